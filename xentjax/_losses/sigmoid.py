"""Binary losses: cross-entropy, focal loss and asymmetric loss. Each logit is a separate yes-or-no decision.

All functions here share these conventions:

- `logits` [...] have a floating dtype. Each logit is the log-odds of one decision. Arithmetic and results are float32, or float64 if
  `logits` are float64. The gradient with respect to `logits` has the dtype of `logits`.
- `labels` [...] have exactly the shape of `logits`. They are booleans, the integers 0 and 1, or floating probabilities in [0, 1].
- `where` [...] has the shape of `logits`, and is True for elements that count. The loss and the gradient of every other element are exactly
  0, whatever the element contains.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
- In the formulas, z is a logit and p = σ(z) is its sigmoid, so −log p = softplus(−z) and −log(1 − p) = softplus(z). The label smoothing is
  ε, and the targets are t = (1 − ε)·labels + ε/2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds


def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    pos_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per element between binary labels and the sigmoid of logits, shape [...].

    loss = w·t·(−log σ(z)) + (1 − t)·(−log σ(−z)) with the targets t = (1 − ε)·labels + ε/2.
    Gradient: ∂loss/∂z = (1 − t)·σ(z) − w·t·σ(−z), which is σ(z) − t for w = 1.

    Args:
        logits: [...], the log-odds z.
        labels: [...], booleans, the integers 0 and 1, or probabilities in [0, 1].
        label_smoothing: ε in [0, 1]. It moves labels toward 1/2.
        pos_weight: a scalar, [classes] or an array with as many axes as `logits`; w ≥ 0, factor of the positive term. An array [classes]
            belongs to the last axis of `logits`. Otherwise each axis has size 1 or the size of the same axis of `logits`. If the classes
            are on the first of three axes, pass `pos_weight[:, None, None]`.
        where: [...], True for elements that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `label_smoothing` is outside [0, 1], or `pos_weight` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.sigmoid_cross_entropy(jnp.array([0.0, 80.0, -80.0]), jnp.array([True, True, True])).tolist()
        [0.69314..., 1.80485...e-35, 80.0]

    Reference:
        Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2.
    """
    name = "sigmoid_cross_entropy"
    z, t, counts = checks.elements(name, logits, labels, where)
    smoothing = checks.number(name, "label_smoothing", label_smoothing, high=1.0)
    return _cross_entropy(z, t, counts, smoothing, checks.pos_weight(name, pos_weight, z))


@jax.jit
def _cross_entropy(logits: Array, labels: Array, where: Array | None, smoothing: ArrayLike | None, pos_weight: ArrayLike | None) -> Array:
    z, t = _finite_logits_and_targets(logits, labels, where, smoothing)
    positive = t if pos_weight is None else t * numerics.expand_leading(jnp.asarray(pos_weight, z.dtype), z.ndim)
    return _finish(numerics.weighted(positive, numerics.softplus(-z)) + numerics.weighted(1 - t, numerics.softplus(z)), where)


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    """Binary focal loss per element, shape [...].

    loss = α·t·(1 − p)^γ·(−log p) + (1 − α)·(1 − t)·p^γ·(−log(1 − p)) with p = σ(z) and the targets t = (1 − ε)·labels + ε/2.
    Gradient: for t = 1, ∂loss/∂z = α·(1 − p)^γ·(γ·p·log p − (1 − p)). For t = 0, replace p by 1 − p and α by 1 − α, and change the sign.

    The focal loss is a cross-entropy that gives less weight to easy elements. The loss and all its derivatives are finite for every γ ≥ 0
    and all logits.

    Args:
        logits: [...], the log-odds z.
        labels: [...], booleans, the integers 0 and 1, or probabilities in [0, 1].
        gamma: γ ≥ 0, the focusing exponent.
        alpha: α in [0, 1], weight of the positive term. The negative term has the weight 1 − α. If `alpha` is None, both weights are 1.
        label_smoothing: ε in [0, 1]. It moves labels toward 1/2.
        where: [...], True for elements that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `gamma` is negative, or `alpha` or `label_smoothing` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.sigmoid_focal_loss(jnp.array([0.0, 4.0]), jnp.array([1, 1]), gamma=2.0, alpha=0.25).tolist()
        [0.04332..., 1.46...e-06]

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv 1708.02002.
    """
    name = "sigmoid_focal_loss"
    z, t, counts = checks.elements(name, logits, labels, where)
    smoothing = checks.number(name, "label_smoothing", label_smoothing, high=1.0)
    balance = None if alpha is None else checks.fraction(name, "alpha", alpha)
    return _focal(z, t, counts, checks.number(name, "gamma", gamma), balance, smoothing)


@jax.jit
def _focal(
    logits: Array, labels: Array, where: Array | None, gamma: ArrayLike | None, alpha: ArrayLike | None, smoothing: ArrayLike | None
) -> Array:
    z, t = _finite_logits_and_targets(logits, labels, where, smoothing)
    a = None if alpha is None else jnp.asarray(alpha, z.dtype)
    positive, negative = (t, 1 - t) if a is None else (a * t, (1 - a) * (1 - t))
    return _finish(numerics.weighted(positive, odds.focal(z, gamma)) + numerics.weighted(negative, odds.focal(-z, gamma)), where)


def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_negative: ArrayLike = 4.0,
    gamma_positive: ArrayLike = 1.0,
    clip: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> Array:
    """Asymmetric loss per element, shape [...].

    loss = t·(1 − p)^γ₊·(−log p) + (1 − t)·q^γ₋·(−log(1 − q)) with t = labels, p = σ(z) and q = max(p − clip, 0).
    Gradient: for t = 1, ∂loss/∂z = (1 − p)^γ₊·(γ₊·p·log p − (1 − p)). For t = 0 and q > 0,
    ∂loss/∂z = p(1 − p)·(q^γ₋/(1 − q) − γ₋·q^(γ₋ − 1)·log(1 − q)). For t = 0 and q = 0, ∂loss/∂z = 0.

    The loss is meant for multi-label classification in which most labels are negative. If p is below `clip`, the loss of a negative label
    is 0. The gradient is exact: the factors (1 − p)^γ₊ and q^γ₋ are differentiated too.

    Args:
        logits: [...], the log-odds z.
        labels: [...], booleans, the integers 0 and 1, or probabilities in [0, 1].
        gamma_negative: γ₋ ≥ 0, the focusing exponent of negative labels.
        gamma_positive: γ₊ ≥ 0, the focusing exponent of positive labels.
        clip: in [0, 1], subtracted from the probability p in the negative term.
        where: [...], True for elements that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, an exponent is negative, or `clip` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.asymmetric_loss(jnp.array([-4.0, 0.0, 0.0]), jnp.array([0, 0, 1])).tolist()  # the first probability is below `clip`
        [0.0, 0.02451..., 0.34657...]

    Reference:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2020, arXiv 2009.14119.
    """
    name = "asymmetric_loss"
    z, t, counts = checks.elements(name, logits, labels, where)
    negative = checks.number(name, "gamma_negative", gamma_negative)
    positive = checks.number(name, "gamma_positive", gamma_positive)
    return _asymmetric(z, t, counts, negative, positive, checks.number(name, "clip", clip, high=1.0))


@jax.jit
def _asymmetric(
    logits: Array,
    labels: Array,
    where: Array | None,
    gamma_negative: ArrayLike | None,
    gamma_positive: ArrayLike | None,
    clip: ArrayLike | None,
) -> Array:
    z, t = _finite_logits_and_targets(logits, labels, where, None)
    negative = odds.focal(-z, gamma_negative) if clip is None else _shifted_focal(z, gamma_negative, jnp.asarray(clip, z.dtype))
    return _finish(numerics.weighted(t, odds.focal(z, gamma_positive)) + numerics.weighted(1 - t, negative), where)


def _shifted_focal(z: Array, gamma: ArrayLike | None, clip: Array) -> Array:
    """q^γ·(−log(1 − q)) with q = max(σ(z) − clip, 0); where q = 0, it and all its derivatives are 0.

    For small q, −log(1 − q) is a log1p. For large q, it is the logarithm of 1 − q = σ(−z) + clip, a sum without cancellation.
    """
    above = numerics.sigmoid(z) > clip
    q = numerics.sigmoid_excess(z, clip)
    surprise = jnp.where(q < 0.5, -jnp.log1p(-jnp.minimum(q, 0.5)), -jnp.log(numerics.sigmoid(-z) + clip))
    modulation = 1 if gamma is None else jnp.exp(jnp.asarray(gamma, z.dtype) * jnp.log(q))
    return jnp.where(above, modulation * surprise, jnp.zeros_like(z))


def _finite_logits_and_targets(logits: Array, labels: Array, where: Array | None, smoothing: ArrayLike | None) -> tuple[Array, Array]:
    """Finite logits and smoothed labels in the accumulation dtype; logits and labels of elements that do not count become 0."""
    dtype = numerics.accumulation_dtype(logits.dtype)
    z, t = numerics.finite(logits.astype(dtype)), labels.astype(dtype)
    if where is not None:  # before smoothing, because the derivative of the smoothed label in ε is 1/2 − label
        z, t = jnp.where(where, z, 0), jnp.where(where, t, 0)
    if smoothing is not None:
        t = (1 - jnp.asarray(smoothing, dtype)) * t + jnp.asarray(smoothing, dtype) / 2
    return z, t


def _finish(loss: Array, where: Array | None) -> Array:
    return numerics.nan_or_zero(numerics.restore_infinity(loss), None, where)
