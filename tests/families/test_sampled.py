"""Losses on sampled classes: exact expectations, by enumerating all samples of tiny problems; memory; errors."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from xentjax import samplers
from xentjax._many_classes import sampled

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
Samples = samplers.Samples

LOGITS = np.array([0.3, -1.0, 1.2, 0.0])
NOISE = np.array([0.4, 0.3, 0.1, 0.2])
DATA = np.array([0.1, 0.25, 0.4, 0.25])


def uncorrected(function):
    """A loss that requires log Q of its labels, called with log Q = 0."""

    def run(hidden, kernel, labels, **keywords):
        return function(hidden, kernel, labels, label_log_expected_count=jnp.zeros(jnp.shape(labels)), **keywords)

    run.__name__ = function.__name__
    return run


LOSSES = [
    sampled.sampled_softmax_cross_entropy,
    uncorrected(sampled.noise_contrastive_estimation_loss),
    sampled.negative_sampling_loss,
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def drawn(n, noise=NOISE):
    """All tuples of n samples [tuples, n], and the probability of each."""
    ids = np.array(list(itertools.product(range(len(noise)), repeat=n)))
    return ids, np.prod(noise[ids], axis=1)


def on_tuples(loss, logits, labels, ids, log_expected, **keywords):
    """The loss of every label [labels] with every tuple of samples [tuples, n], shape [labels, tuples]; `logits` are the parameters."""
    y = jnp.broadcast_to(jnp.asarray(labels)[:, None], (len(labels), len(ids)))
    each = Samples(*(jnp.broadcast_to(jnp.asarray(x)[None], (len(labels), *x.shape)) for x in (ids, log_expected)))
    return loss(jnp.ones((*y.shape, 1)), logits[None], y, samples=each, **keywords)


def test_an_expected_count_of_0_is_the_limit_of_small_ones():
    """Class 0 is the label, class 1 is sampled, class 2 is left out. All logits are 0, so the loss is softplus(log Q_y − log Q_1)."""

    def run(logits, q):
        samples = Samples(jnp.array([1, 2]), jnp.stack([q[1], jnp.float32(jnp.inf)]))
        kernel, more = logits[None], {"samples": samples, "label_log_expected_count": q[0]}
        return sampled.sampled_softmax_cross_entropy(jnp.ones(1), kernel, jnp.array(0), **more)

    both = jax.jit(jax.value_and_grad(run))
    for q, value, slope in (
        ((0.0, -np.inf), np.inf, (-1, 1, 0)),
        ((-np.inf, 0.0), 0, (0, 0, 0)),
        ((-np.inf, -np.inf), np.log(2), (-0.5, 0.5, 0)),
    ):
        found = both(jnp.zeros(3), jnp.float32(q))
        np.testing.assert_allclose(found[0], value, rtol=4 * EPS)
        np.testing.assert_allclose(found[1], slope, rtol=4 * EPS)


def test_a_candidate_of_probability_0_is_the_limit_of_small_ones():
    q, log_prob = jnp.zeros((2, 1)), jnp.array([0.0, -jnp.inf])  # the second candidate has score +∞ for both queries
    np.testing.assert_array_equal(sampled.in_batch_softmax_cross_entropy(q, q, candidate_log_prob=log_prob), [np.inf, 0])


@pytest.mark.exhaustive
def test_every_class_once_is_the_full_softmax(rng):
    hidden, kernel, bias = (jnp.asarray(rng.normal(size=s) * 3, jnp.float32) for s in ((20, 6), (6, 50), (50,)))
    labels = jnp.asarray(rng.integers(0, 50, 20))
    everything = Samples(jnp.asarray(rng.permutation(50)), jnp.zeros(50))

    def full(h, k, b):
        return xentjax.softmax_cross_entropy(jnp.dot(h, k, precision="highest") + b[None], labels)

    def ours(h, k, b):
        return sampled.sampled_softmax_cross_entropy(h, k, labels, samples=everything, bias=b)

    scale = float(jnp.abs(hidden @ kernel).max())  # the products are summed in different orders
    np.testing.assert_allclose(ours(hidden, kernel, bias), full(hidden, kernel, bias), rtol=8 * EPS, atol=8 * EPS * scale)
    slopes = (jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1, 2))(hidden, kernel, bias) for f in (ours, full))
    for slope, expected in zip(*slopes, strict=True):
        np.testing.assert_allclose(slope, expected, rtol=0, atol=16 * EPS * scale * float(jnp.abs(expected).max()))


def test_confident_labels_keep_their_tiny_loss():
    kernel, samples = jnp.array([[60.0, 0.0, 0.0]]), Samples(jnp.array([1, 2]), jnp.zeros(2))
    loss, slope = jax.value_and_grad(sampled.sampled_softmax_cross_entropy, 1)(jnp.ones(1), kernel, jnp.array(0), samples=samples)
    expected = 2 * np.exp(-60.0)
    np.testing.assert_allclose(loss, expected, rtol=68 * EPS)  # (8 + margin)·eps
    np.testing.assert_allclose(slope[0], [-expected, expected / 2, expected / 2], rtol=68 * EPS)
    for loss in LOSSES[1:]:
        value = loss(jnp.ones(1), -kernel + 60, jnp.array(1), samples=Samples(jnp.array([0]), jnp.array([80.0 * (loss is LOSSES[1])])))
        expected = np.log1p(np.exp(-60)) + np.log1p(np.exp(-80.0) if loss is LOSSES[1] else 1)
        np.testing.assert_allclose(value, expected, rtol=4 * EPS)
    np.testing.assert_allclose(LOSSES[2](jnp.ones(1), -kernel, jnp.array(0), samples=samples), 60 + 2 * np.log(2), rtol=4 * EPS)
    wrong = LOSSES[2](jnp.ones(1), 5 * kernel, jnp.array(1), samples=Samples(jnp.array([0]), jnp.zeros(1)))
    np.testing.assert_allclose(wrong, np.log(2) + 300, rtol=4 * EPS)  # e^300 overflows float32
    tiny = LOSSES[2](jnp.ones(1), kernel, jnp.array(0), samples=Samples(jnp.array([0]), jnp.zeros(1)), remove_accidental_hits=True)
    np.testing.assert_allclose(tiny, np.exp(-60), rtol=68 * EPS)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_estimate_of_the_partition_function_is_unbiased(n, unique):
    ids, chance = drawn(n)
    count = 1 - (1 - NOISE) ** n if unique else n * NOISE
    log_expected = np.log(count[ids])
    if unique:
        repeated = [[k in row[:i] for i, k in enumerate(row)] for row in ids.tolist()]
        log_expected = np.where(repeated, np.inf, log_expected)
    loss = on_tuples(LOSSES[0], jnp.asarray(LOGITS, jnp.float32), np.arange(4), ids, log_expected)
    estimate = np.exp(np.asarray(loss, np.float64) + LOGITS[:, None])
    np.testing.assert_allclose(estimate @ chance, np.full(4, np.exp(LOGITS).sum()), rtol=16 * EPS)
    assert np.ptp(estimate, axis=1).min() > 0.1, "single estimates differ"


@pytest.mark.exhaustive
def test_the_bias_of_the_gradient_vanishes_with_samples():
    # The gradient is a ratio of sums, and its denominator is an average over n samples. So its bias is of order 1/n. With three classes,
    # 8 samples have only 3⁸ tuples.
    logits, noise = LOGITS[:3], np.array([0.5, 0.3, 0.2])
    p = np.exp(logits) / np.exp(logits).sum()
    biases = []
    for n in (1, 2, 4, 8):
        ids, chance = drawn(n, noise)

        def expectation(z, ids=ids, chance=chance, n=n):
            return jnp.sum(on_tuples(LOSSES[0], z, [1], ids, np.log(n * noise[ids])) * jnp.asarray(chance, jnp.float32)[None])

        slope = jax.grad(expectation)(jnp.asarray(logits, jnp.float32))
        biases.append(np.abs(slope - (p - np.eye(3)[1])).max())
    ratios = np.array(biases[:-1]) / np.array(biases[1:])
    assert (ratios > 1.3).all() and 1.8 < ratios[-1] < 2.2, ratios


def expected_slope(loss, logits, n, remove=False, **counts):
    """The gradient of the expected loss, with labels drawn from DATA and samples drawn from NOISE."""
    ids, chance = drawn(n)

    def expectation(z):
        values = on_tuples(loss, z, np.arange(4), ids, np.log(n * NOISE[ids]), remove_accidental_hits=remove, **counts)
        return jnp.sum(values * jnp.asarray(DATA[:, None] * chance, jnp.float32))

    return jax.grad(expectation)(jnp.asarray(logits, jnp.float32))


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [1, 2, 3])
def test_noise_contrastive_estimation_has_its_minimum_at_the_data(n):
    tuples = len(NOISE) ** n
    counts = {"label_log_expected_count": jnp.broadcast_to(jnp.log(n * jnp.asarray(NOISE, jnp.float32))[:, None], (4, tuples))}
    slope = functools.partial(expected_slope, sampled.noise_contrastive_estimation_loss, n=n, **counts)
    np.testing.assert_allclose(slope(np.log(DATA)), np.zeros(4), atol=4 * EPS)
    for k in range(4):  # the gradient changes sign there, so it is a minimum
        off = 0.1 * np.eye(4)[k]
        assert slope(np.log(DATA) + off)[k] > 1e-3 and slope(np.log(DATA) - off)[k] < -1e-3
    assert np.abs(slope(np.log(DATA), remove=True)).max() > 1e-3, "without accidental hits, the minimum is elsewhere"


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [1, 2, 3])
def test_sampled_softmax_with_a_corrected_label_has_its_minimum_at_the_data(n):
    counts = {"label_log_expected_count": jnp.broadcast_to(jnp.log(n * jnp.asarray(NOISE, jnp.float32))[:, None], (4, len(NOISE) ** n))}
    slope = expected_slope(
        sampled.sampled_softmax_cross_entropy, np.log(DATA) + 5, n, **counts
    )  # a constant shift of the logits changes nothing
    np.testing.assert_allclose(slope, np.zeros(4), atol=8 * EPS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [1, 2, 3])
def test_negative_sampling_has_the_expectation_of_the_paper(n):
    ids, chance = drawn(n)
    values = on_tuples(LOSSES[2], jnp.asarray(LOGITS, jnp.float32), np.arange(4), ids, np.zeros(ids.shape))
    expected = np.logaddexp(0, -LOGITS) + n * np.sum(NOISE * np.logaddexp(0, LOGITS))
    np.testing.assert_allclose(np.asarray(values, np.float64) @ chance, expected, rtol=4 * EPS)
    slope = expected_slope(LOSSES[2], np.log(DATA / (n * NOISE)), n)
    np.testing.assert_allclose(slope, np.zeros(4), atol=4 * EPS)


@pytest.mark.exhaustive
def test_only_the_label_remains_when_every_sample_equals_it():
    hits = Samples(jnp.full(5, 2), jnp.zeros(5))
    for loss, expected in zip(LOSSES, (0, np.log(2), np.log(2)), strict=True):
        value, slope = jax.value_and_grad(loss, 1)(jnp.ones(3), jnp.zeros((3, 4)), jnp.array(2), samples=hits, remove_accidental_hits=True)
        np.testing.assert_allclose(value, expected, rtol=2 * EPS)
        assert loss is not LOSSES[0] or not slope.any()


@every_loss
@pytest.mark.parametrize("bad", [-1, -100, 4, 2**30])
def test_bad_indices_are_nan_in_their_own_examples(loss, bad):
    hidden, kernel = jnp.ones((3, 2)), jnp.ones((2, 4))
    labels, ids = jnp.array([1, bad, 3]), jnp.array([[0, 1], [0, 1], [2, 1]])

    def run(h, labels, ids):
        return loss(h, kernel, labels, samples=Samples(ids, jnp.zeros((3, 2))))

    for y, i in ((labels, ids), (labels.at[1].set(2), ids.at[1, 1].set(bad))):
        value, slope = run(hidden, y, i), jax.grad(lambda h, y=y, i=i: run(h, y, i).sum())(hidden)
        np.testing.assert_array_equal(np.isnan(value), [False, True, False])
        np.testing.assert_array_equal(np.isnan(slope), [[False] * 2, [True] * 2, [False] * 2])


@every_loss
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_any_integer_dtype(loss, dtype, rng):
    hidden, kernel = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), jnp.asarray(rng.normal(size=(2, 300)), jnp.float32)
    labels, ids = np.array([100, 5, 7]), np.array([5, 9, 120])
    samples, narrow = Samples(ids, jnp.zeros(3)), Samples(ids.astype(dtype), jnp.zeros(3))
    got, expected = loss(hidden, kernel, labels.astype(dtype), samples=narrow), loss(hidden, kernel, labels, samples=samples)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.exhaustive
@every_loss
def test_checked_names_the_bad_label(loss):
    samples = Samples(jnp.array([0]), jnp.zeros(1))
    run = xentjax.checked(lambda y: loss(jnp.ones((2, 3)), jnp.ones((3, 9)), y, samples=samples))
    with pytest.raises(ValueError, match=re.escape(f"{loss.__name__}: labels[1] = 9 is outside [0, 9).")):
        run(jnp.array([0, 9]))
    assert np.isfinite(run(jnp.array([0, 8]))).all()


def test_a_batch_of_all_items_is_the_full_softmax(rng):
    queries, items = (jnp.asarray(rng.normal(size=(12, 5)), jnp.float32) for _ in range(2))
    full = xentjax.softmax_cross_entropy(jnp.dot(queries, items.T, precision="highest") / 0.3, jnp.arange(12))
    got = sampled.in_batch_softmax_cross_entropy(queries, items, temperature=0.3)
    np.testing.assert_allclose(got, full, rtol=64 * EPS, atol=64 * EPS)  # logits up to 30, summed in a different order
    shifted = sampled.in_batch_softmax_cross_entropy(queries, items, temperature=0.3, candidate_log_prob=jnp.full(12, -7.0))
    np.testing.assert_allclose(shifted, full, rtol=64 * EPS, atol=64 * EPS)


def test_candidates_drawn_by_popularity_are_corrected():
    # All batches of three: item 0, which is the query's own, and two items drawn from P. Corrected by log P, the sum of e^s over the two
    # drawn items is an unbiased estimate of 2·Σ_k e^(z_k). The loss divides it by the corrected e^s of item 0, which is multiplied back.
    ids, chance = drawn(2)
    z, log_p = jnp.asarray(LOGITS, jnp.float32), jnp.log(jnp.asarray(NOISE, jnp.float32))

    def first(pair):
        items = jnp.concatenate([jnp.zeros(1, pair.dtype), pair])
        return sampled.in_batch_softmax_cross_entropy(jnp.ones((3, 1)), z[items][:, None], candidate_log_prob=log_p[items])[0]

    others = np.expm1(np.asarray(jax.vmap(first)(jnp.asarray(ids)), np.float64)) * np.exp(LOGITS[0]) / NOISE[0]
    np.testing.assert_allclose(others @ chance, 2 * np.exp(LOGITS).sum(), rtol=32 * EPS)


def test_the_same_item_elsewhere_in_the_batch_is_not_a_negative(rng):
    queries, items = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    ids = jnp.array([3, 3, 8, 3, 9, 8])
    got = sampled.in_batch_softmax_cross_entropy(queries, items, candidate_ids=ids)
    for i in range(6):
        keep = [i, *(j for j in range(6) if ids[j] != ids[i])]
        z = np.asarray(queries, np.float64)[i] @ np.asarray(items, np.float64)[keep].T
        np.testing.assert_allclose(got[i], np.log(np.exp(z).sum()) - z[0], rtol=32 * EPS)
    assert not sampled.in_batch_softmax_cross_entropy(queries, items, candidate_ids=jnp.zeros(6, jnp.int32)).any()


def test_pairs_that_do_not_count_are_not_candidates(rng):
    queries, items = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    where = jnp.array([True, False, True, True, False, True])
    got = sampled.in_batch_softmax_cross_entropy(queries, items, where=where)
    np.testing.assert_allclose(got[where], sampled.in_batch_softmax_cross_entropy(queries[where], items[where]), rtol=8 * EPS)
    assert not got[~where].any()


EXAMPLES, FEATURES, CLASSES = 256, 16, 20_011


def compiled(loss, dtype, classes_first, derive):
    kernel = (CLASSES, FEATURES) if classes_first else (FEATURES, CLASSES)
    arguments = [jax.ShapeDtypeStruct(s, dtype) for s in ((EXAMPLES, FEATURES), kernel)]
    samples = Samples(jnp.arange(32), jnp.zeros(32))

    def total(h, k, y):
        return loss(h, k, y, samples=samples, classes_first=classes_first).mean()

    run = jax.value_and_grad(total, (0, 1)) if derive else total
    return jax.jit(run).lower(*arguments, jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32)).compile()


@pytest.mark.exhaustive
@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes_first", [False, True])
def test_memory(loss, dtype, classes_first):
    kernel = FEATURES * CLASSES * 4
    for derive, budget in ((False, 0), (True, 0 if dtype == jnp.float32 else kernel)):  # in half precision, also a float32 gradient
        program = compiled(loss, dtype, classes_first, derive)
        sizes = {int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"\w\[([\d,]+)\]", program.as_text())}
        assert max(sizes) <= FEATURES * CLASSES < EXAMPLES * CLASSES
        assert program.memory_analysis().temp_size_in_bytes <= budget + EXAMPLES * (FEATURES + 32) * 4 * 8, (derive, dtype)


def test_gradients_of_half_precision_kernels_accumulate_in_float32():
    # 4,096 terms of 1/2: a sum in bfloat16 stops growing at 128
    hidden, kernel = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros((1, 3), jnp.bfloat16)
    samples = Samples(jnp.array([2]), jnp.zeros(1))
    for loss in LOSSES:
        slope = jax.grad(lambda k, loss=loss: loss(hidden, k, jnp.zeros(4096, jnp.int32), samples=samples).sum())(kernel)
        np.testing.assert_array_equal(slope.astype(jnp.float32), [[-2048, 0, 2048]])
    masters = kernel.astype(jnp.float32)
    assert jax.grad(lambda k: LOSSES[0](hidden, k, jnp.zeros(4096, jnp.int32), samples=samples).sum())(masters).dtype == jnp.float32


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}(\n|$)")


@every_loss
def test_errors(loss):
    name, h, k, y = loss.__name__, jnp.ones((2, 3)), jnp.ones((3, 9)), jnp.array([0, 1])
    samples = Samples(jnp.arange(4), jnp.zeros(4))
    for arguments, keywords, error, message in (
        (
            (h, k.T, y),
            {},
            ValueError,
            "kernel must have shape (3, classes) for hidden of shape (2, 3); got (9, 3). Use classes_first=True.",
        ),
        ((h, k, y.astype(jnp.float32)), {}, TypeError, "labels must have an integer dtype; got float32. Use labels.astype(jnp.int32)."),
        ((h, k, "y"), {}, TypeError, "labels must be an array or convertible to one; got str."),
        ((h, k, y), {"bias": jnp.ones(3)}, ValueError, "bias must have shape (9,), one per class; got (3,)."),
        (
            (h, k, y),
            {"samples": Samples(jnp.ones((3, 4), int), jnp.ones((3, 4)))},
            ValueError,
            "samples.ids must have shape (samples,) or (2, samples), the leading axes of hidden first; got (3, 4).",
        ),
        (
            (h[0], k, y[0]),
            {"samples": Samples(jnp.array(1), jnp.array(1.0))},
            ValueError,
            "samples.ids must have shape (samples,); got ().",
        ),
        (
            (h, k, y),
            {"samples": Samples(jnp.arange(4), jnp.zeros(3))},
            ValueError,
            "samples.log_expected_count must have shape (4,), the shape of samples.ids; got (3,).",
        ),
        (
            (h, k, y),
            {"samples": Samples(jnp.zeros(4), jnp.zeros(4))},
            TypeError,
            "samples.ids must have an integer dtype; got float32. Use samples.ids.astype(jnp.int32).",
        ),
    ):
        with raises(error, f"{name}: {message}"):
            loss(*arguments, **{"samples": samples, **keywords})
    if loss is LOSSES[2]:
        with raises(
            ValueError,
            f"{name}: labels must have shape (2,), the shape of hidden without its feature axis; got (2, 1). Use labels.squeeze(-1).",
        ):
            loss(h, k, y[:, None], samples=samples)
        return
    corrected = sampled.sampled_softmax_cross_entropy if loss is LOSSES[0] else sampled.noise_contrastive_estimation_loss
    with raises(ValueError, f"{name}: label_log_expected_count must have shape (2,), the shape of labels; got (3,)."):
        corrected(h, k, y, samples=samples, label_log_expected_count=jnp.zeros(3))


def test_errors_of_batches():
    name, q = "in_batch_softmax_cross_entropy", jnp.ones((4, 3))
    for arguments, keywords, error, message in (
        ((q[0], q), {}, ValueError, "queries must have shape (batch, features); got (3,). Use jax.vmap for several batches."),
        ((q, q[:2]), {}, ValueError, "candidates must have shape (4, 3), the shape of queries; got (2, 3)."),
        ((q, q), {"temperature": 0}, ValueError, "temperature must be above 0; got 0."),
        ((q, q), {"temperature": -1.0}, ValueError, "temperature must be a finite number at least 0; got -1."),
        ((q, q), {"candidate_log_prob": q[0]}, ValueError, "candidate_log_prob must have shape (4,), one per query; got (3,)."),
        (
            (q, q),
            {"candidate_ids": jnp.ones(4)},
            TypeError,
            "candidate_ids must have an integer dtype; got float32. Use candidate_ids.astype(jnp.int32).",
        ),
        (
            (q, q),
            {"where": jnp.ones((4, 1), bool)},
            ValueError,
            "where must have shape (4,), one per query; got (4, 1). Use where.squeeze(-1).",
        ),
    ):
        with raises(error, f"{name}: {message}"):
            sampled.in_batch_softmax_cross_entropy(*arguments, **keywords)
