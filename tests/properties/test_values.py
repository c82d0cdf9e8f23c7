"""Values equal their formulas: every row of the table, every kind of label, any rank and axis."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.drawing import examples
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
# The accuracy of single values is held in test_accuracy.py; here 40 eps of the largest term is enough to find a wrong formula.
RTOL = 40 * EPS


def rows(table):
    return [(c, k) for c in table for k in c.kinds]


def parametrized(names, rows):
    return pytest.mark.parametrize(names, [pytest.param(*row, id="-".join(getattr(x, "__name__", str(x)) for x in row)) for row in rows])


def every_setting(table=cases.LOSSES):
    """All rows of the table with all their labels."""
    return parametrized(("case", "kind"), rows(table))


def each_kind(table=cases.LOSSES):
    """One or two settings of every function with all their labels."""
    return parametrized(("case", "kind"), [row for row in rows(table) if row[0].thorough])


def each_kind_and_dtype(table=cases.LOSSES):
    """Those with indices in float32 and distributions in bfloat16, and cross-entropy with both in both: the passes are the same."""
    both = (jnp.float32, jnp.bfloat16)
    chosen = [row for row in rows(table) if row[0].thorough]
    full = [(c, k, d) for c, k in chosen for d in both if c.name == "softmax_cross_entropy"]
    return parametrized(
        ("case", "kind", "dtype"), full + [(c, k, both[k != "index"]) for c, k in chosen if c.name != "softmax_cross_entropy"]
    )


@pytest.mark.every_row
@every_setting()
def test_any_rank(case, kind, rng):
    several = [case.draw(rng, leading, kind=kind) for leading in ((), (2, 3), (2, 0, 3))]
    for (z, labels), result in zip(several, jax.jit(lambda several: [case(*x) for x in several])(several), strict=True):
        value, _ = case.exact(ref.Double, z, labels)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, value, rtol=case.tolerance * RTOL, atol=case.tolerance * RTOL)


@each_kind(cases.CLASSES + cases.STATISTICS)
@pytest.mark.parametrize("axis", [0, -2])
def test_any_axis(case, kind, axis, rng):
    z, labels = case.draw(rng, (4, 3), kind=kind)
    value, _ = case.exact(ref.Double, z, labels)
    moved = labels if kind == "index" else jnp.moveaxis(labels, -1, axis)
    np.testing.assert_allclose(case(jnp.moveaxis(z, -1, axis), moved, axis=axis), value, rtol=RTOL, atol=RTOL)


def test_any_axis_with_top_k_labels(rng):
    (case,) = cases.TOP_K
    z, labels = case.draw(rng, (4, 3))
    np.testing.assert_allclose(case(jnp.moveaxis(z, -1, 0), labels, axis=0), case.exact(ref.Double, z, labels)[0], rtol=RTOL)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.CLASSES, ids=str)
def test_indices_equal_one_hot_rows(case, rng):
    z, y = case.draw(rng, (50,))
    mask = jnp.arange(7) != 5
    y = jnp.where(y == 5, 4, y)
    one_hot = jax.nn.one_hot(y, 7)
    for by_index, by_row in zip(*(cases.evaluate(case, z, labels, class_mask=mask) for labels in (y, one_hot)), strict=True):
        np.testing.assert_allclose(by_index, by_row, rtol=RTOL, atol=case.tolerance * RTOL)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", [False, True])
def test_indices_equal_one_hot_rows_over_the_product_of_keywords(label_smoothing, z_loss, weighted, masked, where, rng):
    z = jnp.asarray(rng.normal(size=(40, 6)) * 4, jnp.float32)
    y = jnp.asarray(rng.integers(0, 5, 40), jnp.int32)
    keywords = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "class_weights": jnp.asarray(cases.WEIGHTS[:6], jnp.float32) if weighted else None,
        "class_mask": jnp.arange(6) < 5 if masked else None,
        "where": jnp.arange(40) % 3 != 0 if where else None,
    }

    def value_and_gradient(z, labels):
        value, pull = jax.vjp(lambda z: xentjax.softmax_cross_entropy(z, labels, **keywords), z)
        return value, pull(jnp.ones_like(value))[0]

    index, row = jax.jit(lambda z: [value_and_gradient(z, labels) for labels in (y, jax.nn.one_hot(y, 6))])(z)
    for by_index, by_row in zip(index, row, strict=True):
        np.testing.assert_allclose(by_index, by_row, rtol=RTOL, atol=RTOL)
    # and both are the formula
    t = ref.targets(ref.Double, y, 6, label_smoothing, keywords["class_weights"], keywords["class_mask"])
    existing = np.asarray(z, np.float64)[:, : 5 if masked else 6]
    value = ref.cross_entropy(ref.Double, existing, t[:, : existing.shape[1]], z_loss)
    np.testing.assert_allclose(index[0], np.where(keywords["where"], value, 0) if where else value, rtol=RTOL, atol=RTOL)


@examples(40)
@hypothesis.given(
    case=st.sampled_from([c for c in cases.LOSSES if "class_weights" not in c.target and np.ndim(c.formula.get("pos_weight", 0)) == 0]),
    leading=st.lists(st.integers(0, 4), max_size=3),
    classes=st.integers(1, 9),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    soft=st.booleans(),
    scale=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 100),
)
def test_shapes_and_dtypes(case, leading, classes, dtype, soft, scale, seed):
    kind = case.kinds[-1] if soft else "index"
    z, labels = case.draw(np.random.default_rng(seed), tuple(leading), classes, dtype, kind, scale)
    value, slope = case.exact(ref.Double, z, labels)
    result, derivative = cases.evaluate(case, z, labels)
    assert result.dtype == jnp.float32 and derivative.dtype == dtype
    # float32 rounding of the largest logit, and one rounding of the gradient to the dtype of the input
    magnitude = 1 + float(np.abs(np.asarray(z, np.float64)).max(initial=0))
    magnitude *= case.tolerance
    np.testing.assert_allclose(result, value, rtol=RTOL, atol=RTOL * magnitude)
    half = max(float(jnp.finfo(dtype).eps), RTOL)
    atol = half * 0.01 * magnitude * case.steepness  # a component is the difference of two terms of the size of the steepness
    np.testing.assert_allclose(np.asarray(derivative, np.float64), slope, rtol=half, atol=atol)


def test_row_statistics_name_what_they_hold(rng):
    z = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 6, 30), jnp.int32)
    found = xentjax.row_statistics(z, y)
    double = np.asarray(z, np.float64)
    np.testing.assert_array_equal(found.max_logit, z.max(-1))
    np.testing.assert_array_equal(found.correct, double.argmax(-1) == np.asarray(y))
    soft = xentjax.row_statistics(z, jax.nn.one_hot(y, 6))
    np.testing.assert_array_equal(soft.correct, found.correct)
    assert not jax.grad(lambda z: xentjax.row_statistics(z, y).max_logit.sum())(z).any()


def test_row_statistics_of_degenerate_rows():
    z = jnp.array([[-jnp.inf, -jnp.inf], [-jnp.inf, 0.0], [3.0, 3.0], [1.0, 2.0]])
    found = xentjax.row_statistics(z, jnp.array([0, 0, 1, 7]), where=jnp.array([True, True, True, False]))
    np.testing.assert_array_equal(found.log_prob, np.float32([-np.inf, -np.inf, -np.log(2), 0]))
    np.testing.assert_array_equal(found.log_normalizer, np.float32([-np.inf, 0, 3 + np.log(2), 0]))
    np.testing.assert_allclose(found.entropy, [0, 0, np.log(2), 0], rtol=4 * EPS)
    np.testing.assert_array_equal(found.max_logit, [-np.inf, 0, 3, 0])
    np.testing.assert_array_equal(found.correct, [False, False, True, False])


def test_top_k_ids_may_repeat_and_probabilities_need_not_sum_to_one():
    z = jnp.array([1.0, 2.0, 3.0])
    result = xentjax.softmax_cross_entropy_with_top_k_labels(z, jnp.array([2, 2, 0]), jnp.array([0.5, 0.25, 1.0]))
    u = -np.log(np.exp([1.0, 2, 3]) / np.exp([1.0, 2, 3]).sum())
    np.testing.assert_allclose(result, 0.75 * u[2] + u[0], rtol=8 * EPS)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 4, 1), (3, 1, 5), (3, 4, 5)])
def test_pos_weight_along_other_axes(shape, rng):
    z, labels = rng.normal(size=(3, 4, 5)), rng.integers(0, 2, (3, 4, 5))
    w, where = rng.uniform(0.5, 3, shape), rng.uniform(size=(3, 4, 5)) < 0.7
    spoilt = np.where(where, w, np.nan) if w.shape == z.shape else w
    arguments = [jnp.asarray(x, jnp.float32) for x in (z, spoilt)]

    def loss(z, w):
        return xentjax.sigmoid_cross_entropy(z, jnp.asarray(labels), pos_weight=w, where=jnp.asarray(where))

    value, pull = jax.vjp(loss, *arguments)
    of_z, of_w = pull(jnp.ones_like(value))
    z, w = (np.asarray(x, np.float32).astype(np.float64) for x in (z, w))
    np.testing.assert_allclose(value, where * ref.bit_cross_entropy(ref.Double, z, labels, w), rtol=RTOL)
    np.testing.assert_allclose(of_z, where * ref.bit_cross_entropy_gradient(ref.Double, z, labels, w), rtol=RTOL, atol=RTOL)
    positive = where * labels * np.log1p(np.exp(-z))
    over = tuple(axis for axis, n in enumerate(w.shape) if n == 1)
    np.testing.assert_allclose(of_w, positive.sum(over, keepdims=True), rtol=RTOL)
