"""Temperature scaling. Shared conventions are documented in `xentjax.metrics`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts

HIGHEST = 1024.0  # upper bound on the temperature and on its inverse; a power of 2, so that 1/HIGHEST is exact


def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    steps: int = 60,
    weights: ArrayLike | None = None,
    batch_axis_name: str | tuple[str, ...] | None = None,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Temperature T in [1/1024, 1024] for which logits / T fit the labels best, shape [].

    T minimizes Σ_i w_i (−log softmax(z_i/T)_{y_i}), where example i has logits z_i, label y_i and weight w_i.
    Gradient: 0. The result is behind `stop_gradient`, because the temperature is a constant that was fitted on held-out examples.

    The sum is a convex function of β = 1/T. Let p = softmax(βz). The slope of the sum is Σ w (E_p[z] − z_y), and the curvature is
    Σ w Var_p[z]. Newton's method finds the root of the slope within a bracket. A Newton step is rejected if it would leave the bracket or
    if it is more than half as long as the previous step. In that case, the bracket is halved in log β instead.

    If every label has the largest logit, a smaller T always fits better, and the result is the lower bound 1/1024. If the logits are no
    better than chance, a larger T always fits better, and the result is the upper bound 1024. If all T fit equally well, the result is 1.
    This happens if no example counts, or if all logits of each example are equal.

    Args:
        logits: [..., classes], unnormalized log-probabilities of examples that were not used for training.
        labels: [...] class indices.
        steps: maximum number of steps, at least 1. About 5 to 10 steps are usually enough. Each step reads all logits.
        weights: [...], w ≥ 0; None gives each example the weight 1.
        batch_axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`. All devices find the same temperature.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [], float32, or float64 if `logits` are float64. NaN for an out-of-range label, a NaN logit, or a label of probability 0.

    Raises:
        TypeError: an argument has the wrong dtype, or `labels` are soft labels.
        ValueError: an argument has the wrong shape, or `steps` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([[4.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
        >>> float(xentjax.metrics.fit_temperature(logits, labels))  # 4/log 3, because three of four labels have the larger logit
        3.64095...

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.
    """
    name = "fit_temperature"
    batch, w = _counts.indexed_and_weighted(name, logits, labels, axis, axis_name, class_mask, where, weights)
    return _fit(*lax.stop_gradient((batch, w)), checks.count(name, "steps", steps), batch_axis_name)


@functools.partial(jax.jit, static_argnames=("steps", "batch_axis_name"))
def _fit(batch: rows.Examples, weights: Array | None, steps: int, batch_axis_name: str | tuple[str, ...] | None) -> Array:
    x, exists, own, amount, invalid, class_sum = _prepare(rows.of(batch), weights)

    def over_examples(values: Array) -> Array:
        """The weighted mean over all examples of all devices."""
        sums = WeightedSum(jnp.sum(amount * values), jnp.sum(amount))
        return (sums if batch_axis_name is None else sums.psum(batch_axis_name)).mean()

    def slope_and_curvature(beta: Array) -> tuple[Array, Array]:
        e = jnp.where(exists, jnp.exp(beta * x), 0)
        near = jnp.where(e > 0, x, 0)  # if the probability is 0, the square of x may overflow
        total = class_sum(e)
        mean = class_sum(e * near) / total
        return over_examples(mean - own), over_examples(class_sum(e * (near - mean[..., None]) ** 2) / total)

    beta = _root(slope_and_curvature, steps, x.dtype)
    invalid = invalid if batch_axis_name is None else lax.psum(invalid, batch_axis_name)
    beta = jnp.where(over_examples(class_sum(jnp.abs(x))) == 0, 1, beta)
    return _counts.figure(1 / beta, invalid)


def _prepare(r: rows.Rows, weights: Array | None) -> tuple[Array, Array, Array, Array, Array, Callable[[Array], Array]]:
    """What the search needs, all of it independent of the temperature.

    Logits minus the largest of their row; which classes are possible; the logit of the label, minus the same; how much each example counts,
    0 if it does not; the number of invalid examples; and the function that sums over all classes.
    """
    z, label, top = rows.finite_values(r), rows.on_label(r), rows.largest(r)
    exists = ~numerics.is_infinite(-z) if r.class_mask is None else r.class_mask & ~numerics.is_infinite(-z)
    possible = rows.class_sum(r, (label & exists).astype(jnp.int32)) == 1
    nan = rows.class_sum(r, jnp.isnan(z).astype(jnp.int32)) > 0
    amount, invalid = _counts.amounts(weights, rows.counted(r), possible & jnp.isfinite(top) & ~nan)
    counts = amount != 0
    x = numerics.where(exists & counts[..., None], z - jnp.where(counts, top, 0)[..., None], 0)
    own = rows.class_sum(r, numerics.where(label, x, 0))
    return x, exists, own, amount.astype(z.dtype), invalid, functools.partial(rows.class_sum, r)


def _root(slope_and_curvature: Callable[[Array], tuple[Array, Array]], steps: int, dtype: jax.typing.DTypeLike) -> Array:
    """The β in [1/HIGHEST, HIGHEST] at which the slope is 0. The slope grows with β. If it has no root inside, β is the nearer bound."""
    least, most = jnp.asarray(1 / HIGHEST, dtype), jnp.asarray(HIGHEST, dtype)
    rising, falling = slope_and_curvature(least)[0] >= 0, slope_and_curvature(most)[0] <= 0
    outside = rising | falling
    start = jnp.where(falling, most, jnp.where(rising, least, jnp.ones_like(least)))

    def unfinished(state: tuple) -> Array:
        i, _, _, beta, step = state
        return (i < steps) & (jnp.abs(step) > jnp.finfo(beta.dtype).eps ** 0.75 * beta)  # the next step would be about its square

    def body(state: tuple) -> tuple:
        i, low, high, beta, step = state
        slope, curvature = slope_and_curvature(beta)
        low, high = jnp.where(slope < 0, beta, low), jnp.where(slope < 0, high, beta)
        newton = -slope / jnp.where(curvature > 0, curvature, 1)
        inside = (curvature > 0) & (beta + newton >= low) & (beta + newton <= high)
        # a very small step is accepted even if rounding errors keep it from being half as long as the one before
        trusted = inside & (jnp.abs(newton) <= jnp.maximum(jnp.abs(step) / 2, jnp.finfo(beta.dtype).eps ** 0.5 * beta))
        following = jnp.where(trusted, beta + newton, jnp.sqrt(low) * jnp.sqrt(high))
        return i + 1, low, high, following, following - beta

    # These select between equal numbers. They make the bounds vary over the same mesh axes as the slope, inside `shard_map`.
    low, high = jnp.where(outside, least, least), jnp.where(outside, most, most)
    return lax.while_loop(unfinished, body, (0, low, high, start, jnp.where(outside, jnp.zeros_like(most), most)))[3]
