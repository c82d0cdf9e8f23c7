"""Parts that several metrics share: argument checks, counts over examples, and NaN for metrics of invalid examples."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, sums

# Arguments --------------------------------------------------------------------------------------------------------------


def indexed(
    function: str,
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int,
    axis_name: str | tuple[str, ...] | None,
    class_mask: ArrayLike | None,
    where: ArrayLike | None,
) -> rows.Examples:
    """The checked arguments of a categorical loss; TypeError unless the labels are class indices."""
    batch = checks.examples(function, logits, labels, axis, axis_name, class_mask, where)
    assert batch.labels is not None
    if not jnp.issubdtype(batch.labels.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must have an integer dtype (class indices); got {batch.labels.dtype}. "
            f"Use labels.argmax({batch.axis}) for the most likely class of soft labels."
        )
    return batch


def indexed_and_weighted(
    function: str,
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int,
    axis_name: str | tuple[str, ...] | None,
    class_mask: ArrayLike | None,
    where: ArrayLike | None,
    weights: ArrayLike | None,
) -> tuple[rows.Examples, Array | None]:
    """The arguments that `indexed` checks, and one weight per example."""
    batch = indexed(function, logits, labels, axis, axis_name, class_mask, where)
    assert batch.labels is not None
    meaning = "the shape of logits without its class axis"
    return batch, checks.example_weights(function, weights, batch.where, batch.labels.shape, meaning)[0]


def classes(function: str, name: str, x: ArrayLike, remedy: str) -> Array:
    """`x` as an array of class indices; False and True are the classes 0 and 1."""
    array = checks.asarray(function, name, x)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have a boolean or integer dtype; got {array.dtype}. {remedy}")
    return array.astype(numerics.index_dtype(array))


def must_be_valid(weights: Array | None, where: Array | None) -> Array | None:
    """Which examples must be valid: those that count and whose weight is not 0. None means all."""
    weighs = None if weights is None else weights != 0
    return weighs if where is None else where if weighs is None else where & weighs


# Counting ---------------------------------------------------------------------------------------------------------------


def amounts(weights: Array | None, where: Array | None, valid: Array) -> tuple[Array, Array]:
    """How much each example adds to a count [...], and the number of invalid examples [].

    Without weights, each example adds 1 in int32, because a float32 count stops at 2²⁴. If `valid` is False for an example, the
    example adds nothing. The number of invalid examples includes it only if it counts and its weight is not 0.
    """
    amount = jnp.ones(valid.shape, jnp.int32)
    if weights is not None:
        amount = weights.astype(numerics.accumulation_dtype(weights.dtype))
    if where is not None:
        amount = numerics.where(where, amount, jnp.zeros_like(amount))
    invalid = jnp.sum(~valid & (amount != 0), dtype=jnp.int32)
    return numerics.where(valid, amount, jnp.zeros_like(amount)), invalid


def tally(amount: Array, shape: tuple[int, ...], *indices: Array) -> sums.Parts:
    """The sum of the amounts in each cell of an array of the given shape. An out-of-range index must have an amount of 0."""
    places = tuple(index.astype(jnp.int32).reshape(-1) for index in indices)
    amount = amount.reshape(-1)
    if jnp.issubdtype(amount.dtype, jnp.integer):
        return sums.parts_of(_scatter(amount, places, shape))
    return _tally_weights(amount, places, shape)


def _scatter(amount: Array, places: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, amount.dtype).at[places].add(amount, mode="drop")


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _tally_weights(weights: Array, places: tuple[Array, ...], shape: tuple[int, ...]) -> sums.Parts:
    """`tally` of floating amounts.

    A scatter adds one weight after the other. In floating point, a million equal weights then come out with an error of 1e-3; in integers,
    the sum is exact. So each weight is written in integer digits d₁, d₂, … of b bits, in a unit near the largest weight of its cell:

        w = unit·(d₁·2^(−b) + d₂·2^(−2b) + …)

    With n·2^b ≤ 2³⁰, a sum of n digits is at most 2³⁰. The remainder after the last digit is below u/n of the largest weight (u = 2⁻²⁴ for
    float32). The remainders of n weights are therefore below u times the sum.
    """
    count = weights.shape[0]
    if not isinstance(count, int) or count >= 2**28:  # the size is symbolic, or too large to leave room for digits
        return sums.parts_of(_scatter(weights, places, shape))
    largest = jnp.zeros(shape, weights.dtype).at[places].max(jnp.abs(weights), mode="drop")
    info = jnp.finfo(weights.dtype)
    unit = lax.reduce_precision(largest / 4, info.nexp, 0)  # a power of two; of a quarter of the largest, so that it cannot overflow
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, jnp.ones_like(unit))
    left = weights / 8 / unit.at[places].get(mode="clip")  # below 3/4
    bits = 30 - count.bit_length()
    result = sums.parts_of(jnp.zeros_like(unit))
    for digit in range(1, -(-(info.nmant + 1 + count.bit_length()) // bits) + 1):
        left = left * 2.0**bits
        whole = jnp.where(jnp.isfinite(left), jnp.trunc(left), 0)
        total = sums.parts_of(_scatter(whole.astype(jnp.int32), places, shape), weights.dtype)
        result = sums.add_parts(result, sums.scaled(sums.scaled(sums.scaled(total, 2.0 ** (-bits * digit)), unit), 8.0))
        left = left - whole
    x, first, second = result
    return numerics.where(jnp.isfinite(largest), x, largest), first, second


@_tally_weights.defjvp
def _(shape: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple[sums.Parts, sums.Parts]:
    return sums.only_leading(_tally_weights(*primals, shape), _scatter(tangents[0], primals[1], shape))


def figure(value: Array, invalid: Array) -> Array:
    """`value`, and NaN where `invalid` is not 0. `invalid` has the leading axes of `value`."""
    return numerics.nan_unless(jnp.broadcast_to(jnp.expand_dims(invalid == 0, range(invalid.ndim, value.ndim)), value.shape), value)
