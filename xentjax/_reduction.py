"""Sums of weighted values: masks, weights, mesh axes, and 0/0, decided once.

A mean of means is not the mean when batches or devices hold different amounts of weight. So the pair (Σ w·v, Σ w) is kept
as a value of its own, `WeightedSum`, that adds, is summed over devices, and is divided once at the end.
"""

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, sums
from xentjax._core.values import weights as check_weights


class _Pair(NamedTuple):
    total: Any
    """Σ w·v, an array or a pytree of arrays."""
    weight: Array
    """Σ w."""


class WeightedSum(sums.RunningSum, _Pair):
    """Σ w·v and Σ w; a pytree that adds (over microbatches) and sums over devices before it divides once.

    For two parts A and B: mean(A ∪ B) = (A + B).mean(), whatever their weights. `total` may itself be a pytree, of gradients of
    Σ w·loss for instance; `weight` has the shape [] that `weighted_sum` leaves, or what is left of [...] after `axis`. Both may be plain
    numbers. Weights are ≥ 0.

    Sums do not drift: the mean is within 4 eps of the exact quotient after 2⁴⁰ parts. The rounding errors are kept in the
    attribute `rest`, two more arrays for each array of `total` and `weight`, so a running sum of gradients takes three times the memory of
    the gradients.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> first = xentjax.weighted_sum(jnp.array([1.0, 2.0, 3.0]))
        >>> second = xentjax.weighted_sum(jnp.array([10.0, 99.0]), where=jnp.array([True, False]))
        >>> float((first + second).mean())  # (1 + 2 + 3 + 10)/4
        4.0
    """

    def __new__(cls, total: Any, weight: Any) -> "WeightedSum":
        """Sums of arrays or plain numbers; integers become floating and keep every bit."""
        leaves = jax.tree.leaves((total, weight))
        pair = super().__new__(cls, total, weight)
        if all(isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
            return pair
        if not all(isinstance(x, Array | np.ndarray | np.generic | numbers.Number) for x in leaves):
            return pair  # specifications of arrays, not arrays
        return sums.join(pair, _as_parts(leaves))

    def mean(self) -> Any:
        """Σ w·v / Σ w; exactly 0 with gradient 0 where Σ w = 0."""
        return _mean(self)


def _as_parts(leaves):
    """Arrays or numbers as sums; integers and Python numbers take the floating dtype of the arrays among them."""
    own = [getattr(x, "dtype", None) for x in leaves]
    own = [None if d is None or not jnp.issubdtype(d, jnp.floating) else jax.dtypes.canonicalize_dtype(d) for d in own]
    given = [d for d in own if d is not None]
    dtype = numerics.accumulation_dtype(*given) if given else jnp.result_type(float)
    return [sums.parts_of(x, dtype if d is None else d) for x, d in zip(leaves, own, strict=True)]


@jax.jit
def _mean(pair):
    *totals, weight = sums.split(pair)
    weight = sums.value(weight)
    empty = weight == 0

    def divide(parts):
        # in the wider of both dtypes: neither may overflow the other's
        total = sums.value(parts)
        dtype = numerics.accumulation_dtype(total.dtype, weight.dtype)
        divisor = jnp.where(empty, jnp.ones_like(weight), weight).astype(dtype)
        mean = jnp.where(empty, jnp.zeros_like(total), total).astype(dtype) / divisor
        return mean.astype(parts[0].dtype) if jnp.issubdtype(parts[0].dtype, jnp.floating) else mean

    return jax.tree.unflatten(jax.tree.structure(pair.total), map(divide, totals))


def weighted_sum(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> WeightedSum:
    """The pair (Σ w·v, Σ w) over `axis`, to be added to others and divided once; both [] or the shape left by `axis`.

    total = Σ w·v, weight = Σ w over the elements in `where`.

    Weights of both signs, such as advantages in reinforcement learning, have a sum Σ w near 0, and a mean that divides by this sum is
    meaningless. Use `total` and divide by the number of examples, as the example shows.
    Gradient: ∂total/∂v = w, ∂total/∂w = v, ∂weight/∂w = 1; 0 outside `where`.

    Args:
        values: [...], per-example losses or anything else.
        weights: [...], the shape of `values`, w ≥ 0 unless `total` alone is used; None weighs each 1.
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
        >>> log_probs, advantages = jnp.array([-1.0, -2.0]), jnp.array([0.5, -0.5])
        >>> float(-xentjax.weighted_sum(log_probs, advantages).total / advantages.size)  # the loss of a policy gradient
        -0.25

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
        weights: [...], the shape of `values`, w ≥ 0 (for signed ones see `weighted_sum`); None weighs each 1.
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
    v, w, counts = _check("weighted_mean", values, weights, where)
    if w is not None:
        check_weights("weighted_mean", "weights", w, counts)
    pair = _sum(v, w, counts, axis)
    return (pair if axis_name is None else pair.psum(axis_name)).mean()


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
