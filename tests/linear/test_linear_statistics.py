"""Several statistics of the logits in one sweep: `fuse_linear(fn, reduction="none")` where fn returns a pytree of arrays."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import xentjax

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES, FEATURES = 16, 5
STATISTICS = ("log_prob", "log_normalizer", "entropy", "expected_logit", "max_logit")
TOLERANCE = 2e-6  # 16 eps of float32, of the largest component: sums of at most 28 terms, each within 8 eps


def every_statistic(logits, labels, axis_name=None):
    """The statistics, the best class, and an array with an axis of its own."""
    found = xentjax.row_statistics(logits, labels, axis_name=axis_name)._asdict()
    if axis_name is None:
        found |= {"ids": jax.lax.top_k(logits, 2)[1], "squares": logits[:, :3] ** 2}
    return found


def problem(rng, leading):
    """Float64 arrays. The examples that do not count hold NaN and labels of no class. One example that counts has weight 0."""
    where = rng.uniform(size=leading) < 0.7
    where.flat[:2] = True
    hidden, kernel = rng.normal(size=(*leading, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    labels = np.where(where, rng.integers(0, CLASSES, leading), -100).astype(np.int32)
    weights = rng.uniform(0.5, 2, leading)
    weights.flat[0] = 0
    cotangents = {name: rng.normal(size=leading) for name in STATISTICS} | {"squares": rng.normal(size=(*leading, 3))}
    return hidden, kernel, labels, where, weights, cotangents


def definition(hidden, kernel, labels, where, weights, cotangents):
    """The statistics times the weights, and the gradients of Σ ⟨cotangent, statistic⟩ by hidden, kernel and weights. From the formulas."""
    h = np.where(where[..., None], hidden, 0)
    z = h @ kernel
    onehot = np.arange(CLASSES) == labels[..., None]
    lse = np.log(np.exp(z).sum(-1))
    log_p = z - lse[..., None]
    p = np.exp(log_p)
    entropy, expected = -(p * log_p).sum(-1), (p * z).sum(-1)
    first = np.eye(CLASSES)[:3]
    found = {
        "log_prob": (np.where(onehot, log_p, 0).sum(-1), onehot - p),
        "log_normalizer": (lse, p),
        "entropy": (entropy, -p * (log_p + entropy[..., None])),
        "expected_logit": (expected, p * (1 + z - expected[..., None])),
        "max_logit": (z.max(-1), np.zeros_like(z)),  # `row_statistics` does not differentiate it
        "squares": (z[..., :3] ** 2, None),
    }
    values, slope, of_weights = {}, np.zeros_like(z), np.zeros(where.shape)
    for name, c in cotangents.items():
        value, derivative = found[name]
        c = c * where.reshape(*where.shape, *(1,) * (c.ndim - where.ndim))
        if name == "squares":
            values[name] = value * (weights * where)[..., None]
            slope += (2 * c * z[..., :3]) @ first
            of_weights += (c * value).sum(-1)
        else:
            values[name] = value * weights * where
            slope += c[..., None] * derivative
            of_weights += c * value
    slope *= weights[..., None]
    values["correct"] = where & (labels == z.argmax(-1))
    values["ids"] = np.where(where[..., None], np.argsort(-z, -1)[..., :2], 0)
    return values, (slope @ kernel.T, h.reshape(-1, FEATURES).T @ slope.reshape(-1, CLASSES), of_weights)


def inner(cotangents, values):
    return sum(jnp.sum(c * values[name]) for name, c in cotangents.items())


def close(got, expected, tolerance=TOLERANCE):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.shape(g) == np.shape(e)
        np.testing.assert_allclose(np.asarray(g, np.float64), e, rtol=0, atol=tolerance * max(1e-300, np.abs(e).max()))


def single(arrays):
    """In float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), arrays)


@pytest.mark.parametrize(("leading", "chunk_size"), [((13,), 4), ((2, 7), 5), ((7,), 100)])
def test_every_statistic_has_its_gradient(rng, leading, chunk_size):
    arrays = problem(rng, leading)
    hidden, kernel, labels, where, weights, cotangents = single(arrays)
    fused = xentjax.fuse_linear(every_statistic, reduction="none", chunk_size=chunk_size)
    moved = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), (hidden, kernel, weights))

    def values(hidden, kernel, weights):
        return fused(hidden, kernel, labels, where=where, weights=weights)

    @jax.jit
    def results(*inputs):
        _, change = jax.jvp(lambda *x: inner(cotangents, values(*x)), inputs, moved)
        return values(*inputs), jax.grad(lambda *x: inner(cotangents, values(*x)), (0, 1, 2))(*inputs), change

    found, gradients, change = results(hidden, kernel, weights)
    expected, slopes = definition(*arrays)
    for name, value in expected.items():
        close(found[name], value, TOLERANCE if value.dtype == np.float64 else 0)
    assert found["correct"].dtype == bool and found["ids"].dtype == jnp.int32 and found["entropy"].dtype == jnp.float32
    close(gradients, slopes)
    assert (np.asarray(gradients[0])[~arrays[3]] == 0).all()
    terms = [np.where(np.isfinite(s * m), s * m, 0).sum() for s, m in zip(slopes, moved, strict=True)]
    np.testing.assert_allclose(change, sum(terms), atol=1e-5 * sum(np.abs(s * m).sum() for s, m in zip(slopes, moved, strict=True)))


def test_an_infinite_statistic_of_weight_zero_is_zero():
    fused = xentjax.fuse_linear(lambda z: (z[:, :2] / 0, z[:, 0] > 5, jnp.int8(z.argmax(-1))), reduction="none")
    ratio, large, best = fused(jnp.ones((2, 1)), jnp.array([[1.0, 9.0, 0.0]]), weights=jnp.zeros(2))
    assert (ratio == 0).all() and large.tolist() == [False, False] and best.tolist() == [1, 1] and best.dtype == jnp.int8


@pytest.mark.exhaustive
def test_second_derivatives(rng, x64):
    # The derivative of the gradient is the central difference of its formula: error 1e-10 of rounding, and 1e-10 of the third derivative.
    arrays = problem(rng, (13,))
    hidden, kernel, labels, where, weights, cotangents = arrays
    hidden = np.where(where[:, None], hidden, 0)  # differences of NaN are NaN
    fused = xentjax.fuse_linear(every_statistic, reduction="none", chunk_size=4)
    moved = [rng.normal(size=x.shape) for x in (hidden, kernel)]

    def slope(hidden, kernel):
        return jax.grad(lambda h, k: inner(cotangents, fused(h, k, labels, where=where, weights=weights)), (0, 1))(hidden, kernel)

    def in_reverse(hidden, kernel):
        return jax.grad(lambda h, k: sum(jnp.vdot(s, m) for s, m in zip(slope(h, k), moved, strict=True)), (0, 1))(hidden, kernel)

    _, forward = jax.jit(lambda h, k: jax.jvp(slope, (h, k), tuple(moved)))(hidden, kernel)
    ends = [definition(*(x + s * m for x, m in zip((hidden, kernel), moved, strict=True)), *arrays[2:])[1][:2] for s in (1e-5, -1e-5)]
    expected = [(a - b) / 2e-5 for a, b in zip(*ends, strict=True)]
    close(forward, expected, 1e-7)
    close(jax.jit(in_reverse)(hidden, kernel), expected, 1e-7)


@pytest.mark.exhaustive
def test_under_vmap(rng):
    hidden, kernel, labels, where, weights, cotangents = single(problem(rng, (3, 7)))
    fused = xentjax.fuse_linear(every_statistic, reduction="none", chunk_size=2)

    def value(hidden, kernel, labels, where, weights, cotangents):
        return inner(cotangents, fused(hidden, kernel, labels, where=where, weights=weights))

    def of_one(*x):
        return jax.grad(value, (0, 1))(*x)

    def of_all(hidden, kernel, *rest):
        return jax.grad(lambda h, k: jax.vmap(value, (0, None, 0, 0, 0, 0))(h, k, *rest).sum(), (0, 1))(hidden, kernel)

    expected = definition(*jax.tree.map(np.asarray, (hidden, kernel, labels, where, weights, cotangents)))[1][:2]
    rest = labels, where, weights, cotangents
    of_hidden, of_kernel = jax.jit(jax.vmap(of_one, (0, None, 0, 0, 0, 0)))(hidden, kernel, *rest)
    close((of_hidden, of_kernel.sum(0)), expected)
    close(jax.jit(of_all)(hidden, kernel, *rest), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_half_precision_rounds_the_gradient_of_the_logits_once(rng, dtype):
    arrays = list(problem(rng, (13,)))
    arrays[:2] = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays[:2]]  # rounded inputs are exact inputs
    arrays[5] = {name: c for name, c in arrays[5].items() if name in STATISTICS}
    hidden, kernel, labels, where, weights, cotangents = single(arrays)
    fused = xentjax.fuse_linear(xentjax.row_statistics, reduction="none", chunk_size=4)

    @jax.jit
    def slopes(hidden, kernel):
        def value(hidden, kernel):
            return inner(cotangents, fused(hidden, kernel, labels, where=where, weights=weights)._asdict())

        return jax.grad(value, (0, 1))(hidden, kernel)

    of_hidden, of_kernel = slopes(hidden.astype(dtype), kernel.astype(jnp.float32))
    _, expected = definition(*arrays)
    eps = float(jnp.finfo(dtype).eps)
    assert of_hidden.dtype == dtype and of_kernel.dtype == jnp.float32
    # The gradient of the logits is rounded to half an eps, and so is the gradient of hidden. Float32 needs the 16 eps of TOLERANCE.
    close(of_hidden, expected[0], max(2 * eps, TOLERANCE))
    close(of_kernel, expected[1], max(eps, TOLERANCE))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tokens_and_classes_split_over_devices(rng, kind):
    arrays = problem(rng, (4, 6))
    arrays[5].pop("squares")
    hidden, kernel, labels, where, weights, cotangents = single(arrays)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    fused = xentjax.fuse_linear_sharded(every_statistic, mesh=mesh, tokens=P("data"), axis_name="model", reduction="none", chunk_size=4)

    @jax.jit
    def results(hidden, kernel, weights):
        def value(*inputs):
            found = fused(inputs[0], inputs[1], labels, where=where, weights=inputs[2])
            return sum(jnp.sum(found[name] * c) for name, c in cotangents.items()), found

        return jax.value_and_grad(value, (0, 1, 2), has_aux=True)(hidden, kernel, weights)

    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        (_, found), gradients = results(hidden, kernel, weights)
    expected, slopes = definition(*arrays)
    for name in (*STATISTICS, "correct"):
        close(found[name], expected[name])
        assert found[name].sharding.spec[0] == "data"
    close(gradients, slopes)


@pytest.mark.exhaustive
def test_classes_split_inside_shard_map(rng):
    arrays = problem(rng, (7,))
    arrays[5].pop("squares")
    hidden, kernel, labels, where, weights, cotangents = single(arrays)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def on_each_device(hidden, kernel):
        fused = xentjax.fuse_linear(lambda z, y: every_statistic(z, y, "model"), reduction="none", chunk_size=3)
        found = fused(hidden, kernel, labels, where=where, weights=weights)
        return found, inner(cotangents, found)

    run = jax.shard_map(on_each_device, mesh=mesh, in_specs=(P(), P(None, "model")), out_specs=P())
    found = jax.jit(run)(hidden, kernel)[0]
    expected, slopes = definition(*arrays)
    for name in (*STATISTICS, "correct"):
        close(found[name], expected[name])
    close(jax.jit(jax.grad(lambda h, k: run(h, k)[1], (0, 1)))(hidden, kernel), slopes[:2])


RETURNED = "must have shape (4, ...), one entry per example for logits of shape (4, 5); got"
ONE = "with reduction='mean' loss_fn must return one array, one loss per example; got dict. Use reduction='none' for several arrays, or"
REDUCED = "Do not reduce inside loss_fn: reduce what the fused loss returns."


@pytest.mark.parametrize(
    ("function", "reduction", "error", "message"),
    [
        (lambda z: {"a": z[:, 0], "b": z[:2]}, "none", ValueError, f"the result of loss_fn['b'] {RETURNED} (2, 5)."),
        (lambda z: (z[:, 0], z.mean()), "none", ValueError, f"the result of loss_fn[1] {RETURNED} (). {REDUCED}"),
        (lambda z: z.sum(), "none", ValueError, f"the result of loss_fn {RETURNED} (). {REDUCED}"),
        (lambda z: {"a": z[:, 0], "b": "no"}, "none", TypeError, "the result of loss_fn['b'] must be an array or convertible to one; got"),
        (
            lambda z: jax.lax.complex(z[:, 0], z[:, 1]),
            "none",
            TypeError,
            "the result of loss_fn must have a floating dtype; got complex64.",
        ),
        (lambda z: None, "none", TypeError, "loss_fn must return an array or a pytree of arrays; got None, which has none."),
        (lambda z: {"a": z[:, 0]}, "mean", TypeError, ONE),
        (lambda z: None, "sum", TypeError, "the result of loss_fn must be an array or convertible to one; got NoneType."),
    ],
)
def test_errors_name_the_array(function, reduction, error, message):
    with pytest.raises(error, match=f"^fuse_linear: {re.escape(message)}"):
        xentjax.fuse_linear(function, reduction=reduction)(jnp.ones((4, 3)), jnp.ones((3, 5)))
