"""Embeddings [batch, features] of the contrastive losses: checks, masks, normalization, and gathering over devices."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values


class Options(NamedTuple):
    """Options of a contrastive loss. They must be known before tracing."""

    normalize: bool
    chunk_size: int | None
    axis_name: str | tuple[str, ...] | None


def check_options(function: str, normalize: bool, chunk_size: int | None, axis_name: str | tuple[str, ...] | None) -> Options:
    """The checked options of a loss."""
    return Options(bool(normalize), None if chunk_size is None else checks.count(function, "chunk_size", chunk_size), axis_name)


def check_embeddings(function: str, name: str, x: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array | None]:
    """The checked embeddings, and a mask of the rows that count."""
    array = checks.floating(function, name, x)
    if array.ndim != 2:
        raise ValueError(f"{function}: {name} must have shape (batch, features); got {array.shape}. Use jax.vmap for several batches.")
    counts = checks.where_mask(function, where, array.shape[:1], f"one per row of {name}")
    return _check_finite(function, name, array, counts), counts


def check_pairs(
    function: str, first_name: str, first: ArrayLike, second_name: str, second: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array | None]:
    """Two checked batches of the same shape, and a mask of the pairs that count."""
    x, counts = check_embeddings(function, first_name, first, where)
    y = checks.floating(function, second_name, second)
    checks.same_shape(function, second_name, y, x.shape, f"the shape of {first_name}")
    return x, _check_finite(function, second_name, y, counts), counts


def check_negatives(function: str, x: ArrayLike | None, queries: Array) -> Array:
    """The checked additional keys [more, features]. If `x` is None, the result has no rows."""
    if x is None:
        return jnp.zeros((0, queries.shape[1]), queries.dtype)
    more = checks.floating(function, "negatives", x)
    if more.ndim != 2 or more.shape[1] != queries.shape[1]:
        raise ValueError(f"{function}: negatives must have shape (more, {queries.shape[1]}), the features of queries; got {more.shape}.")
    return _check_finite(function, "negatives", more, None)


def check_labels(function: str, x: ArrayLike, name: str, embeddings: Array) -> Array:
    """The checked labels [batch], which may be any integers. `name` is the name of the argument that holds the embeddings."""
    return checks.same_shape(function, "labels", checks.identifiers(function, "labels", x), embeddings.shape[:1], f"one per row of {name}")


def _check_finite(function: str, name: str, x: Array, where: Array | None) -> Array:
    """`x`; inside `xentjax.checked`, NaN or ∞ in a row that counts is an error."""
    values.finite(function, name, x, where)
    return x


# The functions below run inside the compiled parts of the losses.


def prepare(batches: tuple[Array, ...], masks: tuple[Array | None, ...], options: Options) -> list[Array]:
    """The batches in one dtype, with 0 in rows that do not count. With `normalize`, the other rows have length 1."""
    wide = numerics.accumulation_dtype(*(x.dtype for x in batches))
    alike = all(x.dtype == batches[0].dtype for x in batches)
    kept = (x if mask is None else jnp.where(mask[:, None], x, jnp.zeros_like(x)) for x, mask in zip(batches, masks, strict=True))
    return [_unit(x.astype(wide)) if options.normalize else x if alike else x.astype(wide) for x in kept]


def _unit(x: Array) -> Array:
    """x/|x| [..., features]; 0 with derivative 0 for a zero vector.

    Each vector is first divided by its largest component, so that its squares neither overflow nor underflow. The divisor is treated as a
    constant, because x/|x| does not depend on it.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    zero = largest == 0
    scaled = jnp.where(zero, jnp.ones_like(x), x) / jnp.where(zero, jnp.ones_like(largest), largest)
    return jnp.where(zero, jnp.zeros_like(x), scaled / jnp.sqrt(jnp.sum(scaled * scaled, axis=-1, keepdims=True)))


def gather(x: Array, options: Options) -> Array:
    """The rows of all devices. Floating rows are cast to float32 or wider, so that their gradients are summed in that dtype."""
    if options.axis_name is None:
        return x
    x = x.astype(numerics.accumulation_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return lax.all_gather(x, options.axis_name, tiled=True)


def gather_mask(where: Array | None, options: Options) -> Array | None:
    """The mask of the examples of all devices; None if all examples count."""
    return None if where is None else gather(where, options)


def positions(x: Array, options: Options) -> Array:
    """The index of each row of this device among the rows of all devices, shape [batch]."""
    first = 0 if options.axis_name is None else lax.axis_index(options.axis_name) * x.shape[0]
    return jnp.arange(x.shape[0], dtype=jnp.int32) + first
