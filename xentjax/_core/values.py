"""Checks on the values of arguments. They run only inside `xentjax.checked`, which sets the context below while it traces.

Outside of it no function here adds anything to a program. A violation leaves the compiled program through `jax.experimental.checkify`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify

from xentjax._core import numerics, rows

# Part of the key of JAX's caches: a function traced with value checks is never used without, nor the other way round.
checking = jax.make_user_context(False)


def check(
    function: str,
    name: str,
    x: Array,
    bad: Callable[[Array], Array],
    complaint: str,
    counts: Array | None = None,
    axis: int | tuple[int, ...] = -1,
) -> None:
    """Report the first position at which `bad(x)` holds, and the value there.

    Only examples of `counts` are checked; it has the shape of `x`, or that shape without `axis`.
    """
    if not checking.value or x.size == 0:
        return
    wrong = bad(x)
    if counts is not None:
        wrong &= counts if counts.ndim == x.ndim else jnp.expand_dims(counts, axis)
    flat = jnp.broadcast_to(wrong, x.shape).reshape(-1)
    first = jnp.argmax(flat)
    position = jnp.unravel_index(first, x.shape)
    places = ", ".join(f"{{p{i}}}" for i in range(x.ndim))
    where = f"{name}[{places}]" if x.ndim else name
    payload: dict[str, Any] = {f"p{i}": p for i, p in enumerate(position)}
    checkify.check(~flat[first], f"{function}: {where} = {{value}} {complaint}.", value=x.reshape(-1)[first], **payload)


def not_nan(function: str, name: str, x: Array, counts: Array | None = None, axis: int | tuple[int, ...] = -1) -> None:
    """No NaN."""
    check(function, name, x, jnp.isnan, "is NaN", counts, axis)


def probabilities(function: str, name: str, x: Array, counts: Array | None = None, axis: int | tuple[int, ...] = -1) -> None:
    """Neither negative nor NaN; the sum is free."""
    check(function, name, x, lambda p: ~(p >= 0), "is not a probability (it is negative or NaN)", counts, axis)


def bits(function: str, name: str, x: Array, counts: Array | None = None) -> None:
    """In [0, 1]."""
    if x.dtype != jnp.bool_:
        check(function, name, x, lambda t: ~((t >= 0) & (t <= 1)), "is outside [0, 1]", counts)


def indices(function: str, name: str, x: Array, classes: int, counts: Array | None = None) -> None:
    """In [0, classes)."""

    def outside(index):
        wide = index.astype(numerics.index_dtype(index))
        return (wide < 0) | (wide >= classes)

    check(function, name, x, outside, f"is outside [0, {classes})", counts)


def labels(function: str, y: Array, classes: int, counts: Array | None, axis: int) -> None:
    """Class indices in range, or distributions without a negative number."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        indices(function, "labels", y, classes, counts)
    else:
        probabilities(function, "labels", y, counts, axis)


def examples(function: str, batch: rows.Examples, inputs: str) -> None:
    """The arguments of a categorical loss."""
    if not checking.value:
        return
    counts, mask = batch.where, rows.of(batch).class_mask
    exists = None if mask is None else jnp.moveaxis(mask, -1, batch.axis)
    if counts is not None and exists is not None:
        exists &= jnp.expand_dims(counts, batch.axis)
    not_nan(function, inputs, batch.logits, counts if exists is None else exists, batch.axis)
    if batch.labels is not None:
        labels(function, batch.labels, batch.classes, counts, batch.axis)
