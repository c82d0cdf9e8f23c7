"""Exact probabilities over very many classes at a fraction of the cost: a few frequent ones and clusters, or a tree of decisions.

What the losses share:

- `hidden` [..., features], whose dtype is that of the matrix products (they accumulate in float32).
- `labels` [...], integer. An index outside [0, classes) makes the value of its example and the gradient of its `hidden` NaN.
- `where` [...], which examples count. The others cost exactly 0 with gradient exactly 0, whatever they hold.
- The probabilities of all classes sum to 1: these are models of their own, not approximations of a softmax.
- Results are float32, or float64 for float64 `hidden`; gradients come back in the dtype of their argument.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from xentjax._core import checks, numerics, rows, statistics, surprises, values
from xentjax._linear import fused, layers
from xentjax._many_classes import sampled, samplers


class AdaptiveSoftmax(NamedTuple):
    """The parameters of an adaptive softmax over classes in falling order of frequency; its head's logits are [..., shortlist + J].

    The shapes tell the rest: classes [0, shortlist) are in the head, the j-th of the J clusters has the next `kernels[j].shape[1]`.

    Example:
        >>> import jax, xentjax
        >>> parameters = xentjax.init_adaptive_softmax(jax.random.key(0), 64, [100, 1000, 10_000])
        >>> jax.tree.map(jax.numpy.shape, parameters)
        AdaptiveSoftmax(head=(64, 102), projections=((64, 16), (64, 4)), kernels=((16, 900), (4, 9000)))
    """

    head: ArrayLike
    """[features, shortlist + J], the frequent classes and one column per cluster."""
    projections: tuple[ArrayLike, ...]
    """J arrays [features, width_j]: fewer features for rarer classes."""
    kernels: tuple[ArrayLike, ...]
    """J arrays [width_j, classes of the cluster]."""


def init_adaptive_softmax(
    key: Array, features: int, cutoffs: tuple[int, ...] | list[int], *, div_value: float = 4.0, dtype: DTypeLike = jnp.float32
) -> AdaptiveSoftmax:
    """Random parameters for `adaptive_softmax_cross_entropy`, whose logits then are of order 1 for hidden [..., features] of order 1.

    Entries are normal with variance 1/(number of rows);  width_j = ⌊features/div_value^(j + 1)⌋, at least 1.
    Gradient: none.

    Args:
        key: of `jax.random.key`.
        features: the features of `hidden`.
        cutoffs: rising, the last the number of classes: [0, cutoffs[0]) are in the head, [cutoffs[j], cutoffs[j + 1]) in cluster j.
        div_value: ≥ 1, by which each cluster has fewer features than the one before.
        dtype: of the parameters.

    Returns:
        `AdaptiveSoftmax`.

    Raises:
        TypeError: a `key` that is none, sizes that are not Python integers.
        ValueError: sizes < 1, cutoffs that do not rise, `div_value` < 1.

    Example:
        >>> import jax, xentjax
        >>> parameters = xentjax.init_adaptive_softmax(jax.random.key(0), 512, [2000, 10_000, 250_000])
        >>> sum(x.size for x in jax.tree.leaves(parameters)), 512 * 250_000  # numbers, and those of a full softmax
        (9810944, 128000000)

    Reference:
        Grave et al., Efficient Softmax Approximation for GPUs, 2016, arXiv 1609.04309.
    """
    name = "init_adaptive_softmax"
    key, features = samplers.one_key(name, key), checks.count(name, "features", features)
    bounds = [checks.count(name, f"cutoffs[{j}]", c) for j, c in enumerate(cutoffs)]
    if not bounds or any(low >= high for low, high in itertools.pairwise(bounds)):
        raise ValueError(f"{name}: cutoffs must rise from the size of the shortlist to the number of classes; got {list(cutoffs)}.")
    if not 1 <= div_value < float("inf"):
        raise ValueError(f"{name}: div_value must be a finite number at least 1; got {div_value:g}.")
    sizes = [high - low for low, high in itertools.pairwise(bounds)]
    widths = [max(1, int(features / div_value ** (j + 1))) for j in range(len(sizes))]
    shapes = [(features, bounds[0] + len(sizes)), *((features, w) for w in widths), *zip(widths, sizes, strict=True)]
    keys = jax.random.split(key, len(shapes))
    drawn = [(jax.random.normal(k, s, jnp.float32) * s[0] ** -0.5).astype(dtype) for k, s in zip(keys, shapes, strict=True)]
    return AdaptiveSoftmax(drawn[0], tuple(drawn[1 : len(sizes) + 1]), tuple(drawn[len(sizes) + 1 :]))


def adaptive_softmax_cross_entropy(
    hidden: ArrayLike,
    parameters: AdaptiveSoftmax,
    labels: ArrayLike,
    *,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of an adaptive softmax, one value per example [...].

    loss = −log softmax(hidden·head)_y for y in the shortlist, and in cluster j
    loss = −log softmax(hidden·head)_(shortlist + j) − log softmax(hidden·projection_j·kernel_j)_(y − cutoff_j).
    Gradient: softmax − one-hot with respect to the logits of the head and of the label's own cluster, 0 to those of other clusters.

    Every cluster is computed for every example, in chunks, and selected: what is saved are features, not examples, and no label
    costs more than another.

    Args:
        hidden: [..., features], activations.
        parameters: of `init_adaptive_softmax`.
        labels: [...] class indices in falling order of frequency.
        chunk_size: the most examples whose logits exist at a time; None: planned by `plan_linear`.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `chunk_size` < 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> parameters = xentjax.init_adaptive_softmax(jax.random.key(0), 64, [10, 100])
        >>> zero = jax.tree.map(jnp.zeros_like, parameters)
        >>> xentjax.adaptive_softmax_cross_entropy(jnp.ones((2, 64)), zero, jnp.array([3, 50])).tolist()  # log 11, log 11 + log 90
        [2.39789..., 6.89770...]

    Reference:
        Grave et al., Efficient Softmax Approximation for GPUs, 2016, arXiv 1609.04309.
    """
    name = "adaptive_softmax_cross_entropy"
    h, parts, counts = _check_adaptive(name, hidden, parameters, where)
    size = None if chunk_size is None else checks.count(name, "chunk_size", chunk_size)
    y = sampled.class_indices(name, labels, h.shape[:-1], _cutoffs(parts)[-1], counts)
    return _adaptive(h, parts, y, counts, size)


def adaptive_softmax_log_prob(hidden: ArrayLike, parameters: AdaptiveSoftmax, *, where: ArrayLike | None = None) -> Array:
    """Log-probabilities of all classes under an adaptive softmax [..., classes].

    log p_k = log softmax(head)_k in the shortlist, log softmax(head)_(shortlist + j) + log softmax(cluster j)_(k − cutoff_j) behind it.
    Gradient: ∂log p_k = one-hot − softmax with respect to the logits of the head and of the class's own cluster.

    Args:
        hidden: [..., features], activations.
        parameters: of `init_adaptive_softmax`.
        where: [...], which examples count; the others give 0.

    Returns:
        [..., classes], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> parameters = xentjax.init_adaptive_softmax(jax.random.key(0), 64, [10, 100])
        >>> log_prob = xentjax.adaptive_softmax_log_prob(jnp.ones(64), parameters)
        >>> log_prob.shape, round(float(jnp.exp(log_prob).sum()), 5)
        ((100,), 1.0)

    Reference:
        Grave et al., Efficient Softmax Approximation for GPUs, 2016, arXiv 1609.04309.
    """
    return _adaptive_log_prob(*_check_adaptive("adaptive_softmax_log_prob", hidden, parameters, where))


class BinaryTree(NamedTuple):
    """The way from the root of a binary tree to each class, padded to the longest; made by `huffman_tree`, arrays [classes, depth].

    A tree of K classes has K − 1 inner nodes, each a decision: class k is reached by going `signs[k, i]` at node `nodes[k, i]`.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> tree = xentjax.BinaryTree(jnp.array([[0, 0], [0, 1], [0, 1]]), jnp.array([[1, 0], [-1, 1], [-1, -1]]))  # 0 is one step away
        >>> tree.nodes.shape
        (3, 2)
    """

    nodes: ArrayLike
    """[classes, depth], inner nodes in [0, classes − 1), the root first; anything behind the end of a path."""
    signs: ArrayLike
    """[classes, depth], +1 or −1; 0 behind the end of a path."""


def huffman_tree(counts: ArrayLike) -> BinaryTree:
    """The binary tree whose expected path is shortest, paths and signs [classes, depth].

    Σ counts·length is least; with p = counts/Σ counts, H(p) ≤ Σ p·length < H(p) + 1 in bits.
    Gradient: none.

    Made once, outside `jax.jit`. Of all such trees it is one of least depth. Inner nodes are numbered from the root, 0, to the rarest.

    Args:
        counts: [classes], ≥ 0, not all 0: how often each class is a label.

    Returns:
        `BinaryTree`, int32 nodes and int8 signs.

    Raises:
        TypeError: counts that are traced or not numbers.
        ValueError: another shape than [classes], fewer than two classes, a count that is negative or not finite, counts that are all 0.

    Example:
        >>> import xentjax
        >>> tree = xentjax.huffman_tree([5, 1, 2, 1])
        >>> abs(tree.signs).sum(axis=1).tolist()  # decisions to each class
        [1, 3, 2, 3]

    Reference:
        Huffman, A Method for the Construction of Minimum-Redundancy Codes, 1952.
    """
    name = "huffman_tree"
    probs = samplers.probabilities(name, "counts", counts)
    if probs.size < 2:
        raise ValueError(f"{name}: counts must have at least two classes; got shape {probs.shape}.")
    nodes, signs = _paths(*_parents(probs))
    return BinaryTree(jnp.asarray(nodes), jnp.asarray(signs))


def hierarchical_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    tree: BinaryTree,
    bias: ArrayLike | None = None,
    classes_first: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of the decisions on the way to the label in a binary tree, one value per example [...].

    loss = Σ_i softplus(−signs_{y,i}·z_i),  z_i = hidden·kernel_{n_i} + bias_{n_i} at node n_i = nodes_{y,i}.
    Gradient: ∂loss/∂z_i = −signs_{y,i}·σ(−signs_{y,i}·z_i), 0 at nodes off the way.

    Args:
        hidden: [..., features], activations.
        kernel: [features, classes − 1], a column per inner node, or [classes − 1, features] with `classes_first`.
        labels: [...] class indices.
        tree: `huffman_tree`, or any `BinaryTree` of arrays [classes, depth].
        bias: [classes − 1], added to the logits of the nodes.
        classes_first: whether `kernel` is [classes − 1, features], where a node is one piece of memory.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> tree = xentjax.huffman_tree([5, 1, 2, 1])
        >>> kernel = jnp.zeros((8, 3))
        >>> xentjax.hierarchical_softmax_cross_entropy(jnp.ones((2, 8)), kernel, jnp.array([0, 1]), tree=tree).tolist()  # log 2, 3·log 2
        [0.69314..., 2.07944...]

    Reference:
        Morin, Bengio, Hierarchical Probabilistic Neural Network Language Model, 2005; Mikolov et al., Distributed Representations of Words
        and Phrases and their Compositionality, 2013, arXiv 1310.4546 (Huffman trees).
    """
    name = "hierarchical_softmax_cross_entropy"
    nodes, signs = (checks.integers(name, f"tree.{part}", x) for part, x in zip(tree._fields, tree, strict=True))
    if nodes.ndim != 2 or len(nodes) < 2:
        raise ValueError(f"{name}: tree.nodes must have shape (classes, depth), two classes at least; got {nodes.shape}.")
    checks.same_shape(name, "tree.signs", signs, nodes.shape, "the shape of tree.nodes")
    h, k, b, counts, _ = layers.arguments(name, hidden, kernel, bias, where, None, classes_first)
    expected = (len(nodes) - 1, h.shape[-1]) if classes_first else (h.shape[-1], len(nodes) - 1)
    checks.shape(name, "kernel", k, expected, f"one inner node less than the {len(nodes)} classes of the tree")
    layers.check_values(name, k, b, classes_first)
    values.indices(name, "tree.nodes", nodes, len(nodes) - 1, signs != 0)
    y = sampled.class_indices(name, labels, h.shape[:-1], len(nodes), counts)
    return _hierarchical(h, k, b, y, nodes, signs, counts, bool(classes_first))


def _cutoffs(parameters) -> list[int]:
    """The size of the shortlist and the ends of the clusters; the last is the number of classes."""
    sizes = [k.shape[1] for k in parameters.kernels]
    return np.cumsum([parameters.head.shape[1] - len(sizes), *sizes]).tolist()


def _check_adaptive(function, hidden, parameters, where):
    h = checks.floating(function, "hidden", hidden)
    if h.ndim == 0:
        raise ValueError(f"{function}: hidden must have a feature axis; got shape ().")
    features, clusters = h.shape[-1], len(parameters.kernels)
    if len(parameters.projections) != clusters:
        raise ValueError(f"{function}: parameters.projections must be as many as kernels, {clusters}; got {len(parameters.projections)}.")

    def matrix(name, x, inputs, columns, least):
        x = checks.floating(function, f"parameters.{name}", x)
        if x.ndim != 2 or x.shape[0] != inputs or x.shape[1] < least:
            raise ValueError(
                f"{function}: parameters.{name} must have shape ({inputs}, {columns}) for hidden of shape {h.shape}; got {x.shape}."
            )
        return x

    head = matrix("head", parameters.head, features, f"shortlist + {clusters}" if clusters else "classes", clusters + 1)
    projections = tuple(matrix(f"projections[{j}]", x, features, "width", 1) for j, x in enumerate(parameters.projections))
    kernels = tuple(matrix(f"kernels[{j}]", x, projections[j].shape[1], "classes", 1) for j, x in enumerate(parameters.kernels))
    counts = checks.counted(function, where, h.shape[:-1], "the shape of hidden without its feature axis")
    parts = AdaptiveSoftmax(head, projections, kernels)
    values.finite(function, "hidden", h, counts)
    for path, x in jax.tree_util.tree_leaves_with_path(parts):
        values.finite(function, f"parameters{jax.tree_util.keystr(path)}", x)
    return h, parts, counts


@functools.partial(jax.jit, static_argnames=("chunk_size",))
def _adaptive(hidden, parameters, labels, where, chunk_size):
    cutoffs = _cutoffs(parameters)
    y = sampled.counted(where, labels)
    h = sampled.counted(where, hidden)
    entropy = functools.partial(values.unchecked(fused.linear_softmax_cross_entropy), reduction="none", chunk_size=chunk_size)
    inside = (y >= 0) & (y < cutoffs[-1])
    cluster = sum(((y >= c).astype(y.dtype) for c in cutoffs[:-1]), jnp.zeros_like(y))
    in_head = numerics.where(inside, numerics.where(cluster == 0, y, cutoffs[0] + cluster - 1), -1)
    loss = entropy(h, parameters.head, in_head, where=where)
    for j, (projection, kernel) in enumerate(zip(parameters.projections, parameters.kernels, strict=True)):
        own = inside & (cluster == j + 1) & (True if where is None else where)
        loss += entropy(_projected(h, projection), kernel, numerics.where(own, y - cutoffs[j], 0), where=own)
    return loss


@jax.jit
def _adaptive_log_prob(hidden, parameters, where):
    dtype, h = numerics.accumulation_dtype(hidden.dtype), sampled.counted(where, hidden)
    head = _log_softmax(jnp.dot(h, parameters.head.astype(h.dtype), preferred_element_type=dtype))
    shortlist = _cutoffs(parameters)[0]
    parts = [head[..., :shortlist]]
    for j, (projection, kernel) in enumerate(zip(parameters.projections, parameters.kernels, strict=True)):
        tail = _log_softmax(jnp.dot(_projected(h, projection), kernel.astype(h.dtype), preferred_element_type=dtype))
        parts.append(jnp.broadcast_to(head[..., shortlist + j, None], tail.shape) + tail)
    return sampled.counted(where, jnp.concatenate(parts, axis=-1))


def _projected(hidden, projection):
    projected = jnp.dot(hidden, projection.astype(hidden.dtype), preferred_element_type=numerics.accumulation_dtype(hidden.dtype))
    return projected.astype(hidden.dtype)


def _log_softmax(logits):
    r = rows.of(rows.Examples(logits, None, None, None, logits.ndim - 1, None))
    return -surprises.surprise(r, statistics.of_row(r))


@functools.partial(jax.jit, static_argnames=("classes_first",))
def _hierarchical(hidden, kernel, bias, labels, nodes, signs, where, classes_first):
    dtype, h = numerics.accumulation_dtype(hidden.dtype), sampled.counted(where, hidden)
    y = sampled.counted(where, labels)
    path, sign = (jnp.take(x, y, axis=0, mode="clip") for x in (nodes, signs.astype(dtype)))
    path = numerics.where(sign == 0, 0, path)  # nothing is looked up behind the end
    of_nodes = sampled.taken(kernel, path.reshape(-1), 0 if classes_first else 1, dtype).astype(h.dtype).reshape(*path.shape, h.shape[-1])
    z = jnp.einsum("...f,...df->...d", h, of_nodes, preferred_element_type=dtype)
    if bias is not None:
        z += sampled.taken(bias, path.reshape(-1), 0, dtype).reshape(z.shape)
    decisions = numerics.nan_unless((path >= 0) & (path < len(nodes) - 1), numerics.softplus(-sign * z))
    loss = jnp.sum(numerics.where(sign == 0, 0, decisions), axis=-1)
    return sampled.counted(where, numerics.nan_unless((y >= 0) & (y < len(nodes)), loss))


def _parents(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parent of each node, classes first, then inner nodes as they are made, the root last; and which of two children it is, ±1.

    Inner nodes are made in rising order of weight, so two queues do. Classes go first among equals, which keeps the tree flat.
    """
    classes = len(weights)
    weight = [*weights.tolist(), *[0.0] * (classes - 1)]
    leaves, parent, side = (
        np.argsort(weights, kind="stable").tolist(),
        np.zeros(2 * classes - 1, np.int64),
        np.zeros(2 * classes - 1, np.int8),
    )
    leaf, inner = 0, classes
    for made in range(classes, 2 * classes - 1):
        for sign in (-1, 1):
            if inner == made or (leaf < classes and weight[leaves[leaf]] <= weight[inner]):
                child, leaf = leaves[leaf], leaf + 1
            else:
                child, inner = inner, inner + 1
            parent[child], side[child] = made, sign
            weight[made] += weight[child]
    return parent, side


def _paths(parent: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and signs on the way from the root to each class, [classes, depth]."""
    root, classes = len(parent) - 1, (len(parent) + 1) // 2
    steps, at = [], np.arange(classes)
    while (at != root).any():
        steps.append((np.where(at == root, -1, root - parent[at]), np.where(at == root, 0, side[at])))
        at = np.where(at == root, root, parent[at])
    nodes, signs = (np.stack(x[::-1], axis=1) for x in zip(*steps, strict=True))  # the root is at the end of each path
    order = np.argsort(signs == 0, axis=1, kind="stable")  # padding goes behind
    nodes, signs = (np.take_along_axis(x, order, axis=1) for x in (nodes, signs))
    return np.maximum(nodes, 0).astype(np.int32), signs.astype(np.int8)
