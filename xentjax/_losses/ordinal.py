"""Losses for ordered classes.

`cumulative_link_loss` is the loss of the proportional odds model. In this model, thresholds divide the real line into intervals, one per
class, and the score of an example is a point on this line. `coral_loss` is the loss of CORAL. In CORAL, each threshold is a separate binary
decision: whether the class is above the threshold.

Both functions share these conventions:

- The first argument has a floating dtype. Arithmetic and results are float32, or float64 if the first argument is float64. Each gradient
  has the dtype of its argument.
- `labels` [...] are class indices of an integer dtype. The indices follow the order of the classes. If an index is outside [0, classes),
  the value and the gradient of its example are NaN. If padded examples have the label -100, exclude them with `where=labels != -100`.
- `where` [...] is True for examples that count. The loss and the gradient of every other example are exactly 0, whatever the example
  contains.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, numerics, rows, values


def cumulative_link_loss(scores: ArrayLike, labels: ArrayLike, *, thresholds: ArrayLike, where: ArrayLike | None = None) -> Array:
    """Negative log-likelihood of the class in the proportional odds model, one value per example, shape [...].

    loss = −log(σ(θ_y − s) − σ(θ_{y−1} − s)) with θ_{−1} = −∞ and θ_{K−1} = +∞ for K classes.
    Gradient, with b = θ_y − s and a = θ_{y−1} − s: ∂loss/∂s = σ(−b) − σ(a);  ∂loss/∂θ_y = −σ(−b) − 1/(e^(b − a) − 1);
    ∂loss/∂θ_{y−1} = σ(a) + 1/(e^(b − a) − 1). For the first and the last class, the terms that contain b − a are 0.

    Args:
        scores: [...], s, one number per example, unbounded.
        labels: [...], class indices in [0, K).
        thresholds: [K − 1], θ, strictly increasing. If θ_y is below θ_{y−1}, the loss of class y is NaN.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if `scores` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> labels, thresholds = jnp.arange(3), jnp.array([-1.0, 1.0])
        >>> xentjax.cumulative_link_loss(jnp.full(3, 30.0), labels, thresholds=thresholds).tolist()  # far above both thresholds
        [31.0, 29.14541..., 2.54366...e-13]

    Reference:
        McCullagh, Regression Models for Ordinal Data, 1980.
    """
    name = "cumulative_link_loss"
    s, theta = checks.floating(name, "scores", scores), checks.real(name, "thresholds", thresholds)
    if theta.ndim != 1 or theta.size == 0:
        raise ValueError(f"{name}: thresholds must have shape (classes - 1,), at least one; got {theta.shape}.")
    y, counts = _labels(name, labels, s.shape, "the shape of scores", theta.size + 1, where)
    values.not_nan(name, "scores", s, counts)
    values.rising(name, "thresholds", theta)
    return _cumulative_link(s, y, theta, counts)


@jax.jit
def _cumulative_link(scores: Array, labels: Array, thresholds: Array, where: Array | None) -> Array:
    dtype = numerics.accumulation_dtype(scores.dtype)
    s, theta = numerics.finite(scores.astype(dtype)), numerics.finite(thresholds.astype(dtype))
    s, labels = (s, labels) if where is None else (jnp.where(where, s, 0), jnp.where(where, labels, 0))
    last_class = theta.size
    start, end = (jnp.take(theta, jnp.clip(labels - one, 0, last_class - 1), mode="clip") for one in (1, 0))
    first, last = labels <= 0, labels >= last_class
    log_width = jnp.log(numerics.where(first | last, 1, end - start))
    loss = differences.interval_surprise(start - s, end - s, log_width, first, last)
    return _finish(loss, labels, last_class + 1, where)


def coral_loss(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Sum of the binary cross-entropies of all thresholds, one value per example, shape [...].

    loss = Σ_k (softplus(−z_k)·[y > k] + softplus(z_k)·[y ≤ k]), where k runs from 0 to K − 2 for K classes.
    Gradient: ∂loss/∂z_k = σ(z_k) − [y > k].

    The binary label of threshold k is [y > k], which is 1 if y > k and 0 otherwise.

    Args:
        logits: [..., K − 1], log-odds z_k that the class is above threshold k. CORAL computes z_k as the score of the example plus the bias
            of threshold k.
        labels: [...], class indices in [0, K).
        where: [...], True for examples that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([2.0, 0.0, -2.0])  # probably above the first of three thresholds, probably below the last
        >>> [round(float(xentjax.coral_loss(logits, jnp.array(y))), 3) for y in range(4)]
        [2.947, 0.947, 0.947, 2.947]

    Reference:
        Cao, Mirjalili and Raschka, Rank Consistent Ordinal Regression for Neural Networks, 2019, arXiv 1901.07884.
    """
    name = "coral_loss"
    z = checks.floating(name, "logits", logits)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"{name}: logits must have at least one threshold on the last axis; got shape {z.shape}.")
    y, counts = _labels(name, labels, z.shape[:-1], "the shape of logits without its threshold axis", z.shape[-1] + 1, where)
    values.logits(name, "logits", z, counts)
    return _coral(z, y, counts)


@jax.jit
def _coral(logits: Array, labels: Array, where: Array | None) -> Array:
    z = rows.masked(numerics.finite(logits.astype(numerics.accumulation_dtype(logits.dtype))), where)
    labels = labels if where is None else jnp.where(where, labels, 0)
    above = labels[..., None] > lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    loss = jnp.sum(numerics.softplus(numerics.where(above, -z, z)), axis=-1)
    return _finish(loss, labels, z.shape[-1] + 1, where)


def _finish(loss: Array, labels: Array, classes: int, where: Array | None) -> Array:
    """`loss` with +∞ restored, NaN for labels out of range, and 0 in examples that do not count."""
    return numerics.nan_or_zero(numerics.restore_infinity(loss), (labels >= 0) & (labels < classes), where)


def _labels(
    function: str, labels: ArrayLike, shape: tuple[int, ...], meaning: str, classes: int, where: ArrayLike | None
) -> tuple[Array, Array | None]:
    """The checked labels and `where`."""
    y = checks.same_shape(function, "labels", checks.integers(function, "labels", labels), shape, meaning)
    counts = checks.where_mask(function, where, shape, meaning)
    values.indices(function, "labels", y, classes, counts)
    return y, counts
