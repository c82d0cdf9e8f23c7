"""Rényi divergence. Shared conventions are documented in `xentjax.information`.

Let β = α − 1, w = Σ p, S = Σ p^α q^(1−α) and R = log(S/w)/β. Then D = w·R + Σ(q − p).

If p and q are nearly equal, S/w is near 1 and log(S/w) has few correct digits. So the code uses another formula. Let

    E = Σ [p^α q^(1−α) − p − β(p − q)]/β,

a sum of terms that are never negative, and let Y = (S/w − 1)/β = (E − Σ(q − p))/w. Then R = log1p(βY)/β and
D = E − w(e^(βR) − 1 − βR)/β. Both formulas are smooth at β = 0.

Let d = log(p/q), x = p, y = q, t = −d and a = 1 − α. Then each term of E is G(x, y, t) − x(e^(at) − 1 − at)/a, where G is
`_distributions.kl_term`: G(x, y, t) = y − x − x·t. For α < 1/2, this difference cancels. In that case, the code sets x = q, y = p, t = d
and a = α. Each term of E is then the expression above, multiplied by α/(1 − α).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, numerics
from xentjax.information import _distributions


def renyi_divergence(
    p: ArrayLike, q: ArrayLike, *, alpha: ArrayLike, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Rényi divergence of order α per example, shape [...].

    If p and q sum to 1, D_α(p‖q) = log(Σ_k p_k^α q_k^(1−α))/(α − 1). In general, let w = Σ p. Then
    D_α(p‖q) = w·log(Σ_k p_k^α q_k^(1−α)/w)/(α − 1) − w + Σ q.
    Gradient: let S = Σ p^α q^(1−α). Then ∂D/∂p_k = log(S/w)/(α − 1) + (α·w·(p_k/q_k)^(α−1)/S − 1)/(α − 1) − 1 and
    ∂D/∂q_k = 1 − w·(p_k/q_k)^α/S. An infinite derivative is replaced by 0.

    The divergence is ≥ 0 and nondecreasing in α. At α = 1, it equals `kl_divergence` and is smooth in α. It is +∞ if no class has both
    p_k > 0 and q_k > 0. For α ≥ 1, it is also +∞ if some class has p_k > 0 and q_k = 0.

    Args:
        p: [..., classes], probabilities, which need not sum to 1.
        q: [..., classes], probabilities, with the shape of `p`.
        alpha: scalar α > 0, the order. It may be traced, and it may be equal to 1 or close to 1.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of `p` and `q`.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `p` or `q` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `alpha` is not above 0, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
        >>> [float(xentjax.information.renyi_divergence(p, q, alpha=a)) for a in (0.5, 1.0, 2.0)]  # α = 1 gives D(p‖q)
        [0.012793..., 0.025267..., 0.048790...]

    Reference:
        Van Erven, Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2014, arXiv 1206.2459.
    """
    name = "renyi_divergence"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p=p, q=q)
    order = checks.positive(name, "alpha", alpha)
    return _renyi_divergence(x, y, order, _distributions.check_base(name, base), counts, axis, False)


@functools.partial(jax.jit, static_argnames=("axis", "from_logits"))
def _renyi_divergence(
    p: Array, q: Array, alpha: ArrayLike, base: ArrayLike | None, where: Array | None, axis: int, from_logits: bool
) -> Array:
    a, b, d = _distributions.pair(p, q, where, axis, from_logits)
    alpha = jnp.asarray(alpha, d.dtype)
    outside, only_p = a.zero | b.zero, ~a.zero & b.zero
    infinite = only_p & (alpha >= 1)
    d = numerics.where(infinite, 0, d)
    # Probabilities of 0 at which the derivative would be infinite have no derivative.
    p = jnp.where(a.zero & (alpha <= 1), lax.stop_gradient(a.p), a.p)
    q = jnp.where(only_p, lax.stop_gradient(b.p), b.p)
    log_power = numerics.where(outside, -_distributions.FAR, a.log + (alpha - 1) * d)  # log(p^α q^(1−α))
    disjoint = jnp.all(outside, axis=-1) & jnp.any(only_p, axis=-1)
    total = numerics.where(disjoint, 0, _total(p, q, d, log_power, alpha))
    infinite = jnp.any(infinite, axis=-1, keepdims=True) | disjoint[..., None]
    return _distributions.finish(total[..., None], infinite, base, where)


def _total(p: Array, q: Array, d: Array, log_power: Array, alpha: Array) -> Array:
    """The sum w·R + Σ(q − p): from E if S is near w, otherwise from log S."""
    beta, w = alpha - 1, jnp.sum(p, axis=-1)
    excess = jnp.sum(differences.with_slope_of(_distributions.difference(q, p, -d), q - p), axis=-1)  # d has no derivative at zeros
    w = numerics.where(w == 0, 1, w)
    top = lax.stop_gradient(jnp.max(log_power, axis=-1))
    log_sum = top + jnp.log(jnp.sum(jnp.exp(log_power - top[..., None]), axis=-1))
    # If a power exceeds e^30·w, S is not near w, and `log_sum` is used.
    power = jnp.exp(jnp.minimum(log_power, 30 + jnp.log(w)[..., None]))
    e = jnp.sum(_excess_terms(p, q, d, power, alpha), axis=-1)
    y = (e - excess) / w
    near = jnp.abs(beta * y) <= 0.5
    y = numerics.where(near, y, 0)
    r = y * _log1p_over(beta * y)
    far = w * ((log_sum - jnp.log(w)) / jnp.where(near, 1, beta)) + excess
    return numerics.where(near, numerics.where(near, e, 0) - w * beta * r * r * _distributions.relative_excess(beta * r), far)


def _excess_terms(p: Array, q: Array, d: Array, power: Array, alpha: Array) -> Array:
    """[p^α q^(1−α) − p − (α − 1)(p − q)]/(α − 1) ≥ 0 of every class, given the power p^α q^(1−α)."""
    exchanged = alpha < 0.5
    x, y, t = (jnp.where(exchanged, v, w) for v, w in ((q, p), (p, q), (d, -d)))
    a = jnp.where(exchanged, alpha, 1 - alpha)
    small = jnp.abs(a * t) <= 1
    s = numerics.where(small, t, 0)
    near = _distributions.kl_term(x, y, s) - a * (x * s * s * _distributions.relative_excess(a * s))
    far = (y - x) - (power - x) / jnp.where(a == 0, 1, a)
    return numerics.where(small, near, far) * jnp.where(exchanged, alpha / jnp.where(exchanged, 1 - alpha, 1), 1)


def _log1p_over(x: Array) -> Array:
    """log(1 + x)/x for |x| ≤ 1/2."""
    small = jnp.abs(x) < 1 / 16
    z, s = numerics.where(small, 1 / 16, x), numerics.where(small, x, 0)
    series = jnp.full_like(x, 1 / 16)
    for n in range(15, 0, -1):
        series = 1 / n - s * series
    return numerics.where(small, series, jnp.log1p(z) / z)


def renyi_divergence_from_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    alpha: ArrayLike,
    base: ArrayLike = math.e,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """`renyi_divergence` of order α for p = softmax(p_logits) and q = softmax(q_logits), shape [...].

    D_α = log(Σ_k p_k^α q_k^(1−α))/(α − 1). At α = 1, it equals the Kullback–Leibler divergence D(p‖q).
    Gradient: let z be the logits of p, y the logits of q, and r = p^α q^(1−α)/Σ p^α q^(1−α). Then ∂D/∂z = α(r − p)/(α − 1) and
    ∂D/∂y = q − r.

    Args:
        p_logits: [..., classes], unnormalized log-probabilities.
        q_logits: [..., classes], unnormalized log-probabilities, with the shape of `p_logits`.
        alpha: scalar α > 0, the order. It may be traced, and it may be equal to 1 or close to 1.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of both logits.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if either argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `alpha` is not above 0, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p_logits, q_logits = jnp.array([60.0, 0.0]), jnp.array([0.0, 60.0])
        >>> [float(xentjax.information.renyi_divergence_from_logits(p_logits, q_logits, alpha=a)) for a in (0.5, 1.0, 2.0)]
        [58.61370..., 60.0, 60.0]

    Reference:
        Van Erven, Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2014, arXiv 1206.2459.
    """
    name = "renyi_divergence_from_logits"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    order = checks.positive(name, "alpha", alpha)
    return _renyi_divergence(x, y, order, _distributions.check_base(name, base), counts, axis, True)
