"""Calibration in bins against its definition, and temperature scaling against scipy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import PartitionSpec as P

import xentjax
from xentjax import metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
RTOL = 32 * EPS  # softmax of some eps, and sums of at most 200 terms pairwise
EXAMPLES, CLASSES = 200, 5


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw(rng, sharpness=1.0, examples=EXAMPLES):
    """Logits, and labels drawn from their softmax: logits times `sharpness` are best divided by it."""
    logits = rng.normal(size=(examples, CLASSES)) * 1.5
    labels = np.array([rng.choice(CLASSES, p=p) for p in softmax(logits)], np.int32)
    return jnp.asarray(logits * sharpness, jnp.float32), jnp.asarray(labels)


def reliability(logits, labels, bins, weights):
    """Weight, accuracy and confidence per bin ((b)/bins, (b + 1)/bins], example by example in float64."""
    p = softmax(np.asarray(logits, np.float64))
    weight, hits, confidences = np.zeros(bins), np.zeros(bins), np.zeros(bins)
    for row, label, w in zip(p, np.asarray(labels), weights, strict=True):
        b = max(math.ceil(row.max() * bins) - 1, 0)
        weight[b] += w
        hits[b] += w * (row.argmax() == label)
        confidences[b] += w * row.max()
    safe = np.where(weight == 0, 1, weight)
    return weight, hits / safe, confidences / safe


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_figures_are_those_of_the_definition(dtype, weighted, bins, rng):
    logits, labels = draw(rng)
    logits = logits.astype(dtype)
    w, where = rng.uniform(0.1, 2, EXAMPLES) if weighted else np.ones(EXAMPLES), rng.uniform(size=EXAMPLES) < 0.7
    weight, accuracy, confidence = reliability(logits[where], labels[where], bins, w[where])
    poisoned = jnp.where(where[:, None], logits, jnp.nan), jnp.where(where, labels, -100)
    given = jnp.asarray(w, jnp.float32) if weighted else None
    found = metrics.calibration(*poisoned, bins=bins, weights=given, where=jnp.asarray(where))
    assert found.invalid == 0 and found.counts.dtype == found.hits.dtype == (jnp.float32 if weighted else jnp.int32)
    np.testing.assert_allclose(found.counts, weight, rtol=200 * EPS if weighted else 0)  # one after the other
    np.testing.assert_allclose(found.accuracy(), accuracy, rtol=200 * EPS)
    np.testing.assert_allclose(found.confidence(), confidence, rtol=200 * EPS)
    gaps = np.abs(accuracy - confidence)
    np.testing.assert_allclose(found.expected_calibration_error(), (weight * gaps).sum() / weight.sum(), rtol=0, atol=RTOL)
    np.testing.assert_allclose(found.maximum_calibration_error(), gaps.max(), rtol=0, atol=200 * EPS)


def test_edges_belong_to_the_bin_below():
    """Two classes with logits log p/(1 − p) = 0: confidence exactly 1/2; and a confidence of exactly 1."""
    found = metrics.calibration(jnp.array([[0.0, 0.0], [200.0, 0.0]]), jnp.array([0, 0]), bins=4)
    np.testing.assert_array_equal(found.counts, [0, 1, 0, 1])


def test_invalid_examples_spoil_the_figures():
    z = jnp.array([[1.0, 0.0], [1.0, jnp.nan], [-jnp.inf, -jnp.inf], [0.0, 1.0]])
    found = metrics.calibration(z, jnp.array([-1, 0, 0, 1]), bins=2)
    assert found.invalid == 3 and found.counts.sum() == found.hits.sum() == 1
    np.testing.assert_allclose(found.confidences, [0, 1 / (1 + math.exp(-1))], rtol=4 * EPS)
    for figure in (found.accuracy, found.confidence, found.expected_calibration_error, found.maximum_calibration_error):
        assert np.isnan(figure()).all()


def test_nothing_to_divide_by():
    for found in (
        metrics.calibration(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32)),
        metrics.calibration(jnp.full((2, 3), jnp.nan), jnp.array([-1, 9]), where=jnp.zeros(2, bool)),
        metrics.calibration(jnp.zeros((2, 3)), jnp.array([-1, 9]), class_mask=jnp.zeros(3, bool)),
    ):
        assert found.expected_calibration_error() == 0 and found.maximum_calibration_error() == 0 and found.invalid == 0
        assert not found.accuracy().any() and not found.confidence().any()


def test_figures_have_no_gradient_by_logits(rng):
    """A documented stop_gradient: all of them, and not a part."""
    logits, labels = draw(rng, examples=10)
    assert not jax.grad(lambda z: metrics.calibration(z, labels, bins=3).expected_calibration_error())(logits).any()


# Temperature ------------------------------------------------------------------------------------------------------------


def fitted_by_scipy(logits, labels, weights=None):
    z, y = np.asarray(logits, np.float64), np.asarray(labels)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)

    def nll(log_temperature):
        x = z / math.exp(log_temperature)
        x = x - x.max(-1, keepdims=True)
        return (w * (np.log(np.exp(x).sum(-1)) - x[np.arange(len(y)), y])).sum()

    return math.exp(scipy.optimize.minimize_scalar(nll, bounds=(-6.9, 6.9), method="bounded", options={"xatol": 1e-9}).x)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("sharpness", [0.02, 0.5, 1.0, 4.0, 100.0])
def test_temperature_is_that_of_scipy(sharpness, offset, rng):
    logits, labels = draw(rng, sharpness)
    expected = fitted_by_scipy(logits + offset, labels)  # scipy finds a minimum to the root of eps, 1e-8
    np.testing.assert_allclose(metrics.fit_temperature(logits + offset, labels), expected, rtol=1e-5)


def test_masks_weights_axes_and_half_precision(rng):
    logits, labels = draw(rng, 3.0)
    where, w = rng.uniform(size=EXAMPLES) < 0.7, rng.uniform(0, 2, EXAMPLES)
    expected = fitted_by_scipy(logits[where], labels[where], w[where])
    poisoned = jnp.where(where[:, None], logits, jnp.nan), jnp.where(where, labels, -100)
    options = {"weights": jnp.asarray(w, jnp.float32), "where": jnp.asarray(where)}
    np.testing.assert_allclose(metrics.fit_temperature(*poisoned, **options), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.fit_temperature(poisoned[0].T, poisoned[1], axis=0, **options), expected, rtol=1e-5)
    padded = jnp.concatenate([logits, jnp.full((EXAMPLES, 1), 99.0)], -1)
    missing = jnp.array([*[True] * CLASSES, False])
    np.testing.assert_allclose(metrics.fit_temperature(padded, labels, class_mask=missing), fitted_by_scipy(logits, labels), rtol=1e-5)
    hidden = jnp.where(missing, padded, -jnp.inf)  # a class of probability 0 says nothing either
    np.testing.assert_allclose(metrics.fit_temperature(hidden, labels), fitted_by_scipy(logits, labels), rtol=1e-5)
    narrow = logits.astype(jnp.bfloat16)
    found = metrics.fit_temperature(narrow, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, fitted_by_scipy(narrow, labels), rtol=1e-5)


def test_double_precision(x64, rng):
    logits, labels = draw(rng, 3.0)
    found = metrics.fit_temperature(logits.astype(jnp.float64), labels)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, fitted_by_scipy(logits, labels), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e20])
def test_bounds(scale):
    """Every label ahead: no confidence is too much. Every label behind: none is little enough."""
    labels = jnp.array([0, 1, 2])
    ahead = scale * jnp.eye(3)
    assert metrics.fit_temperature(ahead, labels) == 1 / 1024
    assert metrics.fit_temperature(-ahead, labels) == 1024


def test_where_temperature_does_not_matter():
    labels = jnp.array([0, 1])
    assert metrics.fit_temperature(jnp.zeros((2, 3)), labels) == 1
    assert metrics.fit_temperature(jnp.full((2, 3), 7.0), labels) == 1
    assert metrics.fit_temperature(jnp.zeros((0, 3)), labels[:0]) == 1
    assert metrics.fit_temperature(jnp.full((2, 3), jnp.nan), labels, where=jnp.zeros(2, bool)) == 1
    assert metrics.fit_temperature(jnp.array([[1.0, 5.0]]), jnp.array([0]), weights=jnp.zeros(1)) == 1
    assert metrics.fit_temperature(jnp.array([[3.0]]), jnp.array([0])) == 1  # one class


@pytest.mark.parametrize(
    ("logits", "label"), [([0.0, 1.0], -1), ([0.0, 1.0], 2), ([0.0, jnp.nan], 0), ([0.0, -jnp.inf], 1), ([0.0, jnp.inf], 1)], ids=str
)
def test_examples_without_a_likelihood(logits, label, rng):
    good, labels = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]), jnp.array([1, 1, 0])
    assert np.isnan(metrics.fit_temperature(jnp.concatenate([good, jnp.array([logits])]), jnp.append(labels, label)))


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
def test_few_steps_suffice(sharpness, rng):
    logits, labels = draw(rng, sharpness)
    np.testing.assert_allclose(
        metrics.fit_temperature(logits, labels, steps=12), metrics.fit_temperature(logits, labels, steps=200), rtol=8 * EPS
    )
    far = jnp.concatenate([logits, jnp.full((EXAMPLES, 1), -1e20)], -1)  # too far to be squared, and of no weight
    np.testing.assert_allclose(metrics.fit_temperature(far, labels, steps=12), metrics.fit_temperature(logits, labels), rtol=8 * EPS)


def test_expected_error_falls_on_an_overconfident_model(rng):
    logits, labels = draw(rng, 5.0, examples=1000)
    before = metrics.calibration(logits, labels).expected_calibration_error()
    after = metrics.calibration(logits / metrics.fit_temperature(logits, labels), labels).expected_calibration_error()
    assert before > 0.2 and after < 0.06  # of 1,000 examples in 15 bins the error is some 15·√(0.1/67)/15 by chance alone


@pytest.mark.exhaustive
def test_jit_vmap_and_devices(rng):
    parts = [draw(rng, sharpness, 64) for sharpness in (0.5, 2.0, 6.0)]
    logits, labels = (jnp.stack(x) for x in zip(*parts, strict=True))
    separate = jnp.stack([metrics.fit_temperature(*part) for part in parts])
    np.testing.assert_allclose(jax.jit(jax.vmap(metrics.fit_temperature))(logits, labels), separate, rtol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jnp.arange(64) % 5 != 0  # uneven over the devices

    def fit(z, y, counts):
        return metrics.fit_temperature(z, y, where=counts, batch_axis_name="data")

    split = jax.jit(jax.shard_map(fit, mesh=mesh, in_specs=(P("data"), P("data"), P("data")), out_specs=P()))
    found = split(logits[2], labels[2], where)
    np.testing.assert_allclose(found, metrics.fit_temperature(logits[2], labels[2], where=where), rtol=1e-5)

    def each(z, y):  # a temperature of its own on every device
        return metrics.fit_temperature(z, y)[None]

    own = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data")))(logits[0], labels[0])
    expected = [metrics.fit_temperature(z, y) for z, y in zip(logits[0].reshape(8, 8, -1), labels[0].reshape(8, 8), strict=True)]
    np.testing.assert_allclose(own, expected, rtol=1e-5)


def test_temperature_has_no_gradient(rng):
    logits, labels = draw(rng)
    assert not jax.grad(metrics.fit_temperature)(logits, labels).any()
    mean = jax.grad(lambda z: xentjax.softmax_cross_entropy(z / metrics.fit_temperature(z, labels), labels).mean())(logits)
    assert np.isfinite(mean).all() and mean.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: metrics.calibration(z, y, bins=0), ValueError, "calibration: bins must be at least 1; got 0."),
        (
            lambda z, y: metrics.calibration(z, y, weights=jnp.ones(3)),
            ValueError,
            "calibration: weights must have shape (2,), the shape of logits without its class axis; got (3,).",
        ),
        (
            lambda z, y: metrics.calibration(z, z),
            TypeError,
            "calibration: labels must have an integer dtype (class indices); got float32. "
            "Use labels.argmax(1) for the most likely class of soft labels.",
        ),
        (
            lambda z, y: metrics.fit_temperature(z, y, steps=1.5),
            TypeError,
            "fit_temperature: steps must be an integer, known before tracing; got float.",
        ),
        (
            lambda z, y: metrics.fit_temperature(z, y[:1]),
            ValueError,
            "fit_temperature: labels must have shape (2,), the shape of logits without its class axis; got (1,).",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(jnp.zeros((2, 3)), jnp.array([0, 1]))
