"""Bi-tempered loss: a logarithm that is bounded and an exponential with heavy tails, in place of those of softmax cross-entropy.

The normaliser. With exp_t(x) = (1 + (1 − t)x)^(1/(1 − t)), e^x at t = 1, the probabilities are p_k = exp_t2(z_k − λ) where λ makes them
sum to 1. Their sum is Z(λ) = Σ (1 + (t2 − 1)(λ − z_k))^(−1/(t2 − 1)), and log_t2 Z = (1 − Z^(1 − t2))/(t2 − 1) falls, is convex in λ
(a power mean of negative exponent is concave) and linear where all logits are equal. So Newton's method on it, started at the largest
logit, comes from the left and needs a handful of steps; at t2 = 1 one step is exact: the log-sum-exp.

Its derivatives. λ is found as a constant; two more Newton steps are differentiated. Each squares the order of the error, so that
derivatives of the first to the third order are those of the root: ∂λ/∂z_k = p_k^t2/Σ_j p_j^t2.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics

_STEPS = 12  # of Newton; float64 needs 8 for logits 100 apart among 1,000 classes at any t2 in [1, 4]


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
    """Bi-tempered logistic loss, one value per example [...].

    loss = −log_t1 p_y − (1 − Σ_k p_k^(2 − t1))/(2 − t1),  p_k = exp_t2(z_k − λ) with Σ_k p_k = 1;  t1 = t2 = 1 is cross-entropy.
    Gradient: with r_k = p_k^t2/Σ_j p_j^t2 and g_k = p_k^(t2 − t1)·(p_k − onehot y), ∂loss/∂z = g − r·Σ_k g_k.

    log_t(x) = (x^(1 − t) − 1)/(1 − t). t1 < 1 bounds the loss, so that far outliers stop to matter; t2 > 1 gives the probabilities
    heavy tails, so that labels near the boundary may be wrong. A distribution costs Σ_k t_k·loss(k), one class after another: the
    paper's loss of distributions up to a constant of the labels.

    Args:
        logits: [..., classes], activations.
        labels: [...] class indices, or [..., classes] distributions.
        t1: in [0, 1], temperature of the logarithm.
        t2: ≥ 1, temperature of the exponential.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `t1` outside [0, 1], `t2` < 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[0.0, 10.0], [0.0, 1000.0]])  # the loss of a wrong label stays below 1/(1 − t1)
        >>> xentjax.bi_tempered_cross_entropy(logits, jnp.array([0, 0]), t1=0.5, t2=2.0).tolist()
        [1.32966..., 1.93580...]

    Reference:
        Amid et al., Robust Bi-Tempered Logistic Loss Based on Bregman Divergences, 2019, arXiv 1906.03361.
    """
    name = "bi_tempered_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _bi_tempered(batch, checks.fraction(name, "t1", t1), checks.number(name, "t2", t2, low=1.0))


@jax.jit
def _bi_tempered(batch, t1, t2):
    r = rows.of(batch)
    dtype = r.values.dtype
    alpha, heavy = 1 - jnp.asarray(t1, dtype), jnp.asarray(t2, dtype) - 1
    stats = statistics.of_row(r)
    z = rows.finite_values(r)
    keep = rows.masked(jnp.isfinite(r.values) | jnp.isnan(r.values), r.where, r.class_mask)
    u = _tempered_surprise(r, z, keep, stats.reference, heavy)
    power = jnp.exp(-(1 + alpha) * u)  # p^(2 − t1)

    def loss_of_index(r):
        label = rows.on_label(r)
        rest = rows.class_sum(r, numerics.where(label, 0, jnp.exp(-u)))  # 1 − p_y
        own = rows.row_value(r, rows.class_sum(r, numerics.where(label, u, 0)))  # what does not count has u = INFINITE
        others = rows.class_sum(r, numerics.where(label, 0, power))
        return numerics.nan_unless(rows.in_range(r), _excess(own, rest, alpha) + others / (1 + alpha))

    return statistics.finish(r, stats, odds.by_label(r, loss_of_index))


def _tempered_surprise(r, z, keep, top, heavy):
    """−log p_k for every class [..., classes]; INFINITE where a class cannot be."""
    below = top[..., None] - z

    def surprise(beyond):  # of λ − top
        return numerics.where(keep, _heavy_logarithm(beyond[..., None] + below, heavy), numerics.INFINITE)

    def newton(beyond):
        u = surprise(beyond)
        p = jnp.exp(-u)
        total, slope = rows.class_sum(r, p), rows.class_sum(r, jnp.exp(-(1 + heavy) * u))
        some = total > 0
        total, slope = numerics.where(some, total, 1), numerics.where(some, slope, 1)
        log_total = jnp.log(total)
        return beyond + numerics.tempered(log_total, jnp.broadcast_to(heavy, log_total.shape)) * jnp.exp((1 + heavy) * log_total) / slope

    solved = lax.fori_loop(0, _STEPS, lambda _, beyond: lax.stop_gradient(newton(beyond)), lax.stop_gradient(top - top))
    return surprise(newton(newton(lax.stop_gradient(solved))))


@jax.custom_jvp
def _heavy_logarithm(x: Array, heavy: Array) -> Array:
    """log(1 + hx)/h, which is x at h = 0."""
    y = heavy * x
    none = y == 0
    return x * numerics.where(none, jnp.ones_like(y), jnp.log1p(y) / numerics.where(none, jnp.ones_like(y), y))


@_heavy_logarithm.defjvp
def _(primals, tangents):
    x, heavy = primals
    y = heavy * x
    small = jnp.abs(y) < 0.1
    near, value = numerics.where(small, y, jnp.zeros_like(y)), _heavy_logarithm(x, heavy)
    series = jnp.zeros_like(y)  # Σ_n (−1)^n n/(n + 1) y^(n − 1): the quotient beside it cancels for small y
    for n in range(18 if x.dtype == jnp.float64 else 9, 0, -1):
        series = (-1) ** n * n / (n + 1) + near * series
    direct = (x / (1 + y) - value) / numerics.where(small, jnp.ones_like(y), jnp.broadcast_to(heavy, y.shape))
    in_heavy = numerics.where(small, numerics.where(small, x, jnp.zeros_like(x)) ** 2 * series, direct)
    return value, tangents[0] / (1 + y) + in_heavy * tangents[1]


def _excess(own, rest, alpha):
    """∫_0^R s(1 − s)^(α − 1) ds = (1 − p^α)/α − (1 − p^(1 + α))/(1 + α), p = 1 − R: what the two cancel down to where R is small."""
    near = (rest < 0.25) & (own < 1)
    small, far = numerics.where(near, rest, 0), numerics.where(near, jnp.ones_like(own), own)
    terms = 28 if rest.dtype == jnp.float64 else 13
    series = jnp.full_like(rest, 1 / (terms + 2))
    for n in range(terms - 1, -1, -1):
        series = 1 / (n + 2) + (n + 1 - alpha) / (n + 1) * small * series
    alpha = jnp.broadcast_to(alpha, far.shape)
    return numerics.where(near, small * small * series, numerics.tempered(far, alpha) - numerics.tempered(far, 1 + alpha))
