"""Losses for very many classes that look at a few of them: the label, and samples or the rest of the batch.

What the losses on samples share:

- `hidden` [..., features], whose dtype is that of the matrix products (they accumulate in float32); `kernel` [features, classes] (flax),
  or [classes, features] with `classes_first=True`, where a class is one piece of memory; `bias` [classes]. The logit of class k is
  z_k = hidden·kernel_k + bias_k. Only the logits of labels and samples are made.
- `labels` [...], integer. An index outside [0, classes) makes the value of its example and the gradient of its `hidden` NaN, and so does
  a sampled one for every example that it is sampled for.
- `samples`: `draw_samples` makes them, [samples] for all examples or [..., samples] for each its own. With Q_k the expected count of
  class k, `samples.log_expected_count` is log Q_k; +∞ leaves a sample out. An expected count of 0, log Q_k = −∞, gives
  the limit of small counts: +∞ for a sample of that class, 0 for a label of that class.
- `remove_accidental_hits`: whether samples that are the example's own label are left out.
- `where` [...], which examples count. The others cost exactly 0 with gradient exactly 0, whatever they hold.
- Results are float32, or float64 for float64 `hidden`; gradients come back in the dtype of their argument. That of `kernel` is added up in
  float32 and has the full shape of `kernel`, 0 in classes that nobody looked at.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values
from xentjax._linear import layers
from xentjax._losses import softmax
from xentjax._many_classes.samplers import Samples


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
    """Cross-entropy of the softmax over the label and sampled classes, one value per example [...].

    loss = log(e^(s_y) + Σ_{j: k_j≠y} e^(s_j)) − s_y,  s_j = z_{k_j} − log Q_{k_j},  s_y = z_y.
    The sum is an unbiased estimate of Σ_k e^(z_k), so loss and gradient tend to those of the full softmax as samples grow in number.
    Gradient: with p̂ the softmax of s, ∂loss/∂z_y = p̂_y − 1 and ∂loss/∂z_{k_j} = p̂_j.

    With `label_log_expected_count` = log Q_y the label is corrected too, s_y = z_y − log Q_y: which of the classes at hand is the label,
    if the others came from Q? With hits kept, its expectation is least where that of the full softmax is, however few the samples.

    Args:
        hidden: [..., features], activations.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices.
        samples: ids and log Q, both [samples] or [..., samples].
        label_log_expected_count: [...], log Q_y; None for 0, because the label takes part with certainty.
        bias: [classes], added to the logits.
        remove_accidental_hits: whether samples equal to the label are left out; the estimate is unbiased only without them.
        classes_first: whether `kernel` is [classes, features].
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> hidden, kernel, labels = jnp.ones((2, 8)), jnp.zeros((8, 50_000)), jnp.array([7, 49_999])
        >>> samples = xentjax.draw_samples(jax.random.key(0), xentjax.uniform_sampler(50_000), 64)
        >>> xentjax.sampled_softmax_cross_entropy(hidden, kernel, labels, samples=samples).tolist()  # log 50,001
        [10.8197..., 10.8197...]

    Reference:
        Bengio, Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model, 2008; Jean et al.,
        On Using Very Large Target Vocabulary for Neural Machine Translation, 2014, arXiv 1412.2007.
    """
    name = "sampled_softmax_cross_entropy"
    layer = _check(name, hidden, kernel, bias, labels, samples, where, classes_first)
    expected = None if label_log_expected_count is None else _label_counts(name, label_log_expected_count, layer)
    return _sampled_softmax(layer, expected, bool(remove_accidental_hits), bool(classes_first))


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
    """Cross-entropy of telling the label from sampled noise, one value per example [...].

    loss = softplus(−(z_y − log Q_y)) + Σ_j softplus(z_{k_j} − log Q_{k_j}),  Q_k = n·P(k) for n samples of a noise P.
    Its expectation is least where e^(z_k) are the probabilities of the data, normalised without being told to.
    Gradient: ∂loss/∂z_y = −σ(log Q_y − z_y) and ∂loss/∂z_{k_j} = σ(z_{k_j} − log Q_{k_j}).

    Args:
        hidden: [..., features], activations.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices.
        samples: ids and log Q, both [samples] or [..., samples].
        label_log_expected_count: [...], log Q_y: `log_expected_count(sampler, labels, count)`.
        bias: [classes], added to the logits.
        remove_accidental_hits: whether samples equal to the label are left out; with them the least expectation is as said.
        classes_first: whether `kernel` is [classes, features].
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> noise, labels = xentjax.log_uniform_sampler(1000), jnp.array([3, 500])
        >>> samples = xentjax.draw_samples(jax.random.key(0), noise, 16)
        >>> expected = xentjax.log_expected_count(noise, labels, 16)
        >>> kernel = jnp.zeros((4, 1000))
        >>> loss = xentjax.noise_contrastive_estimation_loss(
        ...     jnp.ones((2, 4)), kernel, labels, samples=samples, label_log_expected_count=expected
        ... )
        >>> bool(loss[0] > loss[1])  # noise makes class 3 often, class 500 seldom
        True

    Reference:
        Gutmann, Hyvärinen, Noise-Contrastive Estimation, 2010; Mnih, Teh, A Fast and Simple Algorithm for Training Neural Probabilistic
        Language Models, 2012, arXiv 1206.6426.
    """
    name = "noise_contrastive_estimation_loss"
    layer = _check(name, hidden, kernel, bias, labels, samples, where, classes_first)
    expected = _label_counts(name, label_log_expected_count, layer)
    return _noise_contrastive(layer, expected, bool(remove_accidental_hits), bool(classes_first))


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
    """Sum of the binary cross-entropies of the label, a yes, and of sampled classes, each a no, one value per example [...].

    loss = softplus(−z_y) + Σ_j softplus(z_{k_j}).
    Its expectation over n samples of P is least where e^(z_k) = p_k/(n·P(k)), p the probabilities of the data.
    Gradient: ∂loss/∂z_y = −σ(−z_y) and ∂loss/∂z_{k_j} = σ(z_{k_j}).

    Args:
        hidden: [..., features], activations; for word vectors those of the words in the middle.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices.
        samples: ids, [samples] or [..., samples]; expected counts do not enter, but +∞ leaves a sample out.
        bias: [classes], added to the logits.
        remove_accidental_hits: whether samples equal to the label are left out, as the word2vec program does and its paper does not.
        classes_first: whether `kernel` is [classes, features].
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> vectors, contexts = jnp.ones((100, 8)), jnp.zeros((100, 8))
        >>> words, neighbours = jnp.array([5, 17]), jnp.array([17, 5])
        >>> noise = xentjax.alias_sampler(jnp.arange(1.0, 101.0) ** 0.75)
        >>> samples = xentjax.draw_samples(jax.random.key(0), noise, 5, shape=(2,))  # five for each
        >>> xentjax.negative_sampling_loss(vectors[words], contexts, neighbours, samples=samples, classes_first=True).tolist()  # 6·log 2
        [4.15888..., 4.15888...]

    Reference:
        Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, 2013, arXiv 1310.4546.
    """
    layer = _check("negative_sampling_loss", hidden, kernel, bias, labels, samples, where, classes_first)
    return _negative_sampling(layer, bool(remove_accidental_hits), bool(classes_first))


def in_batch_softmax_cross_entropy(
    queries: ArrayLike,
    candidates: ArrayLike,
    *,
    candidate_log_prob: ArrayLike | None = None,
    candidate_ids: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of finding each query's own candidate among those of the batch, one value per query [batch].

    loss_i = −log softmax_j(s_ij) at j = i,  s_ij = queries_i·candidates_j/τ − log P(j).
    Gradient: with p the softmax over j, ∂loss_i/∂s_ij = p_ij − [i = j].

    Candidates that come often are negatives often; `candidate_log_prob` takes that back.

    Args:
        queries: [batch, features].
        candidates: [batch, features], row i the one that query i is to find.
        candidate_log_prob: [batch], log P(j), how likely a candidate is in a batch; a constant in it changes nothing.
        candidate_ids: [batch], integer: which item a candidate is. The same item elsewhere in the batch is no negative.
        temperature: τ > 0, divides the products; for vectors of length 1, 0.05 say.
        where: [batch], which pairs count; the others are no candidates either.

    Returns:
        [batch], nats, float32 (float64 for float64 queries).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `temperature` of 0 or below.

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
        raise ValueError(f"{name}: queries must have shape (batch, features); got {q.shape}. Use jax.vmap over further axes.")
    checks.same_shape(name, "candidates", c, q.shape, "the shape of queries")
    p = None if candidate_log_prob is None else checks.floating(name, "candidate_log_prob", candidate_log_prob)
    ids = None if candidate_ids is None else checks.identifiers(name, "candidate_ids", candidate_ids)
    counts = checks.counted(name, where, q.shape[:1], "one per query")
    for argument, x in (("candidate_log_prob", p), ("candidate_ids", ids)):
        if x is not None:
            checks.same_shape(name, argument, x, q.shape[:1], "one per query")
    for argument, x in (("queries", q), ("candidates", c), *([] if p is None else [("candidate_log_prob", p)])):
        values.finite(name, argument, x, counts)
    return _in_batch(q, c, p, ids, checks.positive(name, "temperature", temperature), counts)


class _Layer(NamedTuple):
    """The checked arguments of a loss on samples."""

    hidden: Array
    kernel: Array
    bias: Array | None
    labels: Array  # [...]
    ids: Array  # [samples] or [..., samples]
    log_expected: Array  # likewise
    where: Array | None  # [...]


class _Scores(NamedTuple):
    """The logits a loss on samples is made of."""

    label: Array  # [...]
    sampled: Array  # [..., samples]
    log_expected: Array  # [..., samples], finite
    kept: Array  # [..., samples] which samples count


def class_indices(function: str, labels: ArrayLike, leading: tuple[int, ...], classes: int, where: Array | None) -> Array:
    """Labels of examples with these leading axes, integer; distributions are not accepted."""
    y = checks.integers(function, "labels", labels)
    checks.same_shape(function, "labels", y, leading, "the shape of hidden without its feature axis")
    return layers.labels(function, y, leading, classes, where)


def taken(layer: Array, index: Array, axis: int, dtype: jnp.dtype) -> Array:
    """Entries of `layer` along `axis`, which comes first, at `index`; their gradients are added up in `dtype` and cast once."""
    return jnp.moveaxis(jnp.take(layer.astype(dtype), index, axis=axis, mode="clip"), axis, 0)


def counted(where: Array | None, x: Array) -> Array:
    """`x` [...] or [..., n], with 0 in examples that do not count."""
    if where is None:
        return x
    return numerics.where(where if x.ndim == where.ndim else where[..., None], x, 0)


def _check(function, hidden, kernel, bias, labels, samples, where, classes_first) -> _Layer:
    h, k, b, counts, _ = layers.arguments(function, hidden, kernel, bias, where, None, classes_first)
    leading = h.shape[:-1]
    y = class_indices(function, labels, leading, k.shape[0 if classes_first else 1], counts)
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


def _label_counts(function, expected, layer):
    x = checks.floating(function, "label_log_expected_count", expected)
    values.not_nan(function, "label_log_expected_count", x, layer.where)
    return checks.same_shape(function, "label_log_expected_count", x, layer.labels.shape, "the shape of labels")


@functools.partial(jax.jit, static_argnames=("remove", "classes_first"))
def _sampled_softmax(layer, label_expected, remove, classes_first):
    found = _scores(layer, remove, classes_first)
    label = found.label
    if label_expected is not None:
        label -= counted(layer.where, numerics.finite(label_expected.astype(label.dtype)))
    logits = jnp.concatenate([label[..., None], found.sampled - numerics.finite(found.log_expected)], axis=-1)
    exists = jnp.concatenate([jnp.ones_like(found.kept, shape=(*label.shape, 1)), found.kept], axis=-1)
    first = jnp.zeros_like(layer.labels, jnp.int32)
    return values.unchecked(softmax.softmax_cross_entropy)(logits, first, class_mask=exists, where=layer.where)


@functools.partial(jax.jit, static_argnames=("remove", "classes_first"))
def _noise_contrastive(layer, label_expected, remove, classes_first):
    found = _scores(layer, remove, classes_first)
    label = found.label - counted(layer.where, label_expected.astype(found.label.dtype))
    return _binary(layer, label, found.sampled - found.log_expected, found.kept)


@functools.partial(jax.jit, static_argnames=("remove", "classes_first"))
def _negative_sampling(layer, remove, classes_first):
    found = _scores(layer, remove, classes_first)
    return _binary(layer, found.label, found.sampled, found.kept)


@jax.jit
def _in_batch(queries, candidates, log_prob, ids, temperature, where):
    dtype = numerics.accumulation_dtype(queries.dtype)
    size = queries.shape[0]
    q, c = (counted(where, x) for x in (queries, candidates.astype(queries.dtype)))
    logits = jnp.einsum("if,jf->ij", q, c, preferred_element_type=dtype) / jnp.asarray(temperature, dtype)
    if log_prob is not None:
        logits -= jnp.broadcast_to(counted(where, numerics.finite(log_prob.astype(dtype)))[None, :], logits.shape)
    exists = jnp.ones((size, size), bool) if where is None else jnp.broadcast_to(where[None, :], (size, size))
    if ids is not None:
        exists &= (ids[:, None] != ids[None, :]) | jnp.eye(size, dtype=bool)
    return values.unchecked(softmax.softmax_cross_entropy)(logits, jnp.arange(size), class_mask=exists, where=where)


def _binary(layer, label, sampled, kept):
    """softplus(−label) + Σ softplus(sampled), 0 where an example does not count."""
    noise = numerics.where(kept, numerics.softplus(numerics.where(kept, sampled, 0)), 0)
    return counted(layer.where, numerics.softplus(-label) + jnp.sum(noise, axis=-1))


def _scores(layer: _Layer, remove: bool, classes_first: bool) -> _Scores:
    layer = _prepared(layer)
    label, sampled = _logits(layer, classes_first)
    counts = layer.log_expected != jnp.inf
    kept = _for_all(counts, sampled)
    if remove:
        kept &= _for_all(layer.ids, sampled) != jnp.broadcast_to(layer.labels[..., None], sampled.shape)
    return _Scores(label, sampled, _for_all(numerics.where(counts, layer.log_expected, 0), sampled), kept)


def _prepared(layer: _Layer) -> _Layer:
    """Indices of one dtype, numbers in that of the arithmetic, and 0 in examples that do not count."""
    wide = max(layer.labels.dtype, layer.ids.dtype, key=lambda d: d.itemsize)
    ids, expected = layer.ids.astype(wide), layer.log_expected.astype(numerics.accumulation_dtype(layer.hidden.dtype))
    if ids.ndim == layer.hidden.ndim:  # each example has its own
        ids, expected = counted(layer.where, ids), counted(layer.where, expected)
    labels = counted(layer.where, layer.labels.astype(wide))
    return layer._replace(hidden=counted(layer.where, layer.hidden), labels=labels, ids=ids, log_expected=expected)


def _logits(layer: _Layer, classes_first: bool) -> tuple[Array, Array]:
    """The logits of labels [...] and samples [..., samples], from one gather, so that the gradient of the kernel is one scatter."""
    h, y, ids, dtype = layer.hidden, layer.labels, layer.ids, numerics.accumulation_dtype(layer.hidden.dtype)
    axis, index = 0 if classes_first else 1, jnp.concatenate([y.reshape(-1), ids.reshape(-1)])
    classes = taken(layer.kernel, index, axis, dtype).astype(h.dtype)
    of_labels, of_samples = classes[: y.size].reshape(h.shape), classes[y.size :].reshape(*ids.shape, h.shape[-1])
    # elementwise in float32: in half precision the gradient of hidden then gets this part unrounded
    label = jnp.sum(h.astype(dtype) * of_labels.astype(dtype), axis=-1)
    each = "...nf" if ids.ndim > 1 else "nf"
    sampled = jnp.einsum(f"...f,{each}->...n", h, of_samples, preferred_element_type=dtype)
    if layer.bias is not None:
        shift = taken(layer.bias, index, 0, dtype)
        label, sampled = label + shift[: y.size].reshape(y.shape), sampled + _for_all(shift[y.size :].reshape(ids.shape), sampled)
    inside = (index >= 0) & (index < layer.kernel.shape[axis])
    of_labels, of_samples = inside[: y.size].reshape(y.shape), inside[y.size :].reshape(ids.shape)
    return numerics.nan_unless(of_labels, label), numerics.nan_unless(_for_all(of_samples, sampled), sampled)


def _for_all(per_sample: Array, like: Array) -> Array:
    """[samples] or [..., samples] in the shape [..., samples] of `like`."""
    return jnp.broadcast_to(numerics.expand_leading(per_sample, like.ndim), like.shape)
