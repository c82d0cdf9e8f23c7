"""Hierarchical softmax losses: exact probabilities over many classes at a fraction of the cost of a full softmax.

An adaptive softmax has a shortlist of frequent classes, and clusters of rarer classes. A binary tree reaches each class by a sequence of
binary decisions.

All losses share these conventions:

- `hidden` has shape [..., features]. Matrix products are computed in its dtype and accumulate in float32 or wider.
- `labels` [...] are integer class indices. If a label is outside [0, classes), the loss of its example is NaN. The gradient with respect to
  `hidden` is then NaN for this example too.
- `where` [...] is True for examples that count. The loss and the gradient of all other examples are exactly 0, whatever they contain.
- The probabilities of all classes sum to 1. Each loss is the cross-entropy of its own model. It does not approximate a full softmax.
- Results are float32, or float64 if `hidden` is float64. The gradient of each argument has the dtype of that argument.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from __future__ import annotations

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
from xentjax._many_classes import arguments
from xentjax._many_classes.arguments import masked


class AdaptiveSoftmax(NamedTuple):
    """Parameters of an adaptive softmax with J clusters. The logits of its head have shape [..., shortlist + J].

    Classes are numbered in descending order of frequency. The first `shortlist` classes form the shortlist. The head has one logit for each
    class of the shortlist, and one logit for each of the J clusters. The clusters hold all other classes in order. Cluster j, counted
    from 0, holds `kernels[j].shape[1]` classes.

    Example:
        >>> import jax, xentjax
        >>> parameters = xentjax.init_adaptive_softmax(jax.random.key(0), 64, [100, 1000, 10_000])
        >>> jax.tree.map(jax.numpy.shape, parameters)
        AdaptiveSoftmax(head=(64, 102), projections=((64, 16), (64, 4)), kernels=((16, 900), (4, 9000)))
    """

    head: ArrayLike
    """[features, shortlist + J], one column per frequent class and one per cluster."""
    projections: tuple[ArrayLike, ...]
    """J arrays [features, width_j]. Clusters of rarer classes have smaller widths."""
    kernels: tuple[ArrayLike, ...]
    """J arrays [width_j, classes of cluster j]."""


class _Parameters(NamedTuple):
    """A checked `AdaptiveSoftmax`."""

    head: Array
    projections: tuple[Array, ...]
    kernels: tuple[Array, ...]


def init_adaptive_softmax(
    key: Array, features: int, cutoffs: tuple[int, ...] | list[int], *, div_value: float = 4.0, dtype: DTypeLike = jnp.float32
) -> AdaptiveSoftmax:
    """Random initial parameters of an adaptive softmax, for `hidden` of shape [..., features].

    The entries of each matrix are normal with variance 1/(number of its rows). Cluster j has
    width_j = max(1, ⌊features/div_value^(j + 1)⌋) features.
    Gradient: none.

    If the entries of `hidden` are of order 1, the logits are of order 1 too.

    Args:
        key: a random key from `jax.random.key`.
        features: number of features of `hidden`.
        cutoffs: increasing integers. Classes [0, cutoffs[0]) are in the head, and classes [cutoffs[j], cutoffs[j + 1]) are in cluster j.
            The last cutoff is the number of classes.
        div_value: ≥ 1, factor by which the number of features decreases from each cluster to the next.
        dtype: dtype of the parameters.

    Returns:
        `AdaptiveSoftmax`.

    Raises:
        TypeError: `key` is not a JAX random key, `cutoffs` is not a sequence, or a size is not a Python integer.
        ValueError: a size is below 1, `cutoffs` do not increase, or `div_value` is below 1.

    Example:
        >>> import jax, xentjax
        >>> parameters = xentjax.init_adaptive_softmax(jax.random.key(0), 128, [500, 2500, 60_000])
        >>> sum(x.size for x in jax.tree.leaves(parameters)), 128 * 60_000  # parameters, compared with a full softmax
        (593376, 7680000)

    Reference:
        Grave et al., Efficient Softmax Approximation for GPUs, 2016, arXiv 1609.04309.
    """
    name = "init_adaptive_softmax"
    key, features = arguments.random_key(name, key), checks.count(name, "features", features)
    if isinstance(cutoffs, int):
        raise TypeError(
            f"{name}: cutoffs must be a sequence of integers; got {cutoffs}. Use [shortlist, ..., {cutoffs}] for {cutoffs} classes."
        )
    bounds = [checks.count(name, f"cutoffs[{j}]", c) for j, c in enumerate(cutoffs)]
    if not bounds or any(low >= high for low, high in itertools.pairwise(bounds)):
        raise ValueError(f"{name}: cutoffs must increase from the size of the shortlist to the number of classes; got {list(cutoffs)}.")
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
    """Cross-entropy of an adaptive softmax, shape [...].

    If the label y is in the shortlist, loss = −log softmax(hidden·head)_y. If y is in cluster j,
    loss = −log softmax(hidden·head)_(shortlist + j) − log softmax(hidden·projection_j·kernel_j)_(y − cutoff_j).
    Gradient: softmax − one-hot, with respect to the logits of the head and of the label's cluster. With respect to the logits of other
    clusters, the gradient is 0.

    Every cluster is computed for every example, in chunks. The cluster of the label is then selected. So the cost does not depend on the
    labels. No examples are skipped. The cost is lower than for a full softmax because rarer classes have fewer features.

    Args:
        hidden: [..., features], activations.
        parameters: an `AdaptiveSoftmax`; `init_adaptive_softmax` makes one.
        labels: [...] class indices. Classes are numbered in descending order of frequency.
        chunk_size: maximum number of examples whose logits are in memory at a time; None: chosen by `plan_linear`.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `chunk_size` is below 1.

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
    y = arguments.class_indices(name, labels, h.shape[:-1], _cutoffs(parts)[-1], counts)
    return _adaptive(h, parts, y, counts, size)


@functools.partial(jax.jit, static_argnames=("chunk_size",))
def _adaptive(hidden: Array, parameters: _Parameters, labels: Array, where: Array | None, chunk_size: int | None) -> Array:
    cutoffs = _cutoffs(parameters)
    y = masked(labels, where)
    h = masked(hidden, where)
    cross_entropy = functools.partial(values.unchecked(fused.linear_softmax_cross_entropy), reduction="none", chunk_size=chunk_size)
    inside = (y >= 0) & (y < cutoffs[-1])
    cluster = sum(((y >= c).astype(y.dtype) for c in cutoffs[:-1]), jnp.zeros_like(y))
    in_head = numerics.where(inside, numerics.where(cluster == 0, y, cutoffs[0] + cluster - 1), -1)
    loss = cross_entropy(h, parameters.head, in_head, where=where)
    for j, (projection, kernel) in enumerate(zip(parameters.projections, parameters.kernels, strict=True)):
        own = inside & (cluster == j + 1) & (True if where is None else where)
        loss += cross_entropy(_projected(h, projection), kernel, numerics.where(own, y - cutoffs[j], 0), where=own)
    return loss


def adaptive_softmax_log_prob(hidden: ArrayLike, parameters: AdaptiveSoftmax, *, where: ArrayLike | None = None) -> Array:
    """Log-probabilities of all classes under an adaptive softmax, shape [..., classes].

    If class k is in the shortlist, log p_k = log softmax(hidden·head)_k. If it is in cluster j,
    log p_k = log softmax(hidden·head)_(shortlist + j) + log softmax(hidden·projection_j·kernel_j)_(k − cutoff_j).
    Gradient: one-hot − softmax, for log p_k with respect to the logits of the head and of the cluster of class k.

    Args:
        hidden: [..., features], activations.
        parameters: an `AdaptiveSoftmax`; `init_adaptive_softmax` makes one.
        where: [...], True for examples that count; the results of all other examples are 0.

    Returns:
        [..., classes], in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

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


@jax.jit
def _adaptive_log_prob(hidden: Array, parameters: _Parameters, where: Array | None) -> Array:
    dtype, h = numerics.accumulation_dtype(hidden.dtype), masked(hidden, where)
    head = _log_softmax(jnp.dot(h, parameters.head.astype(h.dtype), preferred_element_type=dtype))
    shortlist = _cutoffs(parameters)[0]
    parts = [head[..., :shortlist]]
    for j, (projection, kernel) in enumerate(zip(parameters.projections, parameters.kernels, strict=True)):
        tail = _log_softmax(jnp.dot(_projected(h, projection), kernel.astype(h.dtype), preferred_element_type=dtype))
        parts.append(jnp.broadcast_to(head[..., shortlist + j, None], tail.shape) + tail)
    return masked(jnp.concatenate(parts, axis=-1), where)


class BinaryTree(NamedTuple):
    """Paths from the root of a binary tree to each class, as arrays of shape [classes, depth].

    `huffman_tree` makes a `BinaryTree`. Each inner node of the tree is a binary decision, and a tree of K classes has K − 1 inner nodes. At
    node `nodes[k, i]`, the path to class k takes the direction `signs[k, i]`. Shorter paths are padded to the length of the longest path.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> tree = xentjax.BinaryTree(jnp.array([[0, 0], [0, 1], [0, 1]]), jnp.array([[1, 0], [-1, 1], [-1, -1]]))
        >>> tree.nodes.shape
        (3, 2)
    """

    nodes: ArrayLike
    """[classes, depth], indices of inner nodes in [0, classes − 1). The root comes first. Any integers may follow the end of a path."""
    signs: ArrayLike
    """[classes, depth], +1 or −1; 0 after the end of a path."""


def huffman_tree(counts: ArrayLike) -> BinaryTree:
    """Huffman tree: the binary tree with the shortest expected path, as arrays [classes, depth].

    The tree minimizes Σ counts·length, where length is the number of decisions on the path to a class. Let p = counts/Σ counts, and let
    H(p) be the entropy of p in bits. Then H(p) ≤ Σ p·length < H(p) + 1.
    Gradient: none.

    Build the tree once, outside `jax.jit`. If several trees have the shortest expected path, the function returns a tree of minimal depth.
    Inner nodes are numbered in descending order of their total count. The root is node 0.

    Args:
        counts: [classes], ≥ 0, not all 0; how often each class occurs as a label.

    Returns:
        `BinaryTree` with int32 nodes and int8 signs.

    Raises:
        TypeError: `counts` are traced or not numbers.
        ValueError: `counts` do not have shape [classes], have fewer than two classes, are all 0, or have a negative or non-finite entry.

    Example:
        >>> import xentjax
        >>> tree = xentjax.huffman_tree([5, 1, 2, 1])
        >>> abs(tree.signs).sum(axis=1).tolist()  # decisions to each class
        [1, 3, 2, 3]

    Reference:
        Huffman, A Method for the Construction of Minimum-Redundancy Codes, 1952.
    """
    name = "huffman_tree"
    probs = arguments.probabilities(name, "counts", counts)
    if probs.size < 2:
        raise ValueError(f"{name}: counts must have at least two classes; got shape {probs.shape}.")
    nodes, signs = _paths(*_parents(probs))
    return BinaryTree(jnp.asarray(nodes), jnp.asarray(signs))


def _parents(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parent of each node, and which of the two children of its parent the node is, ±1.

    Nodes are the classes, followed by the inner nodes in the order of their creation; the root is last. Inner nodes are created in
    ascending order of weight, so two sorted queues replace a heap. Among equal weights, classes are merged before inner nodes, which
    minimizes the depth.
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
    """Nodes and signs on the path from the root to each class, [classes, depth]."""
    root, classes = len(parent) - 1, (len(parent) + 1) // 2
    steps, at = [], np.arange(classes)
    while (at != root).any():
        steps.append((np.where(at == root, -1, root - parent[at]), np.where(at == root, 0, side[at])))
        at = np.where(at == root, root, parent[at])
    nodes, signs = (np.stack(x[::-1], axis=1) for x in zip(*steps, strict=True))  # padding, then the path from the root to the class
    order = np.argsort(signs == 0, axis=1, kind="stable")  # moves the padding to the end
    nodes, signs = (np.take_along_axis(x, order, axis=1) for x in (nodes, signs))
    return np.maximum(nodes, 0).astype(np.int32), signs.astype(np.int8)


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
    """Cross-entropy of the binary decisions on the tree path to the label, shape [...].

    loss = Σ_i softplus(−signs_{y,i}·z_i), where i runs over the decisions on the path to the label y. The logit of node n_i = nodes_{y,i}
    is z_i = hidden·kernel_{n_i} + bias_{n_i}.
    Gradient: ∂loss/∂z_i = −signs_{y,i}·σ(−signs_{y,i}·z_i). The gradient is 0 at nodes that are not on the path.

    Args:
        hidden: [..., features], activations.
        kernel: [features, classes − 1], one column per inner node, or [classes − 1, features] with `classes_first`.
        labels: [...] class indices.
        tree: a `BinaryTree` of arrays [classes, depth]; `huffman_tree` makes one.
        bias: [classes − 1], added to the logits of the inner nodes.
        classes_first: whether `kernel` has shape [classes − 1, features]. In this layout, the weights of each node are contiguous in
            memory.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

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
    arguments.check_fields(name, "tree", tree, BinaryTree._fields, "a BinaryTree, such as xentjax.huffman_tree(counts)")
    nodes, signs = (checks.integers(name, f"tree.{part}", getattr(tree, part)) for part in BinaryTree._fields)
    if nodes.ndim != 2 or len(nodes) < 2:
        raise ValueError(f"{name}: tree.nodes must have shape (classes, depth) with at least two classes; got {nodes.shape}.")
    checks.same_shape(name, "tree.signs", signs, nodes.shape, "the shape of tree.nodes")
    h, k, b, counts, _ = layers.arguments(name, hidden, kernel, bias, where, None, classes_first)
    expected = (len(nodes) - 1, h.shape[-1]) if classes_first else (h.shape[-1], len(nodes) - 1)
    checks.shape(name, "kernel", k, expected, f"one inner node fewer than the {len(nodes)} classes of the tree")
    layers.check_values(name, k, b, classes_first)
    values.indices(name, "tree.nodes", nodes, len(nodes) - 1, signs != 0)
    y = arguments.class_indices(name, labels, h.shape[:-1], len(nodes), counts)
    return _hierarchical(h, k, b, y, nodes, signs, counts, bool(classes_first))


@functools.partial(jax.jit, static_argnames=("classes_first",))
def _hierarchical(
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    labels: Array,
    nodes: Array,
    signs: Array,
    where: Array | None,
    classes_first: bool,
) -> Array:
    dtype, h = numerics.accumulation_dtype(hidden.dtype), masked(hidden, where)
    y = masked(labels, where)
    path, sign = (jnp.take(x, y, axis=0, mode="clip") for x in (nodes, signs.astype(dtype)))
    path = numerics.where(sign == 0, 0, path)  # `nodes` holds any integer after the end of a path
    index = path.reshape(-1)
    of_nodes = arguments.take_classes(kernel, index, 0 if classes_first else 1, dtype).astype(h.dtype).reshape(*path.shape, h.shape[-1])
    z = jnp.einsum("...f,...df->...d", h, of_nodes, preferred_element_type=dtype)
    if bias is not None:
        z += arguments.take_classes(bias, index, 0, dtype).reshape(z.shape)
    decisions = numerics.nan_unless((path >= 0) & (path < len(nodes) - 1), numerics.softplus(-sign * z))
    loss = jnp.sum(numerics.where(sign == 0, 0, decisions), axis=-1)
    return numerics.nan_or_zero(loss, (y >= 0) & (y < len(nodes)), where)


def _cutoffs(parameters: _Parameters) -> list[int]:
    """The size of the shortlist, followed by the end of each cluster; the last is the number of classes."""
    sizes = [k.shape[1] for k in parameters.kernels]
    return np.cumsum([parameters.head.shape[1] - len(sizes), *sizes]).tolist()


def _check_adaptive(
    function: str, hidden: ArrayLike, parameters: AdaptiveSoftmax, where: ArrayLike | None
) -> tuple[Array, _Parameters, Array | None]:
    """The checked arguments of a function of an adaptive softmax."""
    h = checks.floating(function, "hidden", hidden)
    if h.ndim == 0:
        raise ValueError(f"{function}: hidden must have a feature axis; got shape ().")
    expected = "an AdaptiveSoftmax, such as the result of xentjax.init_adaptive_softmax"
    arguments.check_fields(function, "parameters", parameters, AdaptiveSoftmax._fields, expected)
    features, clusters = h.shape[-1], len(parameters.kernels)
    if len(parameters.projections) != clusters:
        raise ValueError(
            f"{function}: parameters.projections must hold {clusters} arrays, as many as parameters.kernels; "
            f"got {len(parameters.projections)}."
        )

    def matrix(name: str, x: ArrayLike, inputs: int, columns: str, least: int) -> Array:
        x = checks.floating(function, f"parameters.{name}", x)
        if x.ndim != 2 or x.shape[0] != inputs or x.shape[1] < least:
            raise ValueError(
                f"{function}: parameters.{name} must have shape ({inputs}, {columns}) for hidden of shape {h.shape}; got {x.shape}."
            )
        return x

    head = matrix("head", parameters.head, features, f"shortlist + {clusters}" if clusters else "classes", clusters + 1)
    projections = tuple(matrix(f"projections[{j}]", x, features, "width", 1) for j, x in enumerate(parameters.projections))
    kernels = tuple(matrix(f"kernels[{j}]", x, projections[j].shape[1], "classes", 1) for j, x in enumerate(parameters.kernels))
    counts = checks.where_mask(function, where, h.shape[:-1], "the shape of hidden without its feature axis")
    parts = _Parameters(head, projections, kernels)
    values.finite(function, "hidden", h, counts)
    for path, x in jax.tree_util.tree_leaves_with_path(parts):
        values.finite(function, f"parameters{jax.tree_util.keystr(path)}", x)
    return h, parts, counts


def _projected(hidden: Array, projection: Array) -> Array:
    projected = jnp.dot(hidden, projection.astype(hidden.dtype), preferred_element_type=numerics.accumulation_dtype(hidden.dtype))
    return projected.astype(hidden.dtype)


def _log_softmax(logits: Array) -> Array:
    r = rows.of(rows.Examples(logits, None, None, None, logits.ndim - 1, None))
    return -surprises.surprise(r, statistics.of_row(r))
