"""Losses of a linear layer in chunks equal losses on logits, in value and in derivatives of every order, for every reduction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.linear.test_linear import FIRST, SECOND, close, exact_loss, in_float64, problem
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")


def dense(reduction, labels, where):
    def value(hidden, kernel, bias, weights, temperature):
        z = (jnp.tensordot(hidden, kernel, 1) + bias.reshape((1,) * (hidden.ndim - 1) + (-1,))) / temperature
        loss = jnp.where(where, weights * exact_loss(z, labels), 0)
        total = jnp.sum(jnp.where(where, weights, 0))
        return {"mean": loss.sum() / total, "sum": loss.sum(), "none": loss}[reduction]

    return value


def fused(reduction, labels, where, chunk_size, classes_first=False):
    """The fused loss of hidden states that are NaN where masked. The loss function closes over the temperature."""

    def value(hidden, kernel, bias, weights, temperature):
        run = xentjax.fuse_linear(
            lambda z, y: xentjax.softmax_cross_entropy(z / temperature, y),
            reduction=reduction,
            chunk_size=chunk_size,
            classes_first=classes_first,
        )
        poisoned = jnp.where(where[..., None], hidden, jnp.nan)
        return run(poisoned, kernel.T if classes_first else kernel, labels, bias=bias, where=where, weights=weights)

    return value


def derivatives(function, cotangent):
    """Value, gradient, tangent and both Hessian products of the sum of `cotangent`·function."""

    def scalar(x):
        return jnp.sum(function(*x) * cotangent.astype(x[0].dtype))

    def hessian_in_reverse(x, t):
        return jax.grad(lambda x: sum(jnp.vdot(g, d) for g, d in zip(jax.grad(scalar)(x), t, strict=True)))(x)

    def run(x, t):
        first = function(*x), jax.grad(scalar)(x), jax.jvp(lambda x: function(*x), (x,), (t,))[1]
        return first, (jax.jvp(jax.grad(scalar), (x,), (t,))[1], hessian_in_reverse(x, t))

    return run


SETTINGS = [
    # reduction, leading axes, classes, chunk size, classes first
    ("mean", (97,), 131, 7, False),
    ("mean", (97,), 101, 1, False),
    ("mean", (97,), 131, 16, True),
    ("mean", (97,), 131, 1000, False),
    ("mean", (97,), 101, None, True),
    ("mean", (96,), 131, 16, False),
    ("mean", (1,), 131, 16, False),
    ("mean", (), 101, 7, False),
    ("mean", (5, 13), 131, 16, True),
    ("sum", (97,), 131, 16, False),
    ("sum", (2, 3, 7), 101, 1, False),
    ("sum", (40, 2), 101, 7, False),
    ("none", (97,), 131, 7, False),
    ("none", (97,), 101, 1000, True),
    ("none", (5, 13), 131, 16, False),
    ("none", (), 101, 1, False),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("reduction", "leading", "classes", "chunk_size", "classes_first"), SETTINGS)
def test_equals_dense_to_second_order(rng, reduction, leading, classes, chunk_size, classes_first):
    x, labels, where = problem(rng, leading, classes=classes)
    t = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), x)
    cotangent = jnp.asarray(rng.normal(size=leading if reduction == "none" else ()), jnp.float32)
    if reduction == "none" and leading:
        cotangent = cotangent.at[(0,) * len(leading)].set(0)
    first, second = jax.jit(derivatives(fused(reduction, labels, where, chunk_size, classes_first), cotangent))(x, t)
    expected = in_float64(derivatives(dense(reduction, labels, where), cotangent), x, t)
    close(first, expected[0], FIRST)
    close(second, expected[1], SECOND)


def test_chunks_of_equal_size_equal_dense(rng, leading=(2, 12)):
    # Three chunks, of four examples of both sequences. One loop computes all of them, and adds to zeros.
    x, labels, where = problem(rng, leading)

    def value_and_gradients(function):
        return lambda x: jax.value_and_grad(lambda x: function(*x))(x)

    found = jax.jit(value_and_gradients(fused("mean", labels, where, 8)))(x)
    close(found, in_float64(value_and_gradients(dense("mean", labels, where)), x), FIRST)


@pytest.mark.by_module
@pytest.mark.parametrize("case", [c for c in cases.CATEGORICAL if c.thorough], ids=str)
def test_every_loss_fused_equals_dense(case, rng, x64):
    _, labels = case.draw(rng, (13,), dtype=jnp.float64, kind=case.kinds[-1])
    hidden, kernel = jnp.asarray(rng.normal(size=(13, 4))), jnp.asarray(rng.normal(size=(4, 7)))
    if case.inputs == "cosines":
        hidden, kernel = (x / (1.01 * jnp.linalg.norm(x, axis=axis, keepdims=True)) for x, axis in ((hidden, 1), (kernel, 0)))
    direction = jnp.asarray(rng.normal(size=hidden.shape))
    labels = labels if isinstance(labels, tuple) else (labels,)

    def loss(z, *labels):
        return case(z, labels if case.family == "top_k" else labels[0])

    def both(function):
        slope = jax.grad(function, (0, 1))
        first = function(hidden, kernel), slope(hidden, kernel)
        if case in cases.FAMILIES:  # their second derivatives: test_second_derivatives.py
            return *first, ()
        return *first, jax.jvp(lambda h: slope(h, kernel), (hidden,), (direction,))[1]

    value, slope, product = jax.jit(lambda: both(lambda h, k: xentjax.fuse_linear(loss, chunk_size=5)(h, k, *labels)))()
    expected = jax.jit(lambda: both(lambda h, k: loss(h @ k, *labels).mean()))()
    close((value, slope), expected[:2], case.tolerance * 1e-13)
    close(product, expected[2], case.tolerance * 1e-12)
    exact, _ = case.exact(ref.Double, hidden @ kernel, labels if case.family == "top_k" else labels[0])
    close(value, exact.mean(), 1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.BITS, ids=str)
def test_losses_per_element_are_summed_inside(case, rng, x64):
    _, bits = case.draw(rng, (13,), dtype=jnp.float64)
    hidden, kernel = jnp.asarray(rng.normal(size=(13, 4))), jnp.asarray(rng.normal(size=(4, 7)))
    run = xentjax.fuse_linear(lambda z, b: case(z, b).sum(-1), chunk_size=4)
    value, slope = jax.value_and_grad(run, (0, 1))(hidden, kernel, bits)
    exact, of_logits = case.exact(ref.Double, hidden @ kernel, bits)
    close(value, exact.sum() / 13, 1e-12)
    close(slope, (of_logits @ kernel.T / 13, hidden.T @ of_logits / 13), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [4, 100])
def test_masked_examples_do_not_exist(rng, reduction, chunk_size):
    (hidden, kernel, bias, weights, _), _, where = problem(rng, (30,))
    poison = {"hidden": jnp.where(where[:, None], hidden, jnp.inf), "weights": jnp.where(where, weights, jnp.nan)}
    soft = jnp.where(where[:, None], jnp.asarray(rng.dirichlet(np.ones(131), 30), jnp.float32), jnp.nan)

    def value(h, k, b, w, t, scale, where):
        run = xentjax.fuse_linear(lambda z, t: xentjax.softmax_cross_entropy(z * scale, t), reduction=reduction, chunk_size=chunk_size)
        return run(h, k, t, bias=b, where=where, weights=w)

    @jax.jit
    def value_and_slopes(*arguments):
        return value(*arguments), jax.grad(lambda *a: value(*a, arguments[-1]).sum(), range(6))(*arguments[:-1])

    scale = jnp.asarray(0.7, jnp.float32)
    arguments = (poison["hidden"], kernel, bias, poison["weights"], soft, scale)
    result, slopes = value_and_slopes(*arguments, where)
    kept = np.flatnonzero(where)
    few = (hidden[kept], kernel, bias, weights[kept], soft[kept], scale, None)
    if reduction == "none":
        assert (np.delete(result, kept) == 0).all()
        result = result[kept]
    expected, slopes_alone = value_and_slopes(*few)
    close(result, expected, FIRST)
    for i, (slope, alone) in enumerate(zip(slopes, slopes_alone, strict=True)):
        if i in (0, 3, 4):
            assert (np.delete(slope, kept, axis=0) == 0).all()
            slope = slope[kept]
        close(slope, alone, FIRST)
    nothing = jnp.zeros_like(where)
    for zero in jax.tree.leaves(value_and_slopes(*arguments, nothing)):
        assert (zero == 0).all()
