"""Value checks, at no cost to those who do not ask for them."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax import core
from jax.experimental import checkify

from xentjax._core import checks

P = ParamSpec("P")
T = TypeVar("T")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """`function` with checks on the values that its losses get: labels in range, no NaN logits, no negative probability or weight.

    The result has the shapes and values [...] of `function` = a loss, or anything that calls losses, jitted or not: a
    training step, its gradient. After the call the first violation is raised. Examples outside `where` are not checked.

    Wrap the jitted function: one that is not jitted is traced and compiled anew at every call. A position is one in the array that
    the loss sees: under `vmap`, `scan` or `shard_map` that is the slice, not the whole.

    Args:
        function: a function of arrays; `checked(jax.jit(step))` and `checked(jax.grad(loss))` are as good.

    Returns:
        A function with the same arguments and results.

    Raises:
        ValueError: when called, naming loss, argument, first offending position and value; or if it is itself traced
            (`jax.jit(checked(step))`), because an error can only be raised outside: write `checked(jax.jit(step))`.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.checked(xentjax.softmax_cross_entropy)(jnp.zeros((2, 3)), jnp.array([0, 7]))
        Traceback (most recent call last):
            ...
        ValueError: softmax_cross_entropy: labels[1] = 7 is outside [0, 3).

    Reference:
        jax.experimental.checkify, which carries the error out of the compiled program.
    """

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> T:
        with checks.checking_values(True):
            error, result = checkify.checkify(function, errors=checkify.user_checks)(*args, **kwargs)
        if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(error)):
            name = getattr(function, "__name__", "function")
            raise ValueError(
                f"checked: an error cannot be raised from inside a traced function; got checked({name}) under jit, grad or vmap. "
                f"Put checked outside: checked(jax.jit({name}))."
            )
        if message := error.get():
            raise ValueError(message.replace(" (`check` failed)", ""))
        return result

    return with_checks
