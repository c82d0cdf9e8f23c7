"""Each defect found in peers, by its number in their trackers, does not exist here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import xentjax
from tests.tables import reference as ref
from xentjax._core import rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
cross_entropy = xentjax.softmax_cross_entropy


def slope(z, labels, **keywords):
    return jax.jit(jax.grad(lambda z: cross_entropy(z, labels, **keywords).sum()))(z)


@pytest.mark.parametrize("bad", [-1, -100, 131, 2**31 - 1])
@pytest.mark.parametrize("function", [cross_entropy, xentjax.softmax_focal_loss])
def test_bad_labels_train_no_class(function, bad):
    """1: optax trains class −1 or V − 100, ejkernel clips, T5X and MaxText return softmax as the gradient."""
    z, y = jnp.zeros((2, 131)), jnp.array([bad, 5])
    loss, gradient = function(z, y), jax.jit(jax.grad(lambda z: function(z, y).sum()))(z)
    np.testing.assert_array_equal(np.isnan(loss), [True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [True, False])
    assert np.isfinite(gradient[1]).all()


@pytest.mark.parametrize("margin", [10.0, 15.0, 17.0, 20.0, 50.0, 80.0])
def test_confident_labels_keep_their_loss(margin):
    """2: past 17 nats every peer's loss and gradient are 0 ("softmax collapse", arXiv 2501.04697); at 15 it is 56 % off."""
    z, y = jnp.array([margin, 0.0, 0.0]), jnp.array(0)
    rest = 2 * np.exp(-margin)
    tolerance = (8 + margin) * EPS  # the contract's bound
    np.testing.assert_allclose(cross_entropy(z, y), np.log1p(rest), rtol=tolerance)
    other = np.exp(-margin) / (1 + rest)
    np.testing.assert_allclose(slope(z, y), [-2 * other, other, other], rtol=(8 + 2 * margin) * EPS)


@pytest.mark.parametrize("others", [6, 39])  # few classes and many, whose loss is computed by another formula
def test_a_largest_logit_that_is_rounded_twice(others, monkeypatch):
    """XLA may round a logit that is a product differently in the maximum and at the label. GPUs do, CPUs hardly ever do."""
    shift, exact = 2.0**-18, rows.reference  # one ulp of 40
    monkeypatch.setattr(rows, "reference", lambda r: exact(r) + shift)
    loss = jax.jit(lambda z: cross_entropy(z, jnp.array(0)))(jnp.array([40.0, *[0.0] * others]))
    # Each exponential has the relative error of the shift.
    np.testing.assert_allclose(loss, others * np.exp(-40.0), rtol=shift + 10 * EPS)


def test_gradient_of_a_confident_label_in_bfloat16():
    """2: Liger #1329 computes p − 1 in bfloat16, 100 % off at p = 0.999."""
    z, y = jnp.array([7.0, 0.0], jnp.bfloat16), jnp.array(0)
    other = np.exp(-7.0) / (1 + np.exp(-7.0))
    found = slope(z, y)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), [-other, other], rtol=float(jnp.finfo(jnp.bfloat16).eps) / 2 + 30 * EPS)


@pytest.mark.parametrize("offset", [1e4, 1e8, -1e8])
def test_common_offset(offset):
    """3: optax #1792, loss 0 instead of log C."""
    z, y = jnp.full((1, 131), offset), jnp.array([7])
    np.testing.assert_allclose(cross_entropy(z, y), [np.log(131)], rtol=8 * EPS)
    np.testing.assert_allclose(slope(z, y), [np.full(131, 1 / 131) - np.eye(131)[7]], rtol=8 * EPS)


@pytest.mark.parametrize("soft", [False, True])
def test_impossible_classes(soft):
    """4: optax and T5X give NaN with −∞ logits, optax #1762 in jacfwd, jax #6811 where a whole row is −∞."""
    z = jnp.array([[1.0, -jnp.inf, 2.0], [-jnp.inf] * 3])
    y = jnp.array([0, 0])
    labels = jax.nn.one_hot(y, 3) if soft else y
    p = np.exp([1.0, -np.inf, 2.0]) / np.exp([1.0, -np.inf, 2.0]).sum()
    np.testing.assert_allclose(cross_entropy(z, labels), [-np.log(p[0]), np.inf], rtol=8 * EPS)
    expected = [p - [1, 0, 0], np.zeros(3)]
    forward = jax.jit(jax.jacfwd(lambda z: cross_entropy(z, labels)[0]))(z)
    np.testing.assert_allclose(slope(z, labels), expected, rtol=9 * EPS)
    np.testing.assert_allclose(forward, expected, rtol=9 * EPS)


def test_large_logits_under_a_false_mask():
    """4: jax #17117 and #23842, NaN from e^z of logits that no one asked for."""
    z, exists = jnp.array([1.0, 1e38, jnp.inf, 2.0]), jnp.array([True, False, False, True])
    p = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(cross_entropy(z, jnp.array(0), class_mask=exists), -np.log(p[0]), rtol=8 * EPS)
    np.testing.assert_allclose(slope(z, jnp.array(0), class_mask=exists), [p[0] - 1, 0, 0, p[1]], rtol=9 * EPS)
    rows = cross_entropy(jnp.stack([z, z * 0]), jnp.array([0, 0]), where=jnp.array([False, True]), class_mask=exists)
    assert rows[0] == 0


def test_mask_that_hides_the_label():
    """5: optax's integer path gives −0.687, less than the least that a cross-entropy can be."""
    loss = cross_entropy(jnp.array([2.0, 0.5, 0.1]), jnp.array(0), class_mask=jnp.array([False, True, True]))
    assert loss == np.inf


def test_half_precision_logits_give_a_float32_loss(rng):
    """6: optax returns 10.375 for 10.3917, one of the 8 bits that bfloat16 has."""
    z, y = jnp.asarray(rng.normal(size=(64, 131)) * 3, jnp.bfloat16), rng.integers(0, 131, 64)
    exact = ref.cross_entropy(ref.Double, np.asarray(z, np.float64), np.eye(131)[y])
    loss = cross_entropy(z, jnp.asarray(y, jnp.int32))
    assert loss.dtype == jnp.float32
    margin = np.max(np.asarray(z, np.float64)[np.arange(64), y] - np.sort(np.asarray(z, np.float64), -1)[:, -2])
    np.testing.assert_allclose(loss, exact, rtol=(8 + max(margin, 0)) * EPS)


def test_half_precision_sums():
    """6: ejkernel adds weights to 2992 for 3000, tokamax a chunked sum to 24576 for 24736.6, both in bfloat16."""
    values, weights = jnp.full((3000,), 8.25, jnp.bfloat16), jnp.ones((3000,), jnp.bfloat16)
    sums = xentjax.weighted_sum(values, weights)
    assert (sums.total, sums.weight) == (3000 * 8.25, 3000)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_logits_cost_log_v(dtype):
    """7: tokamax counts padded columns as classes, log 256 for log 130; its test hides it with large logits. 131 is prime."""
    z, y = jnp.zeros((1, 131), dtype), jnp.array([130])
    np.testing.assert_allclose(cross_entropy(z, y), [np.log(131)], rtol=8 * EPS)
    expected = np.full(131, 1 / 131) - np.eye(131)[130]
    np.testing.assert_allclose(np.asarray(slope(z, y)[0], np.float64), expected, rtol=float(jnp.finfo(dtype).eps) / 2 + 8 * EPS)


def test_many_classes_in_float16():
    """10: jax #40409, NaN gradient of log_softmax where the class count overflows float16 (≥ 65,536)."""
    classes = 65_537
    z, y = jnp.zeros((1, classes), jnp.float16), jnp.array([classes - 1])
    np.testing.assert_allclose(cross_entropy(z, y), [np.log(classes)], rtol=16 * EPS)
    found = np.asarray(slope(z, y)[0], np.float64)
    # 1/V is subnormal in float16: one spacing of those
    np.testing.assert_allclose(found, np.full(classes, 1 / classes) - (np.arange(classes) == classes - 1), rtol=2.0**-11, atol=2.0**-24)


def test_weights_with_smoothing_and_ignored_labels():
    """11: torch #69339 and #91383 crash; keras #18818 leaks NaN of a masked row through `* 0`."""
    z, y = jnp.array([[1.0, 2.0, 0.5], [np.nan, np.inf, 0.0]]), jnp.array([2, -100])
    w = np.array([0.5, 1.0, 2.0])
    keywords = {"class_weights": jnp.asarray(w, jnp.float32), "label_smoothing": 0.25, "where": y != -100}
    z0 = np.asarray(z[0], np.float64)
    p = np.exp(z0) / np.exp(z0).sum()
    t = w * (0.75 * np.array([0, 0, 1]) + 0.25 / 3)
    np.testing.assert_allclose(cross_entropy(z, y, **keywords), [-(t * np.log(p)).sum(), 0], rtol=8 * EPS)
    # p_k and t_k are of order 1 and their difference is one rounding of them
    np.testing.assert_allclose(slope(z, y, **keywords), [t.sum() * p - t, np.zeros(3)], rtol=0, atol=16 * EPS)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("gamma", "traced"), [(0.0, False), (0.0, True), (0.5, False), (1.0, True), (1.5, False)])
def test_focal_derivatives_at_saturated_logits(gamma, traced):
    """12: optax #1267 and #1346, NaN gradients at γ = 0 and γ < 1, NaN Hessians at γ < 2."""
    exponent = jnp.asarray(gamma) if traced else gamma
    z, t = jnp.array([200.0, -200.0, 0.0]), jnp.array([1.0, 0.0, 1.0])

    def bits(z):
        return xentjax.sigmoid_focal_loss(z, t, gamma=exponent).sum()

    # at 0: −(1/2)^γ·(γ/2·log 2 + 1/2), where it is saturated 0
    np.testing.assert_allclose(jax.jit(jax.grad(bits))(z), [0, 0, -(0.5**gamma) * (gamma / 2 * np.log(2) + 0.5)], rtol=16 * EPS)
    assert np.isfinite(jax.jit(jax.hessian(bits))(z)).all()
    z = jnp.array([[200.0, 0.0, -200.0], [80.0, 0.0, -80.0], [-200.0, 200.0, 0.0]])

    def classes(z):
        return xentjax.softmax_focal_loss(z, jnp.array([0, 0, 0]), gamma=exponent).sum()

    found = jax.jit(jax.grad(classes))(z)
    assert not found[0].any()
    np.testing.assert_allclose(found[2], [-1, 1, 0], rtol=8 * EPS)  # p = 0: that of cross-entropy
    assert np.isfinite(jax.jit(jax.hessian(classes))(z)).all()


def test_targets_of_zero():
    """13: optax #1786, NaN where a target is 0."""
    z, t = jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 0.25, 0.75])
    z64 = np.array([1.0, 2.0, 0.5])
    p = np.exp(z64) / np.exp(z64).sum()
    np.testing.assert_allclose(cross_entropy(z, t), -(np.asarray(t) * np.log(p)).sum(), rtol=8 * EPS)
    by_z, by_t = jax.jit(jax.grad(cross_entropy, (0, 1)))(z, t)
    np.testing.assert_allclose(by_z, p - np.asarray(t), rtol=0, atol=8 * EPS)
    np.testing.assert_allclose(by_t, -np.log(p), rtol=8 * EPS)


def test_all_examples_masked():
    """14: torch #70348 gives NaN, keras #21908 once divided by its epsilon and exploded."""
    z, y, where = jnp.ones((4, 3)), jnp.full(4, -100), jnp.zeros(4, bool)
    found, gradient = jax.value_and_grad(lambda z: xentjax.weighted_mean(cross_entropy(z, y, where=where), where=where))(z)
    assert found == 0 and not gradient.any()


def test_classes_split_over_devices():
    """15: Megatron's smoothing divides by the shard's V (#7464) and gathered logits add log(shards) (#7452)."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    z = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    sharded = functools.partial(cross_entropy, label_smoothing=0.25, axis_name="model")
    sharded = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P()))
    t = 0.75 * np.eye(16)[[9]] + 0.25 / 16
    np.testing.assert_allclose(sharded(z, jnp.array([9])), ref.cross_entropy(ref.Double, z.astype(np.float64), t), rtol=8 * EPS)


def test_no_derivative_is_silently_zero():
    """16: t5x returns a z-loss without gradient, tensorflow #5876 a Hessian of 0."""
    z, y = jnp.array([1.0, 2.0, 0.5]), jnp.array(1)
    z64 = np.array([1.0, 2.0, 0.5])
    p, lse = np.exp(z64) / np.exp(z64).sum(), np.log(np.exp(z64).sum())
    by_lse = jax.jit(jax.grad(lambda z: xentjax.row_statistics(z, y).log_normalizer ** 2))(z)
    np.testing.assert_allclose(by_lse, 2 * lse * p, rtol=16 * EPS)
    z_loss = jax.jit(jax.grad(lambda z: cross_entropy(z, y, z_loss=0.5) - cross_entropy(z, y)))(z)
    np.testing.assert_allclose(z_loss, 2 * 0.5 * lse * p, rtol=0, atol=16 * EPS)  # of a difference of terms of order 1
    np.testing.assert_allclose(jax.jit(jax.hessian(cross_entropy))(z, y), np.diag(p) - np.outer(p, p), rtol=0, atol=8 * EPS)


def test_columns_do_not_meet_rows():
    """17: optax, tensorflow #1343, keras #17388 broadcast (N, 1) against (N,) to (N, N)."""
    column, row = jnp.zeros((4, 1)), jnp.zeros(4)
    for function in (xentjax.sigmoid_cross_entropy, xentjax.sigmoid_focal_loss, xentjax.asymmetric_loss, xentjax.weighted_mean):
        for pair in ((column, row), (row, column)):
            with pytest.raises(ValueError, match=r"must have shape"):
                function(*pair)
    with pytest.raises(ValueError, match=r"Use labels\.squeeze\(-1\)"):
        cross_entropy(jnp.zeros((4, 3)), column.astype(jnp.int32))


def test_one_possible_class_among_many():
    """18: flash-attention #1930, one finite logit at 50,000 of 100,000, the rest −∞."""
    z, y = jnp.where(jnp.arange(100_000) == 50_000, 3.0, -jnp.full((2, 100_000), jnp.inf)), jnp.array([50_000, 0])
    loss, gradient = cross_entropy(z, y), slope(z, y)
    np.testing.assert_array_equal(loss, [0, np.inf])
    assert not gradient[0].any() and np.isfinite(gradient).all()
    assert xentjax.row_statistics(z, y).entropy[0] == 0


def test_a_mean_of_means_is_not_the_mean():
    """19: transformers #34191, #34242, #37474, #46731; torchtune #1875: microbatches of unequal weight averaged equally."""
    parts = [jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0])]
    whole = (1 + 2 + 3 + 10) / 4
    sums = xentjax.weighted_sum(parts[0]) + xentjax.weighted_sum(parts[1])
    assert sums.mean() == whole
    assert np.mean([sums.mean() for sums in map(xentjax.weighted_sum, parts)]) != whole
