"""Masks are selections: what they hide reaches nothing, in value or derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.properties.test_values import RTOL, each_kind_and_dtype
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")
POISON = (jnp.nan, jnp.inf, -jnp.inf, 1e30)
EXAMPLES = 7  # in every test that can, so that it finds the programs of the others compiled


def first_five(dtype):
    """Five of seven classes: one mask for all examples in float32, one per example in half precision."""
    mask = jnp.arange(7) < 5
    return mask if dtype == jnp.float32 else jnp.broadcast_to(mask, (EXAMPLES, 7))


def hide(labels, rows, fill):
    """Labels with the given rows replaced by something that no label may be."""
    if isinstance(labels, tuple):
        return tuple(hide(x, rows, fill) for x in labels)
    bad = jnp.asarray(-100 if jnp.issubdtype(labels.dtype, jnp.integer) else fill, labels.dtype)
    return labels.at[rows].set(bad)


@pytest.mark.by_module  # test_hidden.py has the first derivatives of every loss
@each_kind_and_dtype()
def test_where_hides_everything(case, kind, dtype, rng):
    z, labels = case.draw(rng, (EXAMPLES,), dtype=dtype, kind=kind)
    where = np.array([True, False, True, False, False, True, True])
    hidden = ~where
    counted = jnp.broadcast_to(where[:, None], z.shape) if case.family == "bits" else where
    value, slope = case.exact(ref.Double, z, labels)
    # float32 rounding of the largest logit, and one rounding of the gradient to its dtype
    magnitude = case.tolerance * case.steepness * (1 + float(np.abs(np.asarray(z, np.float64)).max()))
    half, atol = max(RTOL, float(jnp.finfo(dtype).eps)), RTOL * magnitude
    for poison in POISON:
        z_bad, labels_bad = z.at[hidden].set(jnp.asarray(poison, dtype)), hide(labels, hidden, poison)
        found = cases.derivatives(case, z_bad, labels_bad, jnp.ones_like(z), {"where": counted})
        result, derivative, tangent, second = map(np.asarray, found)
        np.testing.assert_allclose(result[where], value[where], rtol=RTOL, atol=atol)
        np.testing.assert_array_equal(result[hidden], np.zeros_like(result[hidden]))
        np.testing.assert_allclose(derivative[where].astype(np.float64), slope[where], rtol=half, atol=atol)
        np.testing.assert_array_equal(derivative[hidden], np.zeros_like(derivative[hidden]))
        assert np.isfinite(second.astype(np.float32)).all() and not second[hidden].any()
        assert np.isfinite(tangent).all() and not tangent[hidden].any()


@pytest.mark.by_module
@each_kind_and_dtype(cases.CATEGORICAL)
def test_missing_classes_do_not_exist(case, kind, dtype, rng):
    if case.family == "top_k":
        z, labels = case.draw(rng, (EXAMPLES,), classes=5, dtype=dtype)
        z = jnp.concatenate([z, z[:, :2]], -1)
    else:
        z, labels = case.draw(rng, (EXAMPLES,), dtype=dtype, kind=kind)
        labels = labels % 5 if kind == "index" else labels.at[:, 5:].set(0.0)
    mask = first_five(dtype)
    # the same problem with five classes, by the formula
    five = np.asarray(z, np.float64)[:, :5]
    weights = case.target.get("class_weights")
    target = {**case.target, **({"class_weights": weights[:5]} if weights else {})}
    if case.family == "top_k":
        t = case.targets(ref.Double, labels, 5)
    else:
        t = ref.targets(ref.Double, np.asarray(labels) if kind == "index" else np.asarray(labels)[:, :5], 5, **target)
    formula = {**case.formula, **case.of_classes(7, first=5)}
    value, slope = case.value(ref.Double, five, t, **formula), case.gradient(ref.Double, five, t, **formula)
    half = max(RTOL, float(jnp.finfo(dtype).eps))
    for poison in POISON:
        z_bad = z.at[:, 5:].set(jnp.asarray(poison, dtype))
        result, derivative = cases.evaluate(case, z_bad, labels, class_mask=mask)
        np.testing.assert_allclose(result, value, rtol=RTOL, atol=10 * RTOL)
        derivative = np.asarray(derivative, np.float64)
        np.testing.assert_allclose(derivative[:, :5], slope, rtol=half, atol=10 * RTOL)
        assert not derivative[:, 5:].any()


@pytest.mark.parametrize("function", [xentjax.softmax_cross_entropy, xentjax.softmax_focal_loss])
@pytest.mark.parametrize("soft", [False, True])
def test_label_on_a_missing_class_costs_infinity(function, soft):
    labels = jnp.array([0, 2])
    labels = jax.nn.one_hot(labels, 3) if soft else labels
    loss = function(jnp.zeros((2, 3)), labels, class_mask=jnp.array([True, True, False]))
    assert np.isfinite(loss[0]) and loss[1] == np.inf
    slope = jax.grad(lambda z: function(z, labels, class_mask=jnp.array([True, True, False])).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(slope).all()


@pytest.mark.by_module
@each_kind_and_dtype(cases.CATEGORICAL)
def test_row_without_any_class_costs_nothing(case, kind, dtype, rng):
    z, labels = case.draw(rng, (EXAMPLES,), dtype=dtype, kind=kind)
    mask = jnp.ones(z.shape, bool).at[0].set(False)
    value, slope = cases.evaluate(case, z, labels, class_mask=mask)
    assert value[0] == 0 and not slope[0].any()
    np.testing.assert_allclose(value[1:], case.exact(ref.Double, z, labels)[0][1:], rtol=RTOL, atol=RTOL)


# Smoothing puts weight on an impossible class: its loss is +∞ by the formula (test below). The normalised loss counts what it would cost.
@pytest.mark.by_module
@each_kind_and_dtype([c for c in cases.CLASSES + cases.TOP_K if "label_smoothing" not in c.target and c.name != "normalized_cross_entropy"])
def test_impossible_classes(case, kind, dtype, rng):
    z, labels = case.draw(rng, (EXAMPLES,), classes=5 if case.family == "top_k" else 7, dtype=dtype, kind=kind)
    if case.family == "top_k":
        z = jnp.concatenate([z, z[:, :2]], -1)
    elif kind == "index":
        labels = labels % 5
    else:
        labels = labels.at[:, 5:].set(0.0)
    z = z.at[:, 5:].set(-jnp.inf)
    same, _ = cases.evaluate(case, z, labels, class_mask=first_five(dtype))
    value, slope, tangent, second = cases.derivatives(case, z, labels, jnp.ones_like(z), {})
    np.testing.assert_allclose(value, same, rtol=RTOL)
    assert np.isfinite(tangent).all()
    for derivative in (slope, second):
        assert np.isfinite(np.asarray(derivative, np.float32)).all() and not derivative[:, 5:].any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_impossible_labels(soft, dtype):
    z = jnp.array([[-jnp.inf, 1.0, 2.0], [-jnp.inf] * 3], dtype)
    labels = jnp.array([0, 1])
    labels = jax.nn.one_hot(labels, 3) if soft else labels
    for function in (xentjax.softmax_cross_entropy, xentjax.softmax_focal_loss):
        assert (function(z, labels) == np.inf).all()
        slope = jax.grad(lambda z, f=function: f(z, labels).sum())(z)
        assert np.isfinite(np.asarray(slope, np.float32)).all() and not slope[1].any()
    # p − onehot(label) is finite where the loss is not
    p = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    slope = jax.grad(lambda z: xentjax.softmax_cross_entropy(z, labels).sum())(z)
    np.testing.assert_allclose(np.asarray(slope[0], np.float64), [-1, *p], rtol=float(jnp.finfo(dtype).eps))
    assert (xentjax.softmax_log_prob(z, labels) == -np.inf).all()


def test_smoothing_over_an_impossible_class_costs_infinity():
    z = jnp.array([0.0, 1.0, -jnp.inf])
    assert xentjax.softmax_cross_entropy(z, jnp.array(0), label_smoothing=0.1) == np.inf
    finite = xentjax.softmax_cross_entropy(z, jnp.array(0), label_smoothing=0.1, class_mask=jnp.array([True, True, False]))
    assert np.isfinite(finite)


def test_weight_zero_times_infinity_is_zero():
    z = jnp.array([-jnp.inf, 1.0, 2.0])
    w = jnp.array([0.0, 1.0, 1.0])
    assert xentjax.softmax_cross_entropy(z, jnp.array(0), class_weights=w) == 0
    assert xentjax.softmax_cross_entropy(z, jnp.array([1.0, 0.0, 0.0]), class_weights=w) == 0
    assert not jax.grad(lambda z: xentjax.softmax_cross_entropy(z, jnp.array(0), class_weights=w))(z).any()


WIDTHS = [(x, d) for x in (-1, -100, 7, 1000, 2**31 - 1) for d in (jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.uint32)]


@pytest.mark.by_module
@pytest.mark.parametrize(
    ("case", "label", "dtype"),
    [(cases.CLASSES[0], *width) for width in WIDTHS] + [(c, -1, jnp.int32) for c in cases.CLASSES[1:]],
    ids=str,
)
def test_bad_labels_are_nan_in_value_and_gradient(case, label, dtype, rng):
    info = jnp.iinfo(dtype)
    if not info.min <= label <= info.max:
        label = int(np.array(label).astype(dtype))  # −1 as uint8 is 255: out of range as well
    if 0 <= label < 7:
        label = 7
    z, y = case.draw(rng, (EXAMPLES,))
    y = y.astype(dtype).at[1].set(label)
    value, slope = cases.evaluate(case, z, y)
    assert np.isnan(value[1]) and np.isnan(slope[1]).all()
    assert np.isfinite(np.delete(value, 1)).all() and np.isfinite(np.delete(slope, 1, 0)).all()


def test_bad_top_k_labels_are_nan(rng):
    (case,) = cases.TOP_K
    z, (ids, probs) = case.draw(rng, (EXAMPLES,))
    ids = ids.at[1, 0].set(7)
    value, slope = cases.evaluate(case, z, (ids, probs))
    assert np.isnan(value[1]) and np.isnan(slope[1]).all()
    assert np.isfinite(np.delete(value, 1)).all() and np.isfinite(np.delete(slope, 1, 0)).all()


@pytest.mark.by_module
@each_kind_and_dtype(cases.CLASSES)
def test_a_nan_stays_in_its_row(case, kind, dtype, rng):
    bad = jnp.nan if dtype == jnp.float32 else jnp.inf
    z, labels = case.draw(rng, (EXAMPLES,), dtype=dtype, kind=kind)
    z = z.at[jnp.arange(7), jnp.arange(7)].set(jnp.asarray(bad, dtype)).at[3].set(0)
    value, slope = cases.evaluate(case, z, labels)
    assert np.isnan(np.delete(np.asarray(value), 3)).all()
    assert np.isfinite(value[3]) and np.isfinite(np.asarray(slope[3], np.float32)).all()


@pytest.mark.parametrize("case", cases.BITS, ids=str)
def test_infinite_bits(case):
    labels = jnp.array([1, 0, 1, 0, 1, 0, 1])
    z = jnp.array([jnp.inf, -jnp.inf, -jnp.inf, jnp.inf, 0.0, 0.0, 0.0])
    value, slope = cases.evaluate(case, z, labels)
    assert np.isfinite(slope).all()
    if "label_smoothing" not in case.target:
        assert (value[:2] == 0).all() and not slope[:2].any()
        if case.name != "asymmetric_loss":
            assert (value[2:4] == np.inf).all()
