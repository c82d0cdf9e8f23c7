"""Contrastive losses. Each example must be identified among all examples of the batch. The other examples are its negatives.

All losses share these conventions:

- Embeddings have shape [batch, features] and a floating dtype. If a loss takes two arrays of embeddings, row i of one array belongs to row
  i of the other. Arithmetic and results are float32, or float64 if any embeddings are float64. The gradient of each argument has the dtype
  of that argument.
- `normalize` selects the similarities. If it is True, they are cosines, s_ij = x̂_i·ŷ_j with x̂ = x/|x|, computed in float32 or wider. The
  derivative of the normalization is ∂x̂/∂x = (I − x̂·x̂ᵀ)/|x|. A zero vector has cosine 0 with every vector, and its gradient is 0. If
  `normalize` is False, similarities are the products s_ij = x_i·y_j, computed in the dtype of the embeddings.
- `temperature`, `logit_scale` and `logit_bias` are Python numbers or traced scalars. Traced scalars can be learned.
- `chunk_size` is the maximum number of queries whose similarities to all keys are in memory at a time. If it is None, it is chosen
  automatically. If all similarities take at most 32 MiB, all queries form one chunk. Otherwise `plan_linear` chooses the chunk size.
- `axis_name` is the mesh axis over which the batch is sharded, inside `jax.shard_map`. Each device computes the losses of its own examples.
  Their negatives are the examples of all devices. Devices exchange embeddings, but never similarities. Use `lax.psum` to sum the losses
  over devices. This sum has the same derivatives as the sum of the losses of the whole batch.
- `where` [batch] is True for examples that count. All other examples are neither positives nor negatives. Their loss and gradient are
  exactly 0, whatever they contain.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._contrastive.embeddings import (
    Options,
    check_embeddings,
    check_labels,
    check_negatives,
    check_options,
    check_pairs,
    gather,
    gather_mask,
    positions,
    prepare,
)
from xentjax._core import checks, numerics, values
from xentjax._linear import fused
from xentjax._losses import softmax

_compiled = functools.partial(jax.jit, static_argnames=("options",))
_cross_entropy = values.unchecked(softmax.softmax_cross_entropy)


def info_nce(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    temperature: ArrayLike = 0.07,
    negatives: ArrayLike | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """InfoNCE loss: cross-entropy of identifying each query's key among all keys, shape [batch].

    loss_i = −log(e^(s_ii/τ) / Σ_j e^(s_ij/τ)), where j runs over the keys of the batch and over `negatives`.
    Gradient: ∂loss_i/∂s_ij = (p_ij − [j = i])/τ and ∂loss_i/∂τ = (s_ii − Σ_j p_ij·s_ij)/τ², where p_i = softmax(s_i/τ).

    Args:
        queries: [batch, features], one embedding per example.
        keys: [batch, features]; key i is the positive of query i.
        temperature: τ > 0, divides the similarities.
        negatives: [more, features], additional negative keys for all queries, such as a queue of earlier keys. If the batch is sharded,
            they must be the same on every device.
        normalize: whether embeddings are normalized to length 1, so that similarities are cosines.
        chunk_size: maximum number of queries whose similarities are in memory at a time; None: chosen automatically.
        axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`.
        where: [batch], True for examples that count.

    Returns:
        [batch], in nats, float32, or float64 if any embeddings are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `temperature` is not above 0, or `chunk_size` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> xentjax.info_nce(x, x, temperature=1.0).tolist()  # log(1 + 2/e)
        [0.55144..., 0.55144..., 0.55144...]
        >>> xentjax.info_nce(x, x, temperature=1.0, negatives=-x).tolist()  # log(1 + 2/e + e⁻² + 2/e)
        [0.95...]

    Reference:
        van den Oord, Li, Vinyals, Representation Learning with Contrastive Predictive Coding, 2018, arXiv 1807.03748; temperature and
        `negatives`: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2019, arXiv 1911.05722.
    """
    name = "info_nce"
    q, k, counts = check_pairs(name, "queries", queries, "keys", keys, where)
    more = check_negatives(name, negatives, q)
    tau = checks.positive(name, "temperature", temperature)
    return _info_nce(q, k, more, counts, tau, check_options(name, normalize, chunk_size, axis_name))


@_compiled
def _info_nce(queries: Array, keys: Array, negatives: Array, where: Array | None, temperature: ArrayLike, options: Options) -> Array:
    q, k, more = prepare((queries, keys, negatives), (where, where, None), options)
    k, counts = gather(k, options), gather_mask(where, options)
    everything = jnp.concatenate([k, more.astype(k.dtype)])
    counts = None if counts is None else jnp.concatenate([counts, jnp.ones(more.shape[:1], bool)])

    def loss(s: Array, own: Array) -> Array:
        return _cross_entropy(s / jnp.asarray(temperature, s.dtype), own, class_mask=counts)

    return _over_chunks(loss, q, everything, (positions(q, options),), where, options)


def nt_xent(
    first: ArrayLike,
    second: ArrayLike,
    *,
    temperature: ArrayLike = 0.5,
    normalize: bool = True,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """NT-Xent loss: cross-entropy of identifying the other view of an example, shape [batch].

    loss_i = (ℓ(i, N + i) + ℓ(N + i, i))/2, where ℓ(a, b) = −log(e^(s_ab/τ) / Σ_{k≠a} e^(s_ak/τ)). N is the batch size, and a, b and k are
    indices of the 2N views x = (first, second).
    Gradient: ∂ℓ(a, b)/∂s_ak = (p_ak − [k = b])/τ and ∂ℓ(a, b)/∂τ = (s_ab − Σ_k p_ak·s_ak)/τ², where p_a = softmax(s_a/τ) over k ≠ a.

    The mean of the losses over the batch is the loss of the paper, which is a mean over 2N views.

    Args:
        first: [batch, features], one view of each example.
        second: [batch, features], the other view of each example.
        temperature: τ > 0, divides the similarities.
        normalize: whether embeddings are normalized to length 1, so that similarities are cosines.
        chunk_size: maximum number of views whose similarities are in memory at a time; None: chosen automatically.
        axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`.
        where: [batch], True for examples that count.

    Returns:
        [batch], in nats, float32, or float64 if any embeddings are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `temperature` is not above 0, or `chunk_size` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> xentjax.nt_xent(x, x, temperature=1.0).tolist()  # log(1 + 4/e): four negatives, the views of two other examples
        [0.90483..., 0.90483..., 0.90483...]

    Reference:
        Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive Learning of Visual Representations, 2020, arXiv 2002.05709.
    """
    name = "nt_xent"
    pairs = check_pairs(name, "first", first, "second", second, where)
    tau = checks.positive(name, "temperature", temperature)
    return _nt_xent(*pairs, tau, check_options(name, normalize, chunk_size, axis_name))


@_compiled
def _nt_xent(first: Array, second: Array, where: Array | None, temperature: ArrayLike, options: Options) -> Array:
    views = prepare((first, second), (where, where), options)
    everyone = jnp.concatenate([gather(v, options) for v in views])
    counts = None if where is None else jnp.tile(gather(where, options), 2)
    own = positions(views[0], options)
    own = jnp.stack([own, own + everyone.shape[0] // 2])

    def loss(s: Array, own: Array, partner: Array) -> Array:
        return _cross_entropy(s / jnp.asarray(temperature, s.dtype), partner, class_mask=_others(s, own, counts))

    where = None if where is None else jnp.stack([where, where])
    return jnp.mean(_over_chunks(loss, jnp.stack(views), everyone, (own, own[::-1]), where, options), axis=0)


def clip_loss(
    images: ArrayLike,
    texts: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    logit_scale: ArrayLike = 1 / 0.07,
    normalize: bool = True,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """CLIP loss: cross-entropy of identifying each image's text and each text's image, shape [batch].

    loss_i = ½·(−log(e^(t·s_ii) / Σ_j e^(t·s_ij)) − log(e^(t·s_ii) / Σ_j e^(t·s_ji))), where s_ij is the similarity of image i and text j.
    Gradient of Σ_i loss_i: ∂/∂s_ij = t·((p_ij + q_ij)/2 − [i = j]) and ∂/∂t = Σ_ij s_ij·((p_ij + q_ij)/2 − [i = j]), where p_ij is the
    softmax of t·s over texts j and q_ij is the softmax of t·s over images i.

    With `labels`, pairs that have the same label are positives of each other. The positives of pair i are P_i = {k: labels_k = labels_i}.
    loss_i is then the mean over k ∈ P_i of ½·(−log(e^(t·s_ik) / Σ_j e^(t·s_ij)) − log(e^(t·s_ki) / Σ_j e^(t·s_ji))). In the gradient,
    [j ∈ P_i]/|P_i| replaces [i = j].

    Args:
        images: [batch, features], one embedding per pair.
        texts: [batch, features], one embedding per pair.
        labels: [batch], any integers, such as class indices or image ids; None: every pair has its own label.
        logit_scale: t > 0, the inverse of a temperature. The paper learns log t and limits t to 100.
        normalize: whether embeddings are normalized to length 1, so that similarities are cosines.
        chunk_size: maximum number of images, or of texts, whose similarities are in memory at a time; None: chosen automatically.
        axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`.
        where: [batch], True for pairs that count.

    Returns:
        [batch], in nats, float32, or float64 if any embeddings are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `logit_scale` is not above 0, or `chunk_size` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> def loss(log_scale):  # the embeddings of each pair agree, so a larger scale reduces the loss
        ...     return xentjax.clip_loss(x, x, logit_scale=jnp.exp(log_scale)).mean()
        >>> [float(v) for v in jax.value_and_grad(loss)(0.0)]
        [0.55144..., -0.42388...]

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020; `labels`: Yang et
        al., Unified Contrastive Learning in Image-Text-Label Space, 2022, arXiv 2204.03610 (there without the factor ½).
    """
    name = "clip_loss"
    pairs = check_pairs(name, "images", images, "texts", texts, where)
    y = None if labels is None else check_labels(name, labels, "images", pairs[0])
    scale = checks.positive(name, "logit_scale", logit_scale)
    return _clip(*pairs, y, scale, check_options(name, normalize, chunk_size, axis_name))


@_compiled
def _clip(images: Array, texts: Array, where: Array | None, labels: Array | None, logit_scale: ArrayLike, options: Options) -> Array:
    x, y = prepare((images, texts), (where, where), options)
    counts, own = gather_mask(where, options), positions(x, options)
    all_labels = None if labels is None else gather(labels, options)

    def loss(s: Array, own: Array) -> Array:  # `own` holds labels, or positions if there are no labels
        target = own if all_labels is None else _shares(_same(own, all_labels, counts), s.dtype)
        return _cross_entropy(s * jnp.asarray(logit_scale, s.dtype), target, class_mask=counts)

    of_images, of_texts = (
        _over_chunks(loss, q, gather(k, options), (own if labels is None else labels,), where, options) for q, k in ((x, y), (y, x))
    )
    return (of_images + of_texts) / 2


def siglip_loss(
    images: ArrayLike,
    texts: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    logit_scale: ArrayLike = 10.0,
    logit_bias: ArrayLike = -10.0,
    normalize: bool = True,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """SigLIP loss per image, shape [batch].

    Each text is classified as belonging to the image or not. The loss of an image is the sum of the binary cross-entropies of all texts.

    loss_i = Σ_j −log σ(y_ij·z_ij), where z_ij = t·s_ij + b, y_ij = 1 if j = i, and y_ij = −1 otherwise.
    Gradient: ∂loss_i/∂z_ij = σ(z_ij) − [j = i], so ∂loss_i/∂t = Σ_j s_ij·(σ(z_ij) − [j = i]) and ∂loss_i/∂b = Σ_j (σ(z_ij) − [j = i]).

    The mean of the losses over the batch is the loss of the paper. With `labels`, an image and a text belong together if their labels are
    equal: y_ij = 1 if labels_j = labels_i. In the gradient, [labels_j = labels_i] replaces [j = i].

    Args:
        images: [batch, features], one embedding per pair.
        texts: [batch, features], one embedding per pair.
        labels: [batch], any integers, such as class indices or image ids; None: every pair has its own label.
        logit_scale: t > 0, multiplies the similarities. The paper learns log t and initializes it to log 10.
        logit_bias: b, any finite number, added to the scaled similarities. The paper learns b and initializes it to −10, because most
            images and texts do not belong together.
        normalize: whether embeddings are normalized to length 1, so that similarities are cosines.
        chunk_size: maximum number of images whose similarities are in memory at a time; None: chosen automatically.
        axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`.
        where: [batch], True for pairs that count.

    Returns:
        [batch], in nats, float32, or float64 if any embeddings are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `logit_scale` is not above 0, or `chunk_size` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> xentjax.siglip_loss(x, x).tolist()  # log 2 for the image's own text, 4.5e-5 for each of the others
        [0.69323..., 0.69323..., 0.69323...]

    Reference:
        Zhai, Mustafa, Kolesnikov, Beyer, Sigmoid Loss for Language Image Pre-Training, 2023, arXiv 2303.15343.
    """
    name = "siglip_loss"
    pairs = check_pairs(name, "images", images, "texts", texts, where)
    y = None if labels is None else check_labels(name, labels, "images", pairs[0])
    scale, bias = checks.positive(name, "logit_scale", logit_scale), checks.number(name, "logit_bias", logit_bias, low=-math.inf)
    return _siglip(*pairs, y, scale, 0.0 if bias is None else bias, check_options(name, normalize, chunk_size, axis_name))


@_compiled
def _siglip(
    images: Array,
    texts: Array,
    where: Array | None,
    labels: Array | None,
    logit_scale: ArrayLike,
    logit_bias: ArrayLike,
    options: Options,
) -> Array:
    x, y = prepare((images, texts), (where, where), options)
    counts, own = gather_mask(where, options), positions(x, options)
    all_labels = None if labels is None else gather(labels, options)

    def loss(s: Array, own: Array) -> Array:  # `own` holds labels, or positions if there are no labels
        z = s * jnp.asarray(logit_scale, s.dtype) + jnp.asarray(logit_bias, s.dtype)
        each = numerics.softplus(jnp.where(_others(s, own) if all_labels is None else ~_same(own, all_labels), z, -z))
        return jnp.sum(each if counts is None else jnp.where(counts[None], each, jnp.zeros_like(each)), axis=-1)

    return _over_chunks(loss, x, gather(y, options), (own if labels is None else labels,), where, options)


def supervised_contrastive_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 0.1,
    normalize: bool = True,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Supervised contrastive loss: cross-entropy of identifying the other examples with the same label, shape [batch].

    loss_i = 1/|P_i|·Σ_{p∈P_i} −log(e^(s_ip/τ) / Σ_{k≠i} e^(s_ik/τ)), where P_i = {p ≠ i: labels_p = labels_i}.
    Gradient: ∂loss_i/∂s_ik = (p_ik − t_ik)/τ and ∂loss_i/∂τ = Σ_k (t_ik − p_ik)·s_ik/τ², where p_i = softmax(s_i/τ) over k ≠ i and
    t_ik = [k ∈ P_i]/|P_i|.
    If P_i is empty, the loss and its gradient are 0.

    This is the loss L_out of the paper. If an example has several views, pass each view as its own row, with the label of the example.

    Args:
        embeddings: [batch, features], one embedding per example or view.
        labels: [batch], any integers.
        temperature: τ > 0, divides the similarities.
        normalize: whether embeddings are normalized to length 1, so that similarities are cosines.
        chunk_size: maximum number of examples whose similarities are in memory at a time; None: chosen automatically.
        axis_name: mesh axis over which the batch is sharded, inside `jax.shard_map`.
        where: [batch], True for examples that count.

    Returns:
        [batch], in nats, float32, or float64 if any embeddings are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `temperature` is not above 0, or `chunk_size` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([7, 7, 8])
        >>> xentjax.supervised_contrastive_loss(x, labels, temperature=1.0).tolist()  # the last example has no positive
        [0.31326..., 0.31326..., 0.0]

    Reference:
        Khosla et al., Supervised Contrastive Learning, 2020, arXiv 2004.11362.
    """
    name = "supervised_contrastive_loss"
    x, counts = check_embeddings(name, "embeddings", embeddings, where)
    y = check_labels(name, labels, "embeddings", x)
    tau = checks.positive(name, "temperature", temperature)
    return _supervised(x, y, counts, tau, check_options(name, normalize, chunk_size, axis_name))


@_compiled
def _supervised(embeddings: Array, labels: Array, where: Array | None, temperature: ArrayLike, options: Options) -> Array:
    (x,) = prepare((embeddings,), (where,), options)
    all_labels, counts = gather(labels, options), gather_mask(where, options)

    def loss(s: Array, label: Array, own: Array) -> Array:
        others = _others(s, own, counts)
        share = _shares(others & _same(label, all_labels), s.dtype)  # without a positive all shares are 0, and so is the loss
        return _cross_entropy(s / jnp.asarray(temperature, s.dtype), share, class_mask=others)

    return _over_chunks(loss, x, gather(x, options), (labels, positions(x, options)), where, options)


def _over_chunks(
    loss: Callable[..., Array], queries: Array, keys: Array, args: tuple[Array, ...], where: Array | None, options: Options
) -> Array:
    """`loss(similarities [chunk, keys], *args of the chunk)` for all queries [..., features]; 0 for queries that do not count.

    Similarities are the logits of a linear layer whose kernel is `keys`, so `fuse_linear` computes them in chunks.
    """
    if queries.shape[-2] == 0:
        return jnp.zeros(queries.shape[:-1], numerics.accumulation_dtype(queries.dtype))
    run = fused.fuse_linear(loss, reduction="none", chunk_size=options.chunk_size, classes_first=True)
    return values.unchecked(run)(queries, keys, *args, where=where)


def _others(s: Array, own: Array, counts: Array | None = None) -> Array:
    """True for keys that count and are not the query itself [chunk, keys]; `own` holds the positions of the queries."""
    others = lax.broadcasted_iota(jnp.int32, s.shape, 1) != own[:, None]
    return others if counts is None else others & counts[None]


def _same(labels: Array, all_labels: Array, counts: Array | None = None) -> Array:
    """True for keys that count and have the label of the query [chunk, keys]."""
    same = labels[:, None] == all_labels[None]
    return same if counts is None else same & counts[None]


def _shares(positive: Array, dtype: jnp.dtype) -> Array:
    """The uniform distribution over the positives of each query [chunk, keys]; 0 if there are none."""
    positive = positive.astype(dtype)
    return positive / jnp.maximum(jnp.sum(positive, axis=-1, keepdims=True), 1)
