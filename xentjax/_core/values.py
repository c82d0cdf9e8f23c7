"""Checks on the values of arguments. They run only inside `xentjax.checked`, which sets `checking` to True while it traces.

Outside `xentjax.checked`, no function here adds anything to a program. Inside `xentjax.checked`, the compiled program reports invalid
values through `jax.experimental.checkify`.

A public function checks its own arguments under its own name. It calls other public functions through `unchecked`. So an error message
always names the function that the user called. This holds even if JAX has already traced a shared part for another function.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import checkify

from xentjax._core import mesh, numerics, rows

# JAX's caches include this context in their keys: a trace with value checks is never reused without them, and vice versa.
checking = jax.make_user_context(False)


def unchecked(function: Callable) -> Callable:
    """`function` without value checks, for a public function that has already checked its own arguments."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with checking(False):
            return function(*args, **kwargs)

    return run


def check(
    function: str,
    name: str,
    x: Array,
    bad: Callable[[Array], Array],
    complaint: str,
    counts: Array | None = None,
    axis: int | tuple[int, ...] = -1,
) -> None:
    """Report the first position at which `bad(x)` is True, and the value of `x` at that position.

    Only examples where `counts` is True are checked. `counts` has the shape of `x`, or the shape of `x` without `axis`.
    """
    if not checking.value or x.size == 0:
        return
    wrong = bad(x)
    if counts is not None:
        wrong &= counts if counts.ndim == x.ndim else jnp.expand_dims(counts, axis)
    found, position = jnp.any(wrong), []
    for k, size in enumerate(x.shape):  # only reductions, because a sharded axis cannot be indexed or flattened
        index = lax.broadcasted_iota(jnp.int32, x.shape, k, out_sharding=mesh.split_of(x))
        position.append(jnp.min(index, initial=size, where=wrong))
        wrong &= index == position[-1]
    value = jnp.sum(x, dtype=x.dtype, where=wrong)
    where = f"{name}[{', '.join(f'{{p{k}}}' for k in range(x.ndim))}]" if x.ndim else name
    payload: dict[str, Any] = {f"p{k}": p for k, p in enumerate(position)}
    checkify.check(~found, f"{function}: {where} = {{value}} {complaint}.", value=value, **payload)


def not_nan(function: str, name: str, x: Array, counts: Array | None = None, axis: int | tuple[int, ...] = -1) -> None:
    """Report a NaN."""
    check(function, name, x, jnp.isnan, "is NaN", counts, axis)


def logits(function: str, name: str, x: Array, counts: Array | None = None, axis: int | tuple[int, ...] = -1) -> None:
    """Report NaN, +∞ and every number that `numerics` treats as +∞. −∞ is allowed: it gives its class probability 0."""
    not_nan(function, name, x, counts, axis)
    complaint = "is infinite (values above 2**119 count as infinite)"
    check(function, name, x, lambda z: (z == jnp.inf) | numerics.is_infinite(z), complaint, counts, axis)


def finite(function: str, name: str, x: Array, counts: Array | None = None, axis: int | tuple[int, ...] = -1) -> None:
    """Report a number that is NaN or infinite."""
    not_nan(function, name, x, counts, axis)
    check(function, name, x, jnp.isinf, "is infinite", counts, axis)


def weights(function: str, name: str, x: Array, counts: Array | None = None) -> None:
    """Report a number that is negative or NaN."""
    check(function, name, x, lambda w: ~(w >= 0), "is negative or NaN", counts)


def number(function: str, name: str, x: Array, low: float, high: float, interval: str) -> None:
    """Report a scalar that is not a finite number in [low, high]."""
    check(function, name, x, lambda v: ~((v >= low) & (v <= high) & jnp.isfinite(v)), f"is not a finite number {interval}")


def rising(function: str, name: str, x: Array) -> None:
    """Report an entry of a vector that is NaN or less than an earlier entry."""
    lowest = lax.cummax(numerics.where(jnp.isnan(x), -math.inf, x)) if checking.value else x
    check(function, name, x, lambda t: ~(t >= lowest), "is NaN or less than an earlier entry")


def probabilities(function: str, name: str, x: Array, counts: Array | None = None, axis: int | tuple[int, ...] = -1) -> None:
    """Report a number that is negative or NaN. The sum of the numbers is not checked."""
    check(function, name, x, lambda p: ~(p >= 0), "is not a probability (it is negative or NaN)", counts, axis)


def bits(function: str, name: str, x: Array, counts: Array | None = None) -> None:
    """Report a number outside [0, 1]."""
    if x.dtype != jnp.bool_:
        check(function, name, x, lambda t: ~((t >= 0) & (t <= 1)), "is outside [0, 1]", counts)


def indices(function: str, name: str, x: Array, classes: int, counts: Array | None = None) -> None:
    """Report a class index outside [0, classes)."""

    def outside(index: Array) -> Array:
        wide = index.astype(numerics.index_dtype(index))
        return (wide < 0) | (wide >= classes)

    check(function, name, x, outside, f"is outside [0, {classes})", counts)


def labels(function: str, y: Array, classes: int, counts: Array | None, axis: int) -> None:
    """Report a class index out of range, or a soft label that is negative or NaN."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        indices(function, "labels", y, classes, counts)
    else:
        probabilities(function, "labels", y, counts, axis)


def examples(function: str, batch: rows.Examples, inputs: str) -> None:
    """Report bad logits and labels of a categorical loss.

    Only examples that count are checked. Logits are checked only at classes that exist.
    """
    if not checking.value:
        return
    counts, mask = batch.where, rows.of(batch).class_mask
    exists = None if mask is None else jnp.moveaxis(mask, -1, batch.axis)
    if counts is not None and exists is not None:
        exists &= jnp.expand_dims(counts, batch.axis)
    logits(function, inputs, batch.logits, counts if exists is None else exists, batch.axis)
    if batch.labels is not None:
        labels(function, batch.labels, batch.classes, counts, batch.axis)
