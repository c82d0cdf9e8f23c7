"""Metrics that are means over examples, one value each; what they share stands in `xentjax.metrics`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, surprises, values
from xentjax._losses.softmax import softmax_cross_entropy
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts


def accuracy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Whether the class with the largest logit is the label, 1 or 0 per example [...].

    hit = 1 if y = argmax_k z_k, else 0;  of tied classes the first is predicted, as `jnp.argmax` does. Gradient: 0.

    A label of probability 0 (a logit of −∞, a class outside `class_mask`) is never hit.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...], class indices.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits); NaN for a bad label or NaN logits.

    Raises:
        TypeError: a dtype that does not fit; labels that are distributions.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), jnp.array([0, 0, -100])
        >>> where = labels != -100
        >>> hits = xentjax.metrics.accuracy(logits, labels, where=where)
        >>> float(xentjax.weighted_mean(hits, where=where))  # of the two examples that count
        0.5

    Reference:
        Pedregosa et al., Scikit-learn: Machine Learning in Python, 2011, arXiv 1201.0490 (accuracy_score of the argmax).
    """
    return _hits(_counts.indexed("accuracy", logits, labels, axis, axis_name, class_mask, where), 1, first=True)


def top_k_accuracy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    k: int,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Whether the label is among the k classes with the largest logits, 1 or 0 per example [...].

    hit = 1 if #{j: z_j > z_y} + #{j > y: z_j = z_y} < k, else 0. Gradient: 0.

    Of tied classes the last comes first, as in scikit-learn's `top_k_accuracy_score`; `accuracy` takes the first, as `argmax` does.
    A label of probability 0 (a logit of −∞, a class outside `class_mask`) is never hit.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...], class indices.
        k: how many classes may be named, at least 1.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits); NaN for a bad label or NaN logits.

    Raises:
        TypeError: a dtype that does not fit; labels that are distributions; a `k` that is not an integer.
        ValueError: a shape that does not fit, `k` below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([[3.0, 2.0, 1.0, 0.0]] * 3), jnp.array([0, 1, 2])
        >>> [xentjax.metrics.top_k_accuracy(logits, labels, k=k).tolist() for k in (1, 2)]
        [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]

    Reference:
        Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2014, arXiv 1409.0575.
    """
    name = "top_k_accuracy"
    batch = _counts.indexed(name, logits, labels, axis, axis_name, class_mask, where)
    return _hits(batch, checks.count(name, "k", k), first=False)


def brier_score(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Squared distance between the predicted and the true distribution, one value per example [...].

    score = Σ_k (p_k − t_k)²,  p = softmax(z), t the labels; in [0, 2] for class indices.
    Gradient: ∂score/∂z_j = 2 p_j (p_j − t_j − Σ_k p_k (p_k − t_k));  ∂score/∂labels = 2 (t − p).

    The mean is scikit-learn's `brier_score_loss` with `scale_by_half=False`; for two classes its default is half of this one.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.metrics.brier_score(jnp.array([[0.0, 0.0], [20.0, 0.0]]), jnp.array([0, 0])).tolist()  # 2σ(−20)² is not 0
        [0.5, 8.4967...e-18]

    Reference:
        Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    return _brier(checks.examples("brier_score", logits, labels, axis, axis_name, class_mask, where))


def negative_log_likelihood(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Surprise at the label, one value per example [...]: `softmax_cross_entropy` without options.

    nll = −log p_y,  p = softmax(z);  for distributions −Σ_k labels_k log p_k. Gradient: ∂nll/∂z = s·p − t,  s = Σ t.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
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
        >>> nll = xentjax.metrics.negative_log_likelihood(jnp.zeros((2, 256)), jnp.array([7, 9]))
        >>> (nll / jnp.log(2.0)).tolist()  # in bits: a byte without a model costs 8
        [8.0, 8.0]

    Reference:
        Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4.
    """
    checks.examples("negative_log_likelihood", logits, labels, axis, axis_name, class_mask, where)  # errors carry this name
    loss = values.unchecked(softmax_cross_entropy)
    return loss(logits, labels, axis=axis, axis_name=axis_name, class_mask=class_mask, where=where)


def perplexity(losses: WeightedSum) -> Array:
    """Perplexity of a weighted sum of losses, [] or the shape of the sum: the number of equally likely choices that surprise as much.

    perplexity = exp(Σ w·nll / Σ w);  1 if nothing counts. Gradient: perplexity·w_i/Σ w by the loss of example i.

    It takes the sums, not the mean, so that they can first be added over batches and devices: a mean of perplexities is not one.

    Args:
        losses: sums of losses in nats, from `xentjax.weighted_sum`.

    Returns:
        The shape and dtype of `losses.total`.

    Raises:
        TypeError: `losses` is not a `WeightedSum`.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
        >>> short, long = jnp.array([0]), jnp.array([0, 1])
        >>> parts = [xentjax.weighted_sum(xentjax.softmax_cross_entropy(logits[: len(y)], y)) for y in (short, long)]
        >>> float(xentjax.metrics.perplexity(sum(parts)))  # (2·2·2)^(1/3)
        2.0

    Reference:
        Jelinek, Mercer, Bahl, Baker, Perplexity: a measure of the difficulty of speech recognition tasks, 1977.
    """
    if not isinstance(losses, WeightedSum):
        raise TypeError(f"perplexity: losses must be a WeightedSum; got {type(losses).__name__}. Use xentjax.weighted_sum(losses).")
    return jnp.exp(losses.mean())


@functools.partial(jax.jit, static_argnames=("k", "first"))
def _hits(batch, k, first):
    return _counts.hits(rows.of(batch), k, first)


@jax.jit
def _brier(batch):
    r = rows.of(batch)
    a = surprises.class_log_odds(r)
    t = rows.on_label(r).astype(a.dtype) if r.labels_are_indices else r.labels
    assert t is not None
    # 1 − p is σ(−a), which keeps the little that a confident prediction misses
    distance = numerics.where(a > 0, (1 - t) - numerics.sigmoid(-a), numerics.sigmoid(a) - t)
    score = rows.class_sum(r, rows.masked(distance, r.where) ** 2)
    if r.labels_are_indices:  # a product: the derivative is NaN as well
        score = numerics.nan_unless(rows.in_range(r), score)
    return rows.row_value(r, score)
