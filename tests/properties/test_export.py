"""`jax.export` with a symbolic number of examples: every public function, with its gradient where it has one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import xentjax
from tests.properties.test_functions import RTOL, close, each_row
from tests.tables import cases

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, CLASSES, FEATURES = 5, 7, 4


def exported(function, arguments):
    """`function` of any number of examples, which `arguments` have on their first axis if it has BATCH entries."""
    (batch,) = export.symbolic_shape("batch")

    def typed(x):
        shape = (batch, *x.shape[1:]) if x.shape[:1] == (BATCH,) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return export.export(jax.jit(function))(*jax.tree.map(typed, arguments))


@pytest.mark.exhaustive
@each_row
def test_every_function_and_its_gradient(row, rng):
    arguments = row.arguments(rng, (BATCH,))
    per_example = {k: x for k, x in row.keywords.items() if np.shape(x)[:1] == (BATCH,)}

    def run(arguments, per_example):
        def total(*smooth):
            given = dict(zip(row.smooth, smooth, strict=True))
            result = row(*(given.get(i, x) for i, x in enumerate(arguments)), **per_example)
            return jnp.sum(result), result

        smooth = tuple(arguments[i] for i in row.smooth)
        return jax.value_and_grad(total, range(len(smooth)), has_aux=True)(*smooth) if smooth else (total(), ())

    program = exported(run, (arguments, per_example))
    if not row.independent:  # the number of examples is part of what each of them costs
        (_, result), slopes = program.call(arguments, per_example)
        close(result, row.exact(arguments), RTOL)
        for mine, other in zip(slopes, row.exact_gradient(arguments), strict=True):
            close(mine, other, 10 * RTOL)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [c for c in cases.LOSSES if c.thorough], ids=str)
def test_every_loss_and_its_gradient(case, rng):
    for kind in case.kinds:
        arguments = case.draw(rng, (BATCH,), kind=kind)
        exported(jax.value_and_grad(lambda z, labels: case(z, labels).sum()), arguments)


def draw(rng, examples):
    """Logits, scores, labels, bits, weights, and which examples count."""
    return (
        jnp.asarray(rng.normal(size=(examples, CLASSES)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, examples) / 2, jnp.float32),  # with ties
        jnp.asarray(rng.integers(0, CLASSES, examples), jnp.int32),
        jnp.asarray(np.arange(examples) % 2, jnp.int32),
        jnp.asarray(rng.uniform(size=examples), jnp.float32),
        jnp.asarray(rng.uniform(size=examples) < 0.8),
    )


ELSEWHERE = {
    "weighted_mean": jax.value_and_grad(lambda z, s, y, bit, w, where: xentjax.weighted_mean(s, w, where=where), 1),
    "weighted_sum": lambda z, s, y, bit, w, where: xentjax.weighted_sum(s, w, where=where),
    "ranking": lambda z, s, y, bit, w, where: xentjax.metrics.ranking(s, bit, weights=w, where=where).auroc(),
    "confusion": lambda z, s, y, bit, w, where: xentjax.metrics.confusion(z.argmax(-1), y, classes=CLASSES, where=where),
    "calibration": lambda z, s, y, bit, w, where: xentjax.metrics.calibration(z, y, where=where),
    "fit_temperature": lambda z, s, y, bit, w, where: xentjax.metrics.fit_temperature(z, y, weights=w, where=where),
    "samplers.draw": lambda z, s, y, bit, w, where: xentjax.samplers.draw(
        jax.random.key(0), xentjax.samplers.log_uniform(CLASSES), 3, shape=y.shape
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_has_no_row(name, rng):
    exported(ELSEWHERE[name], draw(rng, BATCH))


def test_area_under_the_curve_at_several_sizes(rng):
    program = exported(lambda s, y: xentjax.metrics.auroc(s, y), (jnp.zeros(BATCH), jnp.zeros(BATCH, jnp.int32)))
    for examples in (2, 9):
        _, s, _, y, *_ = draw(rng, examples)
        pairs = np.asarray(s)[np.asarray(y) == 1][:, None] - np.asarray(s)[np.asarray(y) == 0]
        np.testing.assert_allclose(program.call(s, y), (np.sign(pairs) / 2 + 0.5).mean(), rtol=RTOL)


def layer(rng, leading):
    """Hidden, kernel, labels, weights and which examples count; the others hold NaN and no class."""
    where = np.arange(np.prod(leading)).reshape(leading) % 3 != 2
    hidden = np.where(where[..., None], rng.normal(size=(*leading, FEATURES)), np.nan)
    labels = np.where(where, rng.integers(0, CLASSES, leading), -100)
    arrays = hidden, rng.normal(size=(FEATURES, CLASSES)), rng.uniform(0.5, 2, leading)
    return (*(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(labels, jnp.int32), jnp.asarray(where))


def plain(hidden, kernel, weights, labels, where, mean):
    """Σ w·loss or its mean, and the gradients by hidden and kernel, as defined."""
    hidden, kernel, weights, labels, where = (np.asarray(x) for x in (hidden, kernel, weights, labels, where))
    w = np.where(where, weights, 0).astype(np.float64)
    w = w / w.sum() if mean else w
    h, k = np.where(where[..., None], hidden, 0).astype(np.float64), kernel.astype(np.float64)
    z, target = h @ k, np.eye(CLASSES)[np.where(where, labels, 0)]
    lse = np.log(np.exp(z).sum(-1))
    g = w[..., None] * (np.exp(z - lse[..., None]) - target)
    return np.sum(w * (lse - (z * target).sum(-1))), g @ k.T, np.tensordot(h, g, axes=(range(h.ndim - 1),) * 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("reduction", "chunk_size"), [("mean", None), ("mean", 3), ("none", None)])
def test_fused_losses_are_the_plain_ones_at_every_size(reduction, chunk_size, rng):
    batch, length = export.symbolic_shape("batch, length")

    def run(hidden, kernel, weights, labels, where):
        def total(hidden, kernel):
            fused = xentjax.fuse_linear(xentjax.softmax_cross_entropy, reduction=reduction, chunk_size=chunk_size)
            return fused(hidden, kernel, labels, weights=weights, where=where).sum()

        slope = jax.grad(total, (0, 1))
        return total(hidden, kernel), slope(hidden, kernel), jax.jvp(slope, (hidden, kernel), (jnp.zeros_like(hidden), kernel))[1]

    def typed(x):
        return jax.ShapeDtypeStruct((batch, length, *x.shape[2:]) if x.shape[:2] == (2, 3) else x.shape, x.dtype)

    exactly = functools.partial(plain, mean=reduction == "mean")
    program = export.export(jax.jit(run))(*map(typed, layer(rng, (2, 3))))
    for leading in ((1, 1), (2, 7)):
        arguments = layer(rng, leading)
        value, slopes, products = program.call(*arguments)
        exact, *exact_slopes = exactly(*arguments)
        ahead, behind = (
            exactly(arguments[0], np.asarray(arguments[1], np.float64) * scale, *arguments[2:]) for scale in (1 + 1e-5, 1 - 1e-5)
        )
        np.testing.assert_allclose(value, exact, rtol=RTOL)
        for i in range(2):
            close(slopes[i], exact_slopes[i], RTOL)
            close(products[i], (ahead[1 + i] - behind[1 + i]) / 2e-5, 10 * RTOL)  # of terms of several sizes


def test_a_plan_of_symbolic_sizes():
    (batch,) = export.symbolic_shape("batch")
    hidden, kernel = jax.ShapeDtypeStruct((batch, FEATURES), jnp.float32), jax.ShapeDtypeStruct((FEATURES, CLASSES), jnp.float32)
    plan = xentjax.plan_linear(hidden, kernel)
    assert plan.chunks == 4 and plan.chunk_size == (batch - 1) // 4 + 1 and plan.logits_bytes == plan.chunk_size * CLASSES * 4
    loss = xentjax.fuse_linear(xentjax.softmax_cross_entropy)
    two, labels = jnp.ones((2, FEATURES)), jnp.array([0, 8])
    program = export.export(jax.jit(loss))(two, jax.ShapeDtypeStruct((FEATURES, batch), jnp.float32), labels)  # symbolic classes
    np.testing.assert_allclose(program.call(two, jnp.zeros((FEATURES, 9)), labels), np.log(9), rtol=RTOL)


def test_a_kernel_of_several_blocks_at_a_symbolic_batch_size():
    (batch,) = export.symbolic_shape("batch")
    kernel = jax.ShapeDtypeStruct((64, 80_000), jnp.float32)  # 20 MB; blocks have 16
    hidden, labels = jax.ShapeDtypeStruct((batch, 64), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(jax.value_and_grad(xentjax.linear_softmax_cross_entropy, (0, 1)))
    assert export.export(step)(hidden, kernel, labels).out_avals[1].shape == (batch, 64)
