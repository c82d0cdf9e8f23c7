"""Derivatives in every mode and by every argument equal the closed forms; `test_second_derivatives.py` has those of second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.properties.test_values import RTOL, every_setting
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")


@every_setting()
def test_modes_agree_with_the_closed_form(case, kind, rng):
    z, labels = case.draw(rng, (4,), kind=kind)
    direction = jnp.asarray(rng.normal(size=z.shape), jnp.float32)
    value, slope = case.exact(ref.Double, z, labels)

    def loss(z):
        return case(z, labels)

    per_element = case.family == "bits"
    expected = slope * np.asarray(direction, np.float64) if per_element else (slope * np.asarray(direction, np.float64)).sum(-1)
    tolerance = {"rtol": RTOL, "atol": RTOL * (1 + float(jnp.abs(z).max()))}

    @jax.jit
    def everything(z):
        jvp, linear = jax.jvp(loss, (z,), (direction,)), jax.linearize(loss, z)[1](direction)
        pulled = jax.vjp(loss, z)[1](jnp.asarray(value, jnp.float32))[0]
        return jax.grad(lambda z: loss(z).sum())(z), *jvp, linear, jax.jacfwd(loss)(z), jax.jacrev(loss)(z), pulled

    gradient, primal, tangent, linear, forward, reverse, pulled = everything(z)
    np.testing.assert_allclose(gradient, slope, **tolerance)
    np.testing.assert_allclose(primal, value, **tolerance)
    np.testing.assert_allclose(tangent, expected, **tolerance)
    np.testing.assert_allclose(linear, expected, **tolerance)
    for jacobian in (forward, reverse):
        # examples (and bits) do not see each other: the Jacobian is the gradient on its diagonal
        matrix = np.asarray(jacobian).reshape(value.size, z.size)
        blocks = np.diag(slope.ravel()) if per_element else np.zeros((value.size, z.size))
        if not per_element:
            for i, row in enumerate(slope):
                blocks[i, i * z.shape[-1] : (i + 1) * z.shape[-1]] = row
        np.testing.assert_allclose(matrix, blocks, **tolerance)
    np.testing.assert_allclose(pulled, slope * (value if per_element else value[..., None]), rtol=RTOL, atol=30 * tolerance["atol"])


@pytest.mark.parametrize("kind", ["index", "distribution"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hessian_of_cross_entropy(kind, dtype, rng):
    case = cases.CLASSES[0]
    z, labels = case.draw(rng, (), classes=9, dtype=dtype, kind=kind)
    p = ref.softmax(ref.Double, np.asarray(z, np.float64))
    s = case.targets(ref.Double, labels, 9).sum()
    hessian = jax.hessian(lambda z: case(z, labels))(z)
    # s(diag p − ppᵀ), rounded once to the dtype of the logits
    np.testing.assert_allclose(np.asarray(hessian, np.float64), s * (np.diag(p) - np.outer(p, p)), atol=float(jnp.finfo(dtype).eps))


def test_third_derivative_of_cross_entropy(rng, x64):
    z = jnp.asarray(rng.normal(size=4))
    third = jax.jacfwd(jax.hessian(lambda z: xentjax.softmax_cross_entropy(z, jnp.int32(2))))(z)
    p = ref.softmax(ref.Double, np.asarray(z))
    eye = np.eye(4)
    # the third cumulant of a categorical variable
    expected = (
        np.einsum("i,ij,ik->ijk", p, eye, eye)
        - np.einsum("ij,i,k->ijk", eye, p, p)
        - np.einsum("ik,i,j->ijk", eye, p, p)
        - np.einsum("jk,j,i->ijk", eye, p, p)
        + 2 * np.einsum("i,j,k->ijk", p, p, p)
    )
    np.testing.assert_allclose(third, expected, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in cases.CROSS_ENTROPY if "z_loss" not in c.formula and "gamma" not in c.formula], ids=str)
def test_derivative_with_respect_to_distributions(case, rng, x64):
    z, labels = case.draw(rng, (4,), dtype=jnp.float64, kind="distribution")
    labels = labels.at[:, 0].set(0.0)  # at a probability of 0 too
    log_p = np.asarray(z) - ref.log_sum_exp(ref.Double, np.asarray(z))
    p = np.exp(log_p)
    per_class = -log_p if "focal" not in case.name else -((1 - p) ** 2) * log_p
    sign = -1 if case.name == "softmax_log_prob" else 1
    w = np.asarray(case.target.get("class_weights", np.ones(7)))
    expected = sign * w * (1 - case.target.get("label_smoothing", 0.0)) * per_class
    result = jax.grad(lambda t: case(z, t).sum())(labels)
    assert result.dtype == labels.dtype
    np.testing.assert_allclose(result, expected, rtol=1e-6)  # float32 labels
    mixed = jax.jacfwd(jax.grad(lambda z: case(z, labels).sum()))  # ∂²/∂z∂labels exists as well
    assert np.isfinite(np.asarray(mixed(z))).all()


def test_derivative_with_respect_to_top_k_probabilities(rng):
    (case,) = cases.TOP_K
    z, (ids, probs) = case.draw(rng, (4,))
    log_p = np.asarray(z, np.float64) - ref.log_sum_exp(ref.Double, np.asarray(z, np.float64))
    result = jax.grad(lambda q: case(z, (ids, q)).sum())(probs)
    np.testing.assert_allclose(result, -np.take_along_axis(log_p, np.asarray(ids), -1), rtol=RTOL)


@pytest.mark.parametrize(
    ("function", "keyword", "at"),
    [
        (xentjax.softmax_cross_entropy, "label_smoothing", 0.2),
        (xentjax.softmax_cross_entropy, "z_loss", 0.1),
        (xentjax.softmax_focal_loss, "gamma", 1.5),
        (xentjax.softmax_focal_loss, "label_smoothing", 0.1),
        (xentjax.sigmoid_cross_entropy, "label_smoothing", 0.1),
        (xentjax.sigmoid_cross_entropy, "pos_weight", 2.0),
        (xentjax.sigmoid_focal_loss, "gamma", 0.7),
        (xentjax.sigmoid_focal_loss, "alpha", 0.3),
        (xentjax.asymmetric_loss, "gamma_negative", 2.0),
        (xentjax.asymmetric_loss, "gamma_positive", 0.5),
        (xentjax.asymmetric_loss, "clip", 0.1),
    ],
)
def test_derivative_with_respect_to_hyper_parameters(function, keyword, at, rng, x64):
    case = next(c for c in cases.LOSSES if c.function is function)
    z, labels = case.draw(rng, (6,), dtype=jnp.float64)
    target = {"label_smoothing"} & {keyword}

    def formula(x):
        given = {keyword: x}
        options = {} if target else given
        t = (ref.bits if case.family == "bits" else lambda m, y, **k: ref.targets(m, y, 7, **k))(
            ref.Double, labels, **(given if target else {})
        )
        return case.value(ref.Double, np.asarray(z), t, **options).sum()

    numeric = (formula(at + 1e-6) - formula(at - 1e-6)) / 2e-6
    result = jax.grad(lambda x: function(z, labels, **{keyword: x}).sum())(jnp.asarray(at))
    np.testing.assert_allclose(result, numeric, rtol=1e-7, atol=1e-8)


def test_derivative_with_respect_to_class_weights(rng):
    z = jnp.asarray(rng.normal(size=(20, 7)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 7, 20), jnp.int32)
    result = jax.grad(lambda w: xentjax.softmax_cross_entropy(z, y, class_weights=w).sum())(jnp.ones(7))
    per_example = ref.cross_entropy(ref.Double, np.asarray(z, np.float64), np.eye(7)[np.asarray(y)])
    np.testing.assert_allclose(result, [per_example[np.asarray(y) == k].sum() for k in range(7)], rtol=RTOL, atol=1e-7)


@pytest.mark.exhaustive
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("traced", [False, True])
def test_focal_losses_are_finite_at_saturated_logits(gamma, traced):
    gamma = jnp.asarray(gamma) if traced else gamma

    def bit(x):
        return xentjax.sigmoid_focal_loss(x, jnp.int32(1), gamma=gamma)

    def row(x, label):
        return xentjax.softmax_focal_loss(jnp.stack([x, jnp.zeros_like(x)]), label, gamma=gamma)

    @jax.jit
    def derivatives(x):
        found = []
        for loss in (bit, lambda x: row(x, jnp.int32(0)), lambda x: row(x, jnp.array([0.75, 0.25]))):
            for _ in range(3):
                loss = jax.grad(loss)
                found.append(loss(x))
        return jnp.stack(found)

    for z in (0.0, 15.0, -15.0, 40.0, -40.0, 90.0, -90.0, 1e4, -1e4):
        assert np.isfinite(derivatives(jnp.asarray(z, jnp.float32))).all(), (z, gamma)
