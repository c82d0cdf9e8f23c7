"""Bi-tempered loss. It is cross-entropy with a bounded logarithm and a heavy-tailed softmax.

Definitions. The tempered logarithm is log_t(x) = (x^(1 − t) − 1)/(1 − t). Its inverse is exp_t(x) = (1 + (1 − t)x)^(1/(1 − t)). At t = 1,
these functions are log and exp. The loss replaces log by log_t1, and replaces softmax by the probabilities p_k = exp_t2(z_k − λ). The
normalizer λ is the number for which the probabilities sum to 1.

Normalizer. λ is the root of log_t2 Z(λ), where

    Z(λ) = Σ_k p_k = Σ_k (1 + (t2 − 1)(λ − z_k))^(−1/(t2 − 1))        log_t2 Z = (1 − Z^(1 − t2))/(t2 − 1)

The function log_t2 Z(λ) decreases in λ. Up to a constant factor, Z^(1 − t2) is a power mean of the numbers 1 + (t2 − 1)(λ − z_k). Its
exponent is negative. Such a mean is concave, so log_t2 Z(λ) is convex. If all logits are equal, log_t2 Z(λ) is linear. Newton's method
starts at the largest logit. It therefore approaches the root from the left and needs only a few steps. At t2 = 1, one step is exact, and λ
is the log-sum-exp of the logits.

Derivatives. The loop that finds λ is not differentiated. After the loop, two Newton steps are differentiated. Each step doubles the order
of the error. So the first, second and third derivatives equal the derivatives of the root. The first derivative is
∂λ/∂z_k = p_k^t2/Σ_j p_j^t2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics

_STEPS = 12  # Newton steps; for logits 100 apart among 1,000 classes, float64 needs 8 at any t2 in [1, 4]


def bi_tempered_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    t1: ArrayLike = 0.8,
    t2: ArrayLike = 1.2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Bi-tempered logistic loss per example, shape [...].

    loss = −log_t1 p_y − (1 − Σ_k p_k^(2 − t1))/(2 − t1) with p_k = exp_t2(z_k − λ), where λ is the number for which Σ_k p_k = 1.
    Gradient: ∂loss/∂z = g − r·Σ_k g_k with g_k = p_k^(t2 − t1)·(p_k − [k = y]) and r_k = p_k^t2/Σ_j p_j^t2.

    Here log_t(x) = (x^(1 − t) − 1)/(1 − t), and exp_t is its inverse. At t1 = t2 = 1, the loss is cross-entropy. If t1 < 1, the loss is
    bounded, so the influence of far outliers is limited. If t2 > 1, the probabilities have heavy tails, so wrong labels near the decision
    boundary do little harm.

    The loss of soft labels t is Σ_k t_k·loss(k), where loss(k) is the loss of class index k. This sum equals the loss of
    the paper up to a term that depends only on the labels. The terms of the sum are computed one class at a time.

    Args:
        logits: [..., classes], any real numbers.
        labels: [...] class indices, or [..., classes] soft labels.
        t1: in [0, 1], temperature of the logarithm.
        t2: ≥ 1, temperature of the exponential.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `t1` is outside [0, 1], or `t2` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[0.0, 10.0], [0.0, 1000.0]])  # even here the loss is below 1/(1 − t1)
        >>> xentjax.bi_tempered_cross_entropy(logits, jnp.array([0, 0]), t1=0.5, t2=2.0).tolist()
        [1.32966..., 1.93580...]

    Reference:
        Amid et al., Robust Bi-Tempered Logistic Loss Based on Bregman Divergences, 2019, arXiv 1906.03361.
    """
    name = "bi_tempered_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _bi_tempered(batch, checks.fraction(name, "t1", t1), checks.number(name, "t2", t2, low=1.0))


@jax.jit
def _bi_tempered(batch: rows.Examples, t1: ArrayLike, t2: ArrayLike | None) -> Array:
    r = rows.of(batch)
    dtype = r.values.dtype
    alpha, heavy = 1 - jnp.asarray(t1, dtype), jnp.asarray(t2, dtype) - 1
    stats = statistics.of_row(r)
    u = _tempered_surprises(r, stats.reference, heavy)
    power = jnp.exp(-(1 + alpha) * u)  # p^(2 − t1)

    def loss_of_index(r: rows.Rows) -> Array:
        label = rows.on_label(r)
        rest = rows.class_sum(r, numerics.where(label, 0, jnp.exp(-u)))  # 1 − p_y
        # In an example that does not count, u is INFINITE. `row_value` replaces it by 0.
        own = rows.row_value(r, rows.class_sum(r, numerics.where(label, u, 0)))
        others = rows.class_sum(r, numerics.where(label, 0, power))
        return numerics.nan_unless(rows.in_range(r), _label_terms(own, rest, alpha) + others / (1 + alpha))

    return statistics.finish(r, stats, odds.by_label(r, loss_of_index))


def _tempered_surprises(r: rows.Rows, top: Array, heavy: Array) -> Array:
    """−log p_k of every class [..., classes], INFINITE for impossible classes. `top` is the largest logit, `heavy` is t2 − 1."""
    z = rows.finite_values(r)
    keep = rows.not_infinite(r)
    below = top[..., None] - z

    def surprises(offset: Array) -> Array:
        """−log exp_t2(z_k − λ) for λ = top + offset."""
        return numerics.where(keep, numerics.scaled_log1p(offset[..., None] + below, heavy), numerics.INFINITE)

    def newton_step(offset: Array) -> Array:
        u = surprises(offset)
        p = jnp.exp(-u)
        total, slope = rows.class_sum(r, p), rows.class_sum(r, jnp.exp(-(1 + heavy) * u))
        some = total > 0
        total, slope = numerics.where(some, total, 1), numerics.where(some, slope, 1)
        log_total = jnp.log(total)
        return offset + numerics.tempered(log_total, jnp.broadcast_to(heavy, log_total.shape)) * jnp.exp((1 + heavy) * log_total) / slope

    solved = lax.fori_loop(0, _STEPS, lambda _, offset: lax.stop_gradient(newton_step(offset)), lax.stop_gradient(top - top))
    return surprises(newton_step(newton_step(lax.stop_gradient(solved))))


def _label_terms(own: Array, rest: Array, alpha: Array) -> Array:
    """(1 − p^α)/α − (1 − p^(1 + α))/(1 + α), the terms of the label's probability p, with p = e^(−own) = 1 − rest.

    The difference is the integral of s(1 − s)^(α − 1) over s from 0 to `rest`. For small `rest` the two terms cancel, so the series of the
    integral replaces them.
    """
    near = (rest < 0.25) & (own < 1)
    small, far = numerics.where(near, rest, 0), numerics.where(near, jnp.ones_like(own), own)
    terms = 28 if rest.dtype == jnp.float64 else 13
    series = jnp.full_like(rest, 1 / (terms + 2))
    for n in range(terms - 1, -1, -1):
        series = 1 / (n + 2) + (n + 1 - alpha) / (n + 1) * small * series
    alpha = jnp.broadcast_to(alpha, far.shape)
    return numerics.where(near, small * small * series, numerics.tempered(far, alpha) - numerics.tempered(far, 1 + alpha))
