"""Σ w·v and Σ w: values, gradients, masks, microbatches and devices; a mean of parts is the mean of the whole."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import xentjax
from tests.drawing import examples
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
# Twelve positive terms, one product each and 11 additions, one division: at most 13 roundings. Signs may cancel: of the largest term.
RTOL, ATOL = 13 * EPS, 13 * EPS
MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture
def problem(rng):
    values, weights = (jnp.asarray(x, jnp.float32) for x in (rng.normal(size=(3, 4)), rng.uniform(0.1, 2, (3, 4))))
    return values, weights, jnp.asarray(rng.uniform(size=(3, 4)) < 0.6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), ()], ids=str)
def test_values_and_gradients_are_those_of_the_formula(weighted, masked, axis, problem):
    v, w, where = problem
    counts, axes = np.asarray(where) if masked else np.ones((3, 4)), (0, 1) if axis is None else axis
    v64, effective = np.asarray(v, np.float64), counts * (np.asarray(w, np.float64) if weighted else 1)
    total, weight = (x.sum(axes, keepdims=True) for x in (effective * v64, effective))
    safe = np.where(weight == 0, 1, weight)
    w, keywords = w if weighted else None, {"where": where if masked else None, "axis": axis}
    sums = xentjax.weighted_sum(v, w, **keywords)
    np.testing.assert_array_equal(xentjax.weighted_mean(v, w, **keywords), sums.mean())
    for found, expected in ((sums.total, total), (sums.weight, weight), (sums.mean(), total / safe)):
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=RTOL, atol=ATOL)
    # ∂mean/∂v = w/Σw, ∂mean/∂w = (v − mean)/Σw over what counts
    by_v = jax.jit(jax.grad(lambda v: xentjax.weighted_mean(v, w, **keywords).sum()))(v)
    np.testing.assert_allclose(by_v, effective / safe, rtol=RTOL)
    if weighted:
        by_w = jax.jit(jax.grad(lambda w: xentjax.weighted_mean(v, w, **keywords).sum()))(w)
        np.testing.assert_allclose(by_w, counts * (v64 - total / safe) / safe, rtol=RTOL, atol=ATOL / safe.min())


@pytest.mark.parametrize("derive", [jax.jacrev, jax.jacfwd])
def test_gradients_of_the_pair(derive, problem):
    v, w, where = problem
    slopes = jax.jit(derive(lambda v, w: xentjax.weighted_sum(v, w, where=where), (0, 1)))(v, w)
    np.testing.assert_array_equal(slopes.total, np.where(where, [w, v], 0))
    np.testing.assert_array_equal(slopes.weight, [np.zeros((3, 4)), where])


def test_gradient_by_a_weight_of_zero():
    """Learning to reweight (arXiv 1803.09050) starts at weights of 0 and needs ∂total/∂w = v there."""
    v, w, mean = jnp.array([2.0, 3.0]), jnp.array([0.0, 1.0]), 3.0
    np.testing.assert_array_equal(jax.grad(lambda w: xentjax.weighted_sum(v, w).total)(w), v)
    np.testing.assert_array_equal(jax.grad(xentjax.weighted_mean, 1)(v, w), [2 - mean, 3 - mean])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_reaches_nothing(poison):
    values, weights, where = jnp.array([2.0, poison, 6.0]), jnp.array([1.0, poison, 3.0]), jnp.array([True, False, True])
    found, (by_v, by_w) = jax.value_and_grad(lambda v, w: xentjax.weighted_mean(v, w, where=where), (0, 1))(values, weights)
    assert found == (1 * 2 + 3 * 6) / 4
    np.testing.assert_array_equal(by_v, [1 / 4, 0, 3 / 4])
    np.testing.assert_array_equal(by_w, [(2 - found) / 4, 0, (6 - found) / 4])


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_weight_zero_times_infinity_is_zero(infinity):
    values, weights = jnp.array([2.0, infinity, 4.0]), jnp.array([1.0, 0.0, 1.0])
    found, slope = jax.value_and_grad(xentjax.weighted_mean)(values, weights)
    assert found == (2 + 4) / 2
    np.testing.assert_array_equal(slope, [1 / 2, 0, 1 / 2])
    assert xentjax.weighted_mean(values) == infinity  # and is not hidden otherwise


@pytest.mark.parametrize("shape", [(0,), (3,), (0, 3)], ids=str)
def test_nothing_counts(shape):
    """0 with gradient 0, be there no values, no weights, or nothing unmasked."""
    values = jnp.full(shape, np.nan, jnp.float32)
    for weights, where in ((jnp.ones(shape), jnp.zeros(shape, bool)), (jnp.zeros(shape), None)):
        mean = functools.partial(xentjax.weighted_mean, where=where)
        found, slope = jax.value_and_grad(mean)(values, weights)
        assert found == 0 and not slope.any()
        assert not jax.grad(mean, 1)(jnp.nan_to_num(values), weights).any()
    if 0 in shape:
        assert xentjax.weighted_mean(values) == 0 and not xentjax.weighted_mean(values, axis=0).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_adds_in_float32(dtype):
    """10,000 ones: bfloat16 would stop at 256, float16 at 2,048."""
    values, weights = jnp.full(10_000, 3, dtype), jnp.ones(10_000, dtype)
    sums = xentjax.weighted_sum(values, weights)
    assert sums.total.dtype == sums.weight.dtype == jnp.float32
    assert (sums.total, sums.weight, xentjax.weighted_mean(values, weights)) == (30_000, 10_000, 3)
    assert jax.grad(xentjax.weighted_mean)(values, weights).dtype == dtype


def test_float64_stays(x64, rng):
    values, weights = rng.normal(size=(3, 4)), rng.uniform(0.1, 2, (3, 4))
    found = xentjax.weighted_mean(values, weights)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, ref.weighted_mean(values, weights), rtol=0, atol=13 * np.finfo(np.float64).eps)
    assert xentjax.weighted_mean(jnp.asarray(values, jnp.float32), weights).dtype == jnp.float32


def test_parts_make_the_whole(problem):
    v, w, where = problem
    parts = [xentjax.weighted_sum(v[i], w[i], where=where[i]) for i in range(3)]
    whole = parts[0] + parts[1] + parts[2]
    assert isinstance(whole, xentjax.WeightedSum)
    mean = ref.weighted_mean(np.asarray(v, np.float64), np.asarray(w, np.float64) * np.asarray(where))
    np.testing.assert_allclose(whole.mean(), mean, rtol=RTOL, atol=ATOL)
    assert np.abs(np.mean([part.mean() for part in parts]) - mean) > 100 * EPS  # a mean of means is something else


numbers = st.floats(-100, 100, width=32)
pairs = st.lists(st.tuples(numbers, st.floats(0, 10, width=32, allow_subnormal=False)), min_size=4, max_size=4)


@hypothesis.given(a=pairs, b=pairs, c=pairs)
@examples(60)
def test_addition_is_associative_to_rounding(a, b, c):
    parts = [xentjax.weighted_sum(*(np.array(x, np.float32) for x in zip(*part, strict=True))) for part in (a, b, c)]
    left, right = (parts[0] + parts[1]) + parts[2], parts[0] + (parts[1] + parts[2])
    v, w = np.array([*a, *b, *c]).T
    total, weight = math.fsum(w * v), math.fsum(w)
    # signs cancel: rounding is relative to Σ w·|v|
    rounding = RTOL * math.fsum(w * np.abs(v)) + 12 * float(jnp.finfo(jnp.float32).tiny)  # twelve products may underflow
    for sums in (left, right):
        np.testing.assert_allclose(sums.total, total, rtol=0, atol=rounding)
        np.testing.assert_allclose(sums.weight, weight, rtol=RTOL)
        np.testing.assert_allclose(sums.mean(), total / weight if weight else 0, rtol=0, atol=3 * rounding / (weight or 1))


def regression(parameters, x, y, where):
    """Σ of a loss, its weight, and the gradient of the sum: what a microbatch adds."""

    def loss(parameters):
        sums = xentjax.weighted_sum(xentjax.softmax_cross_entropy(x @ parameters["w"] + parameters["b"][None], y, where=where), where=where)
        return sums.total, sums

    gradients, sums = jax.grad(loss, has_aux=True)(parameters)
    return sums, xentjax.WeightedSum(gradients, sums.weight)


@pytest.fixture
def batch(rng):
    """24 examples in 8 ragged parts, one of them empty."""
    parameters = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "b": jnp.asarray(rng.normal(size=3), jnp.float32)}
    x, y = jnp.asarray(rng.normal(size=(24, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, 24), jnp.int32)
    where = np.arange(24) % 3 < np.array([3, 1, 0, 2, 3, 1, 1, 2]).repeat(3)
    return parameters, x, jnp.where(where, y, -100), jnp.asarray(where)


def assert_same_step(loss, gradients, batch):
    """Mean cross-entropy of the full batch and its gradient xᵀ(p − onehot)/N, by NumPy in float64."""
    (w, b), x, y = batch[0].values(), *(np.asarray(a)[np.asarray(batch[-1])] for a in batch[1:3])
    x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
    z, t = x @ w + b, np.eye(3)[y]
    slope = ref.cross_entropy_gradient(ref.Double, z, t) / len(y)
    # tens of roundings of numbers of order 1
    np.testing.assert_allclose(loss, ref.cross_entropy(ref.Double, z, t).mean(), rtol=40 * EPS)
    np.testing.assert_allclose(gradients["w"], x.T @ slope, rtol=40 * EPS, atol=40 * EPS)
    np.testing.assert_allclose(gradients["b"], slope.sum(0), rtol=40 * EPS, atol=40 * EPS)


def add(sums, part):
    return jax.tree.map(lambda a, b: a + b, sums, part, is_leaf=lambda x: isinstance(x, xentjax.WeightedSum))


def test_gradient_accumulation_is_the_full_batch(batch):
    parameters, *data = batch
    step = jax.jit(regression)
    sums = functools.reduce(add, (step(parameters, *(a[i : i + 3] for a in data)) for i in range(0, 24, 3)))
    assert_same_step(*(s.mean() for s in sums), batch)


def test_gradient_accumulation_in_a_scan_is_the_full_batch(batch):
    parameters, *data = batch

    @jax.jit
    def accumulate(parameters, parts):
        zero = jnp.zeros(())
        start = xentjax.WeightedSum(zero, zero), xentjax.WeightedSum(jax.tree.map(jnp.zeros_like, parameters), zero)
        sums, _ = jax.lax.scan(lambda sums, part: (add(sums, regression(parameters, *part)), None), start, parts)
        return [s.mean() for s in sums]

    assert_same_step(*accumulate(parameters, [a.reshape(8, 3, *a.shape[1:]) for a in data]), batch)


def test_a_product_of_a_sum_is_refused():
    sums = xentjax.weighted_sum(jnp.ones(3))
    for product in (lambda: 2 * sums, lambda: sums * 2):  # a tuple would be repeated
        with pytest.raises(TypeError, match=r"^WeightedSum: sums cannot be multiplied\. Multiply the values or the weights"):
            product()


def test_psum_over_a_vmapped_axis_is_the_full_batch(batch):
    parameters, *data = batch

    @functools.partial(jax.vmap, axis_name="parts")
    def device(*part):
        loss, gradients = regression(parameters, *part)
        return loss.psum("parts").mean(), gradients.psum("parts").mean()

    results = jax.jit(device)(*(a.reshape(8, 3, *a.shape[1:]) for a in data))
    jax.tree.map(lambda r: np.testing.assert_array_equal(r, jnp.stack([r[0]] * 8)), results)
    assert_same_step(*jax.tree.map(lambda r: r[0], results), batch)


def test_psum_over_devices_is_the_full_batch(batch):
    parameters, *data = batch

    @functools.partial(jax.shard_map, mesh=MESH, in_specs=P("data"), out_specs=P())
    def device(parameters, *part):
        # a copy of the parameters per device: nothing is summed over devices before `psum`
        loss, gradients = regression(jax.tree.map(lambda p: p[0], parameters), *part)
        return loss.psum("data").mean(), gradients.psum("data").mean()

    assert_same_step(*jax.jit(device)(jax.tree.map(lambda p: jnp.stack([p] * 8), parameters), *data), batch)


def test_mean_over_devices_has_the_gradient_of_the_full_batch(batch):
    parameters, *data = batch

    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P(), *(P("data"),) * 3), out_specs=P())
    def loss(parameters, x, y, where):
        values = xentjax.softmax_cross_entropy(x @ parameters["w"] + parameters["b"][None], y, where=where)
        return xentjax.weighted_mean(values, where=where, axis_name="data")

    assert_same_step(*jax.jit(jax.value_and_grad(loss))(parameters, *data), batch)


def test_mean_over_devices_counts_every_device():
    """Without weights or mask the weight is the same everywhere, and still every device's."""
    mean = jax.shard_map(functools.partial(xentjax.weighted_mean, axis_name="data"), mesh=MESH, in_specs=P("data"), out_specs=P())
    found, slope = jax.jit(jax.value_and_grad(mean))(jnp.arange(16.0))
    assert found == np.arange(16).sum() / 16
    np.testing.assert_array_equal(slope, np.full(16, 1 / 16))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_mean_of_half_precision_totals(dtype):
    """The weight of a large batch does not fit float16 and is not exact in bfloat16."""
    total = jnp.asarray(6e4, dtype)
    found = xentjax.WeightedSum({"w": total}, jnp.asarray(100_001.0)).mean()["w"]
    np.testing.assert_allclose(float(found), float(total) / 100_001, rtol=float(jnp.finfo(dtype).eps) / 2)  # one rounding
