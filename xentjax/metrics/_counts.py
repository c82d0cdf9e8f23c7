"""What the metrics share: their arguments, which class a row predicts, and counting."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, sums, values

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
    """The arguments of a categorical loss, checked; TypeError unless the labels are class indices."""
    batch = checks.examples(function, logits, labels, axis, axis_name, class_mask, where)
    assert batch.labels is not None
    if not jnp.issubdtype(batch.labels.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must have an integer dtype (class indices); got {batch.labels.dtype}. "
            f"Use labels.argmax({batch.axis}) for the likeliest class of a distribution."
        )
    return batch


def classes(function: str, name: str, x: ArrayLike, remedy: str) -> Array:
    """`x` as an array of class indices, where False and True are classes 0 and 1."""
    array = checks.asarray(function, name, x)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have a boolean or integer dtype; got {array.dtype}. {remedy}")
    return array.astype(numerics.index_dtype(array))


def per_example(
    function: str, weights: ArrayLike | None, where: ArrayLike | None, shape: tuple[int, ...], meaning: str
) -> tuple[Array | None, Array | None]:
    """`weights` and `where` of the shape of the examples."""
    w = None if weights is None else checks.same_shape(function, "weights", checks.floating(function, "weights", weights), shape, meaning)
    counts = checks.counted(function, where, shape, meaning)
    if w is not None:
        values.weights(function, "weights", w, counts)
    return w, counts


def taking_part(weights: Array | None, where: Array | None) -> Array | None:
    """Which examples may not be invalid: those that count and have another weight than 0; None for all."""
    weighs = None if weights is None else weights != 0
    return weighs if where is None else where if weighs is None else where & weighs


# Rows -------------------------------------------------------------------------------------------------------------------


def hits(r: rows.Rows, k: int, first: bool) -> Array:
    """1 where fewer than k classes come before the label [...], in the accumulation dtype; of tied classes the first or the last leads.

    NaN where the label is out of range or a logit is NaN, 0 where an example does not count or the label is impossible.
    """
    z, label = rows.finite_values(r), rows.on_label(r)
    exists = jnp.ones_like(label) if r.class_mask is None else r.class_mask
    own = rows.class_sum(r, numerics.where(label, z, 0))[..., None]
    index, y = rows.class_index(r), r.labels[..., None]  # type: ignore[index]  # these rows have labels
    ahead = (z > own) | ((z == own) & (index < y if first else index > y))
    rank = _count(r, ahead & exists)
    possible = _count(r, label & exists & ~numerics.is_infinite(-z)) > 0
    hit = ((rank < k) & possible).astype(z.dtype)
    valid = rows.in_range(r) & (_count(r, jnp.isnan(z) & exists) == 0)
    return rows.row_value(r, numerics.nan_unless(valid, hit))


def _count(r, mask):
    return rows.class_sum(r, mask.astype(jnp.int32))


# Counting ---------------------------------------------------------------------------------------------------------------


def amounts(weights: Array | None, where: Array | None, valid: Array) -> tuple[Array, Array]:
    """What each example adds to a count [...], and how many examples are invalid [].

    1 in int32 without weights, because a float32 stops counting at 2²⁴. What is not valid adds nothing; what does not count, or has
    the weight 0, is not invalid either.
    """
    amount = jnp.ones(valid.shape, jnp.int32)
    if weights is not None:
        amount = weights.astype(numerics.accumulation_dtype(weights.dtype))
    if where is not None:
        amount = numerics.where(where, amount, jnp.zeros_like(amount))
    invalid = jnp.sum(~valid & (amount != 0), dtype=jnp.int32)
    return numerics.where(valid, amount, jnp.zeros_like(amount)), invalid


def tally(amount: Array, shape: tuple[int, ...], *indices: Array) -> sums.Parts:
    """The sum of the amounts that fall on each cell of an array of this shape; an index out of range needs an amount of 0."""
    places = tuple(index.astype(jnp.int32).reshape(-1) for index in indices)
    amount = amount.reshape(-1)
    if jnp.issubdtype(amount.dtype, jnp.integer):
        return sums.parts_of(_scatter(amount, places, shape))
    return _tally_weights(amount, places, shape)


def _scatter(amount, places, shape):
    return jnp.zeros(shape, amount.dtype).at[places].add(amount, mode="drop")


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _tally_weights(weights: Array, places: tuple[Array, ...], shape: tuple[int, ...]) -> sums.Parts:
    """A scatter adds one after the other, and in floating point a million equal weights come out 1e-3 wrong. Integers stay exact.

    So each weight is written as integer digits d₁, d₂, … of b bits, in a unit that is near the largest weight of its cell:
    w = unit·(d₁·2^(−b) + d₂·2^(−2b) + …). Of n digits of b bits no sum passes 2³⁰ with n·2^b ≤ 2³⁰. What the last digit leaves is below
    u/n of the largest weight (u = 2⁻²⁴ for float32), so below u of the sum.
    """
    count = weights.shape[0]
    if not isinstance(count, int) or count >= 2**28:  # a size unknown until the program runs, or without room for digits
        return sums.parts_of(_scatter(weights, places, shape))
    largest = jnp.zeros(shape, weights.dtype).at[places].max(jnp.abs(weights), mode="drop")
    info = jnp.finfo(weights.dtype)
    unit = lax.reduce_precision(largest / 4, info.nexp, 0)  # a power of two; of a quarter, so that none overflows
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, jnp.ones_like(unit))
    left = weights / 8 / unit.at[places].get(mode="clip")  # below 3/4
    bits = 30 - count.bit_length()
    found = sums.parts_of(jnp.zeros_like(unit))
    for digit in range(1, -(-(info.nmant + 1 + count.bit_length()) // bits) + 1):
        left = left * 2.0**bits
        whole = jnp.where(jnp.isfinite(left), jnp.trunc(left), 0)
        total = sums.parts_of(_scatter(whole.astype(jnp.int32), places, shape), weights.dtype)
        found = sums.add_parts(found, sums.scaled(sums.scaled(sums.scaled(total, 2.0 ** (-bits * digit)), unit), 8.0))
        left = left - whole
    x, first, second = found
    return numerics.where(jnp.isfinite(largest), x, largest), first, second


@_tally_weights.defjvp
def _(shape, primals, tangents):
    return sums.only_leading(_tally_weights(*primals, shape), _scatter(tangents[0], primals[1], shape))


def figure(value: Array, invalid: Array) -> Array:
    """`value`, NaN where there is an invalid example; `invalid` has its leading axes."""
    return numerics.nan_unless(jnp.broadcast_to(jnp.expand_dims(invalid == 0, range(invalid.ndim, value.ndim)), value.shape), value)
