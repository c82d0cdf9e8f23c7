"""Per-example metrics. Shared conventions are documented in `xentjax.metrics`."""

from __future__ import annotations

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
    """Accuracy per example, shape [...].

    accuracy = 1 if y = argmax_k z_k, else 0, where z are the logits and y is the label.
    Gradient: 0.

    If several classes share the largest logit, the first of these classes is predicted, as in `jnp.argmax`. `top_k_accuracy` and
    `RowStatistics.correct` have other rules for ties, which are listed in `xentjax.metrics`. If the label has probability 0, the
    accuracy is 0. Such a label has a logit of −∞, or `class_mask` is False for its class.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64. NaN for an out-of-range label or a NaN logit.

    Raises:
        TypeError: an argument has the wrong dtype, or `labels` are soft labels.
        ValueError: an argument has the wrong shape.

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


@functools.partial(jax.jit, static_argnames=("k", "first"))
def _hits(batch: rows.Examples, k: int, first: bool) -> Array:
    return hits(rows.of(batch), k, first)


def hits(r: rows.Rows, k: int, first: bool) -> Array:
    """1 if fewer than k classes are ranked before the label, else 0, shape [...], in the accumulation dtype.

    Classes with equal logits are ranked by their index, in ascending order if `first` is True, otherwise in descending order. The result is
    NaN if the label is out of range or a logit is NaN. It is 0 if the example does not count or its label is impossible.
    """
    assert r.labels is not None
    most = jnp.finfo(r.values.dtype).max  # represents ∞, since logits of any size are compared
    z = rows.masked(jnp.clip(r.values, -most, most), r.where, r.class_mask)
    own = rows.at_label(r, z)
    possible = ~(own <= -most)  # also if `own` is NaN
    if r.class_mask is not None:
        possible &= rows.at_label(r, r.class_mask)
    index, y, label_logit = rows.class_index(r), r.labels[..., None], rows.as_column(r, own)
    ahead = (z > label_logit) | ((z == label_logit) & (index < y if first else index > y))
    rank = rows.class_sum(r, (ahead if r.class_mask is None else ahead & r.class_mask).astype(jnp.int32))
    hit = ((rank < k) & possible).astype(z.dtype)
    valid = rows.in_range(r) & ~jnp.isnan(rows.class_sum(r, 0 * z))  # a sum of zeros, or NaN
    return rows.row_value(r, numerics.nan_unless(valid, hit))


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
    """Top-k accuracy per example, shape [...].

    accuracy = 1 if #{j: z_j > z_y} + #{j > y: z_j = z_y} < k, else 0, where z are the logits and y is the label.
    Gradient: 0.

    The value is 1 if the logit of the label is among the k largest logits. Among classes with equal logits, the class with the largest
    index is ranked first, as in scikit-learn's `top_k_accuracy_score`. `accuracy` predicts the class with the smallest index among them,
    as `jnp.argmax` does. So with ties, `top_k_accuracy` with `k=1` can differ from `accuracy`. If the label has probability 0, the value
    is 0. Such a label has a logit of −∞, or `class_mask` is False for its class.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices.
        k: number of predicted classes, at least 1.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64. NaN for an out-of-range label or a NaN logit.

    Raises:
        TypeError: an argument has the wrong dtype, `labels` are soft labels, or `k` is not an integer.
        ValueError: an argument has the wrong shape, or `k` is below 1.

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
    """Brier score per example, shape [...].

    score = Σ_k (p_k − t_k)² with logits z, p = softmax(z) and labels t. For a class index y, t is the one-hot distribution [k = y], and
    the score is in [0, 2].
    Gradient: ∂score/∂z_j = 2 p_j (p_j − t_j − Σ_k p_k (p_k − t_k)) and ∂score/∂t = 2 (t − p).

    The mean score equals scikit-learn's `brier_score_loss` with `scale_by_half=False`. For two classes, scikit-learn by default returns
    half of this mean.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.metrics.brier_score(jnp.array([[0.0, 0.0], [20.0, 0.0]]), jnp.array([0, 0])).tolist()  # 2σ(−20)² is not 0
        [0.5, 8.4967...e-18]

    Reference:
        Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    return _brier(checks.examples("brier_score", logits, labels, axis, axis_name, class_mask, where))


@jax.jit
def _brier(batch: rows.Examples) -> Array:
    r = rows.of(batch)
    a = surprises.class_log_odds(r)
    t = rows.on_label(r).astype(a.dtype) if r.labels_are_indices else r.given_labels
    # 1 − p is σ(−a), which stays accurate if p is near 1
    distance = numerics.where(a > 0, (1 - t) - numerics.sigmoid(-a), numerics.sigmoid(a) - t)
    score = rows.class_sum(r, rows.masked(distance, r.where) ** 2)
    if r.labels_are_indices:  # the derivative becomes NaN as well
        score = numerics.nan_unless(rows.in_range(r), score)
    return rows.row_value(r, score)


def negative_log_likelihood(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Negative log-likelihood of the label per example, shape [...].

    For logits z and a class index y, nll = −log p_y with p = softmax(z). For soft labels t, nll = −Σ_k t_k log p_k.
    Gradient: ∂nll/∂z = s·p − t with s = Σ_k t_k. For an index y, t is the one-hot distribution [k = y].

    The result equals `xentjax.softmax_cross_entropy` with default options.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
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
        >>> nll = xentjax.metrics.negative_log_likelihood(jnp.zeros((2, 256)), jnp.array([7, 9]))
        >>> (nll / jnp.log(2.0)).tolist()  # in bits: a byte costs 8 if all bytes are equally likely
        [8.0, 8.0]

    Reference:
        Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4.
    """
    checks.examples("negative_log_likelihood", logits, labels, axis, axis_name, class_mask, where)  # errors carry this name
    loss = values.unchecked(softmax_cross_entropy)
    return loss(logits, labels, axis=axis, axis_name=axis_name, class_mask=class_mask, where=where)


def perplexity(losses: WeightedSum) -> Array:
    """Perplexity of a weighted sum of losses, with the shape of `losses.total`. The shape is [] for a sum over all axes.

    perplexity = exp(Σ w·nll / Σ w), where nll are the losses and w are the weights. It is 1 if no example counts.
    Gradient: ∂perplexity/∂nll_i = perplexity·w_i/Σ w.

    If the perplexity is n, the mean loss equals the loss of a uniform prediction over n classes. The mean of the perplexities of several
    batches is not the perplexity of all their examples. So the argument is a `WeightedSum`. Add the weighted sums of all batches and
    devices before the call.

    Args:
        losses: weighted sum of losses in nats, from `xentjax.weighted_sum`.

    Returns:
        An array with the shape and dtype of `losses.total`.

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
