"""Ordered classes: thresholds on one score (proportional odds), and one decision per threshold (CORAL).

What both functions share:

- The first argument is of a floating dtype. Arithmetic and results are float32, or float64 if the first argument is; gradients
  come back in the dtype of each argument.
- `labels` [...] are class indices of an integer dtype, in their order. One outside [0, classes) makes the value and the gradient
  of its example NaN; pad with `where=labels != -100`.
- `where` [...]: which examples count. The others cost exactly 0 with gradient exactly 0, whatever they hold.
- Raises: TypeError for dtypes; ValueError for shapes.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, numerics, rows, values


def cumulative_link_loss(scores: ArrayLike, labels: ArrayLike, *, thresholds: ArrayLike, where: ArrayLike | None = None) -> Array:
    """Negative log-probability of an ordered class whose borders cut a line, the proportional odds model, one value per example [...].

    loss = −log(σ(θ_y − s) − σ(θ_{y−1} − s)),  θ_{−1} = −∞, θ_{K−1} = +∞ for K classes.
    Gradient, with b = θ_y − s and a = θ_{y−1} − s: ∂/∂s = σ(−b) − σ(a);  ∂/∂θ_y = −σ(−b) − 1/(e^(b − a) − 1);
    ∂/∂θ_{y−1} = σ(a) + 1/(e^(b − a) − 1); the second terms are missing in the first and the last class.

    Args:
        scores: [...], s, where an example stands on the line.
        labels: [...], class indices in [0, K).
        thresholds: [K − 1], θ, strictly increasing; a class between two that decrease costs NaN.
        where: [...], which examples count.

    Returns:
        [...], nats, ≥ 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> stars = jnp.arange(3)
        >>> xentjax.cumulative_link_loss(jnp.full(3, 30.0), stars, thresholds=jnp.array([-1.0, 1.0])).tolist()  # far beyond all borders
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


def coral_loss(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Sum over thresholds of the cross-entropy of "the class is above it", for ordered classes, one value per example [...].

    loss = Σ_k softplus(−z_k) [y > k] + softplus(z_k) [y ≤ k],  k = 0 … K − 2 for K classes.
    Gradient: ∂loss/∂z_k = σ(z_k) − [y > k].

    Args:
        logits: [..., K − 1], log-odds that the class is above each threshold; CORAL makes them one score plus K − 1 biases.
        labels: [...], class indices in [0, K).
        where: [...], which examples count.

    Returns:
        [...], nats, ≥ 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([2.0, 0.0, -2.0])  # surely above the first of four classes, surely below the last
        >>> [round(float(xentjax.coral_loss(logits, jnp.array(y))), 3) for y in range(4)]
        [2.947, 0.947, 0.947, 2.947]

    Reference:
        Cao, Mirjalili, Raschka, Rank Consistent Ordinal Regression for Neural Networks, 2019, arXiv 1901.07884.
    """
    name = "coral_loss"
    z = checks.floating(name, "logits", logits)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"{name}: logits must have at least one threshold on the last axis; got shape {z.shape}.")
    y, counts = _labels(name, labels, z.shape[:-1], "the shape of logits without its threshold axis", z.shape[-1] + 1, where)
    values.logits(name, "logits", z, counts)
    return _coral(z, y, counts)


@jax.jit
def _cumulative_link(scores, labels, thresholds, where):
    """The surprise of an interval as `differences` has it; the first and the last class have one end."""
    dtype = numerics.accumulation_dtype(scores.dtype)
    s, theta = numerics.finite(scores.astype(dtype)), numerics.finite(thresholds.astype(dtype))
    s, labels = (s, labels) if where is None else (jnp.where(where, s, 0), jnp.where(where, labels, 0))
    last = theta.size
    above, below = (jnp.take(theta, jnp.clip(labels - one, 0, last - 1), mode="clip") for one in (0, 1))
    first, final = labels <= 0, labels >= last
    log_width = jnp.log(numerics.where(first | final, 1, above - below))
    terms = (
        (final, numerics.softplus(s - above)),
        (first, numerics.softplus(below - s)),
        (first | final, differences.width_surprise(log_width)),
    )
    return _close(sum(numerics.where(missing, 0, term) for missing, term in terms), labels, last + 1, where)


@jax.jit
def _coral(logits, labels, where):
    z = rows.masked(numerics.finite(logits.astype(numerics.accumulation_dtype(logits.dtype))), where)
    labels = labels if where is None else jnp.where(where, labels, 0)
    above = labels[..., None] > lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    loss = jnp.sum(numerics.softplus(numerics.where(above, -z, z)), axis=-1)
    return _close(loss, labels, z.shape[-1] + 1, where)


def _close(loss, labels, classes, where):
    """+∞ restored, NaN for a label that is no class (a factor, so that the derivative is NaN too), 0 where an example does not count."""
    loss = numerics.nan_unless((labels >= 0) & (labels < classes), numerics.restore_infinity(loss))
    return loss if where is None else jnp.where(where, loss, jnp.zeros_like(loss))


def _labels(function, labels, shape, meaning, classes, where):
    y = checks.same_shape(function, "labels", checks.integers(function, "labels", labels), shape, meaning)
    counts = checks.counted(function, where, shape, meaning)
    values.indices(function, "labels", y, classes, counts)
    return y, counts
