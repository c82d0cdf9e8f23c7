"""Metrics per example and from the confusion matrix: equal to scikit-learn, with masks, weights, bad labels and nothing to divide by."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from jax.sharding import PartitionSpec as P

import xentjax
from xentjax import metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
CLASSES, EXAMPLES = 6, 60
AVERAGES = (None, "micro", "macro", "weighted")


@pytest.fixture
def problem(rng):
    """Class 4 is never true, class 5 neither true nor predicted; a third of the examples is masked and holds poison."""
    logits = rng.normal(size=(EXAMPLES, CLASSES))
    logits[:, 5] = -50
    labels = rng.integers(0, 4, EXAMPLES)
    where = rng.uniform(size=EXAMPLES) < 2 / 3
    logits[~where], labels[~where] = np.nan, -100
    return jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32), jnp.asarray(where), rng.uniform(0.1, 2, EXAMPLES)


def kept(where, *arrays):
    return tuple(np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)[np.asarray(where)] for x in arrays)


def mean(values, where=None):
    return float(xentjax.weighted_mean(values, where=where))


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def test_means_are_those_of_scikit_learn(problem):
    logits, labels, where, _ = problem
    z, y = kept(where, logits, labels)
    classes = np.arange(CLASSES)
    # a mean of hits is exact but for its division; 16 eps for exponentials, squares and sums of some 40 terms
    assert mean(metrics.accuracy(logits, labels, where=where), where) == np.float32(sklearn.metrics.accuracy_score(y, z.argmax(-1)))
    for k in range(1, CLASSES + 1):
        expected = sklearn.metrics.top_k_accuracy_score(y, z, k=k, labels=classes) if k < CLASSES else 1.0
        assert mean(metrics.top_k_accuracy(logits, labels, k=k, where=where), where) == np.float32(expected)
    brier, nll = (metrics.brier_score, metrics.negative_log_likelihood)
    expected = ((softmax(z) - np.eye(CLASSES)[y]) ** 2).sum(-1).mean()  # before version 1.7, scikit-learn takes two classes only
    np.testing.assert_allclose(mean(brier(logits, labels, where=where), where), expected, rtol=16 * EPS)
    np.testing.assert_allclose(
        mean(nll(logits, labels, where=where), where), sklearn.metrics.log_loss(y, softmax(z), labels=classes), rtol=16 * EPS
    )


def test_brier_score_of_two_classes_is_twice_that_of_scikit_learn(rng):
    z, y = rng.normal(size=20), rng.integers(0, 2, 20)
    logits = jnp.stack([jnp.zeros(20), jnp.asarray(z, jnp.float32)], -1)
    expected = sklearn.metrics.brier_score_loss(y, 1 / (1 + np.exp(-z)))
    np.testing.assert_allclose(mean(metrics.brier_score(logits, jnp.asarray(y))) / 2, expected, rtol=16 * EPS)


@pytest.mark.parametrize("margin", [1.0, 20.0, 40.0])
def test_brier_score_keeps_what_a_confident_prediction_misses(margin):
    """1 − p = 1/(1 + e^margin) twice, squared; an index and its one-hot row alike."""
    logits, exact = jnp.array([margin, 0.0]), 2 / (1 + math.exp(margin)) ** 2
    for label in (jnp.array(0), jnp.array([1.0, 0.0])):
        # (8 + margin) eps for the log-odds, twice by the square
        np.testing.assert_allclose(metrics.brier_score(logits, label), exact, rtol=2 * (8 + margin) * EPS)


def test_impossible_labels_and_rows():
    z = jnp.array([[0.0, -jnp.inf, -jnp.inf], [-jnp.inf] * 3])
    np.testing.assert_allclose(metrics.brier_score(z, jnp.array([1, 1])), [1 + 1, 1], rtol=EPS)  # p = (1, 0, 0), and no p at all
    assert not metrics.top_k_accuracy(z, jnp.array([1, 1]), k=3).any()
    assert not metrics.accuracy(z[1], jnp.array(0))
    assert not jax.grad(lambda z: metrics.brier_score(z, jnp.array([1, 1])).sum())(z).any()
    some = jnp.array([True, False, True])
    for missing in (5.0, jnp.nan):
        assert metrics.accuracy(jnp.array([-2.0, missing, -1.0]), jnp.array(2), class_mask=some) == 1
        assert metrics.accuracy(jnp.array([-2.0, missing, -1.0]), jnp.array(1), class_mask=some) == 0
    np.testing.assert_allclose(metrics.brier_score(jnp.zeros(3), jnp.array(1), class_mask=some), 1 + 2 / 4, rtol=4 * EPS)


@pytest.mark.parametrize("label", [-1, -100, 3, 200])
@pytest.mark.parametrize("function", [metrics.accuracy, lambda z, y: metrics.top_k_accuracy(z, y, k=3), metrics.brier_score])
def test_bad_labels_and_nan_logits_are_nan(function, label):
    z = jnp.array([[1.0, 0.0, 2.0]] * 3).at[2, 1].set(jnp.nan)
    np.testing.assert_array_equal(np.isnan(function(z, jnp.array([label, 2, 2]))), [True, False, True])


def test_bad_labels_of_narrow_dtypes():
    z = jnp.zeros((1, 300))
    assert np.isnan(metrics.accuracy(z, jnp.array([-1], jnp.int8))) and not np.isnan(metrics.accuracy(z, jnp.array([255], jnp.uint8)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jitted", [False, True])
def test_each_rule_for_ties_is_the_documented_one(jitted, dtype):
    """Of tied classes, `accuracy` predicts the first and `top_k_accuracy` the last; each of them is `correct`."""
    z = np.array([[1, 1, 0], [0, 3, 3], [2, 2, 2], [1, 0, 1], [0.0, -0.0, -1], [-1, 5, 2], [4, -np.inf, 4], [-np.inf] * 3])
    rows, labels = np.repeat(z, 3, 0), np.tile(np.arange(3), len(z))
    logits, y = jnp.asarray(rows, dtype), jnp.asarray(labels)
    wrap = jax.jit if jitted else lambda function: function
    top_1 = functools.partial(metrics.top_k_accuracy, k=1)
    possible = rows[np.arange(len(rows)), labels] > -np.inf
    first, last = rows.argmax(-1), 2 - rows[:, ::-1].argmax(-1)
    np.testing.assert_array_equal(wrap(metrics.accuracy)(logits, y), possible & (labels == first))
    np.testing.assert_array_equal(wrap(top_1)(logits, y), possible & (labels == last))
    tied = possible & (rows[np.arange(len(rows)), labels] == rows.max(-1))
    np.testing.assert_array_equal(wrap(xentjax.row_statistics)(logits, y).correct, tied)
    np.testing.assert_array_equal(wrap(xentjax.row_statistics)(logits, jax.nn.one_hot(y, 3)).correct, tied)
    bins = wrap(functools.partial(metrics.calibration, bins=1))(logits[:-3], y[:-3])  # a row of only −∞ is invalid
    assert int(bins.hits.sum()) == int(metrics.accuracy(logits, y).sum())
    for mask in ([False, True, True], [True, True, False]):
        exists = np.array(mask)
        hidden = np.where(exists, rows, -np.inf)
        possible = hidden[np.arange(len(rows)), labels] > -np.inf
        found = wrap(metrics.accuracy)(logits, y, class_mask=exists), wrap(top_1)(logits, y, class_mask=exists)
        np.testing.assert_array_equal(found[0], possible & (labels == hidden.argmax(-1)))
        np.testing.assert_array_equal(found[1], possible & (labels == 2 - hidden[:, ::-1].argmax(-1)))


def test_perplexity_is_of_all_tokens(rng):
    losses = jnp.asarray(rng.uniform(0, 5, 10), jnp.float32)
    parts = xentjax.weighted_sum(losses[:3]) + xentjax.weighted_sum(losses[3:])
    # eps of a mean of ten terms, times the mean by the exponential
    np.testing.assert_allclose(metrics.perplexity(parts), np.exp(np.asarray(losses, np.float64).mean()), rtol=5 * 10 * EPS)
    assert metrics.perplexity(xentjax.weighted_sum(losses[:0])) == 1
    with pytest.raises(TypeError, match=r"^perplexity: losses must be a WeightedSum; got .*\. Use xentjax.weighted_sum\(losses\)\.$"):
        metrics.perplexity(losses)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shards", [2, 8])
def test_classes_split_over_devices(shards, rng):
    mesh = jax.make_mesh((shards,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    logits, labels = jnp.asarray(rng.integers(0, 5, (20, 16)), jnp.float32), jnp.asarray(rng.integers(0, 16, 20))
    functions = (
        lambda z, y, **k: metrics.accuracy(z, y, **k),
        lambda z, y, **k: metrics.top_k_accuracy(z, y, k=4, **k),
        lambda z, y, **k: metrics.brier_score(z, y, **k),
        lambda z, y, **k: metrics.calibration(z, y, **k).expected_calibration_error(),
        lambda z, y, **k: metrics.fit_temperature(z, y, **k),
    )
    for function in functions:
        split = jax.jit(
            jax.shard_map(lambda z, y, f=function: f(z, y, axis_name="model"), mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P())
        )
        np.testing.assert_allclose(split(logits, labels), function(logits, labels), rtol=32 * EPS)


# The confusion matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_and_figures_are_those_of_scikit_learn(weighted, masked, problem):
    logits, labels, where, w = problem
    if not masked:
        logits, labels = jnp.nan_to_num(logits), jnp.where(where, labels, 2)
        where = jnp.ones_like(where)
    y, w64 = kept(where, labels, w)
    predicted = np.asarray(logits.argmax(-1))[np.asarray(where)]
    sample_weight = w64 if weighted else None
    found = metrics.confusion(
        logits.argmax(-1),
        labels,
        classes=CLASSES,
        weights=jnp.asarray(w, jnp.float32) if weighted else None,
        where=where if masked else None,
    )
    assert found.counts.dtype == (jnp.float32 if weighted else jnp.int32) and found.invalid == 0
    # sums of at most 60 weights, and a handful of divisions: 16 roundings come together at most; without weights only divisions
    rtol = 16 * EPS
    expected = sklearn.metrics.confusion_matrix(y, predicted, labels=range(CLASSES), sample_weight=sample_weight)
    np.testing.assert_allclose(found.counts, expected, rtol=rtol if weighted else 0)
    accuracy = sklearn.metrics.accuracy_score(y, predicted, sample_weight=sample_weight)
    np.testing.assert_allclose(found.accuracy(), accuracy, rtol=rtol)
    recalls = sklearn.metrics.recall_score(
        y, predicted, labels=np.unique(y), average="macro", sample_weight=sample_weight, zero_division=0.0
    )
    np.testing.assert_allclose(found.balanced_accuracy(), recalls, rtol=rtol)
    for average in AVERAGES:
        labels_of = {"labels": range(CLASSES)} if average is None else {}  # an average by scikit-learn's default: over what occurs
        for name in ("precision", "recall", "f1"):
            score = getattr(sklearn.metrics, f"{name}_score")
            expected = score(y, predicted, average=average, sample_weight=sample_weight, zero_division=0.0, **labels_of)
            np.testing.assert_allclose(getattr(found, name)(average), expected, rtol=rtol, err_msg=f"{name} {average}")


def test_balanced_accuracy_is_that_of_scikit_learn(rng):
    y, predicted = rng.integers(0, 5, 100), rng.integers(0, 5, 100)
    found = metrics.confusion(jnp.asarray(predicted), jnp.asarray(y), classes=7)
    np.testing.assert_allclose(found.balanced_accuracy(), sklearn.metrics.balanced_accuracy_score(y, predicted), rtol=4 * EPS)


def test_decisions_from_one_logit(rng):
    """One yes or no per element; a figure per class by vmap, over all elements without."""
    logits, labels = rng.normal(size=(30, 4)), rng.uniform(size=(30, 4)) < 0.4
    z, y = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    for name in ("precision", "recall", "f1"):
        score = getattr(sklearn.metrics, f"{name}_score")
        per_class = getattr(jax.vmap(lambda p, t: metrics.confusion(p, t, classes=2), in_axes=-1)(z > 0, y), name)()
        assert per_class.shape == (4, 2)
        np.testing.assert_allclose(per_class[:, 1], score(labels, logits > 0, average=None), rtol=4 * EPS)
        pooled = getattr(metrics.confusion(z > 0, y.astype(jnp.uint8), classes=2), name)()[1]
        np.testing.assert_allclose(pooled, score(labels, logits > 0, average="micro"), rtol=4 * EPS)


@pytest.mark.exhaustive
def test_nothing_to_divide_by():
    nobody = jnp.zeros(0, jnp.int32)
    for found in (
        metrics.confusion(nobody, nobody, classes=3),
        metrics.confusion(jnp.array([9]), jnp.array([-100]), classes=3, where=jnp.array([False])),
        metrics.confusion(jnp.array([9]), jnp.array([-100]), classes=3, weights=jnp.array([0.0])),
    ):
        assert not found.counts.any() and found.invalid == 0
        assert found.accuracy() == found.balanced_accuracy() == 0
        assert not any(getattr(found, name)(average).any() for name in ("precision", "recall", "f1") for average in AVERAGES)


@pytest.mark.parametrize(("predicted", "label"), [(0, -1), (0, 3), (-1, 0), (3, 1), (0, -100)])
def test_an_index_out_of_range_is_counted_apart_and_spoils_the_figures(predicted, label):
    found = metrics.confusion(jnp.array([0, predicted, 2]), jnp.array([0, label, 2]), classes=3)
    np.testing.assert_array_equal(found.counts, np.diag([1, 0, 1]))
    assert found.invalid == 1
    whole = found + metrics.confusion(jnp.array([1]), jnp.array([1]), classes=3)
    assert np.isnan(whole.accuracy()) and np.isnan(whole.f1()).all() and np.isnan(whole.recall("macro"))


def test_wide_and_narrow_integers(x64):
    big = jnp.array([2**32, 1], jnp.int64)  # which is 0 in 32 bits
    assert metrics.confusion(jnp.array([0, 1]), big, classes=3).invalid == 1
    assert metrics.confusion(jnp.array([0]), jnp.array([255], jnp.uint8), classes=256).counts[255, 0] == 1
    assert metrics.confusion(jnp.array([0]), jnp.array([0]), classes=2, weights=jnp.array([0.1], jnp.float64)).counts[0, 0] == 0.1


PREDICTIONS = "confusion: predictions must have a boolean or integer dtype; got float32. Use logits.argmax(-1), or logits > 0 for"
Z, Y = jnp.zeros((2, 3)), jnp.array([0, 1])
SHAPE = "the shape of logits without its class axis; got (2, 1). Use labels.squeeze(-1)."


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.confusion(Z, Y, classes=3), TypeError, f"{PREDICTIONS} one logit per decision."),
        (
            lambda: metrics.confusion("cat", Y, classes=3),
            TypeError,
            "confusion: predictions must be an array or convertible to one; got str.",
        ),
        (
            lambda: metrics.confusion(Y, Y[:, None], classes=3),
            ValueError,
            "confusion: labels must have shape (2,), the shape of predictions; got (2, 1). Use labels.squeeze(-1).",
        ),
        (
            lambda: metrics.confusion(Y, jnp.ones(2), classes=3),
            TypeError,
            "confusion: labels must have a boolean or integer dtype; got float32. "
            "Use labels.argmax(-1) for the most likely class of soft labels.",
        ),
        (lambda: metrics.confusion(Y, Y, classes=0), ValueError, "confusion: classes must be at least 1; got 0."),
        (
            lambda: metrics.confusion(Y, Y, classes=2, weights=jnp.ones(3)),
            ValueError,
            "confusion: weights must have shape (2,), the shape of labels; got (3,).",
        ),
        (
            lambda: metrics.confusion(Y, Y, classes=2, where=jnp.ones(2)),
            TypeError,
            "confusion: where must have dtype bool; got float32. Use where != 0.",
        ),
        (
            lambda: metrics.confusion(Y, Y, classes=2).f1("binary"),
            ValueError,
            "f1: average must be one of None, 'micro', 'macro', 'weighted'; got 'binary'.",
        ),
        (
            lambda: metrics.accuracy(Z, Z),
            TypeError,
            "accuracy: labels must have an integer dtype (class indices); got float32. "
            "Use labels.argmax(1) for the most likely class of soft labels.",
        ),
        (lambda: metrics.accuracy(Z, Y[:, None]), ValueError, f"accuracy: labels must have shape (2,), {SHAPE}"),
        (lambda: metrics.top_k_accuracy(Z, Y, k=0), ValueError, "top_k_accuracy: k must be at least 1; got 0."),
        (lambda: metrics.brier_score(Z, Y[:, None]), ValueError, f"brier_score: labels must have shape (2,), {SHAPE}"),
        (
            lambda: metrics.negative_log_likelihood(Z, Y[:, None]),
            ValueError,
            f"negative_log_likelihood: labels must have shape (2,), {SHAPE}",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
