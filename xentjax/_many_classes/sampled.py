"""Losses for many classes that compute the logits of only a few classes.

These classes are the label and sampled classes, or the candidates in a batch.

The losses on sampled classes share these conventions:

- `hidden` has shape [..., features]. Matrix products are computed in its dtype and accumulate in float32 or wider.
- `kernel` has shape [features, classes], as in flax. With `classes_first=True`, it has shape [classes, features]. In that layout, the
  weights of each class are contiguous in memory. `bias` has shape [classes]. The logit of class k is z_k = hidden·kernel_k + bias_k. Only
  the logits of labels and samples are computed.
- `labels` [...] are integer class indices. If a label is outside [0, classes), the loss of its example is NaN. The gradient with respect to
  `hidden` is then NaN for this example too. A sampled id outside [0, classes) has the same effect on every example that uses this sample.
- `samples` come from `samplers.draw`. They have shape [samples] if all examples share them, or [..., samples] if each example has its own.
  `samples.log_expected_count` is log Q_k, where Q_k is the expected count of class k. A sample with log Q_k = +∞ is left out. If an
  expected count Q_k is 0 (log Q_k = −∞), the loss is the limit for Q_k → 0. This limit is +∞ if a sample has count 0. If the label has
  count 0, the limit is 0 for the softmax loss and for the label's term of the noise-contrastive loss.
- `remove_accidental_hits` tells whether samples that equal the label of an example are left out for that example.
- `where` [...] is True for examples that count. The loss and the gradient of all other examples are exactly 0, whatever they contain.
- Results are float32, or float64 if `hidden` is float64. The gradient of each argument has the dtype of that argument. The gradient of
  `kernel` accumulates in float32 or wider and has the full shape of `kernel`. It is 0 for classes that are neither labels nor samples.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values
from xentjax._linear import layers
from xentjax._losses import softmax
from xentjax._many_classes import arguments
from xentjax._many_classes.arguments import masked
from xentjax._many_classes.samplers import Samples

_compiled = functools.partial(jax.jit, static_argnames=("remove", "classes_first"))
_cross_entropy = values.unchecked(softmax.softmax_cross_entropy)


class _Layer(NamedTuple):
    """The checked arguments of a loss on sampled classes."""

    hidden: Array
    kernel: Array
    bias: Array | None
    labels: Array  # [...]
    ids: Array  # [samples] or [..., samples]
    log_expected: Array  # [samples] or [..., samples]
    where: Array | None  # [...]


class _Scores(NamedTuple):
    """The logits from which a loss on sampled classes is computed."""

    label: Array  # [...]
    sampled: Array  # [..., samples]
    log_expected: Array  # [..., samples], never +∞
    kept: Array  # [..., samples], True for samples that count


def sampled_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    samples: Samples,
    label_log_expected_count: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    remove_accidental_hits: bool = True,
    classes_first: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of the softmax over the label and sampled classes, shape [...].

    loss = log(e^(s_y) + Σ_{j: k_j≠y} e^(s_j)) − s_y, where s_j = z_{k_j} − log Q_{k_j} and s_y = z_y.
    The sum inside the logarithm is an unbiased estimate of Σ_k e^(z_k). With more samples, the loss and its gradient approach the full
    softmax loss and its gradient.
    Gradient: ∂loss/∂z_y = p̂_y − 1 and ∂loss/∂z_{k_j} = p̂_j, where p̂ is the softmax of s.

    With `label_log_expected_count` = log Q_y, the logit of the label is corrected too: s_y = z_y − log Q_y. The loss is then the
    cross-entropy of distinguishing the label from samples that are drawn from Q. If accidental hits are kept, the expected loss
    and the full softmax loss have the same minimizer, for any number of samples.

    Args:
        hidden: [..., features], activations.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices.
        samples: class ids and log Q, both [samples] or [..., samples].
        label_log_expected_count: [...], log Q_y; None: 0, because the label is always included.
        bias: [classes], added to the logits.
        remove_accidental_hits: whether samples that equal the label are left out. The estimate is unbiased only if they are left out.
        classes_first: whether `kernel` has shape [classes, features].
        where: [...], True for examples that count.

    Returns:
        [...], in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> hidden, kernel, labels = jnp.ones((2, 8)), jnp.zeros((8, 50_000)), jnp.array([7, 49_999])
        >>> samples = xentjax.samplers.draw(jax.random.key(0), xentjax.samplers.uniform(50_000), 64)
        >>> xentjax.sampled_softmax_cross_entropy(hidden, kernel, labels, samples=samples).tolist()  # log 50,001
        [10.8197..., 10.8197...]

    Reference:
        Bengio, Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model, 2008; Jean et al.,
        On Using Very Large Target Vocabulary for Neural Machine Translation, 2014, arXiv 1412.2007.
    """
    name = "sampled_softmax_cross_entropy"
    layer = _check(name, hidden, kernel, bias, labels, samples, where, classes_first)
    expected = None if label_log_expected_count is None else _check_label_counts(name, label_log_expected_count, layer)
    return _sampled_softmax(layer, expected, bool(remove_accidental_hits), bool(classes_first))


@_compiled
def _sampled_softmax(layer: _Layer, label_expected: Array | None, remove: bool, classes_first: bool) -> Array:
    scores = _scores(layer, remove, classes_first)
    label = scores.label
    if label_expected is not None:
        label -= masked(numerics.finite(label_expected.astype(label.dtype)), layer.where)
    logits = jnp.concatenate([label[..., None], scores.sampled - numerics.finite(scores.log_expected)], axis=-1)
    exists = jnp.concatenate([jnp.ones_like(scores.kept, shape=(*label.shape, 1)), scores.kept], axis=-1)
    first = jnp.zeros_like(layer.labels, jnp.int32)
    return _cross_entropy(logits, first, class_mask=exists, where=layer.where)


def noise_contrastive_estimation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    samples: Samples,
    label_log_expected_count: ArrayLike,
    bias: ArrayLike | None = None,
    remove_accidental_hits: bool = False,
    classes_first: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Noise-contrastive estimation: binary cross-entropy of the label and of sampled noise, shape [...].

    A classifier must distinguish the label from n samples of a noise distribution P.

    loss = softplus(−(z_y − log Q_y)) + Σ_j softplus(z_{k_j} − log Q_{k_j}), where Q_k = n·P(k).
    The expected loss is minimal if e^(z_k) is the probability of class k in the data, for every class. So at the minimum, the values
    e^(z_k) sum to 1 without any explicit normalization.
    Gradient: ∂loss/∂z_y = −σ(log Q_y − z_y) and ∂loss/∂z_{k_j} = σ(z_{k_j} − log Q_{k_j}).

    Args:
        hidden: [..., features], activations.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices.
        samples: class ids and log Q, both [samples] or [..., samples].
        label_log_expected_count: [...], log Q_y, computed by `samplers.log_expected_count(sampler, labels, count)`.
        bias: [classes], added to the logits.
        remove_accidental_hits: whether samples that equal the label are left out. The expected loss has the minimum described above only if
            these samples are kept.
        classes_first: whether `kernel` has shape [classes, features].
        where: [...], True for examples that count.

    Returns:
        [...], in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> noise, labels = xentjax.samplers.log_uniform(1000), jnp.array([3, 500])
        >>> samples = xentjax.samplers.draw(jax.random.key(0), noise, 16)
        >>> expected = xentjax.samplers.log_expected_count(noise, labels, 16)
        >>> kernel = jnp.zeros((4, 1000))
        >>> loss = xentjax.noise_contrastive_estimation_loss(
        ...     jnp.ones((2, 4)), kernel, labels, samples=samples, label_log_expected_count=expected
        ... )
        >>> bool(loss[0] > loss[1])  # the noise often draws class 3, and rarely class 500
        True

    Reference:
        Gutmann, Hyvärinen, Noise-Contrastive Estimation, 2010; Mnih, Teh, A Fast and Simple Algorithm for Training Neural Probabilistic
        Language Models, 2012, arXiv 1206.6426.
    """
    name = "noise_contrastive_estimation_loss"
    layer = _check(name, hidden, kernel, bias, labels, samples, where, classes_first)
    expected = _check_label_counts(name, label_log_expected_count, layer)
    return _noise_contrastive(layer, expected, bool(remove_accidental_hits), bool(classes_first))


@_compiled
def _noise_contrastive(layer: _Layer, label_expected: Array, remove: bool, classes_first: bool) -> Array:
    scores = _scores(layer, remove, classes_first)
    label = scores.label - masked(label_expected.astype(scores.label.dtype), layer.where)
    return _binary(layer, label, scores.sampled - scores.log_expected, scores.kept)


def negative_sampling_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    samples: Samples,
    bias: ArrayLike | None = None,
    remove_accidental_hits: bool = False,
    classes_first: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Negative sampling: binary cross-entropy of the label and of sampled negatives, shape [...].

    loss = softplus(−z_y) + Σ_j softplus(z_{k_j}).
    With n samples from a distribution P, the expected loss is minimal if e^(z_k) = p_k/(n·P(k)), where p_k is the probability of class k in
    the data.
    Gradient: ∂loss/∂z_y = −σ(−z_y) and ∂loss/∂z_{k_j} = σ(z_{k_j}).

    Args:
        hidden: [..., features], activations; for word vectors, the vectors of the center words.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices.
        samples: class ids, [samples] or [..., samples]. Their log expected counts log Q are ignored, with one exception: a sample with
            log Q = +∞ is left out.
        bias: [classes], added to the logits.
        remove_accidental_hits: whether samples that equal the label are left out. The word2vec program leaves them out, but its paper keeps
            them.
        classes_first: whether `kernel` has shape [classes, features].
        where: [...], True for examples that count.

    Returns:
        [...], in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> vectors, contexts = jnp.ones((100, 8)), jnp.zeros((100, 8))
        >>> words, neighbours = jnp.array([5, 17]), jnp.array([17, 5])
        >>> noise = xentjax.samplers.alias(jnp.arange(1.0, 101.0) ** 0.75)
        >>> samples = xentjax.samplers.draw(jax.random.key(0), noise, 5, shape=(2,))  # five for each word
        >>> xentjax.negative_sampling_loss(vectors[words], contexts, neighbours, samples=samples, classes_first=True).tolist()  # 6·log 2
        [4.15888..., 4.15888...]

    Reference:
        Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, 2013, arXiv 1310.4546.
    """
    layer = _check("negative_sampling_loss", hidden, kernel, bias, labels, samples, where, classes_first)
    return _negative_sampling(layer, bool(remove_accidental_hits), bool(classes_first))


@_compiled
def _negative_sampling(layer: _Layer, remove: bool, classes_first: bool) -> Array:
    scores = _scores(layer, remove, classes_first)
    return _binary(layer, scores.label, scores.sampled, scores.kept)


def in_batch_softmax_cross_entropy(
    queries: ArrayLike,
    candidates: ArrayLike,
    *,
    candidate_log_prob: ArrayLike | None = None,
    candidate_ids: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy loss for identifying each query's own candidate in the batch, shape [batch].

    loss_i = −log p_ii, where p_ij is the softmax of s_ij over j, and s_ij = queries_i·candidates_j/τ − log P(j).
    Gradient: ∂loss_i/∂s_ij = p_ij − [i = j].

    A frequent candidate is a negative more often than a rare candidate. `candidate_log_prob` corrects for this.

    Args:
        queries: [batch, features].
        candidates: [batch, features]; candidate i is the positive of query i.
        candidate_log_prob: [batch], log P(j), where P(j) is the probability that candidate j is in a batch. Adding the same constant to all
            entries changes nothing.
        candidate_ids: [batch], integers that identify the items. If another candidate has the same id as candidate i, it is not a negative
            of query i.
        temperature: τ > 0, divides the products. For unit vectors, use a small value, for example 0.05.
        where: [batch], True for pairs that count. The candidate of a pair that does not count is not a negative of any query.

    Returns:
        [batch], in nats, float32, or float64 if `queries` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `temperature` is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> items = jnp.array([4, 9, 4])
        >>> xentjax.in_batch_softmax_cross_entropy(jnp.zeros((3, 8)), jnp.zeros((3, 8)), candidate_ids=items).tolist()  # log 2, 3, 2
        [0.69314..., 1.09861..., 0.69314...]

    Reference:
        Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations, 2019.
    """
    name = "in_batch_softmax_cross_entropy"
    q, c = checks.floating(name, "queries", queries), checks.floating(name, "candidates", candidates)
    if q.ndim != 2:
        raise ValueError(f"{name}: queries must have shape (batch, features); got {q.shape}. Use jax.vmap for several batches.")
    checks.same_shape(name, "candidates", c, q.shape, "the shape of queries")
    p = None if candidate_log_prob is None else checks.floating(name, "candidate_log_prob", candidate_log_prob)
    ids = None if candidate_ids is None else checks.identifiers(name, "candidate_ids", candidate_ids)
    counts = checks.where_mask(name, where, q.shape[:1], "one per query")
    for argument, x in (("candidate_log_prob", p), ("candidate_ids", ids)):
        if x is not None:
            checks.same_shape(name, argument, x, q.shape[:1], "one per query")
    for argument, x in (("queries", q), ("candidates", c), *([] if p is None else [("candidate_log_prob", p)])):
        values.finite(name, argument, x, counts)
    return _in_batch(q, c, p, ids, checks.positive(name, "temperature", temperature), counts)


@jax.jit
def _in_batch(
    queries: Array, candidates: Array, log_prob: Array | None, ids: Array | None, temperature: ArrayLike, where: Array | None
) -> Array:
    dtype = numerics.accumulation_dtype(queries.dtype)
    size = queries.shape[0]
    q, c = (masked(x, where) for x in (queries, candidates.astype(queries.dtype)))
    logits = jnp.einsum("if,jf->ij", q, c, preferred_element_type=dtype) / jnp.asarray(temperature, dtype)
    if log_prob is not None:
        logits -= jnp.broadcast_to(masked(numerics.finite(log_prob.astype(dtype)), where)[None, :], logits.shape)
    exists = jnp.ones((size, size), bool) if where is None else jnp.broadcast_to(where[None, :], (size, size))
    if ids is not None:
        exists &= (ids[:, None] != ids[None, :]) | jnp.eye(size, dtype=bool)
    return _cross_entropy(logits, jnp.arange(size), class_mask=exists, where=where)


def _check(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    labels: ArrayLike,
    samples: Samples,
    where: ArrayLike | None,
    classes_first: bool,
) -> _Layer:
    """The checked arguments of a loss on sampled classes."""
    h, k, b, counts, _ = layers.arguments(function, hidden, kernel, bias, where, None, classes_first)
    leading = h.shape[:-1]
    y = arguments.class_indices(function, labels, leading, k.shape[0 if classes_first else 1], counts)
    arguments.check_fields(function, "samples", samples, Samples._fields, "the result of samplers.draw")
    ids = checks.integers(function, "samples.ids", samples.ids)
    if ids.shape[:-1] not in ((), leading) or ids.ndim == 0:
        own = f"({''.join(f'{n}, ' for n in leading)}samples)"
        either = f" or {own}, the leading axes of hidden first" if leading else ""
        raise ValueError(f"{function}: samples.ids must have shape (samples,){either}; got {ids.shape}.")
    expected = checks.floating(function, "samples.log_expected_count", samples.log_expected_count)
    checks.same_shape(function, "samples.log_expected_count", expected, ids.shape, "the shape of samples.ids")
    layers.check_values(function, k, b, classes_first)
    values.not_nan(function, "samples.log_expected_count", expected, counts if ids.ndim > 1 else None)
    kept = expected != jnp.inf
    kept = kept if counts is None or ids.ndim == 1 else kept & counts[..., None]
    values.indices(function, "samples.ids", ids, k.shape[0 if classes_first else 1], kept)
    return _Layer(h, k, b, y, ids, expected, counts)


def _check_label_counts(function: str, expected: ArrayLike, layer: _Layer) -> Array:
    """The checked log expected counts of the labels."""
    x = checks.floating(function, "label_log_expected_count", expected)
    values.not_nan(function, "label_log_expected_count", x, layer.where)
    return checks.same_shape(function, "label_log_expected_count", x, layer.labels.shape, "the shape of labels")


def _binary(layer: _Layer, label: Array, sampled: Array, kept: Array) -> Array:
    """softplus(−label) + Σ softplus(sampled) over the samples in `kept`; 0 in examples that do not count."""
    noise = numerics.where(kept, numerics.softplus(numerics.where(kept, sampled, 0)), 0)
    return masked(numerics.softplus(-label) + jnp.sum(noise, axis=-1), layer.where)


def _scores(layer: _Layer, remove: bool, classes_first: bool) -> _Scores:
    layer = _prepared(layer)
    label, sampled = _logits(layer, classes_first)
    counts = layer.log_expected != jnp.inf
    kept = _for_all(counts, sampled)
    if remove:
        kept &= _for_all(layer.ids, sampled) != jnp.broadcast_to(layer.labels[..., None], sampled.shape)
    return _Scores(label, sampled, _for_all(numerics.where(counts, layer.log_expected, 0), sampled), kept)


def _prepared(layer: _Layer) -> _Layer:
    """Indices in one dtype, log counts in the dtype of the arithmetic, and 0 in examples that do not count."""
    wide = max(layer.labels.dtype, layer.ids.dtype, key=lambda d: d.itemsize)
    ids, expected = layer.ids.astype(wide), layer.log_expected.astype(numerics.accumulation_dtype(layer.hidden.dtype))
    if ids.ndim == layer.hidden.ndim:  # each example has its own samples
        ids, expected = masked(ids, layer.where), masked(expected, layer.where)
    labels = masked(layer.labels.astype(wide), layer.where)
    return layer._replace(hidden=masked(layer.hidden, layer.where), labels=labels, ids=ids, log_expected=expected)


def _logits(layer: _Layer, classes_first: bool) -> tuple[Array, Array]:
    """The logits of labels [...] and samples [..., samples].

    Labels and samples share one gather, so the gradient of the kernel is one scatter.
    """
    h, y, ids, dtype = layer.hidden, layer.labels, layer.ids, numerics.accumulation_dtype(layer.hidden.dtype)
    axis, index = 0 if classes_first else 1, jnp.concatenate([y.reshape(-1), ids.reshape(-1)])
    classes = arguments.take_classes(layer.kernel, index, axis, dtype).astype(h.dtype)
    of_labels, of_samples = classes[: y.size].reshape(h.shape), classes[y.size :].reshape(*ids.shape, h.shape[-1])
    # Elementwise products in float32: in half precision, the label's part of the gradient of `hidden` is then not rounded.
    label = jnp.sum(h.astype(dtype) * of_labels.astype(dtype), axis=-1)
    each = "...nf" if ids.ndim > 1 else "nf"
    sampled = jnp.einsum(f"...f,{each}->...n", h, of_samples, preferred_element_type=dtype)
    if layer.bias is not None:
        shift = arguments.take_classes(layer.bias, index, 0, dtype)
        label, sampled = label + shift[: y.size].reshape(y.shape), sampled + _for_all(shift[y.size :].reshape(ids.shape), sampled)
    inside = (index >= 0) & (index < layer.kernel.shape[axis])
    of_labels, of_samples = inside[: y.size].reshape(y.shape), inside[y.size :].reshape(ids.shape)
    return numerics.nan_unless(of_labels, label), numerics.nan_unless(_for_all(of_samples, sampled), sampled)


def _for_all(per_sample: Array, like: Array) -> Array:
    """[samples] or [..., samples], broadcast to the shape [..., samples] of `like`."""
    return jnp.broadcast_to(numerics.expand_leading(per_sample, like.ndim), like.shape)
