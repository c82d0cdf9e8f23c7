"""Losses over pairs: each example of a batch is told from the others of the batch, which are its negatives.

What every function here shares:

- Embeddings [batch, features] of a floating dtype; row i of one array belongs to row i of the other. Arithmetic and results are
  float32, or float64 for float64 embeddings; gradients come back in the dtype of each input.
- `normalize`: whether similarities s_ij = x̂_i·ŷ_j are cosines, x̂ = x/|x|, made in float32 or wider: ∂x̂/∂x = (I − x̂·x̂ᵀ)/|x|. A zero
  vector has cosine 0 with everything, and gradient 0. False: s_ij = x_i·y_j, products in the dtype of the embeddings.
- `temperature`, `logit_scale`, `logit_bias`: numbers, or traced scalars that are learned.
- `chunk_size`: the most queries whose similarities to all keys exist at a time; None: all of them if that takes at most 32 MiB,
  and otherwise what `plan_linear` says.
- `axis_name`: inside `jax.shard_map`, the mesh axis that splits the batch. Each device gets the losses of its own examples, with those
  of all devices as negatives. Embeddings are gathered, similarities never; the sum over devices (`lax.psum`) has the derivatives of
  the loss of the whole batch.
- `where` [batch]: which examples count. The others are nobody's positive or negative and cost exactly 0 with gradient exactly 0,
  whatever they hold.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._contrastive import embeddings as batches
from xentjax._core import checks, numerics, values
from xentjax._linear import fused
from xentjax._losses import softmax


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
    """InfoNCE, the cross-entropy of finding each query's key among all keys, one value per example [batch].

    loss_i = −log(e^(s_ii/τ) / Σ_j e^(s_ij/τ)),  j over the keys of the batch and `negatives`.
    Gradient: with p_i = softmax(s_i/τ), ∂loss_i/∂s_ij = (p_ij − [j = i])/τ and ∂loss_i/∂τ = (s_ii − Σ_j p_ij·s_ij)/τ².

    Args:
        queries: [batch, features], one embedding per example.
        keys: [batch, features], the embedding that each query is to find.
        temperature: τ > 0.
        negatives: [more, features], further keys for all queries, such as a queue of earlier ones; the same on every device.
        normalize: whether similarities are cosines.
        chunk_size: the most queries whose similarities exist at a time; None: planned.
        axis_name: mesh axis that splits the batch, inside `jax.shard_map`.
        where: [batch], which examples count.

    Returns:
        [batch], nats, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `temperature` that is not above 0, `chunk_size` < 1.

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
    q, k, counts = batches.pairs(name, "queries", queries, "keys", keys, where)
    more = batches.negatives(name, negatives, q)
    tau = checks.positive(name, "temperature", temperature)
    return _info_nce(q, k, more, counts, tau, batches.options(name, normalize, chunk_size, axis_name))


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
    """NT-Xent, each of two views of an example found among all other views, one value per example [batch].

    With the 2N views x = (first, second): ℓ(a, b) = −log(e^(s_ab/τ) / Σ_{k≠a} e^(s_ak/τ)),  loss_i = (ℓ(i, N + i) + ℓ(N + i, i))/2.
    Gradient: with p_a = softmax(s_a/τ) over k ≠ a, ∂ℓ(a, b)/∂s_ak = (p_ak − [k = b])/τ, ∂ℓ(a, b)/∂τ = (s_ab − Σ_k p_ak·s_ak)/τ².

    The mean over the batch is the paper's mean over 2N views.

    Args:
        first: [batch, features], one view of each example.
        second: [batch, features], another.
        temperature: τ > 0.
        normalize: whether similarities are cosines.
        chunk_size: the most views whose similarities exist at a time; None: planned.
        axis_name: mesh axis that splits the batch, inside `jax.shard_map`.
        where: [batch], which examples count.

    Returns:
        [batch], nats, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `temperature` that is not above 0, `chunk_size` < 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> xentjax.nt_xent(x, x, temperature=1.0).tolist()  # log(1 + 4/e): both views of two other examples
        [0.90483..., 0.90483..., 0.90483...]

    Reference:
        Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive Learning of Visual Representations, 2020, arXiv 2002.05709.
    """
    name = "nt_xent"
    pairs = batches.pairs(name, "first", first, "second", second, where)
    tau = checks.positive(name, "temperature", temperature)
    return _nt_xent(*pairs, tau, batches.options(name, normalize, chunk_size, axis_name))


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
    """CLIP's loss, each image found among all texts and each text among all images, one value per pair [batch].

    loss_i = ½·(−log(e^(t·s_ii) / Σ_j e^(t·s_ij)) − log(e^(t·s_ii) / Σ_j e^(t·s_ji))),  s_ij of image i and text j.
    Gradient of Σ_i loss_i: with p_ij and q_ij the softmax of t·s over texts j and over images i, ∂/∂s_ij = t·((p_ij + q_ij)/2 − [i = j]),
    ∂/∂t = Σ_ij s_ij·((p_ij + q_ij)/2 − [i = j]).

    With `labels`, pairs of the same label are positives of each other: loss_i is the mean over P_i = {k: labels_k = labels_i} of
    ½·(−log(e^(t·s_ik) / Σ_j e^(t·s_ij)) − log(e^(t·s_ki) / Σ_j e^(t·s_ji))), and [i = j] becomes [j ∈ P_i]/|P_i| in the gradient.

    Args:
        images: [batch, features], one embedding per pair.
        texts: [batch, features], likewise.
        labels: [batch], integers of any range, such as the class or the image of a caption; None: every pair has a label of its own.
        logit_scale: t > 0, the inverse of a temperature; the paper learns log t and keeps t at most 100.
        normalize: whether similarities are cosines.
        chunk_size: the most images, or texts, whose similarities exist at a time; None: planned.
        axis_name: mesh axis that splits the batch, inside `jax.shard_map`.
        where: [batch], which pairs count.

    Returns:
        [batch], nats, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `logit_scale` that is not above 0, `chunk_size` < 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> def loss(log_scale):  # learned: the pairs fit, so a larger scale costs less
        ...     return xentjax.clip_loss(x, x, logit_scale=jnp.exp(log_scale)).mean()
        >>> [float(v) for v in jax.value_and_grad(loss)(0.0)]
        [0.55144..., -0.42388...]

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020; `labels`: Yang et
        al., Unified Contrastive Learning in Image-Text-Label Space, 2022, arXiv 2204.03610 (there without the factor ½).
    """
    name = "clip_loss"
    pairs = batches.pairs(name, "images", images, "texts", texts, where)
    y = None if labels is None else batches.labels(name, labels, pairs[0].shape[0])
    scale = checks.positive(name, "logit_scale", logit_scale)
    return _clip(*pairs, y, scale, batches.options(name, normalize, chunk_size, axis_name))


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
    """SigLIP's loss, whether each text belongs to the image as one decision each, summed per image [batch].

    loss_i = Σ_j −log σ(y_ij·z_ij),  z_ij = t·s_ij + b,  y_ij = 1 for j = i and −1 for the others.
    Gradient: ∂loss_i/∂z_ij = σ(z_ij) − [j = i], so ∂loss_i/∂t = Σ_j s_ij·(σ(z_ij) − [j = i]), ∂loss_i/∂b = Σ_j (σ(z_ij) − [j = i]).

    The mean over the batch is the paper's loss. With `labels`, every text with the label of the image belongs to it: then
    y_ij = 1 where labels_j = labels_i, and [j = i] in the gradient becomes [labels_j = labels_i].

    Args:
        images: [batch, features], one embedding per pair.
        texts: [batch, features], likewise.
        labels: [batch], integers of any range, such as the class or the image of a caption; None: every pair has a label of its own.
        logit_scale: t > 0; the paper learns log t from log 10.
        logit_bias: b, any number; the paper learns it from −10, because most pairs do not belong together.
        normalize: whether similarities are cosines.
        chunk_size: the most images whose similarities exist at a time; None: planned.
        axis_name: mesh axis that splits the batch, inside `jax.shard_map`.
        where: [batch], which pairs count.

    Returns:
        [batch], nats, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `logit_scale` that is not above 0, `chunk_size` < 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x = jnp.eye(3)
        >>> xentjax.siglip_loss(x, x).tolist()  # log 2 for the pair, 4.5e-5 for each of two others
        [0.69323..., 0.69323..., 0.69323...]

    Reference:
        Zhai, Mustafa, Kolesnikov, Beyer, Sigmoid Loss for Language Image Pre-Training, 2023, arXiv 2303.15343.
    """
    name = "siglip_loss"
    pairs = batches.pairs(name, "images", images, "texts", texts, where)
    y = None if labels is None else batches.labels(name, labels, pairs[0].shape[0])
    scale, bias = checks.positive(name, "logit_scale", logit_scale), checks.number(name, "logit_bias", logit_bias, low=-math.inf)
    return _siglip(*pairs, y, scale, 0.0 if bias is None else bias, batches.options(name, normalize, chunk_size, axis_name))


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
    """Supervised contrastive loss, all examples of the same label found among the others, one value per example [batch].

    loss_i = 1/|P_i|·Σ_{p∈P_i} −log(e^(s_ip/τ) / Σ_{k≠i} e^(s_ik/τ)),  P_i = {p ≠ i: labels_p = labels_i};  0 if P_i is empty.
    Gradient: with p_i = softmax(s_i/τ) over k ≠ i and t_ik = [k ∈ P_i]/|P_i|, ∂loss_i/∂s_ik = (p_ik − t_ik)/τ and
    ∂loss_i/∂τ = Σ_k (t_ik − p_ik)·s_ik/τ²; 0 if P_i is empty.

    This is L_out of the paper. Several views of an example are rows of their own with the same label.

    Args:
        embeddings: [batch, features], one embedding per example or view.
        labels: [batch], integers of any range.
        temperature: τ > 0.
        normalize: whether similarities are cosines.
        chunk_size: the most examples whose similarities exist at a time; None: planned.
        axis_name: mesh axis that splits the batch, inside `jax.shard_map`.
        where: [batch], which examples count.

    Returns:
        [batch], nats, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `temperature` that is not above 0, `chunk_size` < 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> x, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([7, 7, 8])
        >>> xentjax.supervised_contrastive_loss(x, labels, temperature=1.0).tolist()  # the last has no positive
        [0.31326..., 0.31326..., 0.0]

    Reference:
        Khosla et al., Supervised Contrastive Learning, 2020, arXiv 2004.11362.
    """
    name = "supervised_contrastive_loss"
    x, counts = batches.embeddings(name, "embeddings", embeddings, where)
    y = batches.labels(name, labels, x.shape[0])
    tau = checks.positive(name, "temperature", temperature)
    return _supervised(x, y, counts, tau, batches.options(name, normalize, chunk_size, axis_name))


# The compiled parts. Similarities are the logits of a linear layer whose kernel is the keys: `fuse_linear` takes them by chunks.

_compiled = functools.partial(jax.jit, static_argnames=("options",))
_cross_entropy = values.unchecked(softmax.softmax_cross_entropy)


@_compiled
def _info_nce(queries, keys, negatives, where, temperature, options):
    q, k, more = batches.prepare((queries, keys, negatives), (where, where, None), options)
    k, counts = batches.gather(k, options), _gathered(where, options)
    everything = jnp.concatenate([k, more.astype(k.dtype)])
    counts = None if counts is None else jnp.concatenate([counts, jnp.ones(more.shape[:1], bool)])

    def loss(s, own):
        return _cross_entropy(s / jnp.asarray(temperature, s.dtype), own, class_mask=counts)

    return _over_chunks(loss, q, everything, (batches.positions(q, options),), where, options)


@_compiled
def _nt_xent(first, second, where, temperature, options):
    views = batches.prepare((first, second), (where, where), options)
    everyone = jnp.concatenate([batches.gather(v, options) for v in views])
    counts = None if where is None else jnp.tile(batches.gather(where, options), 2)
    own = batches.positions(views[0], options)
    own = jnp.stack([own, own + everyone.shape[0] // 2])

    def loss(s, own, partner):
        return _cross_entropy(s / jnp.asarray(temperature, s.dtype), partner, class_mask=_others(s, own, counts))

    where = None if where is None else jnp.stack([where, where])
    return jnp.mean(_over_chunks(loss, jnp.stack(views), everyone, (own, own[::-1]), where, options), axis=0)


@_compiled
def _clip(images, texts, where, labels, logit_scale, options):
    x, y = batches.prepare((images, texts), (where, where), options)
    counts, own = _gathered(where, options), batches.positions(x, options)
    all_labels = None if labels is None else batches.gather(labels, options)

    def loss(s, own):  # its position, or its label
        target = own if all_labels is None else _shares(_same(own, all_labels, counts), s.dtype)
        return _cross_entropy(s * jnp.asarray(logit_scale, s.dtype), target, class_mask=counts)

    of_images, of_texts = (
        _over_chunks(loss, q, batches.gather(k, options), (own if labels is None else labels,), where, options) for q, k in ((x, y), (y, x))
    )
    return (of_images + of_texts) / 2


@_compiled
def _siglip(images, texts, where, labels, logit_scale, logit_bias, options):
    x, y = batches.prepare((images, texts), (where, where), options)
    counts, own = _gathered(where, options), batches.positions(x, options)
    all_labels = None if labels is None else batches.gather(labels, options)

    def loss(s, own):  # its position, or its label
        z = s * jnp.asarray(logit_scale, s.dtype) + jnp.asarray(logit_bias, s.dtype)
        each = numerics.softplus(jnp.where(_others(s, own) if all_labels is None else ~_same(own, all_labels), z, -z))
        return jnp.sum(each if counts is None else jnp.where(counts[None], each, jnp.zeros_like(each)), axis=-1)

    return _over_chunks(loss, x, batches.gather(y, options), (own if labels is None else labels,), where, options)


@_compiled
def _supervised(embeddings, labels, where, temperature, options):
    (x,) = batches.prepare((embeddings,), (where,), options)
    all_labels, counts = batches.gather(labels, options), _gathered(where, options)

    def loss(s, label, own):
        others = _others(s, own, counts)
        share = _shares(others & _same(label, all_labels), s.dtype)  # all 0 without a positive, which costs 0
        return _cross_entropy(s / jnp.asarray(temperature, s.dtype), share, class_mask=others)

    return _over_chunks(loss, x, batches.gather(x, options), (labels, batches.positions(x, options)), where, options)


def _over_chunks(loss, queries, keys, args, where, options):
    """`loss(similarities [chunk, keys], *args of the chunk)` for all queries [..., features], 0 outside `where`."""
    if queries.shape[-2] == 0:
        return jnp.zeros(queries.shape[:-1], numerics.accumulation_dtype(queries.dtype))
    run = fused.fuse_linear(loss, reduction="none", chunk_size=options.chunk_size, classes_first=True)
    return values.unchecked(run)(queries, keys, *args, where=where)


def _gathered(where, options):
    """Which examples of all devices count, or None."""
    return None if where is None else batches.gather(where, options)


def _others(s, own, counts=None):
    """Which keys are not the query itself, and count [chunk, keys]."""
    others = lax.broadcasted_iota(jnp.int32, s.shape, 1) != own[:, None]
    return others if counts is None else others & counts[None]


def _same(labels, all_labels, counts=None):
    """Which keys have the label of the query, and count [chunk, keys]."""
    same = labels[:, None] == all_labels[None]
    return same if counts is None else same & counts[None]


def _shares(positive, dtype):
    """The distribution that gives all positives of a query the same share [chunk, keys]."""
    positive = positive.astype(dtype)
    return positive / jnp.maximum(jnp.sum(positive, axis=-1, keepdims=True), 1)
