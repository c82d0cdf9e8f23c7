"""Conditional random fields against all taggings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import xentjax
from tests.sequence import oracle
from xentjax import sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
TIME, TAGS = 4, 3
ROUNDING = 2 * (8 + TIME)  # eps: differences of scores, and two products per position
WHERE = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)


def loss_of(labels, where):
    def loss(unary, transitions, start, end):
        return xentjax.crf_loss(unary, labels, transitions, start=start, end=end, where=where)

    return loss


@jax.jit
def evaluate(scores, labels, where):
    """The losses, and the gradients of each sequence for itself: [sequences, ...] for every array of scores."""
    loss = loss_of(labels, where)
    return loss(*scores), jax.vmap(lambda one: jax.vjp(loss, *scores)[1](one))(jnp.eye(len(labels), dtype=scores[0].dtype))


def draw(rng, dtype=jnp.float32):
    """Six sequences: usual, with gaps, with one position, certain, without positions, and one on a forbidden transition."""
    unary = rng.normal(size=(6, TIME, TAGS)) * 2
    labels = np.array([[0, 1, 2, 2], [9, 1, -1, 2], [-7, 8, 0, 9], [2, 1, 0, 1], [5, 5, 5, 5], [0, 2, 1, 1]])
    unary[3, np.arange(TIME), labels[3]] += 40
    transitions = rng.normal(size=(TAGS, TAGS))
    transitions[0, 2] = -np.inf
    unary[1, 0] = unary[4, 2] = np.nan
    scores = (unary, transitions, rng.normal(size=TAGS), rng.normal(size=TAGS))
    return tuple(jnp.asarray(x, dtype) for x in scores), jnp.asarray(labels, jnp.int32), jnp.asarray(WHERE)


def exact(scores, labels, where, i):
    kept = np.asarray(where[i])
    return oracle.crf(np.asarray(scores[0][i], np.float64)[kept], np.asarray(labels[i])[kept], *map(np.asarray, scores[1:]))


def test_every_tagging(rng):
    scores, labels, where = draw(rng)
    loss, slopes = evaluate(scores, labels, where)
    for i in range(6):
        kept = np.asarray(where[i])
        if not kept.any():
            assert loss[i] == 0 and not any(x[i].any() for x in slopes)
            continue
        expected, gradients, *_ = exact(scores, labels, where, i)
        np.testing.assert_allclose(loss[i], expected, rtol=ROUNDING * EPS)
        found = [np.asarray(slopes[0][i, i][kept]), *(np.asarray(x[i]) for x in slopes[1:])]
        assert not slopes[0][i, i][~kept].any() and not np.delete(slopes[0][i], i, 0).any()
        if i == 5:
            assert loss[i] == np.inf and not any(x.any() for x in found)
            continue
        for x, formula in zip(found, gradients, strict=True):
            if i == 3:  # certain
                assert 0 < expected < 1e-12
                np.testing.assert_allclose(x, formula, rtol=1e-4)
            else:
                np.testing.assert_allclose(x, formula, atol=ROUNDING * EPS)


@pytest.mark.exhaustive
def test_derivatives_in_float64(rng, x64):
    scores, labels, where = draw(rng, jnp.float64)
    scores, labels, where = (scores[0][:4], jnp.where(scores[1] == -jnp.inf, -1.0, scores[1]), *scores[2:]), labels[:4], where[:4]
    direction = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in scores)

    def slope(*scores):
        return jax.grad(lambda *x: loss_of(labels, where)(*x).sum(), (0, 1, 2, 3))(*scores)

    @jax.jit
    def products(*scores):
        reverse = jax.grad(lambda *x: sum(jnp.vdot(a, b) for a, b in zip(slope(*x), direction, strict=True)), (0, 1, 2, 3))(*scores)
        return *jax.jvp(slope, scores, direction), reverse, jax.jvp(loss_of(labels, where), scores, direction)

    slopes, forward, reverse, (loss, tangent) = products(*scores)
    above, below = (products(*(x + s * d for x, d in zip(scores, direction, strict=True)))[0] for s in (1e-5, -1e-5))
    counted = np.asarray(where)[..., None]
    for found in (forward, reverse):
        for i, (x, a, b) in enumerate(zip(found, above, below, strict=True)):
            expected = (np.asarray(a) - np.asarray(b)) / 2e-5
            np.testing.assert_allclose(
                np.where(counted, x, 0) if i == 0 else x, np.where(counted, expected, 0) if i == 0 else expected, atol=1e-8
            )
    for i in range(4):
        np.testing.assert_allclose(loss[i], exact(scores, labels, where, i)[0], rtol=1e-12)
    dots = (
        np.vdot(np.nan_to_num(d) if i else np.where(counted, g, 0), np.where(counted, d, 0) if i == 0 else g)
        for i, (g, d) in enumerate(zip(slopes, direction, strict=True))
    )
    np.testing.assert_allclose(tangent.sum(), sum(dots), rtol=1e-11)


def test_a_path_through_an_improbable_tag(rng):
    """The only way to the labels leads through a tag whose sum is e^(−200) of the others: no number may round to 0 on the way."""
    unary = np.zeros((3, TAGS), np.float32)
    unary[0, 0] = 200
    transitions = np.array([[0, -np.inf, -np.inf], [0, 0, 0], [0, 0, 0]], np.float32)
    unary[1:, 0] = -300
    labels = np.array([1, 2, 2])
    loss, slope = jax.value_and_grad(xentjax.crf_loss)(jnp.asarray(unary), jnp.asarray(labels), jnp.asarray(transitions))
    expected, gradients, marginals, _ = oracle.crf(unary, labels, transitions)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope, gradients[0], atol=ROUNDING * EPS)
    np.testing.assert_allclose(sequence.crf_marginals(unary, transitions), marginals, atol=ROUNDING * EPS)


@pytest.mark.parametrize("keyword", ["start", "end"])
def test_a_forbidden_first_or_last_tag(keyword):
    forbidden = {keyword: jnp.array([0, -jnp.inf, 0])}
    labels = jnp.array([[1, 0, 2, 1], [0, 1, 1, 2]])  # the tags of the second sequence are possible
    loss, pull = jax.vjp(lambda u: xentjax.crf_loss(u, labels, jnp.zeros((TAGS, TAGS)), **forbidden), jnp.zeros((2, TIME, TAGS)))
    (slope,) = pull(jnp.ones(2))
    assert loss[0] == jnp.inf and not slope[0].any()
    np.testing.assert_allclose(loss[1], np.log(2 * 3**3), rtol=ROUNDING * EPS)
    assert slope[1].any()


def test_marginals_and_the_best_tagging(rng):
    scores, labels, where = draw(rng)

    @jax.jit
    def run(unary, transitions, start, end):
        keywords = {"start": start, "end": end, "where": where}
        marginals = sequence.crf_marginals(unary, transitions, **keywords)
        (tags, score), pull = jax.vjp(lambda u: sequence.crf_decode(u, transitions, **keywords), unary)
        return marginals, tags, score, pull((np.zeros(tags.shape, jax.dtypes.float0), jnp.ones_like(score)))[0]

    marginals, tags, score, slope = run(*scores)
    for i in range(6):
        kept = np.asarray(where[i])
        assert (tags[i][~kept] == -1).all() and not marginals[i][~kept].any() and not slope[i][~kept].any()
        if not kept.any():
            assert score[i] == 0
            continue
        _, _, expected, scored = exact(scores, labels, where, i)
        np.testing.assert_allclose(marginals[i][kept], expected, atol=ROUNDING * EPS)
        best = max(scored, key=lambda path: scored[path])
        assert tuple(tags[i][kept].tolist()) == best
        np.testing.assert_allclose(score[i], scored[best], rtol=ROUNDING * EPS, atol=ROUNDING * EPS)
        np.testing.assert_array_equal(slope[i][kept], np.eye(TAGS)[list(best)])
    none = jnp.full((TAGS, TAGS), -jnp.inf)
    tags, score = sequence.crf_decode(scores[0][0], none)
    assert (tags == -1).all() and score == -jnp.inf
    assert not sequence.crf_marginals(scores[0][0], none).any()


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_taggings(rng, ties):
    """More taggings than a sequence of three positions has. With whole scores, many taggings have equal scores."""
    scores, labels, where = draw(rng)
    if ties:
        scores = tuple(jnp.round(x / 2) for x in scores)
    best = 30
    tags, found, slope = _best(*scores, where, best)
    assert tags.shape == (6, best, TIME) and found.shape == (6, best)
    for i in range(6):
        kept = np.asarray(where[i])
        assert (tags[i][:, ~kept] == -1).all() and not slope[i][~kept].any()
        if not kept.any():
            np.testing.assert_array_equal(found[i], [0] + [-np.inf] * (best - 1))
            continue
        scored = {path: score for path, score in exact(scores, labels, where, i)[3].items() if score > -np.inf}
        # equal scores: by the tag of the last position, then by the tag before it, and so on
        expected = sorted(scored, key=lambda path: (-scored[path], path[::-1]))[:best]
        assert [tuple(path) for path in tags[i][: len(expected), kept].tolist()] == expected
        np.testing.assert_allclose(found[i][: len(expected)], [scored[path] for path in expected], rtol=ROUNDING * EPS, atol=ROUNDING * EPS)
        assert (np.diff(found[i][: len(expected)]) <= 0).all()
        assert (tags[i][len(expected) :] == -1).all() and (found[i][len(expected) :] == -np.inf).all()
        np.testing.assert_array_equal(slope[i][kept], np.eye(TAGS)[np.array(expected)].sum(0))
    assert len(scored) > best


@functools.partial(jax.jit, static_argnames="best")
def _best(unary, transitions, start, end, where, best):
    def decode(unary):
        tags, scores = sequence.crf_decode(unary, transitions, start=start, end=end, best=best, where=where)
        return jnp.where(jnp.isfinite(scores), scores, 0).sum(), (tags, scores)

    slope, found = jax.grad(decode, has_aux=True)(unary)
    return *found, slope


def test_bad_labels_and_nan_stay_in_their_sequence(rng):
    scores, labels, where = draw(rng)
    expected, _ = evaluate(scores, labels, where)
    unary = scores[0].at[1, 1, 0].set(jnp.nan)
    loss, slopes = evaluate((unary, *scores[1:]), labels.at[0, 2].set(TAGS).at[2, 2].set(-1), where)
    np.testing.assert_array_equal(np.isnan(loss), [True, True, True, False, False, False])
    np.testing.assert_array_equal(loss[3:], expected[3:])
    assert np.isnan(slopes[0][0, 0]).all() and not any(np.isnan(slopes[0][i, i]).any() for i in (3, 4, 5))


def test_other_forms(rng):
    unary, labels = jnp.asarray(rng.normal(size=(2, 3, TIME, TAGS)), jnp.bfloat16), jnp.asarray(rng.integers(0, TAGS, (2, 3, TIME)))
    w = jnp.asarray(rng.normal(size=(TAGS, TAGS)), jnp.float32)
    loss, one, mapped, slope = jax.jit(
        lambda u: (
            xentjax.crf_loss(u, labels, w),
            xentjax.crf_loss(u[0, 0], labels[0, 0], w),
            jax.vmap(jax.vmap(lambda u, y: xentjax.crf_loss(u, y, w)))(u, labels),
            jax.grad(lambda u: xentjax.crf_loss(u, labels, w).sum())(u),
        )
    )(unary)
    assert loss.dtype == jnp.float32 and loss.shape == (2, 3) and slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(one, loss[0, 0], rtol=4 * EPS)
    np.testing.assert_allclose(mapped, loss, rtol=4 * EPS)
    np.testing.assert_allclose(
        loss[1, 2], oracle.crf(np.asarray(unary[1, 2], np.float64), labels[1, 2].tolist(), w)[0], rtol=ROUNDING * EPS
    )
    assert xentjax.crf_loss(jnp.zeros((2, 0, TAGS)), jnp.zeros((2, 0), jnp.int32), w).tolist() == [0, 0]


def test_nothing_on_the_way_is_nan_and_export(rng):
    scores, labels, where = draw(rng)
    scores = (jnp.where(where[..., None], scores[0], 0), *scores[1:])
    jax.config.update("jax_debug_nans", True)
    try:
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(evaluate(scores, labels, where)))
    finally:
        jax.config.update("jax_debug_nans", False)
    exported = export.export(evaluate, platforms=("cpu", "cuda", "rocm", "tpu"))(scores, labels, where)
    np.testing.assert_array_equal(exported.call(scores, labels, where)[0], evaluate(scores, labels, where)[0])


def test_errors():
    u, y, w = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32), jnp.zeros((4, 4))
    for message, call in {
        r"crf_loss: labels must have shape \(2, 3\)": lambda: xentjax.crf_loss(u, y[0], w),
        r"crf_loss: transitions must have shape \(4, 4\).* got \(4,\)": lambda: xentjax.crf_loss(u, y, w[0]),
        r"crf_loss: start must have shape \(4,\)": lambda: xentjax.crf_loss(u, y, w, start=w),
        r"crf_loss: where must have shape \(2, 3\).* got \(2,\)": lambda: xentjax.crf_loss(u, y, w, where=jnp.ones(2, bool)),
        r"crf_decode: best must be at least 1; got 0": lambda: sequence.crf_decode(u, w, best=0),
        r"crf_decode: unary must have shape \[\.\.\., time, tags\]; got \(4,\)": lambda: sequence.crf_decode(u[0, 0], w),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"crf_loss: labels\[0, 1\] = 4 is outside \[0, 4\)"):
        xentjax.checked(xentjax.crf_loss)(u, y.at[0, 1].set(4), w)
    with pytest.raises(TypeError, match=r"crf_loss: transitions must have a floating dtype; got int32"):
        xentjax.crf_loss(u, y, w.astype(jnp.int32))
    with pytest.raises(TypeError, match=r"got float32 and int32\. Use crf_loss\(unary, labels, transitions\)\."):
        xentjax.crf_loss(u, w, y)
