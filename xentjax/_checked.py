"""Checks on the values of arguments. Only functions that are wrapped in `checked` contain these checks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core
from jax.experimental import checkify

from xentjax._core import checks, values

P = ParamSpec("P")
T = TypeVar("T")

_ADVICE = "Causes and remedies: https://github.com/xentjax/xentjax/blob/main/docs/when-something-is-nan.md"


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Make `function` check for bad labels, NaN logits, and negative probabilities or weights.

    `function` is a loss, or any function that calls losses, for example a training step or its gradient. It may be jitted or not. The
    wrapped function returns the same results as `function`. If a check fails, for example because a label is out of range, the wrapped
    function raises an error after the computation. The error names the loss, the argument, the position of the first bad value, and the
    value. Examples outside `where` are not checked.

    - NaN: a NaN in a result always raises an error, even if `function` only returns a NaN that it received. This rule is needed for loops
      (`jax.lax.scan`, `jax.lax.map`) if the derivative is taken outside the loop. JAX drops value checks from such loops, so a bad label
      appears only as a NaN in the result.
    - Infinity: an infinite result does not raise an error, because it may be correct. For example, the loss of a label of probability 0 is
      +∞. If `function` itself computes log(1/0), the infinite result does not raise an error either. Logits that are +∞ or above 2⁸⁰ do
      raise an error, because they are mistakes. Infinite hidden states, kernels and embeddings also raise an error.
    - Speed: write `checked(jax.jit(step))`. A function that is not jitted is traced and compiled again at every call.
    - Positions: the error gives a position in the array that the loss receives. Under `vmap`, `scan` or `shard_map`, this array is a slice
      of the whole array.
    - Large integers: an integer beyond int32 is reported as the largest or the smallest int32. With `jax_enable_x64`, the limits are those
      of int64.

    Args:
        function: a function of arrays, for example `jax.jit(step)` or `jax.grad(loss)`.

    Returns:
        A function that takes the same arguments and returns the same results as `function`.

    Raises:
        TypeError: `function` is not a function; or on a call, if `function` comes from `flax.nnx.jit`, or if `function` is not jitted and
            an argument is a `flax.nnx` model. Tracing would break the model. Split the model, and wrap a jitted function of the model's
            state.
        ValueError: on a call, if a check fails, a result is NaN, or the call is itself traced, as in `jax.jit(checked(step))`. An error can
            only be raised outside a trace, so write `checked(jax.jit(step))`. A NumPy integer outside the range of
            JAX's integers also raises a ValueError, because JAX would truncate it. This rule does not apply to a function of this library
            that is not transformed, because such a function receives the integer itself.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.checked(xentjax.softmax_cross_entropy)(jnp.zeros((2, 3)), jnp.array([0, 7]))
        Traceback (most recent call last):
            ...
        ValueError: softmax_cross_entropy: labels[1] = 7 is outside [0, 3).
        Causes and remedies: https://github.com/xentjax/xentjax/blob/main/docs/when-something-is-nan.md

    Reference:
        The module `jax.experimental.checkify`. It carries the error out of the compiled program.
    """
    if not callable(function):
        raise TypeError(f"checked: function must be a function; got {type(function).__name__}. Use checked(loss)(logits, labels).")
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
            raise ValueError(f"{message.replace(' (`check` failed)', '')}\n{_ADVICE}")
        if (place := _first_nan({"result": result})) is not None:
            given = _first_nan(arguments)
            reason = (
                "No check found a bad argument. JAX drops checks from loops that are differentiated from outside: use checked on one step."
                if given is None
                else f"The argument {given} is NaN too."
            )
            raise ValueError(f"{name}: {place} is NaN. {reason}\n{_ADVICE}")
        return result

    return with_checks


def _refuse_models(name: str, function: Any, arguments: dict[str, Any]) -> None:
    """TypeError if tracing would write traced values into a model of the caller.

    flax is not imported; its classes are recognized by the name of their module. A function from `jax.jit` gets a copy of the model, so it
    is accepted.
    """
    transformed = type(function).__module__.startswith("flax.nnx")
    given = () if isinstance(function, jax.stages.Wrapped) else jax.tree.leaves(arguments, is_leaf=_is_model)
    if transformed or any(map(_is_model, given)):
        raise TypeError(
            f"checked: {name} must be a function of arrays; got flax.nnx.jit or a model of flax.nnx, which tracing would break. Use "
            "graphdef, state = nnx.split(model), and checked(jax.jit(step))(state, ...) with nnx.merge(graphdef, state) inside step."
        )


def _is_model(x: Any) -> bool:
    return any(c.__module__.startswith("flax.nnx") and c.__name__ in ("Pytree", "Object", "Module") for c in type(x).__mro__)


def _refuse_truncation(name: str, arguments: dict[str, Any]) -> None:
    """ValueError for an integer outside the range of JAX's integers: `jax.jit` and `jax.vmap` truncate it before a loss receives it."""
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
    """Whether `function` is from this library and not transformed. Only then does it accept integers of any width."""
    return (getattr(function, "__module__", None) or "").startswith("xentjax.") and not hasattr(function, "__wrapped__")


def _first_nan(tree: Any) -> str | None:
    """The name and position of the first NaN in a tree, or None."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact) and _holds_nan(x):
            if not getattr(x, "is_fully_addressable", True):
                return _place(path, ())
            return _place(path, np.argwhere(np.isnan(np.asarray(x)))[0])
    return None


@jax.jit
def _holds_nan(x: Array) -> Array:
    return jnp.isnan(x).any()


def _place(path: tuple[Any, ...], position: Iterable[Any]) -> str:
    """The name of an array in a tree of arguments, and a position in it: `batch['y'][1]`."""
    indices = ", ".join(str(i) for i in position)
    return f"{path[0].key}{jax.tree_util.keystr(path[1:])}" + (f"[{indices}]" if indices else "")


def _named(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name."""
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # no signature, or a wrong call, for which `function` raises its own error
        return {"args": args, **kwargs}
