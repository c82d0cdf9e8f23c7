"""Yes or no per element: cross-entropy over bits, focal and asymmetric loss.

What every function here shares:

- `logits` [...] of a floating dtype, each the log-odds of its own decision. Arithmetic and results are float32, or float64
  for float64 logits; gradients come back in the dtype of `logits`.
- `labels` [...], exactly the shape of `logits`: boolean, integer 0 or 1, or floating probabilities in [0, 1].
- `where` [...], the shape of `logits`: which elements count. The others cost exactly 0 with gradient exactly 0.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
- With p = σ(z) the two log-probabilities are −log p = softplus(−z) and −log(1 − p) = softplus(z); labels are
  t = (1 − ε)·labels + ε/2.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics
from xentjax._core.odds import focal


def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    pos_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy between bits and the sigmoid of logits, one value per element [...].

    loss = w·t·(−log σ(z)) + (1 − t)·(−log σ(−z)).
    Gradient: ∂loss/∂z = (1 − t)·σ(z) − w·t·σ(−z), which is σ(z) − t for w = 1.

    Args:
        logits: [...], log-odds in nats.
        labels: [...], 0 or 1 (boolean, integer), or probabilities in [0, 1].
        label_smoothing: ε in [0, 1]; t = (1 − ε)·labels + ε/2.
        pos_weight: w ≥ 0 multiplies the positive term: a scalar, [classes] along the last axis, or an array with the axes of `logits`,
            each of their size or of size 1 (`pos_weight[:, None, None]` for classes on the first of three axes).
        where: [...], which elements count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `label_smoothing` outside [0, 1], a negative `pos_weight`.

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


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    """Focal loss over bits, one value per element [...].

    loss = α·t·(1 − p)^γ·(−log p) + (1 − α)·(1 − t)·p^γ·(−log(1 − p)),  p = σ(z);  without `alpha` both factors are 1.
    Gradient for t = 1: ∂loss/∂z = α·(1 − p)^γ·(γ·p·log p − (1 − p)); for t = 0 the same with −z, 1 − α and the sign turned.

    Finite with all derivatives for every γ ≥ 0 at any logit.

    Args:
        logits: [...], log-odds in nats.
        labels: [...], 0 or 1 (boolean, integer), or probabilities in [0, 1].
        gamma: γ ≥ 0, the focusing exponent.
        alpha: α in [0, 1], weight of the positive term, 1 − α that of the negative; None weighs neither.
        label_smoothing: ε in [0, 1]; t = (1 − ε)·labels + ε/2.
        where: [...], which elements count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative `gamma`, `alpha` or `label_smoothing` outside [0, 1].

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


def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_negative: ArrayLike = 4.0,
    gamma_positive: ArrayLike = 1.0,
    clip: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> Array:
    """Asymmetric loss for many labels per example, mostly negative, one value per element [...].

    loss = t·(1 − p)^γ₊·(−log p) + (1 − t)·q^γ₋·(−log(1 − q)),  p = σ(z), q = max(p − clip, 0).
    Gradient for t = 1: (1 − p)^γ₊·(γ₊·p·log p − (1 − p));  for t = 0, where q > 0:
    p(1 − p)·(q^γ₋/(1 − q) − γ₋·q^(γ₋ − 1)·log(1 − q)), and 0 where q = 0.

    A negative easier than `clip` costs nothing. The gradient is the exact one: the modulating factors are differentiated too.

    Args:
        logits: [...], log-odds in nats.
        labels: [...], 0 or 1 (boolean, integer), or probabilities in [0, 1].
        gamma_negative: γ₋ ≥ 0, the focusing exponent of negatives.
        gamma_positive: γ₊ ≥ 0, the focusing exponent of positives.
        clip: in [0, 1], the probability margin by which negatives are shifted.
        where: [...], which elements count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative exponent, `clip` outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.asymmetric_loss(jnp.array([-4.0, 0.0, 0.0]), jnp.array([0, 0, 1])).tolist()  # the first is below `clip`
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
def _cross_entropy(logits, labels, where, smoothing, pos_weight):
    z, t = _prepare(logits, labels, where, smoothing)
    positive = t if pos_weight is None else t * numerics.expand_leading(jnp.asarray(pos_weight, z.dtype), z.ndim)
    return _close(positive * numerics.softplus(-z) + (1 - t) * numerics.softplus(z), where)


@jax.jit
def _focal(logits, labels, where, gamma, alpha, smoothing):
    z, t = _prepare(logits, labels, where, smoothing)
    a = None if alpha is None else jnp.asarray(alpha, z.dtype)
    positive, negative = (t, 1 - t) if a is None else (a * t, (1 - a) * (1 - t))
    return _close(positive * focal(z, gamma) + negative * focal(-z, gamma), where)


@jax.jit
def _asymmetric(logits, labels, where, gamma_negative, gamma_positive, clip):
    z, t = _prepare(logits, labels, where, None)
    negative = focal(-z, gamma_negative) if clip is None else _shifted_focal(z, gamma_negative, jnp.asarray(clip, z.dtype))
    return _close(t * focal(z, gamma_positive) + (1 - t) * negative, where)


def _shifted_focal(z, gamma, clip):
    """q^γ·(−log(1 − q)) with q = max(σ(z) − clip, 0); 0 with all derivatives where q is.

    −log(1 − q) is a log1p for small q, and for large q the logarithm of 1 − q = σ(−z) + clip, a sum without cancellation.
    """
    above = numerics.sigmoid(z) > clip
    q = numerics.sigmoid_excess(z, clip)
    surprise = jnp.where(q < 0.5, -jnp.log1p(-jnp.minimum(q, 0.5)), -jnp.log(numerics.sigmoid(-z) + clip))
    modulation = 1 if gamma is None else jnp.exp(jnp.asarray(gamma, z.dtype) * jnp.log(q))
    return jnp.where(above, modulation * surprise, jnp.zeros_like(z))


def _prepare(logits, labels, where, smoothing):
    """Finite logits and labels in the accumulation dtype, of 0 where an element does not count; the labels smoothed."""
    dtype = numerics.accumulation_dtype(logits.dtype)
    z, t = numerics.finite(logits.astype(dtype)), labels.astype(dtype)
    if where is not None:  # before the smoothing, whose derivative is 1/2 − t
        z, t = jnp.where(where, z, 0), jnp.where(where, t, 0)
    if smoothing is not None:
        t = (1 - jnp.asarray(smoothing, dtype)) * t + jnp.asarray(smoothing, dtype) / 2
    return z, t


def _close(loss, where):
    loss = numerics.restore_infinity(loss)
    return loss if where is None else jnp.where(where, loss, jnp.zeros_like(loss))
