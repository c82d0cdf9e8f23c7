"""What the families promise beyond the properties of the table: limits, bounds, parameters' derivatives, extremes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.properties.test_values import RTOL
from tests.tables import cases
from tests.tables import reference as ref
from tests.tables import reference_families as families
from xentjax._losses import tempered

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
COUNTS = jnp.asarray(cases.counts(7), jnp.float32)
IDENTITY = jnp.eye(7)
cross_entropy = xentjax.softmax_cross_entropy


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, z, y):
    value, pull = jax.vjp(lambda z: loss(z, y), z)
    return value, pull(jnp.ones_like(value))[0]


SPARSE = ("sparsemax_loss", "entmax_loss")  # they also subtract the entropy of the distribution, and 0 for a class


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [c for c in cases.FAMILIES if c.name not in SPARSE], ids=str)
def test_a_distribution_costs_the_mean_over_its_labels(case, rng, x64):
    z, labels = case.draw(rng, (4,), dtype=jnp.float64, kind="distribution")
    each = np.stack([case.exact(ref.Double, z, np.full(4, k))[0] for k in range(7)], -1)
    value, slope = jax.jit(jax.value_and_grad(lambda t: case(z, t).sum()))(labels.at[:, 0].set(0.0))
    np.testing.assert_allclose(slope, each, rtol=1e-6, atol=1e-6)  # float32 labels
    np.testing.assert_allclose(value, (np.asarray(labels)[:, 1:] * each[:, 1:]).sum(), rtol=1e-6)


LIMITS = {
    "generalized": (functools.partial(xentjax.generalized_cross_entropy, q=0.0), 1.0),
    "symmetric": (functools.partial(xentjax.symmetric_cross_entropy, alpha=1.0, beta=0.0), 1.0),
    "symmetric, log_zero": (functools.partial(xentjax.symmetric_cross_entropy, alpha=1.0, log_zero=0.0), 1.0),
    "bootstrapped": (functools.partial(xentjax.bootstrapped_cross_entropy, beta=1.0), 1.0),
    "bootstrapped, hard": (functools.partial(xentjax.bootstrapped_cross_entropy, beta=1.0, hard=True), 1.0),
    "taylor": (functools.partial(xentjax.taylor_cross_entropy, order=200), 0.1),
    "poly": (functools.partial(xentjax.poly_cross_entropy, epsilon=0.0), 1.0),
    "penalty": (functools.partial(xentjax.confidence_penalized_cross_entropy, beta=0.0), 1.0),
    "bi-tempered": (functools.partial(xentjax.bi_tempered_cross_entropy, t1=1.0, t2=1.0), 1.0),
    "forward": (functools.partial(xentjax.forward_corrected_cross_entropy, noise_matrix=IDENTITY), 1.0),
    "backward": (functools.partial(xentjax.backward_corrected_cross_entropy, noise_matrix=IDENTITY), 1.0),
    "logit-adjusted": (functools.partial(xentjax.logit_adjusted_cross_entropy, class_log_prior=jnp.log(COUNTS), tau=0.0), 1.0),
    "logit-adjusted, even": (functools.partial(xentjax.logit_adjusted_cross_entropy, class_log_prior=jnp.full(7, -2.0)), 1.0),
    "ldam": (functools.partial(xentjax.ldam_loss, class_counts=COUNTS, max_margin=0.0, scale=1.0), 1.0),
    "seesaw": (functools.partial(xentjax.seesaw_loss, class_counts=COUNTS, p=0.0, q=0.0), 1.0),
    "margin": (functools.partial(xentjax.margin_cross_entropy, scale=1.0, m2=0.0), 0.2),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("loss", "scale"), LIMITS.values(), ids=LIMITS)
def test_each_ends_in_cross_entropy(loss, scale, rng):
    z = jnp.clip(jnp.asarray(rng.normal(size=(30, 7)) * scale, jnp.float32), -3, 3) * (0.3 if scale < 1 else 1)
    y = jnp.asarray(rng.integers(0, 7, 30), jnp.int32)
    (value, slope), (expected, expected_slope) = (value_and_gradient(f, z, y) for f in (loss, cross_entropy))
    np.testing.assert_allclose(value, expected, rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(slope, expected_slope, rtol=RTOL, atol=4 * RTOL)


def test_generalized_cross_entropy_at_q_1_is_the_mean_absolute_error(rng):
    z, y = cases.FAMILIES[0].draw(rng)
    p = ref.softmax(ref.Double, np.asarray(z, np.float64))
    expected = np.abs(np.eye(7)[np.asarray(y)] - p).sum(-1) / 2
    np.testing.assert_allclose(xentjax.generalized_cross_entropy(z, y, q=1.0), expected, rtol=RTOL)


def test_balanced_softmax_is_tau_1(rng):
    z, y = cases.FAMILIES[0].draw(rng)
    n = np.asarray(COUNTS, np.float64)
    weighed = n * np.exp(np.asarray(z, np.float64))
    expected = -np.log(np.take_along_axis(weighed, np.asarray(y)[:, None], -1)[:, 0] / weighed.sum(-1))
    np.testing.assert_allclose(xentjax.logit_adjusted_cross_entropy(z, y, class_log_prior=jnp.log(COUNTS)), expected, rtol=RTOL)


def test_the_backward_correction_is_unbiased_and_the_forward_one_finds_the_posterior(rng):
    noise = jnp.asarray(rng.dirichlet(np.ones(7), 7) * 0.4 + 0.6 * np.eye(7), jnp.float32)
    z = jnp.asarray(rng.normal(size=7), jnp.float32)
    rows = jnp.broadcast_to(z, (7, 7))
    observed = xentjax.backward_corrected_cross_entropy(rows, jnp.arange(7), noise_matrix=noise)
    np.testing.assert_allclose(np.asarray(noise, np.float64) @ observed, cross_entropy(rows, jnp.arange(7)), rtol=1e-4)  # of an inverse
    # the best prediction under the forward loss is the true distribution
    truth = jnp.asarray(rng.dirichlet(np.ones(7)), jnp.float32)
    seen = truth @ noise
    slope = jax.grad(lambda z: xentjax.forward_corrected_cross_entropy(z, seen, noise_matrix=noise))(jnp.log(truth))
    np.testing.assert_allclose(slope, np.zeros(7), atol=1e-6)


def test_the_forward_correction_keeps_confident_losses():
    z = jnp.array([[50.0, 0.0, 0.0]])
    loss = xentjax.forward_corrected_cross_entropy(z, jnp.array([0]), noise_matrix=jnp.eye(3))
    np.testing.assert_allclose(loss, np.log1p(2 * np.exp(-50.0)), rtol=58 * EPS)
    lost = jnp.array([[1e4, 0.0, 0.0]])  # nothing underflows on the losing side either
    np.testing.assert_allclose(xentjax.forward_corrected_cross_entropy(lost, jnp.array([1]), noise_matrix=jnp.eye(3)), 1e4, rtol=EPS)


NEEDED = {
    "logit_adjusted_cross_entropy": {"class_log_prior": jnp.log(COUNTS)},
    "ldam_loss": {"class_counts": COUNTS},
    "seesaw_loss": {"class_counts": COUNTS},
    "forward_corrected_cross_entropy": {"noise_matrix": jnp.asarray(cases.noise(7), jnp.float32)},
    "backward_corrected_cross_entropy": {"noise_matrix": jnp.asarray(cases.noise(7), jnp.float32)},
}


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.exhaustive)])
def test_bi_tempered_probabilities_sum_to_one(dtype, x64):
    """At any t2, for a few equal largest classes and very many classes up to 1,200 below them: these rows need the most steps."""
    classes, rows = 110_001, []
    for largest, near, gap in itertools.product((1, 5), (10, 10_000), (12.0, 40.0, 300.0)):
        row = np.full(classes, -4 * gap)
        row[: largest + near] = -gap
        row[:largest] = 0
        rows.append(row)
    z = jnp.asarray(np.asarray(rows), dtype)
    surprises = jax.jit(lambda heavy: tempered._surprises(z, jnp.full(len(z), heavy), None, None, None))
    for t2 in (1.0, 1.001, 1.35, 4.0):
        u = surprises(jnp.asarray(t2, dtype) - 1)
        # the rounding of λ moves every probability by a factor of 1 + eps·λ/(1 + (t2 − 1)λ), and λ is below 1,300
        np.testing.assert_allclose(jnp.exp(-u).sum(-1), 1, rtol=64 * float(jnp.finfo(dtype).eps))


PARAMETERS = [
    ("generalized_cross_entropy", "generalized", "q", 0.7),
    ("generalized_cross_entropy", "generalized", "q", 1e-3),
    ("symmetric_cross_entropy", "symmetric", "alpha", 0.1),
    ("symmetric_cross_entropy", "symmetric", "beta", 1.0),
    ("symmetric_cross_entropy", "symmetric", "log_zero", -4.0),
    ("bootstrapped_cross_entropy", "bootstrapped", "beta", 0.9),
    ("poly_cross_entropy", "poly", "epsilon", 1.0),
    ("confidence_penalized_cross_entropy", "penalty", "beta", 0.1),
    ("bi_tempered_cross_entropy", "bi_tempered", "t1", 0.8),
    ("bi_tempered_cross_entropy", "bi_tempered", "t2", 1.2),
    ("bi_tempered_cross_entropy", "bi_tempered", "t2", 1.001),
    ("logit_adjusted_cross_entropy", "logit_adjusted", "tau", 1.0),
    ("ldam_loss", "ldam", "max_margin", 0.5),
    ("ldam_loss", "ldam", "scale", 3.0),
    ("seesaw_loss", "seesaw", "p", 0.8),
    ("seesaw_loss", "seesaw", "q", 2.0),
    ("margin_cross_entropy", "margin", "scale", 4.0),
    ("margin_cross_entropy", "margin", "m1", 1.1),
    ("margin_cross_entropy", "margin", "m2", 0.5),
    ("margin_cross_entropy", "margin", "m3", 0.2),
]


@pytest.mark.parametrize(("name", "formula", "keyword", "at"), PARAMETERS)
def test_derivative_with_respect_to_parameters(name, formula, keyword, at, rng, x64):
    function, needed = getattr(xentjax, name), {k: v.astype(jnp.float64) for k, v in NEEDED.get(name, {}).items()}
    z = 0.9 * jnp.tanh(jnp.asarray(rng.normal(size=(6, 7))))
    y = jnp.asarray(rng.integers(0, 7, 6), jnp.int32)

    def exact(x):
        given = {k: np.asarray(v) for k, v in needed.items()} | {keyword: x}
        return getattr(families, formula)(ref.Double, np.asarray(z), np.eye(7)[np.asarray(y)], **given).sum()

    step = 1e-5
    numeric = (exact(at + step) - exact(at - step)) / (2 * step)
    result = jax.jit(jax.grad(lambda x: function(z, y, **needed, **{keyword: x}).sum()))(jnp.asarray(at))
    np.testing.assert_allclose(result, numeric, rtol=1e-6, atol=1e-6)  # differences of step 1e-5


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "keyword", "values"),
    [
        ("generalized_cross_entropy", "q", [0.0, 0.5, 1.0]),
        ("symmetric_cross_entropy", "beta", [0.0, 1.0]),
        ("poly_cross_entropy", "epsilon", [-1.0, 0.0, 2.0]),
        ("bi_tempered_cross_entropy", "t1", [0.0, 0.5, 1.0]),
        ("bi_tempered_cross_entropy", "t2", [1.0, 1.3, 2.0]),
        ("logit_adjusted_cross_entropy", "tau", [0.0, 1.0]),
        ("ldam_loss", "scale", [1.0, 30.0]),
        ("seesaw_loss", "p", [0.0, 0.8]),
        ("margin_cross_entropy", "m2", [0.0, 0.5]),
    ],
)
def test_traced_parameters_equal_python_numbers(name, keyword, values, rng):
    function, needed = getattr(xentjax, name), NEEDED.get(name, {})
    z, y = cases.FAMILIES[-1].draw(rng)

    def of_parameter(x):
        return jax.value_and_grad(lambda z: function(z, y, **needed, **{keyword: x}).sum())(z)

    together, slopes = jax.jit(jax.vmap(of_parameter))(jnp.asarray(values))
    assert np.isfinite(slopes).all()
    for x, result in zip(values, together, strict=True):
        np.testing.assert_allclose(result, function(z, y, **needed, **{keyword: x}).sum(), rtol=RTOL)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["ldam_loss", "margin_cross_entropy"])
def test_a_row_without_any_class_has_no_gradient_at_a_small_scale(name, dtype):
    """A scale of 0.1 makes a finite number of a tenth of the number that represents ∞."""
    loss, slope = jax.value_and_grad(lambda z: getattr(xentjax, name)(z, 0, scale=0.1, **NEEDED.get(name, {})))(
        jnp.full(7, -jnp.inf, dtype)
    )
    assert loss == np.inf and not slope.any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tau", [1.0, 0.3, 0.0])
def test_a_prior_of_0_removes_a_class(tau, dtype):
    """At τ = 0, the prior has no effect, since 0·log 0 counts as 0."""
    prior, z = jnp.log(jnp.array([0.0, 0.0, 1.0])), jnp.array([1.0, 2.0, -jnp.inf], dtype)
    loss, slope = jax.value_and_grad(lambda z: xentjax.logit_adjusted_cross_entropy(z, 2, class_log_prior=prior, tau=tau))(z)
    p = np.exp([1, 2]) / np.exp([1, 2]).sum()
    assert loss == np.inf  # the only class that is left is impossible
    np.testing.assert_allclose(np.float32(slope), [0, 0, 0] if tau else [*p, -1], atol=float(jnp.finfo(dtype).eps))


@pytest.mark.exhaustive
@pytest.mark.parametrize("hide", ["logit", "mask"])
def test_impossible_labels_cost_infinity_or_the_bound(hide):
    z = jnp.array([-jnp.inf, 1.0, 0.5, 0.0, -1.0, 0.0, 0.2]) if hide == "logit" else jnp.array([3.0, 1.0, 0.5, 0.0, -1.0, 0.0, 0.2])
    mask = None if hide == "logit" else jnp.arange(7) > 0
    bounds = {"generalized_cross_entropy": 1 / 0.7, "taylor_cross_entropy": 1.5, "bi_tempered_cross_entropy": None}
    done = set()
    for case in cases.FAMILIES:
        if case.formula or case.name in ("forward_corrected_cross_entropy", "backward_corrected_cross_entropy"):
            continue
        loss, slope = jax.jit(jax.value_and_grad(lambda z, case=case: case(z, jnp.array(0), class_mask=mask)))(z)
        assert np.isfinite(slope).all(), case
        if bounds.get(case.name):
            np.testing.assert_allclose(loss, bounds[case.name], rtol=4 * EPS)
        elif case.name == "bi_tempered_cross_entropy":
            assert 3 < loss <= 1 / (1 - 0.8)
        elif case.name == "normalized_cross_entropy":
            assert loss == (1.0 if hide == "logit" else np.inf)
        else:
            assert loss == np.inf, case
        done.add(case.name)
    assert len(done) == 14


@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 2**-22])
@pytest.mark.parametrize("m2", [0.0, 0.5])
def test_margins_at_the_ends_of_the_cosine(cosine, m2):
    def loss(c):
        return xentjax.margin_cross_entropy(jnp.stack([c, jnp.float32(0.1)]), jnp.array(0), scale=4.0, m2=m2)

    c = jnp.float32(cosine)
    angle = 0.0 if cosine > 0 else np.pi
    np.testing.assert_allclose(loss(c), np.log1p(np.exp(4 * (0.1 - np.cos(angle + m2)))), rtol=1e-6)
    derivatives = jax.jit(
        lambda c: jnp.stack([jax.grad(loss)(c), jax.grad(jax.grad(loss))(c), jax.jvp(loss, (c,), (jnp.ones_like(c),))[1]])
    )(c)
    assert np.isfinite(derivatives).all()
    if m2 == 0 and cosine <= 1:  # sin θ/sin θ; at 0/0 the rule's floor keeps 0, the neighbours keep 1
        near = jax.grad(loss)(jnp.float32(np.sign(cosine) * (1 - 1e-4)))
        np.testing.assert_allclose(near, -4 / (1 + np.exp(4 * (np.sign(cosine) * (1 - 1e-4) - 0.1))), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("m1", [1.0, 1.5])
def test_margins_bound_the_sine_by_the_dtype_of_the_cosines(dtype, m1):
    # c = 1 and the last three numbers before it, with the formula's derivative where sin² θ is no less than eps
    eps = float(jnp.finfo(dtype).eps)
    c = np.array([1.0, 1 - eps / 2, 1 - eps, 1 - 3 * eps / 2])
    other, scale, m2 = 0.5, 8.0, 0.5
    slope = jax.grad(
        lambda c: xentjax.margin_cross_entropy(
            jnp.stack([c, jnp.full_like(c, other)], -1), jnp.zeros(4, jnp.int32), scale=scale, m1=m1, m2=m2
        ).sum()
    )(jnp.asarray(c, dtype))
    angle = m1 * np.arccos(c) + m2
    missing = 1 / (1 + np.exp(scale * (np.cos(angle) - other)))
    sine = np.sqrt(np.maximum((1 - c) * (1 + c), eps))
    # sin(θ + m2)/sin θ is cos m2 + sin m2·cos θ/sin θ
    turn = np.cos(m2) + np.sin(m2) * c / sine if m1 == 1 else m1 * np.sin(angle) / sine
    exact = -scale * missing * turn
    # one rounding to the dtype; in float32 an angle near 0 has an error of some eps/θ, and eps/θ ≤ √eps
    np.testing.assert_allclose(np.asarray(slope, np.float64), exact, rtol=max(eps, 4 * EPS**0.5))


@pytest.mark.exhaustive
def test_margins_compose_with_a_fused_layer(rng):
    hidden, kernel = rng.normal(size=(50, 8)), rng.normal(size=(8, 33))
    hidden, kernel = (jnp.asarray(x / np.linalg.norm(x, axis=a, keepdims=True), jnp.float32) for x, a in ((hidden, 1), (kernel, 0)))
    y = jnp.asarray(rng.integers(0, 33, 50), jnp.int32)
    fused = xentjax.fuse_linear(xentjax.margin_cross_entropy, chunk_size=16)

    def whole(h, k):
        return xentjax.margin_cross_entropy(jnp.dot(h, k, precision="highest"), y).mean()

    got, expected = (jax.value_and_grad(f, (0, 1))(hidden, kernel) for f in (lambda h, k: fused(h, k, y), whole))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=2e-5 * np.abs(e).max())


def test_largest_classes_that_tie_share_the_bootstrap():
    # by hand: p = (1/2, 1/2), the label's term is 0.8·(p − (1, 0)), and that of the two largest classes p − (1/2, 1/2) = 0
    slope = jax.grad(lambda z: xentjax.bootstrapped_cross_entropy(z, jnp.array(0), beta=0.8, hard=True))(jnp.zeros(2))
    np.testing.assert_allclose(slope, [-0.4, 0.4], rtol=1e-6)


OF_ENTROPY = [
    c for c in cases.FAMILIES if c.name in ("bootstrapped_cross_entropy", "confidence_penalized_cross_entropy", "normalized_cross_entropy")
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", OF_ENTROPY, ids=str)
def test_second_derivatives_of_a_square(case, rng, x64):
    # A rule whose value is a constant has the right first and second derivatives, and loses the product of two first ones.
    z, y = case.draw(rng, (3,), dtype=jnp.float64)
    v = jnp.asarray(rng.normal(size=z.shape))

    def slope(z):
        value, gradient = case.exact(ref.Double, z, y)
        return 2 * value[:, None] * gradient

    numeric = (slope(z + 1e-5 * v) - slope(z - 1e-5 * v)) / 2e-5

    @jax.jit
    def products(z):
        def square(z):
            return (case(z, y) ** 2).sum()

        forward = jax.jvp(lambda z: jax.jvp(lambda z: case(z, y) ** 2, (z,), (v,))[1], (z,), (v,))[1]
        return jax.jvp(jax.grad(square), (z,), (v,))[1], jax.grad(lambda z: jnp.vdot(jax.grad(square)(z), v))(z), forward

    over_reverse, reverse, forward = products(z)
    for product in (over_reverse, reverse):
        np.testing.assert_allclose(product, numeric, rtol=1e-7, atol=1e-6)  # differences of step 1e-5
    np.testing.assert_allclose(forward, (numeric * v).sum(-1), rtol=1e-7, atol=1e-6)


# Bi-tempered: the root -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t2", [1.0, 1.05, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_tempered_root_is_found_at_any_spread(t2, classes, rng, x64):
    for spread in (1e-3, 1.0, 30.0, 1e3, 1e6):
        z = np.stack([rng.normal(size=classes), np.arange(classes) == 0, np.arange(classes) < 2, -np.arange(classes)]) * spread
        y = np.argmax(z, -1)
        exact = families.bi_tempered(ref.Double, z, np.eye(classes)[y], t1=0.5, t2=t2)
        loss = xentjax.bi_tempered_cross_entropy(jnp.asarray(z), jnp.asarray(y), t1=0.5, t2=t2)
        np.testing.assert_allclose(loss, exact, rtol=1e-9, atol=1e-12, err_msg=str(spread))  # bisection cancels where the loss is tiny


def test_confident_bi_tempered_losses_are_relatively_right(rng):
    z = np.zeros((5, 10))
    z[:, 0] = [1, 5, 20, 50, 80]
    value = families.bi_tempered(ref.Exact, ref.Exact.array(z), ref.Exact.array(np.eye(10)[[0] * 5]))
    loss = xentjax.bi_tempered_cross_entropy(jnp.asarray(z, jnp.float32), jnp.zeros(5, jnp.int32))
    np.testing.assert_allclose(np.asarray(loss, np.float64), value.astype(float), rtol=100 * EPS)


def test_two_equal_classes_are_no_most_likely_class():
    """Rounding may bring both probabilities above 1/2. Still, neither class holds most of the probability."""
    t2 = jnp.linspace(1, 4, 2000)
    loss = jax.jit(jax.vmap(lambda t2: xentjax.bi_tempered_cross_entropy(jnp.zeros(2), jnp.full(2, 0.5), t2=t2)))(t2)
    np.testing.assert_allclose(loss, (1 - 0.5**0.2) / 0.2 - (1 - 2 * 0.5**1.2) / 1.2, rtol=32 * EPS)  # 4·(8 + margin) for a margin of 0


@pytest.mark.exhaustive
def test_third_derivatives_of_bi_tempered(rng, x64):
    z, v = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))

    def along(t):
        return xentjax.bi_tempered_cross_entropy(z + t * v, jnp.array(2), t1=0.4, t2=1.6)

    def exact(t):
        return families.bi_tempered_gradient(ref.Exact, ref.Exact.array(z + t * v), ref.Exact.array(np.eye(5)[2]), 0.4, 1.6) @ np.asarray(v)

    step = 1e-4
    third = (exact(step) - 2 * exact(0.0) + exact(-step)) / step**2
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(jax.grad(along))))(0.0), float(third), rtol=1e-6)  # step²·fifth derivative


# Weights -------------------------------------------------------------------------------------------------------------------


def test_inverse_frequency_weights_are_scikit_learn_s():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat(np.arange(4), [900, 90, 9, 1])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(xentjax.inverse_frequency_weights(jnp.bincount(labels)), expected, rtol=4 * EPS)
    np.testing.assert_array_equal(xentjax.inverse_frequency_weights(jnp.array([2, 0, 2])), [1, 0, 1])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.99999])
def test_class_balanced_weights_are_by_effective_number(beta):
    n = np.array([5000.0, 500, 50, 5])
    beta = float(np.float32(beta))  # as the function gets it
    effective = (1 - beta**n) / (1 - beta)
    expected = 4 / effective / (1 / effective).sum()
    np.testing.assert_allclose(xentjax.class_balanced_weights(jnp.asarray(n, jnp.float32), beta), expected, rtol=20 * EPS)
    np.testing.assert_allclose(xentjax.class_balanced_weights(jnp.asarray(n, jnp.float32), beta).sum(), 4, rtol=4 * EPS)
    assert xentjax.class_balanced_weights(jnp.array([3, 0]), beta)[1] == 0
    slope = jax.grad(lambda b: xentjax.class_balanced_weights(jnp.array([3, 30]), b)[0])(jnp.float32(beta))
    assert np.isfinite(slope)


@pytest.mark.parametrize("loss", [xentjax.ldam_loss, xentjax.seesaw_loss])
def test_counts_are_not_differentiated(loss):
    z, y, counts = jnp.array([[0.9, -0.3, 0.1]]), jnp.array([0]), jnp.array([50.0, 5.0, 20.0])
    assert not jax.grad(lambda n: loss(z, y, class_counts=n).sum())(counts).any()


def test_class_balanced_weights_at_the_limit_are_by_inverse_frequency():
    n = np.array([1000.0, 10])
    expected = 2 / n / (1 / n).sum()
    weights = xentjax.class_balanced_weights(jnp.array([1000, 10, 0]), 1.0)
    np.testing.assert_allclose(weights, [*expected, 0], rtol=4 * EPS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda z, y: xentjax.ldam_loss(z, y, class_counts=jnp.ones(6)),
            "ldam_loss: class_counts must have shape (7,), one per class; got (6,).",
        ),
        (
            lambda z, y: xentjax.forward_corrected_cross_entropy(z, y, noise_matrix=jnp.eye(6)),
            "forward_corrected_cross_entropy: noise_matrix must have shape (7, 7), one row per true class, one column per label; "
            "got (6, 6).",
        ),
        (
            lambda z, y: xentjax.logit_adjusted_cross_entropy(z, y, class_log_prior=jnp.ones((1, 7))),
            "logit_adjusted_cross_entropy: class_log_prior must have shape (7,), one per class; got (1, 7).",
        ),
        (
            lambda z, y: xentjax.margin_cross_entropy(z, y[:2]),
            "margin_cross_entropy: labels must have shape (5,), the shape of cosines without its class axis; got (2,).",
        ),
        (
            lambda z, y: xentjax.generalized_cross_entropy(z, y, q=1.5),
            "generalized_cross_entropy: q must be a finite number in [0, 1]; got 1.5.",
        ),
        (
            lambda z, y: xentjax.symmetric_cross_entropy(z, y, log_zero=1.0),
            "symmetric_cross_entropy: log_zero must be a finite number at most 0; got 1.",
        ),
        (
            lambda z, y: xentjax.bi_tempered_cross_entropy(z, y, t2=0.5),
            "bi_tempered_cross_entropy: t2 must be a finite number at least 1; got 0.5.",
        ),
        (
            lambda z, y: xentjax.poly_cross_entropy(z, y, epsilon=-2.0),
            "poly_cross_entropy: epsilon must be a finite number at least -1; got -2.",
        ),
        (lambda z, y: xentjax.taylor_cross_entropy(z, y, order=0), "taylor_cross_entropy: order must be at least 1; got 0."),
        (lambda z, y: xentjax.ldam_loss(z, y, class_counts=jnp.ones(7), scale=0), "ldam_loss: scale must be above 0; got 0."),
        (
            lambda z, y: xentjax.class_balanced_weights(z),
            "class_balanced_weights: class_counts must have shape (classes,), one count per class; got (5, 7).",
        ),
    ],
)
def test_errors(call, message, rng):
    z, y = cases.FAMILIES[0].draw(rng)
    with pytest.raises(ValueError) as caught:
        call(z, y)
    assert str(caught.value).splitlines()[0] == message


@pytest.mark.parametrize("logits", [(2.0, 0.5, -1.0), (2.0, 2.0, -1.0)], ids=["one-largest", "tie"])
def test_hard_bootstrapping_of_soft_labels_that_do_not_sum_to_one(logits):
    t, beta = np.array([0.3, 0.9, 0.4]), 0.8
    p = np.exp(logits) / np.exp(logits).sum()
    largest = np.equal(logits, 2.0) / np.equal(logits, 2.0).sum()
    value, slope = jax.value_and_grad(lambda z: xentjax.bootstrapped_cross_entropy(z, jnp.float32(t), beta=beta, hard=True))(
        jnp.array(logits)
    )
    np.testing.assert_allclose(value, -beta * t @ np.log(p) - (1 - beta) * t.sum() * np.log(p.max()), rtol=8 * EPS)
    np.testing.assert_allclose(slope, beta * (t.sum() * p - t) + (1 - beta) * t.sum() * (p - largest), atol=8 * EPS)
