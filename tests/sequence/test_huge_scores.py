"""Only −∞ forbids a path. Finite scores of any size give the exact loss, and derivatives that are differences of probabilities.

A new function of scores or log-probabilities needs one row in `FUNCTIONS`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.sequence import oracle
from xentjax import sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
TIME, TAGS, MOST = 3, 2, 2
SUMS = 16  # eps: a path has at most 12 terms of one sign, and each sum of two exponents is rounded
LABELS, TAGGING, DURATIONS = np.array([1, 2]), np.array([0, 1, 1]), (0, 1, 2)

# name: (function of the arrays, shapes of the arrays, the paths as lists of (array, index) and the path of the labels, or None)


def _taggings():
    for path in np.ndindex(*[TAGS] * TIME):
        steps = [(1, pair) for pair in itertools.pairwise(path)]
        yield path, [*((0, (t, k)) for t, k in enumerate(path)), *steps, (2, path[:1]), (3, path[-1:])]


def _alignments():
    for states in np.ndindex(*[MOST + 1] * TIME):  # 0 is the blank, and i is label i
        merged = [k for t, k in enumerate(states) if k and (t == 0 or states[t - 1] != k)]
        if merged == [1, 2]:
            yield states, [(0, (t,)) if k == 0 else (1, (t, k - 1)) for t, k in enumerate(states)]


def _moves(durations, at=(0, 0)):
    """All paths from a node to the end. Without durations, the blank has duration 1 and a label has duration 0."""
    t, u = at
    if t == TIME:
        if u == MOST:
            yield []
        return
    for i, d in enumerate(durations or (1,)):
        if d and t + d <= TIME:
            for rest in _moves(durations, (t + d, u)):
                if t + d < TIME or u == MOST:
                    yield [(0, (t, u)), *([(2, (t, u, i))] if durations else []), *rest]
    for i, d in enumerate(durations or (0,)):
        if u < MOST and t + d < TIME:
            for rest in _moves(durations, (t + d, u + 1)):
                yield [(1, (t, u)), *([(2, (t, u, i))] if durations else []), *rest]


def _crf(u, w, s, e):
    return xentjax.crf_loss(u, TAGGING, w, start=s, end=e)


FUNCTIONS = {
    "crf_loss": (_crf, [(TIME, TAGS), (TAGS, TAGS), (TAGS,), (TAGS,)], dict(_taggings())),
    "ctc_loss_from_log_probs": (
        lambda b, p: xentjax.ctc_loss_from_log_probs(b, p, LABELS),
        [(TIME,), (TIME, MOST)],
        dict(_alignments()),
    ),
    "transducer_loss_from_log_probs": (
        xentjax.transducer_loss_from_log_probs,
        [(TIME, MOST + 1), (TIME, MOST)],
        dict(enumerate(_moves(None))),
    ),
    "tdt_loss_from_log_probs": (
        lambda b, p, q: xentjax.tdt_loss_from_log_probs(b, p, q, durations=DURATIONS),
        [(TIME, MOST + 1), (TIME, MOST), (TIME, MOST + 1, len(DURATIONS))],
        dict(enumerate(_moves(DURATIONS))),
    ),
}


def exact(name, arrays):
    """The loss and its gradients, in 60 digits."""
    with oracle.mpmath.workdps(oracle.DIGITS):
        wide, paths = [oracle.numbers(x) for x in arrays], FUNCTIONS[name][2]
        sums = {k: sum(wide[a][i] for a, i in path) for k, path in paths.items()}
        top = max(sums.values())
        weights = {k: oracle.mpmath.exp(v - top) for k, v in sums.items()}
        total = sum(weights.values())
        gold = tuple(TAGGING) if name == "crf_loss" else None
        loss = top + oracle.mpmath.log(total) - sums[gold] if gold else -(top + oracle.mpmath.log(total))
        slopes = [np.zeros(x.shape) for x in arrays]
        for k, path in paths.items():
            for a, i in path:
                slopes[a][i] -= float(weights[k] / total) * (-1 if gold else 1)
        for a, i in paths[gold] if gold else []:
            slopes[a][i] -= 1
    return float(loss), slopes


@pytest.mark.parametrize("name", FUNCTIONS)
def test_huge_scores(name, rng):
    """All scores are huge, or one score is −3.4e38: its paths are never taken if there is another path."""
    function, shapes, _ = FUNCTIONS[name]
    run = jax.jit(jax.value_and_grad(function, range(len(shapes))))

    def draw(size):
        return [(-rng.uniform(0.1, 1, shape) * size).astype(np.float32) for shape in shapes]

    for size in (1e8, 1e20, 2.0**91, 1e30, 2e37):
        arrays = draw(size)
        loss, slopes = run(*arrays)
        expected, gradients = exact(name, arrays)
        np.testing.assert_allclose(loss, expected, rtol=SUMS * EPS, atol=SUMS * EPS * size)
        for x, gradient in zip(slopes, gradients, strict=True):
            np.testing.assert_allclose(x, gradient, atol=SUMS * EPS)
    for a, shape in enumerate(shapes):
        for index in np.ndindex(*shape):
            arrays = draw(1)
            arrays[a][index] = np.finfo(np.float32).min
            loss, slopes = run(*arrays)
            expected, gradients = exact(name, arrays)
            np.testing.assert_allclose(loss, expected, rtol=SUMS * EPS, atol=SUMS * EPS)
            if abs(expected) < 1e30:  # otherwise, the other scores are rounded to multiples of 1e31
                for x, gradient in zip(slopes, gradients, strict=True):
                    np.testing.assert_allclose(x, gradient, atol=SUMS * EPS)
            else:
                assert all(np.isfinite(x).all() and (np.abs(x) <= 2).all() for x in slopes)


@pytest.mark.parametrize("size", [1e8, 2.0**91, 1e30, 2e37])
def test_decoders_of_huge_scores(size, rng):
    shapes, paths = FUNCTIONS["crf_loss"][1:]
    arrays = [np.float32(-rng.uniform(0.1, 1, shape) * size) for shape in shapes]
    sums = {k: sum(float(arrays[a][i]) for a, i in path) for k, path in paths.items()}
    best = max(sums, key=lambda k: sums[k])
    u, w, s, e = arrays
    tags, score = sequence.crf_decode(u, w, start=s, end=e)
    assert tuple(tags.tolist()) == best
    np.testing.assert_allclose(score, sums[best], rtol=SUMS * EPS)
    np.testing.assert_allclose(sequence.crf_marginals(u, w, start=s, end=e), np.eye(TAGS)[list(best)], atol=SUMS * EPS)


OF_LOGITS = {
    "ctc": ([(TIME, 3)], xentjax.ctc_loss, oracle.ctc),
    "transducer": ([(TIME, MOST + 1, 3)], xentjax.transducer_loss, oracle.transducer),
    "tdt": (
        [(TIME, MOST + 1, 3), (TIME, MOST + 1, len(DURATIONS))],
        lambda z, v, y: xentjax.tdt_loss(z, v, y, durations=DURATIONS),
        lambda z, v, y: oracle.tdt(z, v, y, DURATIONS),
    ),
}


@pytest.mark.parametrize("name", OF_LOGITS)
def test_huge_logits(name, rng):
    shapes, function, exact = OF_LOGITS[name]
    run = jax.jit(jax.value_and_grad(lambda arrays: function(*arrays, LABELS)))
    sizes = [size * np.ones(len(shapes)) for size in (1e8, 1e20, 2.0**91, 1e30, 2e37)]
    for size in [*sizes, *([1, size[1]] for size in sizes if len(shapes) == 2)]:  # or only the logits of the durations are huge
        for _ in range(4):
            arrays = [np.float32(rng.uniform(-1, 1, shape) * s) for shape, s in zip(shapes, size, strict=True)]
            loss, slopes = run(arrays)
            expected, *gradients = exact(*arrays, LABELS.tolist())
            np.testing.assert_allclose(loss, expected, rtol=SUMS * EPS)
            if size[0] > 1 or expected < 1e3:  # otherwise, the sums round away the logits of the classes
                for x, gradient in zip(slopes, gradients, strict=False):
                    np.testing.assert_allclose(x, gradient, atol=SUMS * EPS)
