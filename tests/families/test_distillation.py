"""Divergences of teacher and student: digits of nearly equal predictions, inequalities, errors."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special
from hypothesis.extra import numpy as hnp

from tests.drawing import examples
from xentjax._losses.distillation import DIVERGENCES, distillation_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

mpmath.mp.dps = 60
EPS = float(jnp.finfo(jnp.float32).eps)
RTOL = 40 * EPS  # sums of ten terms and a few exponentials of arguments up to 10
each = pytest.mark.parametrize("kind", DIVERGENCES)


def loss(kind, **keywords):
    return functools.partial(distillation_loss, divergence=kind, **keywords)


def slopes(function, student, teacher):
    return jax.grad(lambda *z: function(*z).sum(), (0, 1))(student, teacher)


def exact(kind, student, teacher, beta):
    """The definitions with 60 digits, value and the gradients that the docstring states."""
    p, q = ([mpmath.exp(mpmath.mpf(float(z))) for z in logits] for logits in (teacher, student))
    p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))

    def relative(a, b):
        return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))

    def toward(a, b, share=1):
        return [share * x * (mpmath.log(x / y) - relative(a, b)) for x, y in zip(a, b, strict=True)]

    if kind == "forward":
        return relative(p, q), [y - x for x, y in zip(p, q, strict=True)], toward(p, q)
    if kind == "reverse":
        return relative(q, p), toward(q, p), [x - y for x, y in zip(p, q, strict=True)]
    if kind == "tv":
        signs = [mpmath.sign(y - x) for x, y in zip(p, q, strict=True)]
        q_mean, p_mean = (mpmath.fsum(s * x for s, x in zip(signs, row, strict=True)) for row in (q, p))
        student_slope = [y * (s - q_mean) / 2 for s, y in zip(signs, q, strict=True)]
        teacher_slope = [-x * (s - p_mean) / 2 for s, x in zip(signs, p, strict=True)]
        return mpmath.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2, student_slope, teacher_slope
    b = mpmath.mpf(float(beta))
    m = [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]
    return b * relative(p, m) + (1 - b) * relative(q, m), toward(q, m, 1 - b), toward(p, m, b)


@each
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2, 0.3, 1.0, 5.0, 40.0])
def test_right_relative_to_its_own_size(kind, offset, apart, rng):
    """Differences as small as the logits' own rounding; offset: students and teachers need not be normalised alike."""
    teacher = np.asarray(rng.normal(size=(6, 9)) * 3, np.float32)
    student = np.asarray(np.float32(teacher + offset) + rng.normal(size=teacher.shape) * apart, np.float32)
    student[5] = teacher[5] + np.float32(offset)
    student[5, 2] += np.float32(apart)
    value = loss(kind, beta=0.3)(student, teacher)
    found = slopes(loss(kind, beta=0.3), student, teacher)
    for row in range(6):
        expected, *gradients = exact(kind, student[row], teacher[row], np.float32(0.3))
        # p has the rounding of its surprise, up to 15 + 2·apart here
        tolerance = (20 + 2 * apart) * EPS
        size = float(expected)
        assert abs(float(value[row]) - size) <= tolerance * size, (float(value[row]), size)
        log_p, log_q = (scipy.special.log_softmax(np.float64(z)) for z in (teacher[row], student[row]))
        # slopes are p or q times differences of log-ratios; those of tv, times differences of signs
        scale = np.exp(np.maximum(log_p, log_q)) * (1 if kind == "tv" else np.abs(log_p - log_q).max())
        for slope, gradient in zip(found, gradients, strict=True):
            assert (np.abs(slope[row] - np.float64([float(x) for x in gradient])) <= tolerance * scale + 1e-37).all()


@each
@pytest.mark.parametrize("margin", [5.0, 12.0, 25.0, 60.0])
def test_a_class_with_nearly_all_of_the_probability(kind, margin):
    """Its gradient is as small as the sum of all other components, and keeps its digits."""
    student, teacher = np.float32([margin, 0.5, -1.0, 0.25]), np.float32([margin - 3, -0.5, 0.0, 1.0])
    found = loss(kind, beta=0.3)(student, teacher), *slopes(loss(kind, beta=0.3), student, teacher)
    for ours, expected in zip(found, exact(kind, student, teacher, np.float32(0.3)), strict=True):
        expected = np.float64([float(x) for x in np.atleast_1d(expected)])
        np.testing.assert_allclose(np.atleast_1d(ours), expected, rtol=(20 + 2 * margin) * EPS)


@pytest.mark.exhaustive
@each
def test_equal_predictions_cost_nothing(kind, rng):
    z = jnp.asarray(rng.normal(size=(20, 1000)) * 10, jnp.float32)
    value = loss(kind, temperature=1.7)(z, z)
    np.testing.assert_array_equal(value, np.zeros(20))
    for slope in slopes(loss(kind, temperature=1.7), z, z):
        np.testing.assert_allclose(slope, np.zeros_like(slope), rtol=0, atol=1e-12)  # q·(rounding)², and nothing of size eps


@pytest.mark.exhaustive
@each
def test_second_derivatives_at_equal_predictions(kind, rng, x64):
    """All but tv, which has a kink there, are (1/2)·c·(dz)ᵀ(diag q − q qᵀ)(dz) near 0, c = 1 or β(1 − β)."""
    if kind == "tv":
        return
    z, v = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
    q = np.asarray(jax.nn.softmax(z))
    curvature = (0.3 * 0.7 if kind == "js" else 1.0) * (q * v - q * (q @ v))
    product = jax.jvp(jax.grad(lambda s: loss(kind, beta=0.3)(s, z)), (z,), (v,))[1]
    np.testing.assert_allclose(product, curvature, rtol=1e-12, atol=1e-14)


@pytest.mark.exhaustive
@each
def test_second_derivatives_inside_a_loop(kind, rng):
    """`lax.scan` drops derivative rules in computations that a second derivative goes through."""
    student, teacher = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(2))

    def scanned(student):
        return jax.lax.scan(lambda total, z: (total + loss(kind, beta=0.3)(*z), None), 0.0, (student[None], teacher[None]))[0]

    found, expected = (jax.hessian(f)(student) for f in (scanned, lambda z: loss(kind, beta=0.3)(z, teacher)))
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=RTOL)


@examples(40)
@hypothesis.given(hnp.arrays(np.float32, (2, 5), elements=st.floats(-60, 60, width=32)), st.sampled_from([0.5, 1.0, 3.0]))
def test_inequalities(z, temperature):
    student, teacher = z
    found = {kind: float(loss(kind, temperature=temperature)(student, teacher)) for kind in DIVERGENCES}
    swapped = {kind: float(loss(kind, temperature=temperature)(teacher, student)) for kind in DIVERGENCES}
    slack = 1 + RTOL
    assert all(value >= 0 for value in found.values())
    assert found["tv"] <= slack and found["js"] <= np.log(2) * slack
    for first, second in (("tv", "tv"), ("js", "js"), ("forward", "reverse")):
        np.testing.assert_allclose(found[first], swapped[second], rtol=RTOL * 10, atol=1e-37)  # surprises up to 240
    assert 2 * found["tv"] ** 2 <= min(found["forward"], found["reverse"]) * slack + np.finfo(np.float32).tiny  # Pinsker; squares underflow
    assert found["js"] <= np.log(2) * found["tv"] * slack + 1e-37  # Lin 1991


def test_forward_is_cross_entropy_less_entropy(rng, x64):
    student, teacher = (jnp.asarray(rng.normal(size=(4, 6))) for _ in range(2))
    p = scipy.special.softmax(np.asarray(teacher), -1)
    expected = -np.sum(p * scipy.special.log_softmax(np.asarray(student), -1), -1) - scipy.special.entr(p).sum(-1)
    np.testing.assert_allclose(distillation_loss(student, teacher), expected, rtol=1e-12)


Z = jnp.zeros((2, 3))
NAME = "distillation_loss"
SHAPE = f"{NAME}: teacher_logits must have shape (2, 3), the shape of student_logits; got"


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((Z, Z.T), {}, ValueError, f"{SHAPE} (3, 2)."),
        ((Z, Z[0]), {}, ValueError, f"{SHAPE} (3,). Use jnp.broadcast_to(teacher_logits, (2, 3)) to broadcast it explicitly."),
        ((Z.astype(int), Z), {}, TypeError, f"{NAME}: student_logits must have a floating dtype; got int32. Use student_logits."),
        ((Z, Z.astype(int)), {}, TypeError, f"{NAME}: teacher_logits must have a floating dtype; got int32. Use teacher_logits."),
        ((Z, Z), {"divergence": "kl"}, ValueError, "must be one of 'forward', 'reverse', 'js', 'tv'; got 'kl'."),
        ((Z, Z), {"temperature": 0}, ValueError, f"{NAME}: temperature must be above 0; got 0."),
        ((Z, Z), {"temperature": -1.0}, ValueError, f"{NAME}: temperature must be a finite number at least 0; got -1."),
        ((Z, Z), {"beta": 1.0}, ValueError, "beta must lie strictly between 0 and 1; got 1. Use divergence='forward' or 'reverse'."),
        ((Z, Z), {"beta": 1.5}, ValueError, f"{NAME}: beta must be a finite number in [0, 1]; got 1.5."),
        ((Z, Z), {"where": jnp.ones((2, 1), bool)}, ValueError, f"{NAME}: where must have shape (2,)"),
        ((Z, Z), {"axis": 2}, ValueError, f"{NAME}: axis must be in [-2, 2)"),
    ],
    ids=str,
)
def test_errors(arguments, keywords, error, message):
    with pytest.raises(error, match=re.escape(message)):
        distillation_loss(*arguments, **keywords)
    with pytest.raises(error, match=re.escape(message)):
        jax.jit(lambda *z: distillation_loss(*z, **keywords))(*arguments)
