"""Cross-entropy, log-probability, focal loss and row statistics of a softmax over K classes.

All functions here share these conventions:

- `logits` [..., classes] have a floating dtype, and `axis` is their class axis. Arithmetic and results are float32, or float64 if `logits`
  are float64. The gradient with respect to `logits` has the dtype of `logits`.
- Integer `labels` are class indices. They have the shape of `logits` without the class axis. Floating `labels` are soft labels, that is,
  one distribution over the classes per example. They have the shape of `logits`. If an index is outside [0, classes), the value and the
  gradient of its example are NaN. If padded examples have the label -100, exclude them with `where=labels != -100`.
- `axis_name` is the mesh axis over which the classes are sharded, inside `jax.shard_map`. Class indices are global: they number the classes
  of all devices.
- `class_mask` has shape [classes] or the shape of `logits`, and is True for classes that exist. A class that does not exist has probability
  0 and gradient 0. If the label is a class that does not exist, the loss is +∞.
- `where` has the shape of the result, and is True for examples that count. The loss and the gradient of every other example are exactly 0,
  whatever the example contains.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
- In the formulas, z are the logits, p = softmax(z) and lse(z) = log Σ_k e^(z_k). K is the number of classes that exist, w are the class
  weights and ε is the label smoothing. The targets are t_k = w_k((1 − ε)·labels_k + ε/K), and their sum is s = Σ_k t_k. A class index
  stands for its one-hot label.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics, surprises


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per example between labels and the softmax of logits, shape [...].

    loss = Σ_k t_k (lse(z) − z_k) + ζ·s·lse(z)², where lse(z) = log Σ_k e^(z_k).
    The targets are t_k = w_k((1 − ε)·labels_k + ε/K), their sum is s = Σ_k t_k, and K is the number of classes that exist.
    For a class index y and default options, the loss is −log p_y with p = softmax(z).
    Gradient: ∂loss/∂z = s·p − t + 2ζ·s·lse·p;  ∂loss/∂labels_k = w_k (1 − ε)(lse − z_k + ζ·lse²).

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels, which need not sum to 1.
        label_smoothing: ε in [0, 1], the share of each label that is spread evenly over all classes that exist.
        class_weights: [classes], w ≥ 0; w_k multiplies the term of class k.
        z_loss: ζ ≥ 0, weight of the penalty lse(z)². The penalty keeps the logits nearly normalized.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `label_smoothing` is outside [0, 1], or `z_loss` is negative.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [80.0, 0.0, 0.0]])
        >>> xentjax.softmax_cross_entropy(logits, jnp.array([0, 0])).tolist()  # at a margin of 80 nats, the loss is still accurate
        [0.23954..., 3.60969...e-35]

    Reference:
        Szegedy et al., Rethinking the Inception Architecture, 2015, arXiv 1512.00567 (label smoothing); Chowdhery et al., PaLM, 2022,
        arXiv 2204.02311 (z-loss).
    """
    name = "softmax_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    weights = checks.class_weights(name, class_weights, batch)
    smoothing = checks.number(name, "label_smoothing", label_smoothing, high=1.0)
    return _cross_entropy(batch, smoothing, weights, checks.number(name, "z_loss", z_loss))


@jax.jit
def _cross_entropy(batch: rows.Examples, smoothing: ArrayLike | None, class_weights: Array | None, z_loss: ArrayLike | None) -> Array:
    r = rows.of(batch)
    stats = statistics.of(r)
    loss = odds.expected(r, stats, odds.surprise, smoothing, class_weights, whole=z_loss is None)
    if z_loss is not None:
        total = odds.label_sum(r, smoothing, class_weights)
        loss += jnp.asarray(z_loss, loss.dtype) * total * (stats.reference + stats.log_sum) ** 2
    return statistics.finish(r, stats, loss)


def softmax_log_prob(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Log-probability of the label under the softmax of logits, one value per example, shape [...].

    For a class index y, the result is log p_y = z_y − lse(z), where lse(z) = log Σ_k e^(z_k) and p = softmax(z).
    For soft labels, the result is the expected log-probability Σ_k labels_k (z_k − lse(z)).
    Gradient: ∂result/∂z = labels − s·p with s = Σ_k labels_k. A class index stands for its one-hot label.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, for example actions or tokens, or [..., classes] soft labels.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, at most 0, and −∞ if the label has probability 0; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> policy, old_policy = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0]])
        >>> action = jnp.array([0])
        >>> ratio = jnp.exp(xentjax.softmax_log_prob(policy, action) - xentjax.softmax_log_prob(old_policy, action))
        >>> ratio.tolist()  # the importance ratio of policy-gradient methods
        [1.46211...]

    Reference:
        Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4.
    """
    batch = checks.examples("softmax_log_prob", logits, labels, axis, axis_name, class_mask, where)
    return -_cross_entropy(batch, None, None, None)


def softmax_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Focal loss per example, shape [...].

    loss = Σ_k t_k (1 − p_k)^γ (−log p_k), where t_k = w_k((1 − ε)·labels_k + ε/K) are the targets.
    Gradient: ∂loss/∂z = g − p·Σ_k g_k with g_k = t_k (1 − p_k)^γ (γ·p_k·log p_k/(1 − p_k) − 1).

    The focal loss is a cross-entropy that gives less weight to easy examples. At γ = 0, it is cross-entropy. The loss and all its
    derivatives are finite for every γ ≥ 0 and all logits. Pass the α of the paper as `class_weights`.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        gamma: γ ≥ 0, the focusing exponent.
        label_smoothing: ε in [0, 1], the share of each label that is spread evenly over all classes that exist.
        class_weights: [classes], w ≥ 0; w_k multiplies the term of class k.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `gamma` is negative, or `label_smoothing` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> easy, hard = jnp.array([4.0, 0.0]), jnp.array([0.0, 4.0])
        >>> [float(xentjax.softmax_focal_loss(z, jnp.array(0))) for z in (easy, hard)]
        [5.87...e-06, 3.8749...]

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv 1708.02002.
    """
    name = "softmax_focal_loss"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    weights = checks.class_weights(name, class_weights, batch)
    smoothing = checks.number(name, "label_smoothing", label_smoothing, high=1.0)
    return _focal(batch, checks.number(name, "gamma", gamma), smoothing, weights)


@jax.jit
def _focal(batch: rows.Examples, gamma: ArrayLike | None, smoothing: ArrayLike | None, class_weights: Array | None) -> Array:
    r = rows.of(batch)
    stats = statistics.of(r)
    loss = odds.expected(r, stats, functools.partial(odds.focal, gamma=gamma), smoothing, class_weights)
    return statistics.finish(r, stats, loss)


def softmax_cross_entropy_with_top_k_labels(
    logits: ArrayLike,
    label_ids: ArrayLike,
    label_probs: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per example with sparse soft labels, shape [...].

    loss = Σ_j label_probs_j (lse(z) − z_{label_ids_j}), where lse(z) = log Σ_i e^(z_i).
    Gradient: ∂loss/∂label_probs_j = −log p_{label_ids_j}, and ∂loss/∂z = s·p − t. Here t_i is the sum of the probabilities that
    `label_probs` gives to class i, and s = Σ_i t_i.

    Each example has k class indices with k probabilities. All other classes have the label probability 0. The function never builds soft
    labels of shape [..., classes]. The cached top-k predictions of a teacher can be passed as they are.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        label_ids: [..., k], class indices, which may repeat. The last axis has length k, whatever the value of `axis` is.
        label_probs: [..., k], probabilities of the classes in `label_ids`, which need not sum to 1.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
        >>> xentjax.softmax_cross_entropy_with_top_k_labels(logits, jnp.array([[0, 1]]), jnp.array([[0.7, 0.3]])).tolist()
        [0.74018...]

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    name = "softmax_cross_entropy_with_top_k_labels"
    batch = checks.examples(name, logits, None, axis, axis_name, class_mask, where, labelled=False)
    ids, probs = checks.top_k(name, label_ids, label_probs, batch)
    return _top_k(batch, ids, probs)


@jax.jit
def _top_k(batch: rows.Examples, ids: Array, probs: Array) -> Array:
    r = rows.of(batch)
    stats = statistics.of_row(r)
    loss = jnp.sum(numerics.weighted(probs.astype(r.values.dtype), surprises.surprise_at(r, stats, ids)), axis=-1)
    return statistics.finish(r, stats, loss)


class RowStatistics(NamedTuple):
    """Statistics of the logits of each example, returned by `row_statistics`. Each field has shape [...]."""

    log_prob: Array
    """The log-probability log p_y of the label, or Σ_k labels_k log p_k for soft labels; differentiable."""
    log_normalizer: Array
    """lse(z) = log Σ_k e^(z_k); differentiable."""
    entropy: Array
    """H(p) = −Σ_k p_k log p_k in nats; differentiable."""
    expected_logit: Array
    """Σ_k p_k z_k; differentiable."""
    max_logit: Array
    """max_k z_k; not differentiated."""
    correct: Array
    """Boolean. For class indices, it is True if the label has the largest logit.

    For soft labels, it is True if a class with the largest label probability has the largest logit. If several classes share the largest
    logit, each of them is correct. In this case, `metrics.accuracy` accepts only the first of them, and `metrics.top_k_accuracy` with k = 1
    accepts only the last of them.
    """


def row_statistics(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> RowStatistics:
    """Six statistics of the logits of each example, each of shape [...].

    They are the log-probability of the label, the logarithm of the normalizer, the entropy, the expected logit, the largest logit, and
    whether the label has the largest logit. One pass over the logits computes all of them.

    log p_y = z_y − lse,  lse = log Σ_k e^(z_k),  H = −Σ_k p_k log p_k = lse − Σ_k p_k z_k, where z are the logits and p = softmax(z).
    Gradients: ∂lse/∂z = p;  ∂H/∂z_k = −p_k(log p_k + H);  ∂(Σ_j p_j z_j)/∂z_k = p_k(1 + z_k − Σ_j p_j z_j).

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count. The statistics of all other examples are 0, and `correct` is False.

    Returns:
        A `RowStatistics` with the fields `log_prob`, `log_normalizer`, `entropy`, `expected_logit`, `max_logit` and `correct`. Each field
        has shape [...].

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> stats = xentjax.row_statistics(jnp.zeros((1, 4)), jnp.array([3]))
        >>> stats.entropy.tolist(), stats.correct.tolist()  # log 4; the label is one of the tied classes
        ([1.38629...], [True])

    Reference:
        Cover and Thomas, Elements of Information Theory, 2006, chapter 2.
    """
    return _statistics(checks.examples("row_statistics", logits, labels, axis, axis_name, class_mask, where))


@jax.jit
def _statistics(batch: rows.Examples) -> RowStatistics:
    r = rows.of(batch)
    stats = statistics.of(r)
    loss = odds.expected(r, stats, odds.surprise)
    entropy, mean = surprises.entropy_and_mean(r, stats)
    return RowStatistics(
        log_prob=-statistics.finish(r, stats, loss),
        log_normalizer=rows.row_value(r, statistics.log_normalizer(r, stats)),
        entropy=rows.row_value(r, entropy),
        expected_logit=rows.row_value(r, stats.reference + mean),
        max_logit=rows.row_value(r, rows.largest(r)),
        correct=statistics.hits(r, stats),
    )
