"""Policies: samples of the current policy, clips, levels, normalizers, advantages of degenerate groups, the fused form, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from xentjax import policy

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = float(jnp.finfo(jnp.float32).eps)
INF = jnp.inf
LEVELS = ("token", "sequence")


@functools.partial(jax.jit, static_argnames=("level",))
def derivatives(x, old, advantages, where=None, level="token"):
    """The loss, and the gradient of its sum by log-probabilities and advantages."""

    def loss(x, advantages):
        return policy.policy_gradient_loss(x, old, advantages, level=level, where=where)

    value, pull = jax.vjp(loss, x, advantages)
    return value, *pull(jnp.ones_like(value))


def draw(rng, *shape):
    return jnp.asarray(-rng.uniform(1, 3, shape), jnp.float32)


@pytest.mark.parametrize("level", LEVELS)
def test_samples_of_the_current_policy(level, rng):
    """The ratio is exactly 1, and the gradient is that of the plain policy gradient −A·log π."""
    x, advantages = draw(rng, 4, 3), jnp.array([1.5, -0.5, 0.0, 2.0])
    value, slope, _ = derivatives(x, x, advantages, level=level)
    np.testing.assert_array_equal(value, -(jnp.tile(advantages[:, None], 3) if level == "token" else advantages))
    np.testing.assert_array_equal(slope, jnp.tile(-advantages[:, None], 3) / (1 if level == "token" else 3))
    # ... also if the caller differentiates both
    both = jax.grad(lambda x: policy.policy_gradient_loss(x, x, advantages, level=level).sum())(x)
    np.testing.assert_array_equal(both, slope)


def test_clipped_tokens_have_no_gradient():
    """Ratios of 0, 1/2, 1, 2 and beyond the range of float32, for each sign of the advantage and for 0."""
    d = jnp.array([-1e4, -np.log(2), 0.0, np.log(2), 1e4], jnp.float32)
    x, old = jnp.tile(d, (3, 1)) - 1e4, jnp.full((3, 5), -1e4)
    value, slope, of_advantages = derivatives(x, old, jnp.array([1.0, -1.0, 0.0]))
    expected = [[0, -0.5, -1, -1.2, -1.2], [0.8, 0.8, 1, 2, INF], [0] * 5]
    np.testing.assert_allclose(value, expected, rtol=1e-3)  # log 2 is added to 1e4 in float32
    np.testing.assert_allclose(slope, [[0, -0.5, -1, 0, 0], [0, 0, 1, 2, INF], [0] * 5], rtol=1e-3)
    np.testing.assert_allclose(of_advantages[::2], [-(0 + 0.5 + 1 + 1.2 + 1.2)] * 2, rtol=1e-3)


def test_impossible_tokens():
    """−∞ under the new policy, the old one, both."""
    x, old = jnp.array([-INF, -1.0, -INF]), jnp.array([-1.0, -INF, -INF])
    value, slope, _ = derivatives(x, old, jnp.full(3, 2.0))
    np.testing.assert_allclose(value, [0, -2.4, -2], rtol=2 * EPS)
    np.testing.assert_array_equal(slope, [0, 0, -2])
    estimates = [policy.kl_estimate(x, old, kind=kind).tolist() for kind in ("k1", "k2", "k3")]
    assert estimates == [[-INF, INF, 0], [INF, INF, 0], [INF, INF, 0]]
    assert np.isfinite(jax.grad(lambda x: policy.kl_estimate(x, old, kind="k1").sum())(x)).all()


def test_sequences_count_their_own_tokens(rng):
    x, old, advantages = draw(rng, 4, 3), draw(rng, 4, 3), jnp.array([1.0, -1.0, 2.0, jnp.nan])
    where = jnp.array([[True, True, False], [True, False, False], [True, True, True], [False, False, False]])
    spoilt = jnp.where(where, x, jnp.nan)
    value, slope, of_advantages = derivatives(spoilt, old, advantages, where, level="sequence")
    keep = np.asarray(where)
    d = np.where(keep, np.asarray(x, np.float64) - old, 0).sum(-1) / np.maximum(keep.sum(-1), 1)
    a = np.nan_to_num(advantages)
    np.testing.assert_allclose(value, -np.minimum(np.exp(d) * a, np.clip(np.exp(d), 0.8, 1.2) * a), rtol=16 * EPS)
    assert not slope[~keep].any() and value[3] == 0 and of_advantages[3] == 0
    live = (np.where(a >= 0, np.exp(d) <= 1.2, np.exp(d) >= 0.8) * -np.exp(d) * a / np.maximum(keep.sum(-1), 1))[:, None]
    np.testing.assert_allclose(slope, np.where(keep, live, 0), rtol=16 * EPS)
    none = policy.policy_gradient_loss(x[:, :0], old[:, :0], advantages, level="sequence")
    assert not none.any()  # no tokens


def test_levels_agree_on_single_tokens(rng):
    x, old, advantages = draw(rng, 5, 1), draw(rng, 5, 1), jnp.array([1.0, -1.0, 2.0, -2.0, 0.5])
    token, sequence = (derivatives(x, old, advantages, level=level) for level in LEVELS)
    np.testing.assert_array_equal(token[0][:, 0], sequence[0])
    np.testing.assert_array_equal(token[1], sequence[1])


@pytest.mark.exhaustive
def test_masked_tokens_of_a_sequence_with_one_advantage(rng):
    x, old, where = draw(rng, 2, 3), draw(rng, 2, 3), jnp.array([[True, False, True], [False, False, False]])
    value, slope, of_advantages = derivatives(jnp.where(where, x, jnp.nan), old, jnp.array([1.0, jnp.nan]), where)
    whole, slopes, _ = derivatives(x, old, jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(value, jnp.where(where, whole, 0))
    np.testing.assert_array_equal(slope, jnp.where(where, slopes, 0))
    assert of_advantages[1] == 0 and np.isfinite(of_advantages[0])


def test_normalizers(rng):
    """The three means of `xentjax.policy` against loops."""
    x, mask = draw(rng, 3, 4), jnp.array([[True] * 4, [True, False, False, False], [True, True, False, False]])
    loss = policy.policy_gradient_loss(x, draw(rng, 3, 4), jnp.array([1.0, -1.0, 0.5]), where=mask)
    rows = [np.asarray(row, np.float64)[keep] for row, keep in zip(loss, np.asarray(mask), strict=True)]
    weights = mask.astype(jnp.float32) / jnp.maximum(mask.sum(-1, keepdims=True, dtype=jnp.float32), 1)
    tolerance = {"rtol": 8 * EPS}
    np.testing.assert_allclose(xentjax.weighted_mean(loss, where=mask), np.concatenate(rows).mean(), **tolerance)
    np.testing.assert_allclose(xentjax.weighted_mean(loss, weights), np.mean([row.mean() for row in rows]), **tolerance)
    np.testing.assert_allclose(xentjax.weighted_mean(loss), sum(row.sum() for row in rows) / mask.size, **tolerance)


@pytest.mark.exhaustive
def test_estimates_in_expectation(rng):
    """Over all tokens of a policy: k1 and k3 are the divergence. The gradient is 0 for k1, D(π‖ρ)' for k2 and D(ρ‖π)' for k3."""
    z, reference = (jnp.asarray(rng.normal(size=7), jnp.float32) for _ in range(2))
    p, log_reference = jax.nn.softmax(z), jax.nn.log_softmax(reference)

    def expected(z, kind):  # of samples that do not change with z
        return jnp.vdot(p, policy.kl_estimate(jax.nn.log_softmax(z), log_reference, kind=kind))

    @jax.jit
    def everything(z):
        return tuple(zip(*(jax.value_and_grad(expected)(z, kind) for kind in ("k1", "k2", "k3")), strict=True))

    values, slopes = everything(z)
    divergence = xentjax.information.kl_divergence_from_logits
    tolerance = {"rtol": 32 * EPS, "atol": 8 * EPS}
    np.testing.assert_allclose(values[::2], [divergence(z, reference)] * 2, **tolerance)
    np.testing.assert_allclose(slopes[0], np.zeros(7), **tolerance)
    np.testing.assert_allclose(slopes[1], jax.grad(divergence)(z, reference), **tolerance)
    np.testing.assert_allclose(slopes[2], jax.grad(divergence, 1)(reference, z), **tolerance)


NORMALIZERS = ("std", "mean", "leave_one_out")


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_equal_rewards_have_no_advantage(normalize):
    """Three rewards of 0.1, whose mean in float32 is not 0.1; a group of one sample; and both beside a group that differs."""
    rewards, groups = jnp.array([0.1, 0.1, 0.1, 5.0, 0.0, 1.0]), jnp.array([4, 4, 4, 9, -7, -7])

    def total(r, direction):
        return jnp.vdot(policy.group_advantages(r, groups, normalize=normalize), direction)

    value = policy.group_advantages(rewards, groups, normalize=normalize)
    assert not value[:4].any() and value[4] < 0 < value[5]
    direction = jnp.arange(6.0)
    slope, product = jax.jvp(lambda r: jax.grad(total)(r, direction), (rewards,), (jnp.ones(6),))
    assert np.isfinite(slope).all() and np.isfinite(product).all()
    if normalize == "std":
        assert not slope[:4].any()
    assert not policy.group_advantages(rewards[:3], 3, normalize=normalize).any()


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_groups(normalize, rng):
    """In any order, with a constant added, with samples that do not count, and with one that is NaN in another group."""
    rewards = (rng.integers(-3, 4, (2, 6)) / 4).astype(np.float32)
    rewards[:, 1] = 9
    advantages = functools.partial(policy.group_advantages, normalize=normalize)
    expected = np.asarray(advantages(rewards, 3))
    order = np.array([4, 0, 3, 1, 5, 2])
    ids = np.broadcast_to(order // 3, rewards.shape)
    np.testing.assert_allclose(advantages(rewards[:, order], ids), expected[:, order], rtol=4 * EPS, atol=4 * EPS)
    for scale in (2.0**100, 2.0**-100) if normalize == "std" else ():
        np.testing.assert_array_equal(advantages(rewards * np.float32(scale), 3), expected)
    np.testing.assert_array_equal(advantages(rewards + np.float32(2**20), 3), expected)  # exact sums of multiples of 1/4
    spoilt = np.pad(rewards.reshape(2, 2, 3), ((0, 0), (0, 0), (0, 2)), constant_values=np.nan).reshape(2, 10)
    where = np.broadcast_to(np.arange(10) % 5 < 3, (2, 10))
    found = np.asarray(advantages(spoilt, 5, where=where))
    np.testing.assert_allclose(found[where].reshape(2, 6), expected, rtol=2 * EPS)  # a constant n is divided by otherwise
    assert not found[~where].any() and not advantages(spoilt, 5, where=where & False).any()
    rewards[0, 0] = np.nan
    other = advantages(rewards, 3)
    assert np.isnan(other[0, :3]).all()
    np.testing.assert_array_equal(other[0, 3:], expected[0, 3:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("groups", [4, np.arange(16) % 4], ids=["size", "ids"])
def test_groups_over_devices(groups, rng):
    """A mesh with explicit axes splits the samples, so that each group lies on several devices."""
    rewards = jnp.asarray(rng.normal(size=16), jnp.float32)
    expected = policy.group_advantages(rewards, groups)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    split = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        given = groups if isinstance(groups, int) else jax.device_put(jnp.asarray(groups, jnp.int32), split)
        found = policy.group_advantages(jax.device_put(rewards, split), given)
    assert jax.typeof(found).sharding.spec == P("data")
    np.testing.assert_allclose(found, expected, rtol=4 * EPS)


@pytest.mark.exhaustive
def test_fused_and_dense(rng):
    """The loss of GRPO with a penalty on the divergence, per sequence, from hidden states [sequences, tokens, features]."""
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 5, 3), (3, 11)))
    tokens, mask = jnp.asarray(rng.integers(0, 11, (4, 5)), jnp.int32), jnp.asarray(np.arange(5) < np.array([[5], [2], [3], [1]]))
    old, reference = draw(rng, 4, 5), draw(rng, 4, 5)
    advantages = policy.group_advantages(jnp.array([1.0, 0.0, 1.0, 0.5]), 2)
    weights = mask.astype(jnp.float32) / mask.sum(-1, keepdims=True, dtype=jnp.float32)

    def fused(hidden, kernel):
        log_probs = xentjax.fuse_linear(xentjax.softmax_log_prob, reduction="none", chunk_size=3)(hidden, kernel, tokens, where=mask)
        loss = policy.policy_gradient_loss(log_probs, old, advantages, where=mask)
        return xentjax.weighted_mean(loss + 0.5 * policy.kl_estimate(log_probs, reference, where=mask), weights)

    def dense(hidden, kernel):
        table = jax.nn.log_softmax(jnp.einsum("...f,fv->...v", hidden, kernel))
        log_probs = jnp.take_along_axis(table, tokens[..., None], -1)[..., 0]
        ratio, a = jnp.exp(log_probs - old), jnp.broadcast_to(advantages[:, None], old.shape)
        loss = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
        loss += 0.5 * (jnp.exp(reference - log_probs) - (reference - log_probs) - 1)
        return (weights * jnp.where(mask, loss, 0)).sum(-1).mean()

    for got, expected in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(hidden, kernel)) for f in (fused, dense)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}(\n|$)")


def test_errors():
    x, loss, advantages = -jnp.ones((2, 3)), policy.policy_gradient_loss, policy.group_advantages
    with raises(ValueError, "policy_gradient_loss: old_log_probs must have shape (2, 3), the shape of log_probs; got (2, 4)."):
        loss(x, -jnp.ones((2, 4)), jnp.ones(2))
    with raises(
        ValueError, "policy_gradient_loss: advantages must have shape (2,), the shape of log_probs without its last axis; got (3,)."
    ):
        loss(x, x, jnp.ones(3))
    with raises(
        ValueError, "policy_gradient_loss: advantages must have shape (2,), the shape of log_probs without its last axis; got (2, 3)."
    ):
        loss(x, x, x, level="sequence")
    with raises(ValueError, "policy_gradient_loss: level must be one of 'token', 'sequence'; got 'batch'."):
        loss(x, x, x, level="batch")
    with raises(ValueError, "policy_gradient_loss: clip_low must be a finite number in [0, 1]; got 1.5."):
        loss(x, x, x, clip_low=1.5)
    with raises(ValueError, "policy_gradient_loss: log_probs must have an axis of tokens for level='sequence'; got a scalar."):
        loss(x[0, 0], x[0, 0], x[0, 0], level="sequence")
    with raises(ValueError, "kl_estimate: kind must be one of 'k1', 'k2', 'k3'; got 'k4'."):
        policy.kl_estimate(x, x, kind="k4")
    remedy = "For groups of different sizes, pass the group of each sample as an array of integers."
    with raises(ValueError, f"group_advantages: groups must divide 3, the last axis of rewards; got 2. {remedy}"):
        advantages(x, 2)
    broadcast = "Use jnp.broadcast_to(groups, (2, 3)) to broadcast it explicitly."
    with raises(ValueError, f"group_advantages: groups must have shape (2, 3), one group per sample of rewards; got (3,). {broadcast}"):
        advantages(x, jnp.arange(3))
    with raises(ValueError, "group_advantages: normalize must be one of 'std', 'mean', 'leave_one_out'; got None."):
        advantages(x, 3, normalize=None)


def test_checked_accepts_densities():
    x = jnp.array([0.5, -1.0])
    checked = xentjax.checked(jax.jit(policy.policy_gradient_loss))
    np.testing.assert_array_equal(checked(x, x, x), -x)
    with raises(ValueError, "policy_gradient_loss: old_log_probs[1] = nan is NaN."):
        checked(x, x.at[1].set(jnp.nan), x)
    with raises(ValueError, "policy_gradient_loss: advantages[0] = inf is infinite."):
        checked(x, x, x.at[0].set(INF))
