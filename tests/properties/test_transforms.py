"""jit, vmap, scan, checkpoint, export, strict modes: a loss is an ordinary JAX function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import xentjax
from tests.properties.test_values import RTOL, each_kind
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.by_module
@each_kind()
def test_vmap_over_arguments_equals_the_batch(case, kind, rng):
    z, labels = case.draw(rng, (4,), kind=kind)
    batched, gradient = cases.evaluate(case, z, labels)
    one = jax.tree.map(lambda x: x[0], labels)

    @jax.jit
    def mapped(z):
        other = jax.vmap(case, in_axes=(1, 0), out_axes=0)(jnp.moveaxis(z, 0, 1), labels)
        return jax.vmap(lambda z: case(z, one))(z), other

    first, last = mapped(z)
    np.testing.assert_allclose(first[0], batched[0], rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(last, batched, rtol=RTOL, atol=RTOL)

    def total(z, label):
        loss = case(z, label)
        return loss.sum(), loss

    (_, both), slope = jax.vmap(jax.value_and_grad(total, has_aux=True))(z, labels)  # outside jit
    np.testing.assert_allclose(both, batched, rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(slope, gradient, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(
    ("function", "keyword", "values"),
    [
        (xentjax.softmax_cross_entropy, "label_smoothing", [0.0, 0.1, 0.5, 1.0]),
        (xentjax.softmax_cross_entropy, "z_loss", [0.0, 0.1, 1.0]),
        (xentjax.softmax_focal_loss, "gamma", [0.0, 0.5, 2.0]),
        (xentjax.sigmoid_cross_entropy, "pos_weight", [0.0, 1.0, 3.0]),
        (xentjax.sigmoid_focal_loss, "alpha", [0.0, 0.25, 1.0]),
        (xentjax.asymmetric_loss, "clip", [0.01, 0.05, 0.5]),
    ],
)
def test_vmap_over_hyper_parameters_equals_python_numbers(function, keyword, values, rng):
    case = next(c for c in cases.LOSSES if c.function is function)
    z, labels = case.draw(rng, (5,))
    together = jax.vmap(lambda x: function(z, labels, **{keyword: x}))(jnp.asarray(values, jnp.float32))
    for x, result in zip(values, together, strict=True):
        np.testing.assert_allclose(result, function(z, labels, **{keyword: x}), rtol=RTOL, atol=RTOL)


def test_vmap_over_masks_and_weights(rng):
    z, y = cases.CLASSES[0].draw(rng, (5,))
    masks = jnp.asarray(rng.uniform(size=(3, 7)) < 0.7).at[:, :].set(True).at[0, 6].set(False)
    y = jnp.minimum(y, 5)
    weights = jnp.asarray(rng.uniform(size=(3, 7)), jnp.float32)
    counts = jnp.asarray(rng.uniform(size=(3, 5)) < 0.5)

    def loss(mask, w, count):
        return xentjax.softmax_cross_entropy(z, y, class_mask=mask, class_weights=w, where=count)

    together = jax.vmap(loss)(masks, weights, counts)
    for i in range(3):
        np.testing.assert_allclose(together[i], loss(masks[i], weights[i], counts[i]), rtol=RTOL)


@pytest.mark.exhaustive
@each_kind(cases.CROSS_ENTROPY)  # the families in a scan: test_second_derivatives.py
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_checkpoint_and_scan(case, kind, dtype, rng):
    z, labels = case.draw(rng, (4, 3), dtype=dtype, kind=kind)
    half = max(RTOL, float(jnp.finfo(dtype).eps))

    def scanned(z):
        return jax.lax.scan(lambda total, x: (total + case(*x).sum(), None), jnp.float32(0), (z, labels))[0]

    losses = (jax.checkpoint(lambda z: case(z, labels).sum()), scanned, jax.checkpoint(scanned))
    plain, *slopes = jax.jit(lambda z: [jax.grad(loss)(z).astype(jnp.float32) for loss in (lambda z: case(z, labels).sum(), *losses)])(z)
    for slope in slopes:
        np.testing.assert_allclose(slope, plain, rtol=half, atol=RTOL)


@pytest.mark.by_module
@pytest.mark.parametrize("case", [c for c in cases.LOSSES if c.thorough], ids=str)
def test_export_with_gradient_for_every_platform(case, rng):
    for kind in case.kinds[:1] if case in cases.FAMILIES else case.kinds:
        z, labels = case.draw(rng, (4,), dtype=jnp.bfloat16, kind=kind)
        step = jax.jit(jax.value_and_grad(lambda z, y: case(z, y).sum()))
        exported = export.export(step, platforms=("cpu", "cuda", "rocm", "tpu"))(z, labels)
        assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
        value, slope = exported.call(z, labels)
        expected, gradient = case.exact(ref.Double, z, labels)
        tolerance = case.tolerance * RTOL
        np.testing.assert_allclose(value, expected.sum(), rtol=tolerance, atol=tolerance)
        half = float(jnp.finfo(jnp.bfloat16).eps)
        np.testing.assert_allclose(np.asarray(slope, np.float64), gradient, rtol=half, atol=tolerance)


@pytest.mark.by_module
@each_kind()
def test_no_nan_on_the_way_to_a_finite_answer(case, kind, rng):
    z, labels = case.draw(rng, (4,), kind=kind)
    if case.family == "classes" and "label_smoothing" not in case.target and kind == "index":
        z = z.at[:, 6].set(-jnp.inf)
        labels = labels % 6
    where = jnp.array([True, True, False, True])
    where = jnp.broadcast_to(where[:, None], z.shape) if case.family == "bits" else where
    poisoned = z.at[2].set(jnp.nan)
    jax.config.update("jax_debug_nans", True)
    try:
        assert np.isfinite(case(z, labels)).all()
        assert np.isfinite(cases.gradient(case, z, labels)).all()
        assert np.isfinite(case(poisoned, labels, where=where)).all()
    finally:
        jax.config.update("jax_debug_nans", False)


def test_an_optax_loop_learns(rng):
    optax = pytest.importorskip("optax")
    centres = rng.normal(size=(3, 5)) * 3
    y = rng.integers(0, 3, 90)
    x = jnp.asarray(centres[y] + rng.normal(size=(90, 5)), jnp.float32)
    labels = jnp.asarray(y, jnp.int32)
    parameters = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}
    optimizer = optax.sgd(0.5)
    state = optimizer.init(parameters)

    def loss(p):
        return xentjax.weighted_mean(xentjax.softmax_cross_entropy(x @ p["kernel"] + p["bias"][None], labels))

    @jax.jit
    def step(p, state):
        value, slope = jax.value_and_grad(loss)(p)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(p, updates), state, value

    first = None
    for _ in range(50):
        parameters, state, value = step(parameters, state)
        first = value if first is None else first
    np.testing.assert_allclose(first, np.log(3), rtol=RTOL)
    assert value < 0.2 * first


def test_weak_and_strong_scalars_agree(rng):
    z, y = cases.CLASSES[0].draw(rng)
    smooth = functools.partial(xentjax.softmax_cross_entropy, z, y)
    for x in (0.1, np.float32(0.1), np.array(0.1), jnp.float32(0.1), jnp.bfloat16(0.1)):
        expected = ref.cross_entropy(ref.Double, np.asarray(z, np.float64), ref.targets(ref.Double, y, 7, float(x)))
        np.testing.assert_allclose(smooth(label_smoothing=x), expected, rtol=RTOL)


def test_nested_tangents_are_cumulants(rng):
    """Along a line z + t·v the derivatives of the loss are −v_y plus those of log Σ e^(z + t·v): mean, variance, third cumulant of v."""
    z, v = (rng.normal(size=7) for _ in range(2))
    p = np.exp(z) / np.exp(z).sum()
    mean = p @ v
    cumulants = mean - v[2], p @ (v - mean) ** 2, p @ (v - mean) ** 3
    start, direction = jnp.asarray(z, jnp.float32), jnp.asarray(v, jnp.float32)

    def derivative(f):
        return lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]

    first = derivative(lambda t: xentjax.softmax_cross_entropy(start + t * direction, jnp.int32(2)))
    second = derivative(first)
    found = jax.jit(lambda t: (first(t), second(t), derivative(second)(t)))(jnp.float32(0))
    np.testing.assert_allclose(found, cumulants, rtol=RTOL, atol=RTOL)
