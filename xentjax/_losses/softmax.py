"""One class of K: cross-entropy, log-probability, focal loss, sparse distributions, statistics of a row.

What every function here shares:

- `logits` [..., classes] of a floating dtype, the class axis at `axis`. Arithmetic and results are float32, or float64 for
  float64 logits; gradients come back in the dtype of `logits`.
- `labels`: an integer dtype means class indices, the shape of `logits` without the class axis; a floating dtype means a
  distribution over classes, the shape of `logits`. An index outside [0, classes) makes the value and the gradient of its
  example NaN; pad with `where=labels != -100`.
- `axis_name`: inside `jax.shard_map`, the mesh axis over which the class axis is split. Indices are global.
- `class_mask` [classes] or the shape of `logits`: which classes exist. A missing class has probability 0 and gradient 0; a
  label on it costs +∞.
- `where`, the shape of the result: which examples count. The others cost exactly 0 with gradient exactly 0, whatever they hold.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
- With p = softmax(z), K classes and class weights w, labels are the distribution t_k = w_k((1 − ε)·labels_k + ε/K), s = Σ t_k.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, odds, rows, statistics, surprises


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
    """Cross-entropy between labels and the softmax of logits, one value per example [...].

    loss = Σ_k t_k (lse(z) − z_k) + ζ·s·lse(z)²,  which is −log p_y for an index y and no options.
    Gradient: ∂loss/∂z = s·p − t + 2ζ·s·lse·p;  ∂loss/∂labels_k = w_k (1 − ε)(lse − z_k + ζ·lse²).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions (they need not sum to 1).
        label_smoothing: ε in [0, 1], the share of the label spread evenly over the classes that exist.
        class_weights: [classes], w ≥ 0, multiplies each class's term.
        z_loss: ζ ≥ 0, weight of the penalty on lse(z)² that keeps logits near normalised.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `label_smoothing` outside [0, 1], a negative `z_loss`.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [80.0, 0.0, 0.0]])
        >>> xentjax.softmax_cross_entropy(logits, jnp.array([0, 0])).tolist()  # a margin of 80 nats keeps its loss
        [0.23954..., 3.60969...e-35]

    Reference:
        Szegedy et al., Rethinking the Inception Architecture, 2015, arXiv 1512.00567 (smoothing); Chowdhery et al., PaLM,
        2022, arXiv 2204.02311 (z-loss).
    """
    name = "softmax_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    weights = checks.class_weights(name, class_weights, batch)
    smoothing = checks.number(name, "label_smoothing", label_smoothing, high=1.0)
    return _cross_entropy(batch, smoothing, weights, checks.number(name, "z_loss", z_loss))


def softmax_log_prob(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Log-probability of the label under the softmax of logits, one value per example [...].

    log p_y = z_y − lse(z);  for distributions the expected log-probability Σ_k labels_k (z_k − lse(z)).
    Gradient: ∂/∂z = labels − s·p.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices (actions, tokens), or [..., classes] distributions.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, ≤ 0; −∞ for an impossible label.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

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
    """Focal loss, cross-entropy with easy examples turned down, one value per example [...].

    loss = Σ_k t_k (1 − p_k)^γ (−log p_k);  γ = 0 is cross-entropy.
    Gradient: with g_k = t_k (1 − p_k)^γ (γ·p_k·log p_k/(1 − p_k) − 1), ∂loss/∂z = g − p·Σ g.

    Finite with all derivatives for every γ ≥ 0 at any logits. The α of the paper is `class_weights`.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        gamma: γ ≥ 0, the focusing exponent.
        label_smoothing: ε in [0, 1], the share of the label spread evenly over the classes that exist.
        class_weights: [classes], w ≥ 0, multiplies each class's term.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative `gamma`, `label_smoothing` outside [0, 1].

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
    """Cross-entropy against sparse distributions, k classes with their probabilities per example, one value per example [...].

    loss = Σ_j label_probs_j (lse(z) − z_{label_ids_j});  ids may repeat, probabilities need not sum to 1.
    Gradient: ∂loss/∂z = s·p − t with t scattered from `label_probs`;  ∂loss/∂label_probs_j = −log p_{label_ids_j}.

    The distribution is never made dense: teachers' top-k predictions can be cached and used as they are.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        label_ids: [..., k], class indices; the last axis is k, whatever `axis` is.
        label_probs: [..., k], their probabilities.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
        >>> xentjax.softmax_cross_entropy_with_top_k_labels(logits, jnp.array([[0, 1]]), jnp.array([[0.7, 0.3]])).tolist()
        [0.74018...]

    Reference:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    name = "softmax_cross_entropy_with_top_k_labels"
    batch = checks.examples(name, logits, None, axis, axis_name, class_mask, where, labelled=False)
    ids, probs = checks.top_k(name, label_ids, label_probs, batch)
    return _top_k(batch, ids, probs)


class RowStatistics(NamedTuple):
    """What one pass over a row of logits tells; each field has the leading shape [...] of the logits."""

    log_prob: Array
    """log p of the label (expected under labels that are distributions); differentiable."""
    log_normalizer: Array
    """lse(z) = log Σ_k e^(z_k); differentiable."""
    entropy: Array
    """H(p) = −Σ_k p_k log p_k in nats; differentiable."""
    expected_logit: Array
    """Σ_k p_k z_k; differentiable."""
    max_logit: Array
    """max_k z_k; differentiation stopped."""
    correct: Array
    """Whether the label, or a most likely class of soft labels, has the largest logit; boolean.

    If several classes share the largest logit, each of them is correct. `metrics.accuracy` counts only the first of them as a hit, and
    `metrics.top_k_accuracy` with k = 1 only the last.
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
    """Log-probability, normaliser, entropy, expected and largest logit, and top-1 hit, six values per example [...] from one pass.

    log p_y = z_y − lse,  lse = log Σ e^(z_k),  H = −Σ p_k log p_k = lse − Σ p_k z_k.
    Gradients: ∂lse/∂z = p;  ∂H/∂z_k = −p_k(log p_k + H);  ∂(Σ p z)/∂z_k = p_k(1 + z_k − Σ p z).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count; the others give 0 and False.

    Returns:
        `RowStatistics` with fields `log_prob`, `log_normalizer`, `entropy`, `expected_logit`, `max_logit`, `correct`, each [...].

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> stats = xentjax.row_statistics(jnp.zeros((1, 4)), jnp.array([3]))
        >>> stats.entropy.tolist(), stats.correct.tolist()  # log 4, and the label is among the tied classes
        ([1.38629...], [True])

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, chapter 2.
    """
    return _statistics(checks.examples("row_statistics", logits, labels, axis, axis_name, class_mask, where))


# The compiled parts: outside jit a call runs one cached program, and its derivative another; inside a user's jit XLA inlines them.


@jax.jit
def _cross_entropy(batch, smoothing, class_weights, z_loss):
    r = rows.of(batch)
    stats = statistics.of(r)
    loss = odds.expected(r, stats, odds.surprise, smoothing, class_weights)
    if z_loss is not None:
        total = odds.label_sum(r, smoothing, class_weights)
        loss += jnp.asarray(z_loss, loss.dtype) * total * (stats.reference + stats.log_sum) ** 2
    return statistics.finish(r, stats, loss)


@jax.jit
def _focal(batch, gamma, smoothing, class_weights):
    r = rows.of(batch)
    stats = statistics.of(r)
    loss = odds.expected(r, stats, functools.partial(odds.focal, gamma=gamma), smoothing, class_weights)
    return statistics.finish(r, stats, loss)


@jax.jit
def _top_k(batch, ids, probs):
    r = rows.of(batch)
    stats = statistics.of_row(r)
    loss = jnp.sum(probs.astype(r.values.dtype) * surprises.surprise_at(r, stats, ids), axis=-1)
    return statistics.finish(r, stats, loss)


@jax.jit
def _statistics(batch):
    r = rows.of(batch)
    stats = statistics.of(r)
    u = surprises.surprise(r, stats)
    p = jnp.exp(-u)
    loss = odds.expected(r, stats, odds.surprise)
    return RowStatistics(
        log_prob=-statistics.finish(r, stats, loss),
        log_normalizer=rows.row_value(r, statistics.log_normalizer(r, stats)),
        entropy=rows.row_value(r, surprises.entropy(r, stats)),
        expected_logit=rows.row_value(r, rows.class_sum(r, p * rows.finite_values(r))),
        max_logit=rows.row_value(r, rows.largest(r)),
        correct=statistics.hits(r, stats),
    )
