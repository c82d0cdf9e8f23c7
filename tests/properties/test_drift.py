"""Running sums after very many parts, over batches and devices: every accumulator of the package, by one table."""

import functools
import math
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import xentjax
from tests.tables import table_metrics
from xentjax import metrics

EPS = float(jnp.finfo(jnp.float32).eps)
PROMISE = 4 * EPS  # of the exact quotient, whatever the number of parts
DOUBLINGS, MORE = 40, 1000
EACH = pytest.mark.parametrize("row", table_metrics.ACCUMULATORS, ids=str)
MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
Sum = xentjax.WeightedSum


def exact(sums):
    """What a running sum stands for, in fractions: its fields and, beside them, what those cannot hold."""

    def whole(*parts):
        units = (1, 1, 2**31) if np.issubdtype(parts[0].dtype, np.integer) else (1, 1, 1)
        return sum(unit * np.array([Fraction(float(x)) for x in np.ravel(part)], object) for unit, part in zip(units, parts, strict=True))

    sums = jax.tree.map(np.asarray, sums)  # a `rest` of None becomes zeros
    return jax.tree.leaves(jax.tree.map(whole, tuple(sums), *sums.rest))


def assert_within(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        for a, b in zip(np.ravel(x), np.ravel(np.array(y, object)), strict=True):
            assert abs(a - b) <= Fraction(tolerance) * abs(b), (float(a), float(b))


@functools.partial(jax.jit, static_argnums=2)
def repeated(sums, part, times):
    return lax.fori_loop(0, times, lambda _, s: s + part, sums)


@functools.partial(jax.jit, static_argnums=1)
def doubled(part, times=DOUBLINGS):
    return lax.fori_loop(0, times, lambda _, s: s + s, part)


def test_every_accumulator_is_in_the_table():
    public = [x for module in (xentjax, metrics) for x in vars(module).values() if isinstance(x, type) and hasattr(x, "psum")]
    assert set(public) == {type(row.part()) for row in table_metrics.ACCUMULATORS}


@EACH
def test_small_parts_on_a_large_sum(row):
    """What 2⁴⁰ parts make, and that each of the next thousand still counts in full; figures by the definition."""
    part = row.part()
    each, many = exact(part), doubled(part)
    assert_within(exact(many), [2**DOUBLINGS * x for x in each], PROMISE)
    more = repeated(many, part, MORE)
    grown = [b - a for a, b in zip(exact(many), exact(more), strict=True)]
    # float32: the error of an addition is 2⁻⁷² of the sum, 2⁻³² of a part; fields that read 0 stay 0
    assert_within(grown, [MORE * x for x in each], PROMISE)
    for found, expected in zip(row.figures(more), row.figures(part), strict=True):
        np.testing.assert_allclose(found, expected, rtol=PROMISE)


@pytest.mark.exhaustive
@EACH
def test_over_devices(row):
    """Large and small sums meet in a psum, inside `shard_map` and `vmap`, and what they make goes on growing."""
    part = row.part()
    large, middle = doubled(part), doubled(part, 20)
    has = np.array([[1, 0, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 1, 0, 0, 0]]).T  # which devices hold which

    def device(has, large, middle, part):
        own = [jax.tree.map(lambda x, i=i: x * has[0, i].astype(x.dtype), s) for i, s in enumerate((large, middle))]
        sums = sum(own) + part
        return sums.psum("data"), sums.psum("data") + part

    @jax.jit
    def both(has, *sums):
        over_mesh = jax.shard_map(device, mesh=MESH, in_specs=(P("data"), P(), P(), P()), out_specs=P())
        over_vmap = jax.vmap(device, in_axes=(0, None, None, None), out_axes=None, axis_name="data")
        return over_mesh(has, *sums), over_vmap(has[:, None], *sums)

    for found in both(has, large, middle, part):
        # of integers every bit; of floats all that float32 keeps, and half as much again
        assert_within(
            exact(found[0]), [4 * a + 2 * b + 8 * c for a, b, c in zip(exact(large), exact(middle), exact(part), strict=True)], EPS**1.5
        )
        grown = [b - a for a, b in zip(*map(exact, found), strict=True)]
        assert_within(grown, exact(part), PROMISE)


@pytest.mark.parametrize(("weight", "times"), [(1000.0, 2_000_000), (1.0, 20_000_000)])
def test_millions_of_equal_parts(weight, times):
    """A float32 sum gives 2.251 and 2.927 for 2.3: past 2²⁴ times a part it no longer changes by that part."""
    total = np.float32(2.3 * weight)
    zero, part = Sum(0.0, 0.0), Sum(total, np.float32(weight))
    mean = Fraction(total.item()) / Fraction(weight)
    assert_within([Fraction(repeated(zero, part, times).mean().item())], [mean], PROMISE)

    def scanned(sums, _):
        return sums + part, None

    assert_within([Fraction(lax.scan(scanned, zero, length=100_000)[0].mean().item())], [mean], PROMISE)


def test_parts_of_all_sizes_and_signs(rng):
    """Exactly summed by NumPy in fractions: 3,000 parts over 12 orders of magnitude, then all but the first taken back."""
    totals = (rng.normal(size=3000) * 10.0 ** rng.uniform(-6, 6, 3000)).astype(np.float32)

    @jax.jit
    def add(totals):
        return lax.scan(lambda sums, x: (sums + Sum(x, 1.0), None), Sum(0.0, 0.0), totals)[0]

    whole = sum(map(Fraction, totals.tolist()), Fraction(0))
    found = add(totals)
    # 2⁻⁷² per addition, of the largest sum on the way
    room = 3000 * Fraction(2) ** -72 * sum(abs(Fraction(x)) for x in totals.tolist())
    assert abs(exact(found)[0] - whole) <= room
    assert abs(Fraction(found.mean().item()) - whole / 3000) <= PROMISE * abs(whole / 3000)
    back = add(np.concatenate([totals, -totals[1:]]))
    assert back.total == totals[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_totals(dtype):
    """A sum in bfloat16 alone stops at 2⁸ times a part."""
    value = jnp.asarray(2.3, dtype)
    part, zero = Sum({"w": value}, jnp.float32(1)), Sum({"w": jnp.zeros((), dtype)}, jnp.float32(0))
    mean = repeated(zero, part, 20_000).mean()["w"]
    assert mean.dtype == dtype and mean == value


def test_float64(x64):
    value = np.float64(0.1)
    found = repeated(Sum(0.0, 0.0), Sum(value, 1.0), 1000)
    assert found.total.dtype == found.mean().dtype == jnp.float64
    assert exact(found)[0] == 1000 * Fraction(0.1)


def test_infinite_and_nan_parts():
    """∞ stays ∞, by psum too, and is not turned into NaN by what it rounds off."""
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        found = Sum(2.3, 1.0) + Sum(bad, 1.0) + Sum(1e-9, 1.0)
        np.testing.assert_array_equal(found.mean(), bad)
        over = jax.vmap(lambda x: Sum(x, 1.0).psum("parts").mean(), axis_name="parts")(jnp.array([1.0, bad, 2.0]))
        np.testing.assert_array_equal(over, [bad] * 3)
    assert (Sum(3e38, 1.0) + Sum(3e38, 1.0)).mean() == jnp.inf  # too large for float32
    assert jax.vmap(lambda x: Sum(x, 1.0).psum("parts").total, axis_name="parts")(jnp.array([3e38, 1.0]))[0] == np.float32(3e38)


def polynomial(x):
    """A mean of sums, and itself in numbers: (x + 2x² + 3·x³)/(1 + x + 5)."""
    return Sum(x, 1.0), Sum(2 * x**2, x), Sum(3 * x**3, 5.0)


def derivatives(function):
    def both(x):
        return function(x), jax.grad(function)(x), jax.jvp(function, (x,), (jnp.ones_like(x),))[1], jax.grad(jax.grad(function))(x)

    return jax.jit(both)


@pytest.mark.exhaustive
def test_derivatives():
    """∂(a + b) is 1 by either: in a chain, a scan, after a psum, over devices; twice, forward and reverse."""

    def chain(x):
        return sum(polynomial(x)).mean()

    def scan(x):
        parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *polynomial(x))
        return lax.scan(lambda sums, part: (sums + part, None), Sum(0 * x, 0 * x), parts)[0].mean()

    def mapped(x):
        parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *polynomial(x))
        return jax.vmap(lambda part: (part + part).psum("parts").mean(), axis_name="parts")(parts)[1]

    def meshed(x):
        def device(i, x):
            a, b, c = polynomial(x)
            pick = [jnp.where(i[0] == n, 1.0, 0.0) for n in range(8)]
            own = [jax.tree.map(lambda leaf, k=k: leaf * pick[k], part) for k, part in enumerate((a, b, c))]
            return sum(own).psum("data").mean()

        return jax.shard_map(device, mesh=MESH, in_specs=(P("data"), P()), out_specs=P())(jnp.arange(8), x)

    x = 0.7
    top, bottom = np.polynomial.Polynomial([0, 1, 2, 3]), np.polynomial.Polynomial([6, 1])
    slope = (top.deriv() * bottom - top * bottom.deriv(), bottom**2)
    curve = (slope[0].deriv() * slope[1] - slope[0] * slope[1].deriv(), slope[1] ** 2)
    first, second = (n(x) / d(x) for n, d in (slope, curve))
    for function in (chain, scan, mapped, meshed):
        # a dozen roundings of terms of order 1
        np.testing.assert_allclose(derivatives(function)(jnp.float32(x)), [top(x) / bottom(x), first, first, second], rtol=16 * EPS)


def test_gradients_of_pytrees_flow_through_large_sums():
    """A part that is lost beside a large sum in float32 has its derivative all the same, and rest of a sum has it too."""
    large = Sum({"w": jnp.full(3, 2.0**40)}, 1.0)

    def mean(x):
        return ((large + Sum({"w": x}, 1.0)) + Sum({"w": -(2.0**40) + x}, 2.0)).mean()["w"]

    x = jnp.array([0.3, 0.2, 0.1])
    np.testing.assert_allclose(mean(x), x / 4, rtol=PROMISE)  # the third x is rounded off by its own addition to −2⁴⁰
    np.testing.assert_array_equal(jax.jacrev(mean)(x), np.eye(3) * 2 / 4)
    sums = large + Sum({"w": x}, 1.0)
    for by_sums, count in ((lambda sums: sums.mean(), 2), (lambda sums: (sums + Sum({"w": x}, 2.0)).mean(), 4)):
        found = jax.grad(lambda sums, mean=by_sums: mean(sums)["w"].sum())(sums)
        for leaf in (found.total, *(rest[0] for rest in found.rest)):
            np.testing.assert_array_equal(leaf["w"], [1 / count] * 3)


@pytest.mark.parametrize(
    ("total", "weight", "mean"),
    [
        (3, 2, 1.5),
        (3.0, 2, 1.5),
        (np.float32(3), np.int64(2), 1.5),
        (np.float64(2.5), True, 2.5),
        (np.array([1, 2], np.uint8), 4, [0.25, 0.5]),
        (jnp.array([1, 2], jnp.int8), jnp.array(4, jnp.uint32), [0.25, 0.5]),
        (jnp.array(3.0, jnp.bfloat16), 2, 1.5),
        (2**40 + 1, 2**40, 1.0),
        (1, 0, 0.0),
    ],
    ids=str,
)
def test_plain_numbers(total, weight, mean):
    found = Sum(total, weight)
    np.testing.assert_array_equal(np.asarray(found.mean(), np.float32), np.float32(mean))
    np.testing.assert_array_equal(np.asarray((found + Sum(0 * found.total, 0 * found.weight)).mean(), np.float32), np.float32(mean))


def test_numbers_keep_their_bits():
    """A count in int32 or a Python integer is longer than float32, a Python float too."""
    for count in (2**24 + 1, jnp.int32(2**31 - 1), np.int64(2**40 + 1)):
        expected = Fraction(int(count))
        found = (
            jax.jit(lambda count: Sum(count, count) + Sum(1, 0))(count) if isinstance(count, jax.Array) else Sum(count, count) + Sum(1, 0)
        )
        assert exact(found) == [expected + 1, expected]
    assert abs(exact(Sum(0.1, 1))[0] - Fraction(0.1)) <= Fraction(2) ** -70


def test_a_pair_of_two():
    """Users unpack a pair, replace one of them, describe it by specs, and add by hand what is no pair."""
    sums = Sum(3.0, 2.0) + Sum(1.0, 2.0)
    total, weight = sums
    assert (total, weight, len(sums)) == (4, 4, 2)
    assert sums._replace(weight=jnp.float32(8)).mean() == 1 / 2
    specs = Sum(P("data"), P("data"))
    run = jax.shard_map(lambda sums: sums.psum("data").mean(), mesh=MESH, in_specs=(specs,), out_specs=P())
    np.testing.assert_array_equal(run(Sum(jnp.arange(8.0), jnp.ones(8))), [3.5])
    with pytest.raises(TypeError, match="unsupported operand"):
        operator.add(sums, 1.0)
    message = r"^WeightedSum: both sums must have the same pytree structure to be added; got .* and .*\.(\n|$)"
    with pytest.raises(ValueError, match=message):
        operator.add(sums, Sum({"w": 1.0}, 1.0))


# Counts -----------------------------------------------------------------------------------------------------------------


def test_counts_beyond_int32():
    """The field stays at 2³¹ − 1, figures are exact to rounding; sums over devices of saturated counts as well."""
    one = metrics.confusion(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), classes=2)  # 1 of 2 and 1 of 1
    many = doubled(one)
    np.testing.assert_array_equal(many.counts, [[2**31 - 1] * 2, [0, 2**31 - 1]])
    np.testing.assert_allclose(many.recall(), [1 / 2, 1], rtol=PROMISE)
    np.testing.assert_allclose(many.accuracy(), 2 / 3, rtol=PROMISE)
    wrong = metrics.confusion(jnp.array([0]), jnp.array([7]), classes=2)
    assert wrong.invalid == 1 and np.isnan(doubled(wrong).accuracy()) and doubled(wrong).invalid == 2**31 - 1
    area = metrics.ranking(jnp.array([0.0, 0.2, 0.4]), jnp.array([0, 1, 0]), points=11)
    np.testing.assert_allclose(doubled(area).auroc(), 1 / 2, rtol=PROMISE)


def test_a_small_gap_between_large_sums():
    """Hits and confidences agree to 2⁻²⁰; a difference of rounded sums, or of rounded quotients, keeps four bits of that."""
    confidence = 1 / 2 + 2.0**-21
    part = metrics.Calibration(*(jnp.array([x], jnp.float32) for x in (2.0, 1.0, 2 * confidence)), jnp.int32(0))
    found = repeated(part, part, 10_000)
    for error in (found.expected_calibration_error(), found.maximum_calibration_error()):
        np.testing.assert_allclose(error, 2.0**-21, rtol=PROMISE)


@pytest.mark.parametrize("examples", [1, 1000, 2**20])
def test_weights_of_one_large_batch(examples):
    """One after the other, a million times 0.1 in float32 is 9e-3 off; tiny weights have a cell of their own, and keep their bits."""
    weights = jnp.where(jnp.arange(examples) % 2 == 0, 0.1, 3e-12).astype(jnp.float32)
    labels = jnp.arange(examples) % 2
    found = metrics.confusion(labels, labels, classes=2, weights=weights)
    light, heavy = examples // 2, examples - examples // 2
    expected = [heavy * Fraction(np.float32(0.1).item()), light * Fraction(np.float32(3e-12).item())]
    assert_within([exact(found)[0][:: len(expected) + 1]], [expected], EPS / 2)


def test_weights_of_all_sizes(rng):
    """Against exact sums: 300 weights over 24 orders of magnitude, the largest float32 among them; ∞ and NaN stay in their cell."""
    weights = (10.0 ** rng.uniform(-12, 12, 300)).astype(np.float32)
    labels = rng.integers(0, 3, 300)
    weights[:3], labels[:3] = [3e38, 1e-30, 5.0], [0, 1, 2]
    found = metrics.confusion(labels, labels, classes=3, weights=weights)
    expected = [sum((Fraction(w) for w in weights[labels == k].tolist()), Fraction(0)) for k in range(3)]
    assert_within([exact(found)[0][:: len(expected) + 1]], [expected], EPS / 2)
    weights[:2] = jnp.inf, jnp.nan
    found = metrics.confusion(labels, labels, classes=3, weights=weights).counts
    np.testing.assert_array_equal(np.isnan(found), np.diag([False, True, False]))
    assert found[0, 0] == jnp.inf and math.isfinite(found[2, 2])
    by_weights = jax.grad(lambda w: metrics.confusion(labels, labels, classes=3, weights=w).counts[1].sum())(jnp.ones(300))
    np.testing.assert_array_equal(by_weights, labels == 1)


# Weights under `checked` ------------------------------------------------------------------------------------------------

ONES, LABELS = np.ones((2, 3), np.float32), np.array([0, 1])


def fused(reduction):
    run = xentjax.fuse_linear(xentjax.softmax_cross_entropy, reduction=reduction)
    return lambda w, where: run(jnp.ones((2, 2)), ONES[:2], LABELS, weights=w, where=where)


def fused_over_mesh(w, where):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name=())
    return run(jnp.ones((2, 2)), ONES[:2], LABELS, weights=w, where=where)


def main_loss(w, where):
    return xentjax.linear_softmax_cross_entropy(jnp.ones((2, 2)), ONES[:2], LABELS, weights=w, where=where)


WEIGHTED = {
    "weighted_mean": lambda w, where: xentjax.weighted_mean(jnp.array([1.0, 2.0]), w, where=where),
    "fuse_linear": fused("mean"),
    "fuse_linear_sharded": fused_over_mesh,
    "linear_softmax_cross_entropy": main_loss,
    "confusion": lambda w, where: metrics.confusion(LABELS, LABELS, classes=3, weights=w, where=where),
    "calibration": lambda w, where: metrics.calibration(ONES, LABELS, weights=w, where=where),
    "fit_temperature": lambda w, where: metrics.fit_temperature(ONES, LABELS, weights=w, where=where),
    "ranking": lambda w, where: metrics.ranking(ONES[:, 0], LABELS, weights=w, where=where),
    "auroc": lambda w, where: metrics.auroc(ONES[:, 0], LABELS, weights=w, where=where),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("bad", [-0.5, np.nan])
@pytest.mark.parametrize("name", WEIGHTED)
def test_checked_weights(name, bad):
    """A mean by weights of both signs divides by a sum near 0. A masked weight is not looked at, a sum takes signed ones."""
    function = xentjax.checked(jax.jit(WEIGHTED[name]))
    weights, where = jnp.array([1.0, bad]), jnp.array([True, True])
    with pytest.raises(ValueError, match=rf"^(at mapped index 0: )?{name}: weights\[1\] = {bad} is negative or NaN\."):
        function(weights, where)
    function(weights, jnp.array([True, False]))
    function(jnp.array([1.0, 0.0]), where)


def test_sums_take_signed_weights():
    values, advantages = jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])
    assert xentjax.checked(jax.jit(xentjax.weighted_sum))(values, advantages).total == 0.5 * 1 - 0.5 * 2
    for reduction in ("sum", "none"):
        xentjax.checked(jax.jit(fused(reduction)))(advantages, None)
