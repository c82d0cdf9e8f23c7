"""Cross-entropy and Kullback–Leibler divergence. Shared conventions are documented in `xentjax.information`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import differences, numerics
from xentjax.information import _distributions


def cross_entropy(p: ArrayLike, q: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Cross-entropy of q relative to p per example, shape [...].

    H(p, q) = −Σ_k p_k log q_k. It is +∞ if some class has p_k > 0 and q_k = 0.
    Gradient: ∂H/∂p_k = −log q_k and ∂H/∂q_k = −p_k/q_k. Both are 0 at q_k = 0.

    If p and q sum to 1, H(p, q) is smallest at q = p. Its value there is the entropy H(p), which is usually not 0.

    Args:
        p: [..., classes], true probabilities, which need not sum to 1.
        q: [..., classes], predicted probabilities, with the shape of `p`.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of `p` and `q`.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `p` or `q` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> weather, forecast = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
        >>> [float(xentjax.information.cross_entropy(weather, q)) for q in (forecast, weather)]
        [1.05492..., 1.02965...]

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 5.4.
    """
    name = "cross_entropy"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p=p, q=q)
    return _cross_entropy(x, y, _distributions.check_base(name, base), counts, axis, False)


@functools.partial(jax.jit, static_argnames=("axis", "from_logits"))
def _cross_entropy(p: Array, q: Array, base: ArrayLike | None, where: Array | None, axis: int, from_logits: bool) -> Array:
    a, b, d = _distributions.pair(p, q, where, axis, from_logits)
    terms = _distributions.with_slope(-a.p * b.log, a.p, -b.log)
    if from_logits:
        terms += _distributions.with_slope(jnp.zeros_like(terms), -b.log, _distributions.difference(a.p, b.p, d))
    else:
        terms += _distributions.with_slope(jnp.zeros_like(terms), b.p, -_distributions.quotient(a.p, b))
    return _distributions.finish(terms, ~a.zero & b.zero, base, where)


def cross_entropy_from_logits(
    p_logits: ArrayLike, q_logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """`cross_entropy` of q = softmax(q_logits) relative to p = softmax(p_logits), shape [...].

    H(p, q) = Σ_k p_k v_k with v = −log q. It is smallest at q = p. Its value there is the entropy H(p).
    Gradient: let z be the logits of p, and y the logits of q. Then ∂H/∂z_k = p_k (v_k − H(p, q)) and ∂H/∂y_k = q_k − p_k.

    Args:
        p_logits: [..., classes], unnormalized log-probabilities of the true distribution.
        q_logits: [..., classes], unnormalized log-probabilities of the predicted distribution, with the shape of `p_logits`.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of both logits.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if either argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> teacher = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> float(xentjax.information.cross_entropy_from_logits(teacher, jnp.zeros(3)))  # log 3 for a uniform prediction
        1.09861...

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 5.4.
    """
    name = "cross_entropy_from_logits"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    return _cross_entropy(x, y, _distributions.check_base(name, base), counts, axis, True)


def kl_divergence(p: ArrayLike, q: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Kullback–Leibler divergence D(p‖q) (relative entropy) per example, shape [...].

    D(p‖q) = Σ_k [p_k log(p_k/q_k) − p_k + q_k] ≥ 0. It is +∞ if some class has p_k > 0 and q_k = 0. If Σ p = Σ q, D(p‖q) equals
    Σ_k p_k log(p_k/q_k).
    Gradient: ∂D/∂p_k = log(p_k/q_k), or 0 where p_k or q_k is 0. ∂D/∂q_k = 1 − p_k/q_k, or 0 where p_k > 0 and q_k = 0.

    The order of the arguments matters. In general, D(p‖q) differs from D(q‖p).

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
        >>> p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
        >>> float(xentjax.information.kl_divergence(p, q)), float(xentjax.information.kl_divergence(q, p))
        (0.025267..., 0.025815...)

    Reference:
        Kullback, Leibler, On Information and Sufficiency, 1951.
    """
    name = "kl_divergence"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p=p, q=q)
    return _kl_divergence(x, y, _distributions.check_base(name, base), counts, axis, False)


@functools.partial(jax.jit, static_argnames=("axis", "from_logits"))
def _kl_divergence(p: Array, q: Array, base: ArrayLike | None, where: Array | None, axis: int, from_logits: bool) -> Array:
    a, b, d = _distributions.pair(p, q, where, axis, from_logits)
    infinite = ~a.zero & b.zero
    finite = numerics.where(infinite, 0, d)
    terms = _distributions.with_slope(_distributions.kl_term(a.p, b.p, -finite), a.p, numerics.where(a.zero, 0, finite))
    if from_logits:
        terms += _distributions.with_slope(jnp.zeros_like(terms), -b.log, _distributions.difference(a.p, b.p, d))
    else:
        slope = differences.with_slope_of(-jnp.expm1(finite), -_distributions.quotient(a.p, b))
        terms += _distributions.with_slope(jnp.zeros_like(terms), b.p, slope)
    return _distributions.finish(terms, infinite, base, where)


def kl_divergence_from_logits(
    p_logits: ArrayLike, q_logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """`kl_divergence` D(p‖q) for p = softmax(p_logits) and q = softmax(q_logits), shape [...].

    D(p‖q) = Σ_k p_k d_k with d = log(p/q).
    Gradient: let z be the logits of p, and y the logits of q. Then ∂D/∂z_k = p_k (d_k − D) and ∂D/∂y_k = q_k − p_k.

    Args:
        p_logits: [..., classes], unnormalized log-probabilities.
        q_logits: [..., classes], unnormalized log-probabilities, with the shape of `p_logits`.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of both logits.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if either argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p_logits, q_logits = jnp.array([0.0, 2e-5]), jnp.array([0.0, 0.0])
        >>> float(xentjax.information.kl_divergence_from_logits(p_logits, q_logits))  # (2e-5)²/8; each logarithm rounds by more
        4.99999...e-11

    Reference:
        Kullback, Leibler, On Information and Sufficiency, 1951.
    """
    name = "kl_divergence_from_logits"
    x, y, counts, axis = _distributions.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    return _kl_divergence(x, y, _distributions.check_base(name, base), counts, axis, True)
