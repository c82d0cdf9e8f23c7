"""AUROC: equal to scikit-learn with ties, weights and masks; on a grid within the bound that it states."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from tests.drawing import examples
from xentjax import metrics

EPS = float(jnp.finfo(jnp.float32).eps)
EXAMPLES = 200
# Counts are exact; a rounded ratio per positive, their sum by halves (8 levels for 200), two divisions. Weights: cumulative sums as well.
RTOL, WEIGHTED = 16 * EPS, 64 * EPS


def draw(rng, ties=False):
    labels = rng.uniform(size=EXAMPLES) < 0.3
    scores = rng.normal(size=EXAMPLES) + labels
    return np.round(scores, 0 if ties else 9).astype(np.float32), labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_exact_area_is_that_of_scikit_learn(dtype, ties, weighted, rng):
    scores, labels = draw(rng, ties)
    scores, w, where = jnp.asarray(scores, dtype), rng.uniform(0, 2, EXAMPLES).astype(np.float32), rng.uniform(size=EXAMPLES) < 0.7
    weights = w[where] if weighted else None
    expected = sklearn.metrics.roc_auc_score(labels[where], np.asarray(scores, np.float64)[where], sample_weight=weights)
    poisoned = jnp.where(where, scores, jnp.nan), jnp.where(where, labels.astype(np.int8), -100)
    found = metrics.auroc(*poisoned, weights=jnp.asarray(w) if weighted else None, where=jnp.asarray(where))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=WEIGHTED if weighted else RTOL)


def test_extremes():
    labels = jnp.array([0, 0, 1, 1])
    for scores, area in (
        ([0, 1, 2, 3], 1),
        ([3, 2, 1, 0], 0),
        ([1, 1, 1, 1], 1 / 2),
        ([-jnp.inf, 0, 0, jnp.inf], 7 / 8),
        ([-0.0, -0.0, 0.0, 0.0], 1 / 2),
        ([3e38, 0, 3e38, 3.1e38], 7 / 8),
    ):
        assert metrics.auroc(jnp.array(scores, jnp.float32), labels) == area


def test_one_figure_per_class(rng):
    scores, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    bits = np.eye(4, dtype=np.int32)[labels]
    found = jax.jit(jax.vmap(metrics.auroc, in_axes=-1))(jnp.asarray(scores), jnp.asarray(bits))
    np.testing.assert_allclose(found, sklearn.metrics.roc_auc_score(bits, scores, average=None), rtol=RTOL)
    histograms = jax.vmap(lambda s, y: metrics.ranking(s, y, low=-4.0, high=4.0, points=20_001), in_axes=-1)(
        jnp.asarray(scores), jnp.asarray(bits)
    )
    assert histograms.auroc().shape == histograms.auroc_error().shape == (4,)
    assert (np.abs(histograms.auroc() - found) <= histograms.auroc_error() + RTOL).all()


def test_double_precision(x64, rng):
    """A difference of 1e-12 ranks."""
    assert metrics.auroc(jnp.array([1.0, 1.0 + 1e-12]), jnp.array([False, True])) == 1
    scores, labels = draw(rng)
    found = metrics.auroc(jnp.asarray(scores, jnp.float64), jnp.asarray(labels))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, sklearn.metrics.roc_auc_score(labels, scores), rtol=1e-14)


@pytest.mark.parametrize("points", [2, 10, 101, 1001])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_on_the_grid_are_exact(weighted, points, rng):
    low, high = -3.0, 2.0
    labels = rng.uniform(size=EXAMPLES) < 0.5
    scores = np.linspace(low, high, points)[rng.integers(0, points, EXAMPLES)].astype(np.float32)
    w = rng.uniform(0.1, 2, EXAMPLES).astype(np.float32) if weighted else None
    found = metrics.ranking(
        jnp.asarray(scores), jnp.asarray(labels), low=low, high=high, points=points, weights=None if w is None else jnp.asarray(w)
    )
    expected = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=w)
    np.testing.assert_allclose(found.auroc(), expected, rtol=WEIGHTED if weighted else RTOL)


@examples(30)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 50]), st.floats(-2, 0.5), st.floats(0.75, 3))
def test_the_bound_holds(seed, points, low, high):
    """Scores between the points and outside the grid as well."""
    rng = np.random.default_rng(seed)
    scores, labels = draw(rng)
    found = metrics.ranking(jnp.asarray(scores), jnp.asarray(labels), low=low, high=high, points=points)
    assert found.positives.sum() + found.negatives.sum() == EXAMPLES
    assert abs(float(found.auroc()) - sklearn.metrics.roc_auc_score(labels, scores)) <= float(found.auroc_error()) + RTOL


def test_nothing_to_divide_by():
    for scores, labels, where in (
        ([], [], None),
        ([1.0, 2.0], [1, 1], None),
        ([1.0, 2.0], [0, 0], None),
        ([1.0, jnp.nan], [1, -100], [True, False]),
    ):
        arguments = jnp.array(scores, jnp.float32), jnp.array(labels, jnp.int32)
        where = None if where is None else jnp.array(where)
        assert metrics.auroc(*arguments, where=where) == 0
        found = metrics.ranking(*arguments, where=where)
        assert found.auroc() == found.auroc_error() == 0


@pytest.mark.parametrize(("score", "label"), [(jnp.nan, 1), (0.5, 2), (0.5, -1)])
def test_invalid_examples_spoil_the_figures(score, label):
    arguments = jnp.array([0.0, 1.0, score]), jnp.array([0, 1, label])
    assert np.isnan(metrics.auroc(*arguments))
    found = metrics.ranking(*arguments)
    assert found.invalid == 1 and found.positives.sum() == found.negatives.sum() == 1
    assert np.isnan(found.auroc()) and np.isnan(found.auroc_error())
    assert metrics.auroc(*arguments, weights=jnp.array([1.0, 1.0, 0.0])) == 1


S, Y = jnp.zeros(3), jnp.array([0, 1, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.auroc(Y, Y), TypeError, "auroc: scores must have a floating dtype; got int32. Use scores.astype(jnp.float32)."),
        (
            lambda: metrics.auroc(S, S),
            TypeError,
            "auroc: labels must have a boolean or integer dtype; got float32. Use labels > 0.5 for bits.",
        ),
        (
            lambda: metrics.auroc(S, Y[:, None]),
            ValueError,
            "auroc: labels must have shape (3,), the shape of scores; got (3, 1). Use labels.squeeze(-1).",
        ),
        (
            lambda: metrics.ranking(S, Y, where=jnp.ones((), bool)),
            ValueError,
            "ranking: where must have shape (3,), the shape of scores; got (). "
            "Use jnp.broadcast_to(where, (3,)) to broadcast it explicitly.",
        ),
        (lambda: metrics.ranking(S, Y, points=1), ValueError, "ranking: points must be at least 2; got 1."),
        (lambda: metrics.ranking(S, Y, low=1), ValueError, "ranking: low must be below high; got 1 and 1."),
        (lambda: metrics.ranking(S, Y, high=jnp.inf), ValueError, "ranking: high must be a finite Python number; got inf."),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
