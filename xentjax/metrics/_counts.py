"""What the metrics share: their arguments, which class a row predicts, and counting."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows

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
    return w, checks.counted(function, where, shape, meaning)


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


def tally(amount: Array, shape: tuple[int, ...], *indices: Array) -> Array:
    """The sum of the amounts that fall on each cell of an array of this shape; an index out of range needs an amount of 0."""
    places = tuple(index.astype(jnp.int32).reshape(-1) for index in indices)
    return jnp.zeros(shape, amount.dtype).at[places].add(amount.reshape(-1), mode="drop")


def figure(value: Array, invalid: Array) -> Array:
    """`value`, NaN where there is an invalid example; `invalid` has its leading axes."""
    return numerics.nan_unless(jnp.broadcast_to(jnp.expand_dims(invalid == 0, range(invalid.ndim, value.ndim)), value.shape), value)
