"""The identities of information theory, over drawn distributions with zeros, tiny entries and peaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.drawing import examples
from xentjax import information

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
SLACK = 40 * EPS  # two sums of a few roundings each, of normalised float32 numbers, on either side
CLASSES = 5

entry = st.one_of(st.just(0.0), st.floats(0.01, 1), st.floats(-60, 0).map(np.exp))
positive = st.one_of(st.floats(0.01, 1), st.floats(-60, 0).map(np.exp))


def normalised(values, shape):
    x = np.asarray(values, np.float64).reshape(shape)
    return jnp.asarray(x / x.sum(), jnp.float32)


def drawn(entries, *shape):
    size = int(np.prod(shape))
    return st.lists(entries, min_size=size, max_size=size).filter(lambda v: sum(v) > 1e-3).map(lambda v: normalised(v, shape))


anything, full, joint = drawn(entry, CLASSES), drawn(positive, CLASSES), drawn(entry, 3, 4)
run = examples(40)


def close(got, expected, scale=1.0):
    np.testing.assert_allclose(got, expected, rtol=SLACK, atol=SLACK * scale)


@run
@given(anything, full)
def test_cross_entropy_is_entropy_and_divergence(p, q):
    close(information.cross_entropy(p, q), information.entropy(p) + information.kl_divergence(p, q))
    assert information.cross_entropy(p, q) >= information.entropy(p) * (1 - SLACK) - SLACK


@run
@given(anything, anything)
def test_divergences_are_not_negative_and_0_for_equals_only(p, q):
    for divergence in (
        information.kl_divergence,
        information.js_divergence,
        lambda p, q: information.renyi_divergence(p, q, alpha=0.5),
    ):
        assert divergence(p, q) >= 0
        assert divergence(p, p) == 0
        # an entry of 1e-26 beside 0 adds less than float32 has
        assert divergence(p, q) > 0 or np.square(np.float64(p - q)).sum() < 1e-30


@run
@given(anything, anything)
def test_js_is_symmetric_and_at_most_log_2(p, q):
    there, back = information.js_divergence(p, q), information.js_divergence(q, p)
    np.testing.assert_allclose(there, back, rtol=10 * EPS)
    assert there <= np.log(2) * (1 + 10 * EPS)
    m = (p + q) / 2
    close(there, information.entropy(m) - (information.entropy(p) + information.entropy(q)) / 2)


@jax.jit
def renyi_orders(p, q):
    return jax.vmap(lambda a: information.renyi_divergence(p, q, alpha=a))(jnp.array([0.01, 0.3, 0.5, 0.99, 1.0, 1.01, 2.0, 8.0]))


@run
@given(full, full)
def test_renyi_grows_with_its_order_and_is_kl_at_1(p, q):
    orders, divergence = renyi_orders(p, q), information.kl_divergence(p, q)
    assert (orders[1:] >= orders[:-1] * (1 - 100 * EPS)).all()
    np.testing.assert_allclose(orders[4], divergence, rtol=10 * EPS)
    turned = renyi_orders(q, p)
    # D_α(p‖q)/α = D_(1−α)(q‖p)/(1 − α)
    # with sums that differ by δ, which their rounding leaves, to (δ²/2)/(α(1 − α))
    apart = (np.asarray(p, np.float64).sum() - np.asarray(q, np.float64).sum()) ** 2 / 2 / (0.01 * 0.99)
    np.testing.assert_allclose(orders[0] / 0.01, turned[3] / 0.99, rtol=100 * EPS, atol=1.01 * apart)
    np.testing.assert_allclose(orders[2], turned[2], rtol=100 * EPS)


@pytest.mark.exhaustive
@run
@given(joint)
def test_chain_rule_and_mutual_information(p):
    px, py, whole = p.sum(-1), p.sum(-2), p.reshape(-1)
    h = information.entropy
    close(h(whole), h(px) + information.conditional_entropy(p), 2)
    shared = information.mutual_information(p)
    close(shared, h(px) + h(py) - h(whole), 2)
    close(shared, h(py) - information.conditional_entropy(p), 2)
    close(shared, information.mutual_information(p.T))
    assert -0.0 <= shared <= min(h(px), h(py)) + SLACK
    product = jnp.outer(px, py)
    if (product[p > 0] > 1e-37).all():
        close(shared, information.kl_divergence(whole, product.reshape(-1)))


@run
@given(anything, full)
def test_products_share_nothing(p, q):
    product = jnp.outer(p, q)
    # the product's roundings are dependence of the size eps, which counts as its square
    assert information.mutual_information(product) <= EPS**2
    close(information.conditional_entropy(product), information.entropy(q))


@run
@given(anything, st.floats(1.5, 20))
def test_units_and_perplexity(p, base):
    h = information.entropy(p)
    close(information.entropy(p, base=base) * np.log(base), h)
    close(information.perplexity(p), np.exp(np.float64(h)), CLASSES)
    assert 1 - SLACK <= information.perplexity(p) <= CLASSES * (1 + SLACK)


@run
@given(anything, anything)
def test_logits_say_the_same_as_probabilities(p, q):
    z, y = jnp.log(p), jnp.log(q)  # −∞ is an impossible class; a logarithm's rounding of up to 60 eps is one of p
    for name in ("cross_entropy", "kl_divergence", "js_divergence"):
        got, expected = getattr(information, f"{name}_from_logits")(z, y), getattr(information, name)(p, q)
        np.testing.assert_allclose(got, expected, rtol=200 * EPS, atol=60 * EPS)
    for name in ("entropy", "perplexity"):
        got, expected = getattr(information, f"{name}_from_logits")(z), getattr(information, name)(p)
        np.testing.assert_allclose(got, expected, rtol=200 * EPS, atol=60 * EPS)


@run
@given(joint)
def test_joint_logits_say_the_same_as_probabilities(p):
    for name in ("conditional_entropy", "mutual_information"):
        got, expected = getattr(information, f"{name}_from_logits")(jnp.log(p)), getattr(information, name)(p)
        np.testing.assert_allclose(got, expected, rtol=200 * EPS, atol=60 * EPS)


@run
@given(anything, anything)
def test_merging_classes_loses_information(p, q):
    def merged(x):
        return jnp.stack([x[0] + x[1], x[2], x[3] + x[4]])

    for divergence in (information.kl_divergence, information.js_divergence):
        assert divergence(merged(p), merged(q)) <= divergence(p, q) * (1 + SLACK) + EPS**2
