"""Adaptive softmax and binary trees: probabilities that sum to 1, optimal codes, memory, errors."""

import heapq
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from xentjax._many_classes import hierarchical

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
BF16 = float(jnp.finfo(jnp.bfloat16).eps)


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}(\n|$)")


def adaptive(cutoffs, features=8, dtype=jnp.float32):
    return hierarchical.init_adaptive_softmax(jax.random.key(1), features, cutoffs, div_value=2.0, dtype=dtype)


def log_probs(hidden, parameters):
    """Log-probabilities in float64: the product of the head's and the cluster's probability of each class."""
    h, p = np.asarray(hidden, np.float64), jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    head, clusters = log_softmax(h @ p.head), len(p.kernels)
    shortlist = p.head.shape[1] - clusters
    tails = [log_softmax(h @ a @ b) + head[..., shortlist + j, None] for j, (a, b) in enumerate(zip(p.projections, p.kernels, strict=True))]
    return np.concatenate([head[..., :shortlist], *tails], axis=-1)


CUTOFFS = [[5], [3, 4], [4, 7, 19], [1, 3, 10, 31]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("cutoffs", CUTOFFS, ids=str)
def test_adaptive_probabilities_are_products_and_sum_to_one(cutoffs, rng):
    parameters, classes = adaptive(cutoffs), cutoffs[-1]
    hidden = jnp.asarray(rng.normal(size=(3, 8)) * 2, jnp.float32)
    expected = log_probs(hidden, parameters)
    everyone = jnp.broadcast_to(hidden[:, None], (3, classes, 8))
    labels = jnp.broadcast_to(jnp.arange(classes)[None], (3, classes))
    loss = hierarchical.adaptive_softmax_cross_entropy(everyone, parameters, labels)
    for got in (-loss, hierarchical.adaptive_softmax_log_prob(hidden, parameters)):
        assert got.shape == (3, classes)
        np.testing.assert_allclose(got, expected, rtol=64 * EPS)  # two products of sums of eight terms
        np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)).sum(1), 1, rtol=16 * EPS)


def test_adaptive_with_one_cutoff_is_the_softmax(rng):
    hidden, labels = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), jnp.arange(6)
    parameters = adaptive([6])
    expected = xentjax.softmax_cross_entropy(jnp.dot(hidden, parameters.head, precision="highest"), labels)
    np.testing.assert_allclose(hierarchical.adaptive_softmax_cross_entropy(hidden, parameters, labels), expected, rtol=16 * EPS)


def test_adaptive_confident_labels_keep_their_tiny_loss():
    zero = jax.tree.map(jnp.zeros_like, adaptive([2, 4], features=2))
    sure = zero._replace(head=zero.head.at[0, 2].set(60), projections=(jnp.eye(2)[:, :1],), kernels=(jnp.array([[50.0, 0.0]]),))
    loss = hierarchical.adaptive_softmax_cross_entropy(jnp.array([1.0, 0.0]), sure, jnp.array(2))
    expected = 2 * np.exp(-60.0) + np.exp(-50.0)
    np.testing.assert_allclose(loss, expected, rtol=68 * EPS)
    log_prob = hierarchical.adaptive_softmax_log_prob(jnp.array([1.0, 0.0]), sure)
    np.testing.assert_allclose(log_prob[2], -expected, rtol=68 * EPS)


@pytest.mark.exhaustive
def test_adaptive_gradients_stay_in_the_cluster_of_the_label(rng):
    parameters = adaptive([4, 7, 19])
    hidden = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    labels = jnp.array([1, 5, 4])
    slopes = jax.grad(lambda p: hierarchical.adaptive_softmax_cross_entropy(hidden, p, labels).sum())(parameters)
    assert not slopes.kernels[1].any() and not slopes.projections[1].any()
    assert slopes.kernels[0].any() and slopes.projections[0].any() and slopes.head.any()


def test_adaptive_log_prob_hides_examples(rng):
    hidden = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32).at[1].set(jnp.nan)
    where = jnp.array([True, False, True, True])
    parameters = adaptive([4, 7, 19])

    def run(h, p):
        return hierarchical.adaptive_softmax_log_prob(h, p, where=where)

    got = run(hidden, parameters)
    assert not got[1].any()
    np.testing.assert_allclose(got[where], log_probs(hidden[where], parameters), rtol=64 * EPS)
    slopes = jax.grad(lambda h, p: run(h, p).sum(), (0, 1))(hidden, parameters)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes)) and not slopes[0][1].any()


@pytest.mark.exhaustive
def test_adaptive_in_half_precision_has_only_the_error_of_rounded_features(rng):
    parameters = adaptive([4, 7, 19], dtype=jnp.bfloat16)
    hidden, labels = jnp.asarray(rng.normal(size=(30, 8)), jnp.bfloat16), jnp.asarray(rng.integers(0, 19, 30))
    expected = -np.take_along_axis(log_probs(hidden, parameters), np.asarray(labels)[:, None], -1)[:, 0]
    loss = hierarchical.adaptive_softmax_cross_entropy(hidden, parameters, labels)
    assert loss.dtype == jnp.float32
    # Only the projected features are rounded, each by eps/2. A logit is a sum of at most four of them, each of size 1.
    np.testing.assert_allclose(loss, expected, atol=4 * BF16)
    np.testing.assert_allclose(loss[labels < 4], expected[np.asarray(labels) < 4], rtol=32 * EPS)
    slopes = jax.grad(lambda p: hierarchical.adaptive_softmax_cross_entropy(hidden, p, labels).sum())(parameters)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(slopes))


@pytest.mark.exhaustive
def test_adaptive_memory():
    examples, classes, features = 512, 8191, 16
    parameters = jax.eval_shape(lambda: hierarchical.init_adaptive_softmax(jax.random.key(0), features, [100, 1000, classes]))

    def total(p, h, y):
        return hierarchical.adaptive_softmax_cross_entropy(h, p, y, chunk_size=64).mean()

    arguments = parameters, jax.ShapeDtypeStruct((examples, features), jnp.float32), jax.ShapeDtypeStruct((examples,), jnp.int32)
    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile()
    sizes = {int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"\w\[([\d,]+)\]", program.as_text())}
    assert max(sizes) <= 64 * (classes - 1000)
    assert program.memory_analysis().temp_size_in_bytes < examples * classes * 4 / 3


@pytest.mark.exhaustive
def test_adaptive_init():
    p = hierarchical.init_adaptive_softmax(jax.random.key(0), 100, (20, 30, 2000), dtype=jnp.bfloat16)
    assert [x.shape for x in jax.tree.leaves(p)] == [(100, 22), (100, 25), (100, 6), (25, 10), (6, 1970)]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(p))
    for x in jax.tree.leaves(p):
        variance = np.asarray(x, np.float64).var() * x.shape[0]
        assert abs(variance - 1) < 5 * np.sqrt(2 / x.size)  # five standard deviations
    assert jnp.shape(hierarchical.init_adaptive_softmax(jax.random.key(0), 3, [2, 3, 4, 5]).projections[2]) == (3, 1)


def reference_cost(counts):
    """Σ counts·length of an optimal code, which is the sum of the weights of all inner nodes."""
    heap, cost = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


COUNTS = {
    "two": [1, 1],
    "zeros": [0, 0, 3, 0, 1],
    "fibonacci": [1, 1, 2, 3, 5, 8, 13, 21, 34, 55],
    "powers": [2**k for k in range(12)],
    "equal": [1] * 37,
    "zipf": (1e6 / np.arange(1, 501)).astype(int).tolist(),
    "random": np.random.default_rng(0).integers(0, 1000, 300).tolist(),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_huffman_codes_are_optimal(counts):
    tree = hierarchical.huffman_tree(counts)
    nodes, signs = np.asarray(tree.nodes), np.asarray(tree.signs)
    assert nodes.shape == signs.shape == (len(counts), np.abs(signs).sum(1).max())
    lengths = np.abs(signs).sum(axis=1)
    assert (signs == np.where(np.arange(signs.shape[1]) < lengths[:, None], signs, 0)).all(), "padding is at the end"
    cost = int(np.dot(counts, lengths))
    assert cost == reference_cost(counts)
    p = np.array([c for c in counts if c]) / sum(counts)
    entropy = -np.sum(p * np.log2(p))
    assert entropy - 1e-12 <= cost / sum(counts) < entropy + 1
    assert sum(2.0 ** -lengths.astype(float)) == 1
    used = signs != 0
    assert set(nodes[used]) == set(range(len(counts) - 1)) and (nodes[:, 0] == 0).all()
    codes = {tuple(s[s != 0]) for s in signs}
    assert len(codes) == len(counts) and not any(c[:i] in codes for c in codes for i in range(1, len(c))), "no code is a prefix of another"


def test_huffman_tree_of_equals_is_flat():
    lengths = np.abs(np.asarray(hierarchical.huffman_tree(np.ones(37)).signs)).sum(1)
    assert set(lengths.tolist()) == {5, 6}
    assert np.shape(hierarchical.huffman_tree([1, 1, 2, 2]).signs) == (4, 2), "lengths 1, 2, 3, 3 have the same cost but a larger depth"


@pytest.mark.exhaustive
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("classes_first", [False, True])
def test_tree_probabilities_sum_to_one(counts, classes_first, rng):
    tree, classes = hierarchical.huffman_tree(counts), len(counts)
    hidden, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5,), (5, classes - 1), (classes - 1,)))
    everyone = jnp.broadcast_to(hidden[None], (classes, 5))
    layer = kernel.T if classes_first else kernel
    loss = hierarchical.hierarchical_softmax_cross_entropy(
        everyone, layer, jnp.arange(classes), tree=tree, bias=bias, classes_first=classes_first
    )
    np.testing.assert_allclose(np.exp(-np.asarray(loss, np.float64)).sum(), 1, rtol=32 * EPS)


def test_decisions_keep_tiny_losses():
    tree = hierarchical.BinaryTree(np.array([[0, 0], [0, 1], [0, 1]]), np.array([[1, 0], [-1, 1], [-1, -1]]))
    loss = hierarchical.hierarchical_softmax_cross_entropy(jnp.ones(1), jnp.array([[-60.0, 50.0]]), jnp.array(1), tree=tree)
    np.testing.assert_allclose(loss, np.exp(-60.0) + np.exp(-50.0), rtol=64 * EPS)


@pytest.mark.parametrize("bad", [-1, -100, 5])
def test_bad_labels_are_nan_in_their_own_examples(bad):
    labels = jnp.array([1, bad, 3])
    tree, kernel, parameters = hierarchical.huffman_tree([5, 1, 1, 2, 1]), jnp.ones((2, 4)), adaptive([2, 5], features=2)
    for run in (
        lambda h: hierarchical.hierarchical_softmax_cross_entropy(h, kernel, labels, tree=tree),
        lambda h: hierarchical.adaptive_softmax_cross_entropy(h, parameters, labels),
    ):
        hidden = jnp.ones((3, 2))
        np.testing.assert_array_equal(np.isnan(run(hidden)), [False, True, False])
        slope = jax.grad(lambda h, run=run: run(h).sum())(hidden)
        np.testing.assert_array_equal(np.isnan(slope), [[False] * 2, [True] * 2, [False] * 2])


def test_tree_nodes_that_do_not_exist_are_nan():
    tree = hierarchical.BinaryTree(np.array([[0, 0], [0, 2], [0, 1]]), np.array([[1, 0], [-1, 1], [-1, -1]]))
    loss = hierarchical.hierarchical_softmax_cross_entropy(jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.arange(3), tree=tree)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])


def test_tree_memory():
    examples, classes, features = 256, 20_011, 16
    tree = hierarchical.huffman_tree(1 / np.arange(1, classes + 1))

    def total(h, k, y):
        return hierarchical.hierarchical_softmax_cross_entropy(h, k, y, tree=tree).mean()

    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((examples, features), (features, classes - 1))]
    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments, jax.ShapeDtypeStruct((examples,), jnp.int32)).compile()
    sizes = {int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"\w\[([\d,]+)\]", program.as_text())}
    assert max(sizes) <= max(features * classes, tree.nodes.size) < examples * classes


def test_errors():
    name, h, y = "init_adaptive_softmax", jnp.ones((2, 8)), jnp.array([0, 1])
    for cutoffs in ([], [3, 3], [5, 2]):
        with raises(ValueError, f"{name}: cutoffs must increase from the size of the shortlist to the number of classes; got {cutoffs}."):
            adaptive(cutoffs)
    with raises(ValueError, f"{name}: cutoffs[1] must be at least 1; got 0."):
        adaptive([3, 0])
    with raises(ValueError, f"{name}: div_value must be a finite number at least 1; got 0.5."):
        hierarchical.init_adaptive_softmax(jax.random.key(0), 8, [2], div_value=0.5)
    parameters = adaptive([4, 7, 19])
    for function, arguments in (
        (hierarchical.adaptive_softmax_cross_entropy, (y,)),
        (hierarchical.adaptive_softmax_log_prob, ()),
    ):
        name = function.__name__
        message = f"{name}: parameters.head must have shape (8, shortlist + 2) for hidden of shape (2, 8); got (9, 6)."
        with raises(ValueError, message):
            function(h, parameters._replace(head=jnp.ones((9, 6))), *arguments)
        with raises(ValueError, f"{name}: parameters.kernels[1] must have shape (2, classes) for hidden of shape (2, 8); got (3, 12)."):
            function(h, parameters._replace(kernels=(parameters.kernels[0], jnp.ones((3, 12)))), *arguments)
        with raises(ValueError, f"{name}: parameters.projections must hold 2 arrays, as many as parameters.kernels; got 0."):
            function(h, parameters._replace(projections=()), *arguments)
        with raises(ValueError, f"{name}: hidden must have a feature axis; got shape ()."):
            function(h[0, 0], parameters, *arguments)
    name, tree, kernel = "hierarchical_softmax_cross_entropy", hierarchical.huffman_tree([1, 2, 3]), jnp.ones((8, 3))
    with raises(ValueError, f"{name}: kernel must have shape (8, 2), one inner node fewer than the 3 classes of the tree; got (8, 3)."):
        hierarchical.hierarchical_softmax_cross_entropy(h, kernel, y, tree=tree)
    with raises(ValueError, f"{name}: tree.signs must have shape (3, 2), the shape of tree.nodes; got (3,)."):
        hierarchical.hierarchical_softmax_cross_entropy(h, kernel, y, tree=tree._replace(signs=jnp.ones(3, int)))
    with raises(ValueError, "huffman_tree: counts must have at least two classes; got shape (1,)."):
        hierarchical.huffman_tree([3])
    with raises(ValueError, "huffman_tree: counts must be finite and at least 0; got counts[0] = -1."):
        hierarchical.huffman_tree([-1, 2])
