"""Properties of single arguments, of every public function: integers of 64 bits, dtypes, hyper-parameters that are traced integers."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.tables.calls import CALLS, IDENTIFIERS, NOT_NEGATIVE, NUMBERS, QUANTITIES, WITHOUT, public

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDE = 2**32
EPS = float(jnp.finfo(jnp.float32).eps)
each_call = pytest.mark.parametrize("call", CALLS, ids=str)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(not np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_every_argument_is_in_the_table():
    names = {name for name, _ in public()}
    assert names == {call.name for call in CALLS} | WITHOUT
    for name in names - WITHOUT:
        calls = [call for call in CALLS if call.name == name]
        given = {"where", "class_mask"}.union(*((*call.arrays, *call.static, *call.settings) for call in calls))
        for p in inspect.signature(calls[0].function).parameters.values():
            alternatives = {"log_variance", "scale", "bias", "label_log_expected_count"}  # of what is given, or held by another row
            assert p.name in given | alternatives or "ArrayLike" not in str(p.annotation), f"{name}: {p.name}"


def settings(call, dtype):
    """Every hyper-parameter as an array: 2, which both dtypes hold, whatever it means."""
    return {name: jnp.asarray(2, dtype) for name in call.settings}


def integral(call, dtype):
    """The arrays of the call with its hyper-parameters in whole numbers."""
    return {name: np.ceil(x).astype(dtype) if name in NUMBERS else x for name, x in call.arrays.items()}


@pytest.mark.exhaustive
@each_call
def test_hyper_parameters_may_be_integers(call):
    floats = call(integral(call, np.float32), settings(call, jnp.float32))
    same(call(integral(call, np.int32), settings(call, jnp.int32)), floats)
    jax.eval_shape(call, integral(call, np.int32), settings(call, jnp.int32))  # traced ones


@pytest.mark.exhaustive
@pytest.mark.parametrize("call", [c for c in CALLS if [*c.leaves(np.integer)]], ids=str)
def test_integers_keep_their_value(call):
    numbers = settings(call, jnp.float32)

    def result(path, x):
        return call(call.replaced(path, x), numbers)

    good = call(call.arrays, numbers)
    for path, name, x in call.leaves(np.integer):
        whole = x.astype(np.int64)
        first = np.arange(x.size).reshape(x.shape) == 0
        if {name, f"{call}.{name}"} & IDENTIFIERS:  # the first two differ by what an int32 loses
            expected, equal = (result(path, np.array([3, second, 9], np.int32)) for second in (4, 3))
            assert differ(expected, equal)
            same(result(path, np.array([3, 3 + WIDE, 9])), expected)
        elif name == "tree.signs" or f"{call}.{name}" in QUANTITIES:
            assert differ(result(path, np.where(first, whole + WIDE, whole)), good)
        else:
            expected = result(path, np.where(first, -1, x).astype(np.int32))
            assert differ(expected, good)
            for value in (whole + WIDE, whole - WIDE, np.full_like(whole, -(2**63)), whole.astype(np.uint64) + np.uint64(2**63)):
                same(result(path, np.where(first, value, whole.astype(value.dtype))), expected)
            same(result(path, jnp.asarray(np.where(first, 2**31 + whole, whole).astype(np.uint32))), expected)


def test_integers_of_lists_keep_their_value():
    logits = np.zeros((2, 3), np.float32)
    for far in (1 + WIDE, 1 - WIDE, 2**80):
        for labels in ([far, 1], (far, 1), [np.int64(1), far]):
            loss = np.asarray(xentjax.softmax_cross_entropy(logits, labels))
            assert np.isnan(loss[list(labels).index(far)]) and np.isfinite(loss).sum() == 1
        assert np.isnan(xentjax.softmax_cross_entropy(logits[0], far))
    hidden, kernel = np.ones((2, 2), np.float32), np.ones((2, 3), np.float32)
    loss = xentjax.fuse_linear(xentjax.softmax_cross_entropy, reduction="none")(hidden, kernel, np.array([1 + WIDE, 1]))
    assert np.isnan(loss).tolist() == [True, False]


def test_counts_beyond_int32_are_counts():
    counts = np.array([5 * 10**9, 10**9])
    same(xentjax.inverse_frequency_weights(counts), xentjax.inverse_frequency_weights(counts.astype(np.float32)))
    np.testing.assert_allclose(xentjax.inverse_frequency_weights(counts), 6e9 / (2 * counts), rtol=4 * EPS)  # a sum and a quotient
    same(
        xentjax.poisson_nll(np.full(2, 20, np.float32), counts), xentjax.poisson_nll(np.full(2, 20, np.float32), counts.astype(np.float32))
    )


def without_infinities():
    return [np.dtype(d) for d in (jnp.float8_e4m3fn, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz, jnp.float4_e2m1fn)]


@each_call
def test_dtypes_without_infinities_are_refused(call):
    for path, name, x in call.leaves(np.floating):
        for dtype in without_infinities():
            remedy = f"must have a dtype with infinities; got {dtype}. Use {name}.astype(jnp.bfloat16)."
            with pytest.raises(TypeError, match=re.escape(f"{call.function.__name__}: {name} {remedy}")):
                call(call.replaced(path, jnp.asarray(x, dtype)))


@pytest.mark.exhaustive
@each_call
def test_checked_names_function_and_argument(call):
    """Every NaN, every index out of range, every negative weight, and every hyper-parameter that is not a number."""
    checked, function = xentjax.checked(jax.jit(call.__call__)), re.escape(call.function.__name__)
    numbers = {name: np.float32(x) for name, x in call.settings.items()}
    checked(call.arrays, numbers)

    def names(name, arrays, numbers=numbers):
        named = rf"{function}: {re.escape(name)}[\[ ]"
        if name in ("ids", "values") or str(call).startswith("weighted"):
            named = rf"({named}|__call__: result.* is NaN)"  # what is wrong may show in the result alone
        with pytest.raises(ValueError, match=f"^{named}"):
            checked(arrays, numbers)

    for path, name, x in call.leaves(np.floating):
        signed = name == "weights" and str(call) in ("weighted_sum", "weighted_mean", "linear_softmax_cross_entropy")  # test_drift.py
        for bad in (np.nan, *([-0.5] if name in NOT_NEGATIVE and not signed else [])):
            names(name, call.replaced(path, np.where(np.arange(x.size).reshape(x.shape) == x.size - 1, np.float32(bad), x)))
    for path, name, x in call.leaves(np.integer):
        if not {name, f"{call}.{name}"} & IDENTIFIERS and name != "tree.signs":
            names(name, call.replaced(path, np.where(np.arange(x.size).reshape(x.shape) == x.size - 1, np.int32(-1), x)))
    for name in numbers:
        names(name, call.arrays, {**numbers, name: np.float32(np.nan)})
