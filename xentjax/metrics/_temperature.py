"""Temperature scaling; what it shares with the metrics stands in `xentjax.metrics`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts

HIGHEST = 1024.0  # a power of 2, so that its inverse is exact: bound on the temperature, and on its inverse


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
    """The temperature T that makes logits / T fit the labels best, [], within [1/1024, 1024].

    T = argmin Σ_i w_i (−log softmax(z_i/T)_{y_i}) over all examples.
    Gradient: none; the result is behind `stop_gradient`, as a number that was fitted once on held-out examples.

    In β = 1/T the sum is convex, with slope Σ w (E_p[z] − z_y) and curvature Σ w Var_p[z] under p = softmax(βz). Newton's method finds the
    root of the slope inside a bracket that halves (in log β) whenever a step would leave it or does not halve the one before.

    Where every hit would gain from more confidence (all labels have the largest logit), T is the lower bound 1/1024; where less is always
    better (logits no better than chance), the upper bound 1024. Where T does not matter (no examples, equal logits) it is 1.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats, of examples that were not trained on.
        labels: [...], class indices.
        steps: the most evaluations of slope and curvature, each a pass over the logits; some 5 to 10 are usually needed.
        weights: [...], w ≥ 0; None weighs each example 1.
        batch_axis_name: mesh axis that splits the examples, inside `jax.shard_map`; all devices then find the same temperature.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [], float32 (float64 for float64 logits); NaN for a bad label, a NaN logit, or a label of probability 0.

    Raises:
        TypeError: a dtype that does not fit; labels that are distributions.
        ValueError: a shape that does not fit, `steps` below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([[4.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
        >>> float(xentjax.metrics.fit_temperature(logits, labels))  # 4/log 3: three of four are right
        3.64095...

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.
    """
    name = "fit_temperature"
    batch = _counts.indexed(name, logits, labels, axis, axis_name, class_mask, where)
    assert batch.labels is not None
    w, _ = _counts.per_example(name, weights, batch.where, batch.labels.shape, "the shape of logits without its class axis")
    return _fit(*lax.stop_gradient((batch, w)), checks.count(name, "steps", steps), batch_axis_name)


@functools.partial(jax.jit, static_argnames=("steps", "batch_axis_name"))
def _fit(batch, weights, steps, batch_axis_name):
    x, exists, own, amount, invalid, class_sum = _prepare(rows.of(batch), weights)

    def over_examples(values):
        sums = WeightedSum(jnp.sum(amount * values), jnp.sum(amount))
        return (sums if batch_axis_name is None else sums.psum(batch_axis_name)).mean()

    def slope_and_curvature(beta):
        e = jnp.where(exists, jnp.exp(beta * x), 0)
        near = jnp.where(e > 0, x, 0)  # what has no weight may be too far to be squared
        total = class_sum(e)
        mean = class_sum(e * near) / total
        return over_examples(mean - own), over_examples(class_sum(e * (near - mean[..., None]) ** 2) / total)

    beta = _root(slope_and_curvature, steps, x.dtype)
    invalid = invalid if batch_axis_name is None else lax.psum(invalid, batch_axis_name)
    beta = jnp.where(over_examples(class_sum(jnp.abs(x))) == 0, 1, beta)
    return _counts.figure(1 / beta, invalid)


def _prepare(r, weights):
    """Logits minus the largest of their row, which classes are possible, the label's, and what each example counts; 0 where it does not."""
    z, label, top = rows.finite_values(r), rows.on_label(r), rows.largest(r)
    exists = ~numerics.is_infinite(-z) if r.class_mask is None else r.class_mask & ~numerics.is_infinite(-z)
    possible = rows.class_sum(r, (label & exists).astype(jnp.int32)) == 1
    nan = rows.class_sum(r, jnp.isnan(z).astype(jnp.int32)) > 0
    amount, invalid = _counts.amounts(weights, rows.counted(r), possible & jnp.isfinite(top) & ~nan)
    counts = amount != 0
    x = numerics.where(exists & counts[..., None], z - jnp.where(counts, top, 0)[..., None], 0)
    own = rows.class_sum(r, numerics.where(label, x, 0))
    return x, exists, own, amount.astype(z.dtype), invalid, functools.partial(rows.class_sum, r)


def _root(slope_and_curvature, steps, dtype):
    """β in [1/HIGHEST, HIGHEST] at which the slope, which grows with β, is 0; the bound if it is 0 nowhere inside."""
    least, most = jnp.asarray(1 / HIGHEST, dtype), jnp.asarray(HIGHEST, dtype)
    rising, falling = slope_and_curvature(least)[0] >= 0, slope_and_curvature(most)[0] <= 0
    outside = rising | falling
    start = jnp.where(falling, most, jnp.where(rising, least, jnp.ones_like(least)))

    def unfinished(state):
        i, _, _, beta, step = state
        return (i < steps) & (jnp.abs(step) > jnp.finfo(beta.dtype).eps ** 0.75 * beta)  # the next step would be that squared

    def body(state):
        i, low, high, beta, step = state
        slope, curvature = slope_and_curvature(beta)
        low, high = jnp.where(slope < 0, beta, low), jnp.where(slope < 0, high, beta)
        newton = -slope / jnp.where(curvature > 0, curvature, 1)
        inside = (curvature > 0) & (beta + newton >= low) & (beta + newton <= high)
        # a small step is a good one even if rounding keeps it from halving
        trusted = inside & (jnp.abs(newton) <= jnp.maximum(jnp.abs(step) / 2, jnp.finfo(beta.dtype).eps ** 0.5 * beta))
        following = jnp.where(trusted, beta + newton, jnp.sqrt(low) * jnp.sqrt(high))
        return i + 1, low, high, following, following - beta

    # selects between equal numbers, so that inside shard_map these vary over devices as far as the slope does
    low, high = jnp.where(outside, least, least), jnp.where(outside, most, most)
    return lax.while_loop(unfinished, body, (0, low, high, start, jnp.where(outside, jnp.zeros_like(most), most)))[3]
