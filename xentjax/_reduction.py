"""Sums of weighted values: masks, weights, mesh axes, and 0/0, decided once.

A mean of means is not the mean when batches or devices hold different amounts of weight. So the pair (Σ w·v, Σ w) is kept
as a value of its own, `WeightedSum`, that adds, is summed over devices, and is divided once at the end.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics


class WeightedSum(NamedTuple):
    """Σ w·v and Σ w; a pytree that adds (over microbatches) and sums over devices before it divides once.

    For two parts A and B: mean(A ∪ B) = (A + B).mean(), whatever their weights. `total` may itself be a pytree, of gradients of
    Σ w·loss for instance; `weight` has the shape [] that `weighted_sum` leaves, or what is left of [...] after `axis`.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> first = xentjax.weighted_sum(jnp.array([1.0, 2.0, 3.0]))
        >>> second = xentjax.weighted_sum(jnp.array([10.0, 99.0]), where=jnp.array([True, False]))
        >>> float((first + second).mean())  # (1 + 2 + 3 + 10)/4
        4.0
    """

    total: Any
    """Σ w·v, an array or a pytree of arrays."""
    weight: Array
    """Σ w."""

    def __add__(self, other: "WeightedSum") -> "WeightedSum":  # type: ignore[override]  # a sum, not a concatenation of tuples
        """The sum over both parts."""
        return jax.tree.map(jnp.add, self, other)

    def __radd__(self, other: int) -> "WeightedSum":
        """So that the built-in `sum` can start from 0."""
        return self if other == 0 else NotImplemented

    def psum(self, axis_name: str | tuple[str, ...]) -> "WeightedSum":
        """The sum over the devices of a mesh axis, inside `jax.shard_map` or `jax.vmap(axis_name=…)`."""
        return mesh.psum(self, mesh.names(axis_name))

    def mean(self) -> Any:
        """Σ w·v / Σ w; exactly 0 with gradient 0 where Σ w = 0."""
        empty = self.weight == 0

        def divide(total: Array) -> Array:
            # in the wider of both dtypes: neither may overflow the other's
            dtype = numerics.accumulation_dtype(total.dtype, self.weight.dtype)
            weight = jnp.where(empty, jnp.ones_like(self.weight), self.weight).astype(dtype)
            mean = jnp.where(empty, jnp.zeros_like(total), total).astype(dtype) / weight
            return mean.astype(total.dtype) if jnp.issubdtype(total.dtype, jnp.floating) else mean

        return jax.tree.map(divide, self.total)


def weighted_sum(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> WeightedSum:
    """The pair (Σ w·v, Σ w) over `axis`, to be added to others and divided once; both [] or the shape left by `axis`.

    total = Σ w·v, weight = Σ w over the elements in `where`.
    Gradient: ∂total/∂v = w, ∂total/∂w = v, ∂weight/∂w = 1; 0 outside `where`.

    Args:
        values: [...], per-example losses or anything else.
        weights: [...], the shape of `values`; None weighs each 1.
        where: [...], which elements count; the others may hold NaN.
        axis: what to sum over; None is everything.

    Returns:
        `WeightedSum`, float32 (float64 for float64 values).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.weighted_sum(jnp.array([1.0, 3.0]), jnp.array([1.0, 0.5])).mean().tolist()
        1.66666...

    Reference:
        Why the pair and not the mean: transformers issues 34191 and 34242 (gradient accumulation), 2024.
    """
    return _sum(*_check("weighted_sum", values, weights, where), axis)


def weighted_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Weighted mean of values over `axis` and over devices, [] or the shape left by `axis`.

    mean = Σ w·v / Σ w over the elements in `where`; exactly 0 with gradient 0 if Σ w = 0.
    Gradient: ∂mean/∂v = w/Σ w;  ∂mean/∂w = (v − mean)/Σ w;  0 outside `where`.

    Args:
        values: [...], per-example losses or anything else.
        weights: [...], the shape of `values`; None weighs each 1.
        where: [...], which elements count; the others may hold NaN.
        axis: what to average over; None is everything.
        axis_name: mesh axis whose devices hold parts of the batch: both sums are taken over it before dividing.

    Returns:
        float32 (float64 for float64 values).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> values, where = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
        >>> float(xentjax.weighted_mean(values, where=where)), float(xentjax.weighted_mean(values, where=where & False))
        (2.0, 0.0)

    Reference:
        Why both sums cross devices before the division: transformers issues 34191 and 34242, 2024.
    """
    sums = _sum(*_check("weighted_mean", values, weights, where), axis)
    return (sums if axis_name is None else sums.psum(axis_name)).mean()


def _check(function, values, weights, where):
    v, meaning = checks.floating(function, "values", values), "the shape of values"
    w = None if weights is None else checks.same_shape(function, "weights", checks.floating(function, "weights", weights), v.shape, meaning)
    return v, w, checks.counted(function, where, v.shape, meaning)


@functools.partial(jax.jit, static_argnames=("axis",))
def _sum(values, weights, where, axis):
    dtype = numerics.accumulation_dtype(values.dtype)
    v = values.astype(dtype)
    w = jnp.ones_like(v) if weights is None else weights.astype(dtype)
    if where is not None:
        v, w = jnp.where(where, v, 0), jnp.where(where, w, 0)
    # a value of weight 0 adds 0, be it infinite; finite values stay, because ∂total/∂w is v
    product = jnp.where((w == 0) & ~jnp.isfinite(v), jnp.zeros_like(v), v) * w
    return WeightedSum(jnp.sum(product, axis), jnp.sum(w, axis))
