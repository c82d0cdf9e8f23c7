"""Losses computed in blocks of examples. Everything equals the same loss computed at once, which other tests hold against formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from xentjax._core import blocks, numerics

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
CLASSES = 6
ROWS_IN_A_BLOCK = 3  # before the size is made even: 13 examples are then four blocks of four, the last of which repeats three examples


def distillation(divergence, logits, other, number):
    return xentjax.distillation_loss(logits, other, divergence=divergence, temperature=1 + number, beta=number)


def tempered(labels_of, logits, other, number):
    return xentjax.bi_tempered_cross_entropy(logits, labels_of(other), t1=number, t2=1 + number)


def distribution(logits):
    """The softmax in float32. XLA would round a softmax in half precision only where it stores it."""
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


DISTILLATION = {kind: functools.partial(distillation, kind) for kind in ("forward", "reverse", "js", "tv")}
LOSSES = DISTILLATION | {
    "tempered": functools.partial(tempered, lambda x: jnp.argmax(x, -1)),
    "tempered-soft": functools.partial(tempered, distribution),
    "bootstrapped-hard": lambda x, y, number: xentjax.bootstrapped_cross_entropy(x, distribution(y), beta=number, hard=True),
}
SHORT = ("forward", "js")  # in the short run; the others have the same form
each = pytest.mark.parametrize(
    "loss", [pytest.param(loss, id=name, marks=() if name in SHORT else pytest.mark.exhaustive) for name, loss in LOSSES.items()]
)


@pytest.fixture
def in_blocks(monkeypatch):
    """A function that runs another one with small blocks, and without blocks."""

    def compare(function, *arguments):
        results = []
        for size in (4 * CLASSES * ROWS_IN_A_BLOCK, 2**60):
            monkeypatch.setattr(blocks, "_BYTES", size)
            jax.clear_caches()
            compiled = jax.jit(function).lower(*arguments).compile()
            assert ("dynamic-update-slice" in compiled.as_text()) == (size < 2**60)
            results.append(compiled(*arguments))
        jax.clear_caches()
        return results

    return compare


def close(found, expected, dtype=jnp.float32):
    """Up to the rounding of sums of about 100 terms as large as the largest result: gradients are multiplied by cotangents at the end."""
    found, expected = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (found, expected))
    largest = max(np.abs(x[np.isfinite(x)]).max(initial=0) for x in expected)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=32 * float(jnp.finfo(dtype).eps) * largest)


def draw(rng, leading=(13,), dtype=jnp.float32):
    logits, other, v, w = (jnp.asarray(rng.normal(size=(*leading, CLASSES)) * 2, dtype) for _ in range(4))
    return logits, other, jnp.asarray(rng.normal(size=leading), jnp.float32), v, w


@each
@pytest.mark.parametrize("leading", [(13,), (3, 5)])
def test_derivatives(loss, leading, in_blocks, rng):
    """Value, gradients for any cotangent, tangent, and products with the Hessian, forward over reverse and reverse over reverse."""
    logits, other, cotangent, *directions = draw(rng, leading)
    number = jnp.float32(0.3)

    def everything(logits, other, number):
        def total(*x):
            return jnp.vdot(cotangent, loss(*x))

        def along(*x):
            return sum(jnp.vdot(g, v) for g, v in zip(jax.grad(total, (0, 1))(*x), directions, strict=True))

        arguments, moved = (logits, other, number), (*directions, jnp.float32(0.7))
        slopes = jax.grad(total, (0, 1, 2))
        return loss(*arguments), jax.jvp(loss, arguments, moved), jax.jvp(slopes, arguments, moved), jax.grad(along, (0, 1, 2))(*arguments)

    close(*in_blocks(everything, logits, other, number))


@pytest.mark.exhaustive
@each
def test_half_precision(loss, in_blocks, rng):
    logits, other, *_ = draw(rng, dtype=jnp.bfloat16)
    found, expected = in_blocks(jax.value_and_grad(lambda x, y: loss(x, y, 0.3).sum(), (0, 1)), logits, other)
    close(found[0], expected[0])
    close(found[1], expected[1], jnp.bfloat16)
    assert found[1][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_soft_labels_of_half_precision_logits(dtype, in_blocks, rng):
    """For float32 logits, cross-entropy with soft labels has no blocks. `dtype` is that of the labels."""
    logits, other, *_ = draw(rng, dtype=jnp.bfloat16)
    labels = distribution(other).astype(dtype)
    found, expected = in_blocks(jax.value_and_grad(lambda x, t: xentjax.softmax_cross_entropy(x, t).sum(), (0, 1)), logits, labels)
    close(found[0], expected[0])
    close(found[1][0], expected[1][0], jnp.bfloat16)
    close(found[1][1], expected[1][1], dtype)


def test_the_label_and_the_largest_class_of_half_precision_logits(in_blocks, rng):
    """For float32 logits, hard bootstrapping with class indices has no blocks."""
    logits, *_ = draw(rng, dtype=jnp.bfloat16)
    labels = jnp.arange(13) % CLASSES

    def loss(logits, beta):
        return xentjax.bootstrapped_cross_entropy(logits, labels, beta=beta, hard=True).sum()

    found, expected = in_blocks(jax.value_and_grad(loss, (0, 1)), logits, 0.3)
    close((found[0], found[1][1]), (expected[0], expected[1][1]))
    close(found[1][0], expected[1][0], jnp.bfloat16)


SMALL = {  # losses whose gradient at the classes 1 to 5 is e⁻¹⁸ for logits of 0 and −18
    "plain": lambda z: xentjax.softmax_cross_entropy(z, jnp.eye(CLASSES)[jnp.zeros(13, jnp.int32)]),
    "bootstrapped": lambda z: xentjax.bootstrapped_cross_entropy(z, jnp.zeros(13, jnp.int32), hard=True),
    "bootstrapped-soft": lambda z: xentjax.bootstrapped_cross_entropy(z, jnp.eye(CLASSES)[jnp.zeros(13, jnp.int32)], hard=True),
    "distillation": lambda z: xentjax.distillation_loss(z, z.at[:, 1:].set(-60)),
}


@pytest.mark.parametrize("loss", SMALL.values(), ids=SMALL)
def test_a_loss_scale_keeps_small_gradients_in_float16(loss, monkeypatch):
    """e⁻¹⁸ is below the smallest float16 number. 1,024 times e⁻¹⁸ is not."""
    monkeypatch.setattr(blocks, "_BYTES", 4 * CLASSES)
    logits = jnp.zeros((13, CLASSES), jnp.float16).at[:, 1:].set(-18)
    slope = jax.grad(lambda z: 1024 * loss(z).sum())(logits)[:, 1:]
    np.testing.assert_allclose(slope, np.full_like(slope, 1024 * np.exp(-18)), rtol=2.0**-6)  # a subnormal number of at least 7 bits


@pytest.mark.exhaustive
@each
def test_vmap(loss, in_blocks, rng):
    logits, other, *_ = draw(rng, (13, 2))
    numbers = jnp.linspace(0.2, 0.8, 13)
    slopes = jax.grad(lambda *x: loss(*x).sum(), (0, 1, 2))

    def everything(logits, other, numbers):
        return jax.vmap(slopes)(logits, other, numbers), jax.vmap(slopes, (1, 1, None))(logits, other, numbers[0])

    close(*in_blocks(everything, logits, other, numbers))


@pytest.mark.exhaustive
@each
def test_vmap_over_a_number(loss, in_blocks, rng):
    """The logits are not copied for each number, so this part has no blocks."""
    logits, other, *_ = draw(rng)
    numbers = jnp.linspace(0.2, 0.8, 3)

    def everything(logits, other, numbers):
        of_numbers = jax.vmap(jax.value_and_grad(lambda x, y, n: loss(x, y, n).sum()), (None, None, 0))
        return of_numbers(logits, other, numbers), jax.jacfwd(lambda x: loss(x, other, 0.5))(logits)

    close(*in_blocks(everything, logits, other, numbers))


@pytest.mark.parametrize("divergence", ["forward", "js"])
def test_masks(divergence, in_blocks, rng):
    logits, other, *_ = draw(rng)
    where, class_mask = jnp.arange(13) % 4 != 1, jnp.arange(CLASSES) != 2
    logits = jnp.where(where[:, None] & class_mask[None], logits, jnp.nan)

    def run(x, y):
        return xentjax.distillation_loss(x, y, divergence=divergence, where=where, class_mask=class_mask).sum()

    found, expected = in_blocks(jax.value_and_grad(run, (0, 1)), logits, other)
    close(found, expected)
    assert not np.asarray(found[1][0])[~np.asarray(where)].any() and not np.asarray(found[1][1])[:, 2].any()


@pytest.mark.parametrize("loss", DISTILLATION.values(), ids=DISTILLATION)
@pytest.mark.parametrize("spec", [P("i"), P(None, "i")])
def test_no_blocks_on_several_devices(loss, spec, monkeypatch, rng):
    """A loop over examples would gather them. Devices add numbers of an example, if the classes are split; else they exchange nothing."""
    monkeypatch.setattr(blocks, "_BYTES", 4 * CLASSES)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    logits, other, cotangent, *_ = draw(rng, (12,))
    sharding = NamedSharding(mesh, spec)

    def total(x, y):
        return jnp.vdot(cotangent, loss(x, y, 0.3))

    run = jax.value_and_grad(total, (0, 1))
    expected = jax.jit(run)(logits, other)
    for split in (jax.jit(run, in_shardings=sharding), lambda x, y: run(*jax.lax.with_sharding_constraint((x, y), sharding))):
        compiled = jax.jit(split).lower(logits, other).compile()
        assert "while" not in compiled.as_text() and "all-gather" not in compiled.as_text()
        close(compiled(logits, other), expected)
    assert "while" in jax.jit(run).lower(logits, other).compile().as_text()


def test_blocks_have_one_even_size():
    """768 KiB hold 19,660 examples of 10 classes, so 50,000 examples are three blocks. A third of 50,000 is 16,667, which is odd."""
    logits = jax.ShapeDtypeStruct((50_000, 10), jnp.float32)
    program = jax.jit(functools.partial(distillation, "tv")).lower(logits, logits, 0.3).as_text()
    assert "tensor<16668x10xf32>" in program and "tensor<19660x10xf32>" not in program


@pytest.mark.parametrize("devices", [1, 2])
def test_an_iteration_stops_early_on_one_device_only(devices):
    """On several devices, the examples that have not converged may be on another device."""
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    condition = jax.device_put(jnp.arange(4) < 4, NamedSharding(mesh, P("i")))
    compiled = jax.jit(blocks.every).lower(condition).compile()
    assert bool(compiled(condition)) == (devices == 1) and "all-reduce" not in compiled.as_text()
    assert not jax.jit(blocks.every)(jnp.arange(4) < 3)
    assert not jax.jit(jax.vmap(blocks.every, out_axes=None))(jnp.arange(8).reshape(2, 4) < 7)


@pytest.mark.exhaustive
@each
def test_symbolic_number_of_examples(loss, rng):
    logits, other, *_ = draw(rng)
    size = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((*size, CLASSES), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda x, y: loss(x, y, 0.3).sum(), (0, 1)))
    close(export.export(run)(shape, shape).call(logits, other), run(logits, other))


@pytest.mark.parametrize(("divergence", "passes"), [("forward", 3), ("reverse", 5), ("js", 5), ("tv", 5)])
def test_on_gpus_every_sum_reads_the_logits_again(divergence, passes):
    # There, XLA would store an array that two passes share. So a barrier for both logits stands before the correction, the value, the two
    # means of the gradient (it has none for "forward") and the gradient. On CPUs, the passes share arrays.
    def loss(student, teacher):
        return jnp.sum(xentjax.distillation_loss(student, teacher, divergence=divergence))

    traced = jax.jit(jax.grad(loss)).trace(jnp.zeros((4, 7)), jnp.zeros((4, 7)))
    cuda, cpu = (traced.lower(lowering_platforms=(p,)).as_text().count("optimization_barrier") for p in ("cuda", "cpu"))
    assert cuda - cpu == 2 * passes


def test_fresh_has_the_derivatives_of_its_argument():
    def function(x):
        return numerics.fresh(x, jnp.sum(x, -1)) ** 2

    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(jax.vmap(function))(x), x**2)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(jax.vmap(function)(x)))(x), 2 * x)
    np.testing.assert_array_equal(jax.hessian(lambda x: jnp.sum(function(x)))(x[0]), 2 * np.eye(3))
