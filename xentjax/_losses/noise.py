"""Losses for noisy labels. They use a known noise matrix to correct for the noise.

All functions share the conventions of `xentjax.softmax_cross_entropy`. In the formulas, z are the logits, p = softmax(z), y is the observed
label, and [k = y] is 1 for the label and 0 for other classes.

`noise_matrix` T has one row and one column per class. If the classes are sharded over devices, each device passes the whole matrix. The
entry T_ij = P(label j | class i) is the probability that an example of true class i has the label j. Each row sums to 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics, values


def forward_corrected_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    noise_matrix: ArrayLike,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per example between noisy labels and the predicted distribution of noisy labels, shape [...].

    loss = −log Σ_i p_i T_iy, where p is the predicted distribution of the true class.
    Gradient: ∂loss/∂z = p − r, where r_i = p_i T_iy/Σ_j p_j T_jy is the posterior probability of the true class i.

    The model predicts the true class, and T converts this prediction into a prediction of the noisy label. The expected loss is minimal if
    p is the distribution of the true class.

    The loss of soft labels t is Σ_k t_k·loss(k), where loss(k) is the loss of class index k. The terms of this sum are
    computed one class at a time. So soft labels take about as many times longer than class indices as there are classes.

    Args:
        logits: [..., classes], unnormalized log-probabilities of the true classes.
        labels: [...] observed class indices, or [..., classes] soft labels.
        noise_matrix: [classes, classes], T_ij = P(label j | class i), in [0, 1].
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that can be the true class.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> noise = jnp.array([[0.8, 0.2], [0.0, 1.0]])  # a fifth of class 0 has the label 1
        >>> logits = jnp.array([50.0, 0.0])
        >>> float(xentjax.forward_corrected_cross_entropy(logits, jnp.array(1), noise_matrix=noise))  # −log 0.2, not 50
        1.60943...

    Reference:
        Patrini et al., Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach, 2016, arXiv 1609.03683.
    """
    name = "forward_corrected_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _forward(batch, _noise(name, noise_matrix, batch))


@jax.jit
def _forward(batch: rows.Examples, noise_matrix: Array) -> Array:
    r = rows.of(batch)
    noise = noise_matrix.astype(r.values.dtype)
    to_label, to_others = (rows.of_this_device(r, _log(x).T) for x in (noise, 1 - noise))  # [labels, true classes]

    def log_sum(r: rows.Rows, log_weights: Array) -> Array:
        """Log of Σ_i w_yi e^(z_i), where y is the label; −INFINITE if the sum is 0. `log_weights` holds log w [labels, true classes]."""
        weighted = rows.adjusted(r, jnp.add, rows.table_row(r, log_weights))
        stats = statistics.of_row(weighted)
        return numerics.where(stats.all_impossible, -numerics.INFINITE, stats.reference + stats.log_sum)

    def loss_of_index(r: rows.Rows) -> Array:
        loss = odds.surprise(log_sum(r, to_label) - log_sum(r, to_others))  # of the log-odds of the noisy label
        return numerics.nan_unless(rows.in_range(r), loss)  # a maximum over devices may lose a NaN

    stats = statistics.of_row(r)
    loss = odds.by_label(r, loss_of_index)
    return statistics.finish(r, stats, numerics.where(stats.all_impossible, numerics.INFINITE, loss))


def backward_corrected_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    noise_matrix: ArrayLike,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Unbiased estimate of the cross-entropy with the true label, one value per example, shape [...].

    loss = −Σ_j (T⁻¹)_yj log p_j, where y is the noisy label.
    Gradient: ∂loss/∂z_k = p_k − (T⁻¹)_yk, because the rows of T⁻¹ sum to 1.

    The expectation of the loss over the noise is −log p_i, where i is the true class. The loss may be negative, and has no lower bound.

    Args:
        logits: [..., classes], unnormalized log-probabilities of the true classes.
        labels: [...] observed class indices, or [..., classes] soft labels.
        noise_matrix: [classes, classes], T_ij = P(label j | class i), invertible.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist. T_ij must be 0 if only one of the classes i and j exists.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, ±∞ if a class j of probability 0 has a nonzero weight (T⁻¹)_yj; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> noise, logits = jnp.array([[0.8, 0.2], [0.0, 1.0]]), jnp.array([[1.0, 0.0]] * 2)
        >>> observed = xentjax.backward_corrected_cross_entropy(logits, jnp.array([0, 1]), noise_matrix=noise)
        >>> float(noise[0] @ observed), float(xentjax.softmax_cross_entropy(logits, jnp.array([0, 0]))[0])  # the mean over the noise
        (0.31326..., 0.31326...)

    Reference:
        Patrini et al., Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach, 2016, arXiv 1609.03683.
    """
    name = "backward_corrected_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _backward(batch, _noise(name, noise_matrix, batch))


@jax.jit
def _backward(batch: rows.Examples, noise_matrix: Array) -> Array:
    r = rows.of(batch)
    inverse = jnp.linalg.inv(noise_matrix.astype(r.values.dtype))
    weights = rows.table_row(r, rows.of_this_device(r, inverse)) if r.labels_are_indices else rows.table_sum(r, inverse)
    possible = rows.not_infinite(r)
    r = r._replace(labels=numerics.where(possible, weights, 0))
    stats = statistics.of(r)
    # Weights may be negative. The sum of the weights of all impossible classes decides between +∞ and −∞.
    impossible = rows.class_sum(r, rows.masked(numerics.where(possible, 0, weights), r.where))
    loss = odds.expected(r, stats, odds.surprise) + numerics.INFINITE * jnp.sign(impossible)
    loss = statistics.finish(r, stats, loss)
    return numerics.where(numerics.is_infinite(-loss), -jnp.inf, loss)


def _noise(function: str, noise_matrix: ArrayLike, batch: rows.Examples) -> Array:
    classes = batch.classes
    matrix = checks.real(function, "noise_matrix", noise_matrix)
    values.probabilities(function, "noise_matrix", matrix)
    return checks.shape(function, "noise_matrix", matrix, (classes, classes), "one row per true class, one column per label")


def _log(x: Array) -> Array:
    """The logarithm; at 0 it is −∞ with derivative 0."""
    some = x > 0
    return numerics.where(some, jnp.log(numerics.where(some, x, 1)), -jnp.inf)
