"""Samplers: draws follow the stated probabilities, and expected counts follow their definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from scipy import stats

from xentjax import samplers

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
WEIGHTS = np.array([3.0, 0.0, 0.5, 10.0, 1e-3, 1.0, 1.0])
SAMPLERS = {
    "uniform": (samplers.uniform(7), np.full(7, 1 / 7)),
    "log-uniform": (samplers.log_uniform(7), np.log(np.arange(2, 9) / np.arange(1, 8)) / np.log(8)),
    "log-uniform, a thousand": (samplers.log_uniform(1000), np.log1p(1 / np.arange(1.0, 1001)) / np.log(1001)),
    "alias": (samplers.alias(WEIGHTS), WEIGHTS / WEIGHTS.sum()),
    "alias, a thousand": (samplers.alias(1 / np.arange(1, 1001)), 1 / np.arange(1, 1001) / np.sum(1 / np.arange(1, 1001))),
    "one class": (samplers.alias([2]), np.ones(1)),
    "one class, log-uniform": (samplers.log_uniform(1), np.ones(1)),
}
every_sampler = pytest.mark.parametrize(("sampler", "probs"), SAMPLERS.values(), ids=SAMPLERS)


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}(\n|$)")


@every_sampler
def test_log_probabilities(sampler, probs):
    with np.errstate(divide="ignore"):
        expected = np.log(probs)
    got = sampler.log_prob(jnp.arange(len(probs)))
    np.testing.assert_allclose(got, expected, rtol=4 * EPS, atol=4 * EPS)  # the difference of two logarithms of order 1 to 10
    assert np.isnan(sampler.log_prob(jnp.array([-1, len(probs), 2**30]))).all()
    assert sampler.log_prob(np.uint8(0)).dtype == jnp.float32


@pytest.mark.exhaustive
@every_sampler
@pytest.mark.parametrize("seed", [0, 1])
def test_goodness_of_fit(sampler, probs, seed):
    # A correct sampler fails for one key in 10⁴. The keys here are fixed, so the test is deterministic.
    draws = 200_000
    ids = np.asarray(jax.jit(lambda s, k: s.sample(k, (draws,)))(sampler, jax.random.key(seed)))
    assert ids.dtype == np.int32
    counts = np.bincount(ids, minlength=len(probs))
    assert len(counts) == len(probs) and not counts[probs == 0].any()
    enough = draws * probs >= 10  # rarer classes share one cell, because the chi-square approximation needs enough draws per cell
    observed, expected = (np.append(x[enough], x[~enough].sum()) for x in (counts, draws * probs))
    filled = expected > 0
    if filled.sum() > 1:
        assert stats.chisquare(observed[filled], expected[filled]).pvalue > 1e-4


def test_draws_are_independent():
    first, second = np.asarray(samplers.log_uniform(6).sample(jax.random.key(3), (2, 50_000)))
    table = np.histogram2d(first, second, bins=[np.arange(7)] * 2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_the_rarest_of_a_million_classes_are_all_drawn():
    ids = np.concatenate([samplers.log_uniform(10**6).sample(jax.random.key(k), (4_000_000,)) for k in range(2)])
    assert ids.max() < 10**6
    rare = np.arange(900_000, 10**6)
    drawn = len(np.unique(ids[ids >= 900_000]))
    # The standard deviation is 0.4 %. A single float32 exponential, with steps of 1.6 classes here, would draw a seventh fewer classes.
    assert abs(drawn / np.sum(-np.expm1(-len(ids) * np.log1p(1 / (rare + 1)) / np.log(10**6))) - 1) < 0.02
    blocks = np.bincount((ids[ids >= 2**19 - 1] - (2**19 - 1)) // 2**14)[:29]  # the last octave
    weights = np.log1p(2**14 / (2**19 + 2**14 * np.arange(29)))
    assert stats.chisquare(blocks, blocks.sum() * weights / weights.sum()).pvalue > 1e-4


@pytest.mark.parametrize(
    "weights", [WEIGHTS, np.ones(5), 1 / np.arange(1, 3001), np.random.default_rng(0).gamma(0.1, size=2000), [0, 0, 1]]
)
def test_the_alias_table_holds_the_distribution(weights):
    sampler, probs = samplers.alias(weights), np.asarray(weights) / np.sum(weights)
    kept = np.asarray(sampler.threshold, np.float64) / 2**32
    shares = kept.copy()
    np.add.at(shares, np.asarray(sampler.alias), 1 - kept)
    np.testing.assert_allclose(shares / len(probs), probs, rtol=0, atol=2.0**-31)  # thresholds are rounded to within 2⁻³³ of a cell
    assert not shares[probs == 0].any()


def test_a_draw_does_not_search_the_table():
    sampler = samplers.alias(np.ones(5000))
    jaxpr = str(jax.make_jaxpr(lambda s, k: s.sample(k, (3,)))(sampler, jax.random.key(0)))
    assert "[5000]" in jaxpr
    assert not re.findall(r"(?:while|scan|sort|cumsum)\[", jaxpr)
    made = [line for line in jaxpr.splitlines() if re.search(r"\[5000\] = ", line) and "lambda" not in line and "jit[" not in line]
    assert not made, "a draw computes an array of the size of the table"


@every_sampler
@pytest.mark.parametrize("unique", [False, True])
def test_expected_counts(sampler, probs, unique):
    n = 5
    got = samplers.log_expected_count(sampler, jnp.arange(len(probs)), n, unique=unique)
    with np.errstate(divide="ignore"):
        expected = np.log(-np.expm1(n * np.log1p(-probs)) if unique else n * probs)
    np.testing.assert_allclose(got, expected, rtol=8 * EPS, atol=8 * EPS)
    assert np.isnan(samplers.log_expected_count(sampler, -1, n, unique=unique))


def test_expected_counts_of_rare_classes_do_not_cancel():
    sampler = samplers.uniform(10_000_000)
    got = samplers.log_expected_count(sampler, 3, 7, unique=True)
    np.testing.assert_allclose(got, np.log(-np.expm1(7 * np.log1p(-1e-7))), rtol=4 * EPS)


def test_as_many_classes_as_ids():
    classes = 2**31 - 1
    sampler = samplers.uniform(classes)
    ids = np.asarray(sampler.sample(jax.random.key(0), (100_000,)))
    assert ids.min() >= 0
    # the share of each tenth of the classes is binomial; allow five standard deviations
    shares = np.histogram(ids / classes, bins=10, range=(0, 1))[0] / len(ids)
    np.testing.assert_allclose(shares, 0.1, atol=5 * np.sqrt(0.1 * 0.9 / len(ids)))
    assert (ids % 2 == 1).mean() > 0.49  # float32 cannot represent most odd ids
    np.testing.assert_allclose(sampler.log_prob(jnp.array([0, classes - 1])), -np.log(classes), rtol=EPS)
    assert np.isnan(sampler.log_prob(jnp.array([-1, classes]))).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("unique", [False, True])
def test_drawn_samples_carry_their_expected_counts(unique):
    sampler = samplers.log_uniform(4)
    samples = samplers.draw(jax.random.key(1), sampler, 6, shape=(300,), unique=unique)
    ids, log_counts = np.asarray(samples.ids), np.asarray(samples.log_expected_count)
    expected = np.asarray(samplers.log_expected_count(sampler, samples.ids, 6, unique=unique))
    assert ids.shape == log_counts.shape == (300, 6)
    for row, got, right in zip(ids, log_counts, expected, strict=True):
        first = np.array([k not in row[:i] for i, k in enumerate(row)])
        np.testing.assert_array_equal(got, np.where(first | (not unique), right, np.inf))


def test_unique_samples_occur_as_often_as_expected():
    # For every class k, Σ_samples [id = k]·e^(−log_expected_count) must have expectation 1. Then a sum over samples estimates a sum over
    # classes without bias.
    sampler, n, rows = samplers.alias([5, 1, 1, 3]), 3, 40_000
    samples = samplers.draw(jax.random.key(2), sampler, n, shape=(rows,), unique=True)
    shares = np.array([np.sum(np.where(samples.ids == k, np.exp(-samples.log_expected_count), 0)) / rows for k in range(4)])
    spread = np.sqrt(np.exp(-samplers.log_expected_count(sampler, jnp.arange(4), n, unique=True)) / rows)
    assert (np.abs(shares - 1) < 4 * spread).all()


@pytest.mark.exhaustive
def test_the_same_key_draws_the_same_ids_and_another_key_does_not():
    for sampler, _ in list(SAMPLERS.values())[:5]:
        first, again, other = (sampler.sample(k, (64,)) for k in (jax.random.key(0), jax.random.key(0), jax.random.key(1)))
        assert (first == again).all() and (first != other).any()
        assert (jax.jit(sampler.sample, static_argnums=1)(jax.random.key(0), (64,)) == first).all()
        keys = jax.random.split(jax.random.key(0), 3)
        batched = jax.vmap(lambda k, s=sampler: s.sample(k, (8,)))(keys)
        assert (batched == jnp.stack([sampler.sample(k, (8,)) for k in keys])).all()
    assert samplers.uniform(5).sample(jax.random.PRNGKey(0), ()).shape == ()  # a key in the older format


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["uniform", "log-uniform", "alias"])
def test_export_for_every_platform(name):
    sampler, bits = SAMPLERS[name][0], jax.random.key_data(jax.random.key(5))
    run = jax.jit(lambda s, b: samplers.draw(jax.random.wrap_key_data(b), s, 9, unique=True))
    tree = jax.tree.leaves(sampler)

    def flat(bits, *leaves):
        return tuple(run(jax.tree.unflatten(jax.tree.structure(sampler), leaves), bits))

    exported = export.export(jax.jit(flat), platforms=("cpu", "cuda", "rocm", "tpu"))(bits, *tree)
    for got, expected in zip(exported.call(bits, *tree), run(sampler, bits), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_errors():
    uniform, name = samplers.uniform(5), "samplers.alias: weights must"
    with raises(ValueError, "samplers.uniform: classes must be at least 1; got 0."):
        samplers.uniform(0)
    with raises(ValueError, "samplers.log_uniform: classes must be at most 16777216; got 16777217."):
        samplers.log_uniform(2**24 + 1)
    with raises(ValueError, "samplers.uniform: classes must be at most 2147483647; got 2147483648."):
        samplers.uniform(2**31)
    with raises(TypeError, "samplers.log_uniform: classes must be an integer, known before tracing; got float."):
        samplers.log_uniform(5.0)
    for weights, error, message in (
        (np.ones((2, 2)), ValueError, f"{name} have shape (classes,), one per class; got (2, 2)."),
        ([], ValueError, f"{name} have shape (classes,), one per class; got (0,)."),
        ([1.0, -2.0], ValueError, f"{name} be finite and at least 0; got weights[1] = -2."),
        ([np.nan, 1.0], ValueError, f"{name} be finite and at least 0; got weights[0] = nan."),
        ([0, 0], ValueError, f"{name} not all be 0."),
        ([True], TypeError, f"{name} be numbers; got bool."),
    ):
        with raises(error, message):
            samplers.alias(weights)
    outside = "be known before tracing; got a traced array. Call samplers.alias outside jax.jit and pass its result as an argument."
    with raises(TypeError, f"{name} {outside}"):
        jax.jit(samplers.alias)(jnp.ones(3))
    with raises(TypeError, "samplers.draw: key must be a JAX random key; got int. Use jax.random.key(0)."):
        samplers.draw(0, uniform, 3)
    with raises(TypeError, "samplers.draw: key must be a JAX random key; got float32. Use jax.random.key(0)."):
        samplers.draw(jnp.zeros(2), uniform, 3)
    several = "samplers.draw: key must be one key; got keys of shape (4,). Use jax.vmap, or `shape` for more samples."
    with raises(ValueError, several):
        samplers.draw(jax.random.split(jax.random.key(0), 4), uniform, 3)
    with raises(ValueError, "samplers.draw: count must be at least 1; got 0."):
        samplers.draw(jax.random.key(0), uniform, 0)
    with raises(TypeError, "samplers.log_expected_count: ids must have an integer dtype; got float32. Use ids.astype(jnp.int32)."):
        samplers.log_expected_count(uniform, 0.5, 3)
    with raises(TypeError, "samplers.Uniform.log_prob: ids must be an array or convertible to one; got str."):
        uniform.log_prob("3")
