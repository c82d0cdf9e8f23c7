"""Weighted sums and means over examples, batches and devices.

If two batches have different sums of weights, the mean of their means is not the mean of all examples. The same is true of devices. So a
`WeightedSum` holds the pair (Σ w·v, Σ w) instead of a mean. Pairs are added over batches and devices first, and divided once at the end.

This module handles masks, weights, mesh axes and 0/0 for the whole library.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, sums


class _Pair(NamedTuple):
    total: Any
    """Σ w·v, an array or a pytree of arrays."""
    weight: Array
    """Σ w."""


class WeightedSum(sums.RunningSum, _Pair):
    """The pair (Σ w·v, Σ w). Pairs are added over batches and devices. At the end, Σ w·v is divided by Σ w once.

    Let A and B be the pairs of two batches. Then (A + B).mean() is the weighted mean over both batches, whatever their weights are.

    `total` is Σ w·v. It may be a pytree, for example the gradients of Σ w·loss. `weight` is Σ w. In the result of `weighted_sum`,
    both have the shape of `values` with `axis` removed, or shape [] if `axis` is None. `total` and `weight` may also be plain numbers. For
    the mean, weights must be ≥ 0. A `WeightedSum` is a pytree.

    The sums do not drift. After 2⁴⁰ additions, the mean is within 4 eps of the exact quotient. The attribute `rest` keeps the rounding
    errors. It holds two more arrays for each array of `total` and `weight`, so a running sum of gradients takes three times the memory of
    the gradients.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> first = xentjax.weighted_sum(jnp.array([1.0, 2.0, 3.0]))
        >>> second = xentjax.weighted_sum(jnp.array([10.0, 99.0]), where=jnp.array([True, False]))
        >>> float((first + second).mean())  # (1 + 2 + 3 + 10)/4
        4.0
    """

    def __new__(cls, total: Any, weight: Any) -> WeightedSum:
        """Build the pair from arrays or plain numbers. Integers are converted to a floating dtype without losing a bit."""
        leaves = jax.tree.leaves((total, weight))
        pair = super().__new__(cls, total, weight)
        if all(isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
            return pair
        if not all(isinstance(x, Array | np.ndarray | np.generic | numbers.Number) for x in leaves):
            return pair  # descriptions of arrays, such as a PartitionSpec
        return sums.join(pair, _as_parts(leaves))

    def mean(self) -> Any:
        """The mean Σ w·v / Σ w. Where Σ w = 0, the mean and its gradient are exactly 0."""
        return _mean(self)


@jax.jit
def _mean(pair: WeightedSum) -> Any:
    *totals, weight = sums.split(pair)
    weight = sums.value(weight)
    empty = weight == 0

    def divide(parts: sums.Parts) -> Array:
        # in the wider of both dtypes, so that neither overflows in the dtype of the other
        total = sums.value(parts)
        dtype = numerics.accumulation_dtype(total.dtype, weight.dtype)
        divisor = jnp.where(empty, jnp.ones_like(weight), weight).astype(dtype)
        mean = jnp.where(empty, jnp.zeros_like(total), total).astype(dtype) / divisor
        return mean.astype(parts[0].dtype) if jnp.issubdtype(parts[0].dtype, jnp.floating) else mean

    return jax.tree.unflatten(jax.tree.structure(pair.total), map(divide, totals))


def _as_parts(leaves: Sequence[Any]) -> list[sums.Parts]:
    """Arrays or numbers as running sums. Integers and Python numbers take the floating dtype of the arrays among them."""
    own = [getattr(x, "dtype", None) for x in leaves]
    own = [None if d is None or not jnp.issubdtype(d, jnp.floating) else jax.dtypes.canonicalize_dtype(d) for d in own]
    given = [d for d in own if d is not None]
    dtype = numerics.accumulation_dtype(*given) if given else jnp.result_type(float)
    return [sums.parts_of(x, dtype if d is None else d) for x, d in zip(leaves, own, strict=True)]


def weighted_sum(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> WeightedSum:
    """The pair of sums Σ w·v and Σ w over `axis`. Both sums have the shape of `values` with `axis` removed.

    total = Σ w·v and weight = Σ w over the elements in `where`.
    Gradient: ∂total/∂v = w, ∂total/∂w = v and ∂weight/∂w = 1. Outside `where`, all gradients are 0.

    The pairs of two batches can be added. If `axis` is None, both sums have shape [].

    If weights have both signs, like advantages in reinforcement learning, their sum Σ w can be near 0. The weighted mean divides by Σ w and
    is then meaningless. Divide `total` by the number of examples instead, as in the second example.

    Args:
        values: [...], per-example losses or any other numbers.
        weights: [...], the same shape as `values`; w ≥ 0 unless you use only `total`. If None, every element has weight 1.
        where: [...], True for elements that count. All other elements may be NaN.
        axis: axis or axes to sum over. If None, sum over all axes.

    Returns:
        A `WeightedSum` of float32 arrays, or of float64 arrays if `values` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.weighted_sum(jnp.array([1.0, 3.0]), jnp.array([1.0, 0.5])).mean().tolist()
        1.66666...
        >>> log_probs, advantages = jnp.array([-1.0, -2.0]), jnp.array([0.5, -0.5])
        >>> float(-xentjax.weighted_sum(log_probs, advantages).total / advantages.size)  # the loss of a policy gradient
        -0.25

    Reference:
        Issues 34191 and 34242 of Hugging Face transformers (gradient accumulation), 2024. They show why a pair is needed and not a mean.
    """
    return _sum(*_check("weighted_sum", values, weights, where, signed=True), axis)


@functools.partial(jax.jit, static_argnames=("axis",))
def _sum(values: Array, weights: Array | None, where: Array | None, axis: int | tuple[int, ...] | None) -> WeightedSum:
    dtype = numerics.accumulation_dtype(values.dtype)
    v = values.astype(dtype)
    w = jnp.ones_like(v) if weights is None else weights.astype(dtype)
    if where is not None:
        v, w = jnp.where(where, v, 0), jnp.where(where, w, 0)
    # A value of weight 0 adds 0, even if the value is infinite. Finite values stay, because ∂total/∂w = v.
    product = jnp.where((w == 0) & ~jnp.isfinite(v), jnp.zeros_like(v), v) * w
    return WeightedSum(jnp.sum(product, axis), jnp.sum(w, axis))


def weighted_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Weighted mean over `axis` and over devices. It has the shape of `values` with `axis` removed.

    mean = Σ w·v / Σ w over the elements in `where`. If Σ w = 0, the mean and its gradient are exactly 0.
    Gradient: ∂mean/∂v = w/Σ w and ∂mean/∂w = (v − mean)/Σ w. Outside `where`, the gradient is 0.

    If `axis` is None, the mean has shape [].

    Args:
        values: [...], per-example losses or any other numbers.
        weights: [...], the same shape as `values`; w ≥ 0. For weights of both signs, see `weighted_sum`. If None, every element has
            weight 1.
        where: [...], True for elements that count. All other elements may be NaN.
        axis: axis or axes to average over. If None, average over all axes.
        axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`. Σ w·v and Σ w are added over the devices
            of this axis before the division.

    Returns:
        The mean in float32, or in float64 if `values` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> values, where = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
        >>> float(xentjax.weighted_mean(values, where=where)), float(xentjax.weighted_mean(values, where=where & False))
        (2.0, 0.0)

    Reference:
        Issues 34191 and 34242 of Hugging Face transformers, 2024. They show why both sums are added over devices before the division.
    """
    pair = _sum(*_check("weighted_mean", values, weights, where), axis)
    return (pair if axis_name is None else pair.psum(axis_name)).mean()


def _check(
    function: str, values: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None, *, signed: bool = False
) -> tuple[Array, Array | None, Array | None]:
    v = checks.floating(function, "values", values)
    return v, *checks.example_weights(function, weights, where, v.shape, "the shape of values", signed=signed)
