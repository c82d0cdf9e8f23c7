"""Losses of a linear layer in chunks: accuracy, dtypes and extreme inputs. `test_linear_dense.py` tests all derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from xentjax._linear import layout, products

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
FIRST, SECOND = 2e-5, 2e-4  # float32 sums over 97 examples and 131 classes, relative to the largest component


def problem(rng, leading=(97,), features=11, classes=131, dtype=jnp.float32):
    """(hidden, kernel, bias, weights per example, temperature), labels, and which examples count."""

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    where = jnp.asarray(rng.uniform(size=leading) < 0.8)
    where = where if where.any() else ~where
    labels = jnp.where(where, jnp.asarray(rng.integers(0, classes, leading), jnp.int32), -100)
    weights = jnp.asarray(rng.uniform(0.5, 2.0, leading), jnp.float32)
    return (draw(*leading, features), draw(features, classes), draw(classes), weights, jnp.asarray(1.3, jnp.float32)), labels, where


def exact_loss(z, labels):
    """−log softmax at the label, by definition. Its automatic derivative in float64 is the reference."""
    return jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, jnp.maximum(labels, 0)[..., None], -1)[..., 0]


def close(got, expected, tolerance):
    """Equal relative to the largest component, or to 0.05 where terms of order 1 cancel (a mean's derivative by its only weight)."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        e = np.asarray(e, np.float64)
        np.testing.assert_allclose(np.asarray(g, np.float64), e, rtol=0, atol=tolerance * (np.abs(e).max(initial=0) + 0.05))


def in_float64(function, *trees):
    """`function` of the same numbers in float64."""
    jax.config.update("jax_enable_x64", True)
    try:
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), trees)
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(jnp.asarray, wide)))
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 1000])
def test_zero_logits_cost_the_logarithm_of_the_class_count(chunk_size):
    hidden, kernel, labels = jnp.ones((97, 8)), jnp.zeros((8, 131)), jnp.arange(97)
    log = np.float32(np.log(131))
    each = xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none", chunk_size=chunk_size)
    np.testing.assert_array_equal(each, np.full(97, log))
    one = xentjax.linear_softmax_cross_entropy(hidden[:1], kernel, labels[:1], chunk_size=chunk_size)
    assert one == log
    mean = xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, chunk_size=chunk_size)
    np.testing.assert_allclose(mean, log, rtol=4 * EPS)  # 97 times log/97, added in float32


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_no_worse_than_dense(rng, reduction, dtype):
    (hidden, kernel, *_), labels, _ = problem(rng, (61,), 32, 101, dtype)
    labels = jnp.maximum(labels, 0)
    ct = jnp.asarray(rng.normal(size=61), jnp.float32) if reduction == "none" else jnp.ones(())

    def naive(h, k):  # the usual code without the library: half-precision logits in memory
        each = exact_loss((h @ k).astype(jnp.float32), labels)
        return jnp.sum(ct * (each if reduction == "none" else each.mean()))

    def ours(h, k):
        return jnp.sum(ct * xentjax.linear_softmax_cross_entropy(h, k, labels, reduction=reduction, chunk_size=8))

    def exact(h, k, ct):
        each = exact_loss(h @ k, labels)
        return jnp.sum(ct * (each if reduction == "none" else each.mean()))

    expected = in_float64(jax.value_and_grad(exact, (0, 1)), hidden, kernel, ct)

    def error(function):
        value, slopes = jax.value_and_grad(function, (0, 1))(hidden, kernel)
        assert value.dtype == jnp.float32 and slopes[0].dtype == dtype and slopes[1].dtype == dtype
        return [np.abs(np.asarray(g, np.float64) - e).max() for g, e in zip((value, *slopes), (expected[0], *expected[1]), strict=True)]

    for mine, theirs in zip(error(ours), error(naive), strict=True):
        assert mine <= theirs


def test_the_kernel_s_gradient_adds_up_in_float32():
    # 2,048 equal contributions, one per chunk: a sum in bfloat16 stops growing at 256
    hidden, kernel, labels = jnp.ones((2048, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16), jnp.zeros(2048, jnp.int32)
    for reduction in ("sum", "none"):

        def loss(k, reduction=reduction):
            return jnp.sum(xentjax.linear_softmax_cross_entropy(hidden, k, labels, reduction=reduction, chunk_size=1))

        np.testing.assert_array_equal(jax.grad(loss)(kernel).astype(jnp.float32), [[-1024, 1024]])


@pytest.mark.parametrize("per_class", [False, True])
def test_gradients_of_closed_over_arrays_are_added_in_float32(per_class):
    # 2,048 equal contributions of 1, one per chunk: a sum in bfloat16 stops growing at 256
    hidden, kernel = jnp.ones((2048, 1), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16)

    def total(scale):
        def loss(logits):  # the logits are 1
            return (logits * scale.astype(logits.dtype).reshape(1, -1))[:, 0]

        return xentjax.fuse_linear(loss, reduction="sum", chunk_size=1)(hidden, kernel)

    slope = jax.grad(total)(jnp.ones(2 if per_class else (), jnp.bfloat16))
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_array_equal(slope.astype(jnp.float32), [2048, 0] if per_class else 2048)


def test_float16_gradients_are_computed_before_the_division():
    # A probability of 1e-3 divided by 65,536 is below the smallest float16. With a loss scale, the gradient of the mean must not be 0.
    n, classes = 65_536, 512
    hidden, kernel, labels = jnp.ones((n, 1), jnp.float16), jnp.zeros((1, classes), jnp.float16), jnp.zeros(n, jnp.int32)
    slope = jax.grad(lambda k: 1024 * xentjax.linear_softmax_cross_entropy(hidden, k, labels, chunk_size=8192))(kernel)
    np.testing.assert_allclose(slope[0, 1:].astype(jnp.float32), 1024 / classes, rtol=2**-10)


def test_float32_kernels_keep_float32_gradients(rng):
    (hidden, kernel, *_), labels, _ = problem(rng, (40,))
    narrow = hidden.astype(jnp.bfloat16)
    slope = jax.grad(xentjax.linear_softmax_cross_entropy, 1)(narrow, kernel, jnp.maximum(labels, 0), chunk_size=8)
    assert slope.dtype == jnp.float32
    rounded = slope.astype(jnp.bfloat16).astype(jnp.float32)
    assert (slope != rounded).mean() > 0.9
    wide = jax.grad(xentjax.linear_softmax_cross_entropy, 1)(hidden, kernel.astype(jnp.bfloat16), jnp.maximum(labels, 0), chunk_size=8)
    assert wide.dtype == jnp.bfloat16


def test_no_examples_cost_nothing():
    value, slopes = jax.value_and_grad(xentjax.linear_softmax_cross_entropy, (0, 1))(
        jnp.zeros((0, 4)), jnp.ones((4, 7)), jnp.zeros(0, jnp.int32)
    )
    assert value == 0 and slopes[0].shape == (0, 4) and (slopes[1] == 0).all()
    each = xentjax.linear_softmax_cross_entropy(jnp.zeros((3, 0, 4)), jnp.ones((4, 7)), jnp.zeros((3, 0), jnp.int32), reduction="none")
    assert each.shape == (3, 0)


def test_an_infinite_loss_of_weight_zero_costs_nothing():
    kernel = jnp.array([[0.0, -jnp.inf, 0.0]])
    value = xentjax.linear_softmax_cross_entropy(jnp.ones((2, 1)), kernel, jnp.array([0, 1]), weights=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(value, np.log(2), rtol=4 * EPS)


def test_bad_labels_are_nan(rng):
    (hidden, kernel, *_), _, _ = problem(rng, (9,))
    labels = jnp.arange(9).at[5].set(131)
    each = xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none", chunk_size=4)
    np.testing.assert_array_equal(np.isnan(each), np.arange(9) == 5)
    slope = jax.grad(xentjax.linear_softmax_cross_entropy)(hidden, kernel, labels, chunk_size=4)
    assert np.isnan(slope[5]).all() and np.isfinite(np.delete(slope, 5, axis=0)).all()


def test_confident_labels_keep_their_loss_and_gradient():
    # a margin of 40 nats: loss 2·e⁻⁴⁰, where lse − z and p − 1 are 0
    hidden, kernel = jnp.full((5, 1), 40.0), jnp.array([[1.0, 0.0, 0.0]])
    value, slope = jax.value_and_grad(xentjax.linear_softmax_cross_entropy, 1)(hidden, kernel, jnp.zeros(5, jnp.int32), chunk_size=2)
    tiny = np.exp(-40.0)
    np.testing.assert_allclose(value, 2 * tiny, rtol=60 * EPS)  # (8 + margin) eps and the mean
    np.testing.assert_allclose(slope, [[-80 * tiny, 40 * tiny, 40 * tiny]], rtol=60 * EPS)


@pytest.mark.parametrize(("leading", "chunk_size"), [((7,), 3), ((2, 7), 4), ((3, 2, 5), 6), ((5, 4), 3), ((), 1), ((9,), 3), ((2, 12), 8)])
def test_joined_chunks_have_the_order_of_the_examples(leading, chunk_size):
    x = jnp.arange(2 * math.prod(leading)).reshape(*leading, 2)
    cut = layout.even(leading, chunk_size)
    np.testing.assert_array_equal(cut.join(*cut.split(x)), x)
    if cut.loops:
        np.testing.assert_array_equal(cut.unstack(cut.stack(x)), x)
        np.testing.assert_array_equal(cut.stack(x)[1:], cut.split(x)[1])
        once = cut.stack(jnp.ones(leading), repeat=False)
        assert once.sum() == math.prod(leading) and (once[1:] == 1).all()


@pytest.mark.parametrize("classes", [0, 1])
def test_products_added_in_blocks_count_each_class_once(rng, monkeypatch, classes):
    monkeypatch.setattr(products, "_BLOCK_BYTES", 512)  # blocks of 10 classes: the last of 10 blocks overlaps the one before it
    total, hidden, slopes = rng.normal(size=(12, 97)), rng.normal(size=(5, 12)), rng.normal(size=(5, 97))
    arrays = (total, hidden, slopes) if classes == 1 else (total.T, slopes, hidden)
    found = products._add_in_blocks(classes, *(jnp.asarray(x, jnp.float32) for x in arrays))
    expected = total + hidden.T @ slopes
    # 6 roundings of terms of at most 4·4 + 4
    np.testing.assert_allclose(found, expected if classes == 1 else expected.T, atol=6 * 64 * EPS)
