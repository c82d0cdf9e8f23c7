"""Losses of routers: padding, microbatches, devices, and their scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import xentjax
from tests.sharded.test_sharded import mesh_of
from tests.tables.table_routing import balance

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = float(jnp.finfo(jnp.float32).eps)
CLOSE = {"rtol": 20 * EPS, "atol": 4 * EPS}  # sums of a few terms of order 1


def test_scale():
    """1 at balance for every top_k, and the number of experts if all tokens go to one expert."""
    even = 40.0 * jnp.eye(4)
    np.testing.assert_allclose(xentjax.load_balancing_loss(even, top_k=1), 1, **CLOSE)
    np.testing.assert_allclose(xentjax.load_balancing_loss(jnp.zeros((3, 4)), top_k=2), 1, **CLOSE)
    np.testing.assert_allclose(xentjax.load_balancing_loss(jnp.broadcast_to(even[0], (5, 4)), top_k=1), 4, **CLOSE)


def test_padding_microbatches_and_devices(rng):
    """Eight sequences of four tokens, one without any token. Wrong numbers of padding are never read."""
    logits = jnp.asarray(2 * rng.normal(size=(8, 4, 5)), jnp.float32)
    counts = jnp.asarray(rng.uniform(size=(8, 4)) < 0.6).at[3].set(False).at[0, 0].set(True)
    padded = jnp.where(counts[..., None], logits, jnp.nan)
    loss = functools.partial(xentjax.load_balancing_loss, top_k=2)

    def whole(z):
        return loss(z, where=counts)

    def microbatches(z):
        loads = [xentjax.expert_load(z[i : i + 2], top_k=2, where=counts[i : i + 2]) for i in range(0, 8, 2)]
        return sum(loads[1:], loads[0]).mean().imbalance

    def devices(z):
        shard = functools.partial(jax.shard_map, mesh=mesh_of(4), in_specs=(P("model"), P("model")), out_specs=P())
        return shard(lambda z, counts: loss(z, where=counts, axis_name="model"))(z, counts)

    expected = balance(np.float64(logits[counts]), 2)
    slopes = []
    for function in (whole, microbatches, devices):
        value, slope = jax.jit(jax.value_and_grad(function))(padded)
        np.testing.assert_allclose(value, expected, **CLOSE)
        slopes.append(np.asarray(slope))
        np.testing.assert_allclose(slopes[-1], slopes[0], **CLOSE)
        assert np.all(slopes[-1][~np.asarray(counts)] == 0)
    p = np.asarray(jax.nn.softmax(logits))
    f = np.asarray(xentjax.expert_load(padded, top_k=2, where=counts).mean().assigned)
    kept = np.asarray(counts, np.float32)[..., None]
    closed = 5 / kept.sum() * p * (f - np.sum(p * f, -1, keepdims=True)) * kept
    np.testing.assert_allclose(slopes[0], closed, **CLOSE)

    each = loss(padded, where=counts, per="sequence")
    for i in range(8):
        rows = np.float64(logits[i][counts[i]])
        np.testing.assert_allclose(each[i], balance(rows, 2) if len(rows) else 0, **CLOSE)


def test_errors():
    z = jnp.zeros((3, 4))
    for arguments, message in (
        ({"top_k": 5}, "load_balancing_loss: top_k must be at most 4, the number of experts; got 5"),
        ({"top_k": 1, "per": "token"}, "per must be one of 'batch', 'sequence'; got 'token'"),
        ({"top_k": 1, "where": jnp.ones(4, bool)}, r"where must have shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            xentjax.load_balancing_loss(z, **arguments)
    with pytest.raises(ValueError, match=r"router_logits must have shape \[..., tokens, experts\]"):
        xentjax.load_balancing_loss(z[0], top_k=1)
