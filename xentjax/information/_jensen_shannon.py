"""Jensen–Shannon divergence. Shared conventions are documented in `xentjax.information`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import numerics
from xentjax.information import _distributions


def js_divergence(p: ArrayLike, q: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Jensen–Shannon divergence of p and q per example, shape [...].

    JS(p, q) = ½ Σ_k [p_k log(p_k/m_k) + q_k log(q_k/m_k)] with m = (p + q)/2.
    Gradient: ∂JS/∂p_k = ½ log(p_k/m_k), or 0 at p_k = 0. The gradient with respect to q has the same form.

    The divergence is symmetric in p and q and always finite. If p and q sum to 1, the divergence is between 0 and log 2. The square root of
    the divergence is a metric.

    Args:
        p: [..., classes], probabilities, which need not sum to 1.
        q: [..., classes], probabilities, with the shape of `p`.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of `p` and `q`.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `p` or `q` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> float(xentjax.information.js_divergence(p, q, base=2)), float(xentjax.information.kl_divergence(p, q))
        (1.0, inf)

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    name = "js_divergence"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p=p, q=q)
    return _js_divergence(x, y, _distributions.check_base(name, base), counts, axis, False)


@functools.partial(jax.jit, static_argnames=("axis", "from_logits"))
def _js_divergence(p: Array, q: Array, base: ArrayLike | None, where: Array | None, axis: int, from_logits: bool) -> Array:
    a, b, d = _distributions.pair(p, q, where, axis, from_logits)
    middle, p_to_m, q_to_m = (a.p + b.p) / 2, _log_ratio_to_mixture(d), _log_ratio_to_mixture(-d)
    of_p, of_q = _distributions.kl_term(a.p, middle, -p_to_m) / 2, _distributions.kl_term(b.p, middle, -q_to_m) / 2
    terms = _distributions.with_slope(of_p, a.p, numerics.where(a.zero, 0, p_to_m / 2))
    terms += _distributions.with_slope(of_q, b.p, numerics.where(b.zero, 0, q_to_m / 2))
    return _distributions.finish(terms, None, base, where)


def _log_ratio_to_mixture(d: Array) -> Array:
    """log(p/m) = −log((1 + e^(−d))/2) for m = (p + q)/2 and d = log(p/q)."""
    value = jnp.minimum(d, 0) - jnp.log1p(jnp.expm1(-jnp.abs(d)) / 2)
    return _distributions.with_slope(value, d, numerics.sigmoid(-d))


def js_divergence_from_logits(
    p_logits: ArrayLike, q_logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """`js_divergence` of p = softmax(p_logits) and q = softmax(q_logits) per example, shape [...].

    JS(p, q) = ½ D(p‖m) + ½ D(q‖m), where m = (p + q)/2 and D is the Kullback–Leibler divergence.
    Gradient: let z be the logits of p. Then ∂JS/∂z_k = ½ p_k (log(p_k/m_k) − D(p‖m)). The gradient with respect to the logits of q has the
    same form.

    Args:
        p_logits: [..., classes], unnormalized log-probabilities.
        q_logits: [..., classes], unnormalized log-probabilities, with the shape of `p_logits`.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of both logits.
        where: [...], True for examples that count.

    Returns:
        [...], between 0 and log 2, with the logarithm in the given base; float32, or float64 if either argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p_logits, q_logits = jnp.array([0.0, 1e-3]), jnp.array([0.0, 0.0])
        >>> float(xentjax.information.js_divergence_from_logits(p_logits, q_logits))  # (1e-3)²/32
        3.12...e-08

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    name = "js_divergence_from_logits"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    return _js_divergence(x, y, _distributions.check_base(name, base), counts, axis, True)
