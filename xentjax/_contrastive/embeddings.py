"""Batches of embeddings [batch, features], as the losses over pairs take them: checked, masked, normalised, gathered from all devices."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values


class Options(NamedTuple):
    """What is known before tracing."""

    normalize: bool
    chunk_size: int | None
    axis_name: str | tuple[str, ...] | None


def options(function: str, normalize: bool, chunk_size: int | None, axis_name: str | tuple[str, ...] | None) -> Options:
    """The checked options of a loss."""
    return Options(bool(normalize), None if chunk_size is None else checks.count(function, "chunk_size", chunk_size), axis_name)


def embeddings(function: str, name: str, x: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array | None]:
    """Embeddings, and which of them count."""
    array = checks.floating(function, name, x)
    if array.ndim != 2:
        raise ValueError(f"{function}: {name} must have shape (batch, features); got {array.shape}. Use jax.vmap for several batches.")
    counts = checks.counted(function, where, array.shape[:1], f"one per row of {name}")
    return _finite(function, name, array, counts), counts


def pairs(
    function: str, first_name: str, first: ArrayLike, second_name: str, second: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array | None]:
    """Two batches of one shape, and which pairs count."""
    x, counts = embeddings(function, first_name, first, where)
    y = checks.floating(function, second_name, second)
    checks.same_shape(function, second_name, y, x.shape, f"the shape of {first_name}")
    return x, _finite(function, second_name, y, counts), counts


def negatives(function: str, x: ArrayLike | None, queries: Array) -> Array:
    """Further keys [more, features]; none of them if None."""
    if x is None:
        return jnp.zeros((0, queries.shape[1]), queries.dtype)
    more = checks.floating(function, "negatives", x)
    if more.ndim != 2 or more.shape[1] != queries.shape[1]:
        raise ValueError(f"{function}: negatives must have shape (more, {queries.shape[1]}), the features of queries; got {more.shape}.")
    return _finite(function, "negatives", more, None)


def labels(function: str, x: ArrayLike, batch: int) -> Array:
    """Integers [batch], of any range."""
    return checks.same_shape(function, "labels", checks.identifiers(function, "labels", x), (batch,), "one per row of embeddings")


def _finite(function, name, x, where):
    """`x`; inside `xentjax.checked` an error if a row that counts holds NaN or ∞."""
    values.finite(function, name, x, where)
    return x


# The compiled parts.


def prepare(batches: tuple[Array, ...], masks: tuple[Array | None, ...], options: Options) -> list[Array]:
    """Batches in one dtype, 0 in rows outside the mask of each, unit vectors if asked for."""
    wide = numerics.accumulation_dtype(*(x.dtype for x in batches))
    alike = all(x.dtype == batches[0].dtype for x in batches)
    kept = (x if mask is None else jnp.where(mask[:, None], x, jnp.zeros_like(x)) for x, mask in zip(batches, masks, strict=True))
    return [unit(x.astype(wide)) if options.normalize else x if alike else x.astype(wide) for x in kept]


def unit(x: Array) -> Array:
    """x/|x| [..., features]; 0 with derivative 0 for a zero vector.

    Divided first by its largest component, whose square then neither overflows nor underflows: a constant, on which x/|x| does not depend.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    zero = largest == 0
    scaled = jnp.where(zero, jnp.ones_like(x), x) / jnp.where(zero, jnp.ones_like(largest), largest)
    return jnp.where(zero, jnp.zeros_like(x), scaled / jnp.sqrt(jnp.sum(scaled * scaled, axis=-1, keepdims=True)))


def gather(x: Array, options: Options) -> Array:
    """The rows of all devices, floating ones in float32 or wider, in which their gradients are then added up."""
    if options.axis_name is None:
        return x
    x = x.astype(numerics.accumulation_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return lax.all_gather(x, options.axis_name, tiled=True)


def positions(x: Array, options: Options) -> Array:
    """The index of each row of this device among those of all devices [batch]."""
    first = 0 if options.axis_name is None else lax.axis_index(options.axis_name) * x.shape[0]
    return jnp.arange(x.shape[0], dtype=jnp.int32) + first
