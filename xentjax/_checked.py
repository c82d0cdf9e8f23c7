"""Value checks, at no cost where they are not requested."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.experimental import checkify

from xentjax._core import checks, values

P = ParamSpec("P")
T = TypeVar("T")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """`function` with checks on the values that its losses receive: labels in range, no NaN logits, no negative probability or weight.

    `function` is a loss, or anything that calls losses, jitted or not: a training step, its gradient. The results have the shapes and
    values [...] of those of `function`. After the call the first violation is raised, under the name of the library function.
    Examples outside `where` are not checked.

    A NaN in a result always raises, whatever its origin, even if `function` only passes it on. JAX drops value checks from a loop
    (`jax.lax.scan`, `jax.lax.map`) that is differentiated from outside; a bad label then shows only as a NaN in the result. An infinite
    result does not raise: +∞ is the loss of a label of probability 0, and the value of log(1/0). Where +∞ is a mistake, it comes from an
    argument (logits of +∞ or above 2⁸⁰, infinite hidden), and the argument raises.

    Wrap the jitted function: one that is not jitted is traced and compiled anew at every call. A reported position refers to the
    array that the loss sees: under `vmap`, `scan` or `shard_map` this is the slice, not the whole array. An integer beyond int32 is
    reported as the largest or the smallest int32.

    Args:
        function: a function of arrays; `checked(jax.jit(step))` and `checked(jax.grad(loss))` work too.

    Returns:
        A function with the same arguments and results.

    Raises:
        TypeError: when called with a model of `flax.nnx`, which the trace would break, or around `flax.nnx.jit`. Split the model and wrap
            `jax.jit` of a function of its state.
        ValueError: when called, naming loss, argument, first offending position and value; if a result is NaN; if a function that is
            not of this library gets a 64-bit integer that JAX would truncate; or if it is itself traced (`jax.jit(checked(step))`),
            because an error can only be raised outside: write `checked(jax.jit(step))`.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.checked(xentjax.softmax_cross_entropy)(jnp.zeros((2, 3)), jnp.array([0, 7]))
        Traceback (most recent call last):
            ...
        ValueError: softmax_cross_entropy: labels[1] = 7 is outside [0, 3).

    Reference:
        jax.experimental.checkify, which carries the error out of the compiled program.
    """
    name = getattr(function, "__name__", "function")

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> T:
        arguments = _named(function, args, kwargs)
        _refuse_models(name, function, arguments)
        if not _is_ours(function):
            _refuse_truncation(name, arguments)
        with values.checking(True):
            error, result = checkify.checkify(function, errors=checkify.user_checks)(*args, **kwargs)
        if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves((error, result))):
            raise ValueError(
                f"checked: an error cannot be raised from inside a traced function; got checked({name}) under jit, grad or vmap. "
                f"Put checked outside: checked(jax.jit({name}))."
            )
        if message := error.get():
            raise ValueError(message.replace(" (`check` failed)", ""))
        if (place := _first_nan({"result": result})) is not None:
            given = _first_nan(arguments)
            reason = (
                "No check found a bad argument. JAX drops checks in a loop that is differentiated from outside: use checked on one step."
                if given is None
                else f"So is {given}, an argument."
            )
            raise ValueError(f"{name}: {place} is NaN. {reason}")
        return result

    return with_checks


def _refuse_models(name: str, function: Any, arguments: dict[str, Any]) -> None:
    """TypeError where the trace would write its own values into a model of the caller.

    flax is not imported: its classes are recognised by their module. A `jax.jit` function works on a copy of a model, so it is accepted.
    """
    transformed = type(function).__module__.startswith("flax.nnx")
    given = () if isinstance(function, jax.stages.Wrapped) else jax.tree.leaves(arguments, is_leaf=_is_model)
    if transformed or any(map(_is_model, given)):
        raise TypeError(
            f"checked: {name} must be a function of arrays; got flax.nnx.jit or a model of flax.nnx, which the trace would break. Use "
            "graphdef, state = nnx.split(model), and checked(jax.jit(step))(state, ...) with nnx.merge(graphdef, state) inside step."
        )


def _is_model(x: Any) -> bool:
    return any(c.__module__.startswith("flax.nnx") and c.__name__ in ("Pytree", "Object", "Module") for c in type(x).__mro__)


def _refuse_truncation(name: str, arguments: dict[str, Any]) -> None:
    """ValueError for an integer beyond the range of JAX's integers, which `jax.jit` and `jax.vmap` truncate before any loss sees it."""
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        whole = checks.oversized_integers(x) if isinstance(x, np.ndarray | np.generic) else None
        if whole is not None:
            low, high = checks.integer_limits()
            position = tuple(np.argwhere((whole < low) | (whole > high))[0])
            raise ValueError(
                f"{name}: {_place(path, position)} = {whole[position]} is outside [{low}, {high}], and JAX would truncate it. "
                "Replace it before the call."
            )


def _is_ours(function: Any) -> bool:
    """Whether it is a function of this library. These take integers of any width, but not after a transformation such as `jax.jit`."""
    return (getattr(function, "__module__", None) or "").startswith("xentjax.") and not hasattr(function, "__wrapped__")


def _first_nan(tree: Any) -> str | None:
    """Where the first NaN is, if there is one."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact) and _holds_nan(x):
            if not getattr(x, "is_fully_addressable", True):
                return _place(path, ())
            return _place(path, np.argwhere(np.isnan(np.asarray(x)))[0])
    return None


@jax.jit
def _holds_nan(x):
    return jnp.isnan(x).any()


def _place(path: Any, position: Any) -> str:
    indices = ", ".join(str(i) for i in position)
    return f"{path[0].key}{jax.tree_util.keystr(path[1:])}" + (f"[{indices}]" if indices else "")


def _named(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # no signature, or a call that is wrong: `function` says so itself
        return {"args": args, **kwargs}
