"""Sums of metrics: uneven batches in any order, devices and one batch are the same; counts stay exact."""

import functools
import operator

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from tests.drawing import examples
from xentjax import metrics

EXAMPLES, CLASSES = 40, 4
MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def confusion(z, y, **keywords):
    return metrics.confusion(z.argmax(-1), y, classes=CLASSES, **keywords)


def calibration(z, y, **keywords):
    return metrics.calibration(z, y, bins=5, **keywords)


def ranking(z, y, **keywords):
    return metrics.ranking(z[..., 0], y == 0, low=-3.0, high=3.0, points=9, **keywords)


def figures(found):
    """Every figure of a sum."""
    names = [
        name
        for name in ("accuracy", "balanced_accuracy", "f1", "confidence", "expected_calibration_error", "auroc", "auroc_error")
        if hasattr(found, name)
    ]
    return [getattr(found, name)() for name in names]


EACH = pytest.mark.parametrize("function", [confusion, calibration, ranking], ids=lambda f: f.__name__)


def draw(rng, leading=(EXAMPLES,)):
    """Weights are quarters, so that sums of them are exact in any order."""
    logits = jnp.asarray(rng.normal(size=(*leading, CLASSES)), jnp.float32)
    where, weights = rng.uniform(size=leading) < 0.7, rng.integers(0, 9, leading) / 4
    return logits, jnp.asarray(rng.integers(0, CLASSES, leading)), jnp.asarray(where), jnp.asarray(weights, jnp.float32)


def same(got, expected):
    """Exactly, but for sums of confidences: 40 additions of float32 in another order."""
    for name, x, y in zip(expected._fields, got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=40 * 2**-24 if name == "confidences" else 0, err_msg=name)
    for x, y in zip(figures(got), figures(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
@EACH
@pytest.mark.parametrize("weighted", [False, True])
@examples(15)
@hypothesis.given(data=st.data())
def test_batches_in_any_order_make_the_whole(function, weighted, data):
    logits, labels, where, weights = draw(np.random.default_rng(data.draw(st.integers(0, 1000))))
    whole = function(logits, labels, where=where, weights=weights if weighted else None)
    # cuts out of a few, empty parts included: every new size is a new program
    cuts = sorted(data.draw(st.lists(st.sampled_from([0, 1, 13, 30, EXAMPLES]), max_size=3)))
    ends = [*cuts, EXAMPLES]
    parts = [
        function(logits[a:b], labels[a:b], where=where[a:b], weights=weights[a:b] if weighted else None)
        for a, b in zip([0, *cuts], ends, strict=True)
    ]
    shuffled = data.draw(st.permutations(parts))
    same(functools.reduce(operator.add, shuffled), whole)
    same(sum(shuffled[1:]) + shuffled[0] if len(shuffled) > 1 else sum(shuffled), whole)


@pytest.mark.exhaustive
@EACH
def test_devices_make_the_whole(function, rng):
    logits, labels, where, weights = draw(rng)
    for given in ({"where": where}, {"where": where, "weights": weights}, {}):

        def step(z, y, keywords):
            found = function(z, y, **keywords).psum("data")
            return found, figures(found)

        split = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=P("data"), out_specs=P()))
        found, read = split(logits, labels, given)
        whole = function(logits, labels, **given)
        same(found, whole)
        for x, y in zip(read, figures(whole), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
@EACH
def test_jit_vmap_and_scan(function, rng):
    logits, labels, where, _ = draw(rng, (3, EXAMPLES))
    separate = [function(z, y, where=w) for z, y, w in zip(logits, labels, where, strict=True)]
    batched = jax.jit(jax.vmap(lambda z, y, w: function(z, y, where=w)))(logits, labels, where)
    same(batched, jax.tree.map(lambda *x: jnp.stack(x), *separate))
    total = function(logits, labels, where=where)  # any leading axes
    same(sum(separate), total)
    start = jax.tree.map(jnp.zeros_like, separate[0])  # an evaluation loop inside jit
    loop = jax.jit(lambda: jax.lax.scan(lambda found, x: (found + function(*x[:2], where=x[2]), None), start, (logits, labels, where))[0])
    same(loop(), total)


@pytest.mark.parametrize("size", [2**24, 2**30])
def test_counts_are_exact_beyond_what_float32_can_count(size):
    """2²⁴ + 1 in float32 is 2²⁴; and sums of margins pass 2³⁰ without overflow."""
    one = jnp.array([0])
    many = confusion(jnp.zeros((1, CLASSES)), one)._replace(counts=jnp.zeros((CLASSES, CLASSES), jnp.int32).at[0, 0].set(size))
    assert (many + confusion(jnp.zeros((1, CLASSES)), one)).counts[0, 0] == size + 1
    assert many.f1()[0] == many.accuracy() == 1
    sure = jnp.array([[99.0, 0.0]])
    bins = metrics.calibration(sure, one, bins=2)
    grown = bins._replace(counts=size * bins.counts, hits=size * bins.hits) + bins
    assert grown.counts[1] == grown.hits[1] == size + 1
    area = metrics.ranking(jnp.array([0.0, 1.0]), jnp.array([0, 1]))
    grown = jax.tree.map(lambda x: size * x, area) + area
    assert grown.negatives[0] == grown.positives[-1] == size + 1 and grown.auroc() == 1


def test_one_batch_counts_beyond_what_float32_can_count():
    predictions = jnp.zeros(2**24 + 1, jnp.uint8)
    assert metrics.confusion(predictions, predictions, classes=2).counts[0, 0] == 2**24 + 1


def test_confidences_of_a_large_batch_are_summed_by_halves():
    """One after the other, a million times 0.9 in float32 would be 5e-3 off."""
    logits = jnp.broadcast_to(jnp.array([jnp.log(9.0), 0.0]), (2**20, 2))
    found = metrics.calibration(logits, jnp.zeros(2**20, jnp.int32), bins=1)
    np.testing.assert_allclose(found.confidence(), 0.9, rtol=1e-6)


@pytest.mark.exhaustive
@EACH
def test_export_for_every_platform_and_debug_nans(function, rng):
    logits, labels, where, weights = draw(rng)
    step = jax.jit(lambda z, y, c, w: figures(function(z, y, where=c, weights=w)))
    exported = export.export(step, platforms=("cpu", "cuda", "rocm", "tpu"))(logits, labels, where, weights)
    poisoned = jnp.where(where[:, None], logits, jnp.nan), jnp.where(where, labels, -100), where, weights
    jax.config.update("jax_debug_nans", True)
    try:
        for x, y in zip(exported.call(logits, labels, where, weights), step(*poisoned), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
    finally:
        jax.config.update("jax_debug_nans", False)


@pytest.mark.parametrize("function", [metrics.fit_temperature, lambda z, y: metrics.auroc(z[:, 0], y == 0)])
def test_the_others_too(function, rng):
    logits, labels, _, _ = draw(rng)
    exported = export.export(jax.jit(function), platforms=("cpu", "cuda", "rocm", "tpu"))(logits, labels)
    jax.config.update("jax_debug_nans", True)
    try:
        np.testing.assert_allclose(exported.call(logits, labels), function(logits, labels), rtol=1e-6)
    finally:
        jax.config.update("jax_debug_nans", False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("figure", ["accuracy", "f1", "auroc"])
def test_gradients_by_weights(figure, rng):
    """Reverse mode against differences, which of ratios of sums in float32 are good to some 1e-3."""
    logits, labels, where, _ = draw(rng)
    function = ranking if figure == "auroc" else confusion
    weights = jnp.asarray(rng.uniform(0.5, 2, EXAMPLES), jnp.float32)

    def value(w):
        return getattr(function(logits, labels, weights=w, where=where), figure)().sum()

    slope, direction = jax.grad(value)(weights), jnp.asarray(rng.normal(size=EXAMPLES), jnp.float32)
    numeric = (value(weights + 0.01 * direction) - value(weights - 0.01 * direction)) / 0.02
    np.testing.assert_allclose(slope @ direction, numeric, rtol=2e-2, atol=1e-4)
    assert slope.any() and not slope[~where].any()
