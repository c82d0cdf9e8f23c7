"""Classes split over devices: what test_sharded_product.py does not ask. Margins, collectives, hits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from tests.properties.test_values import RTOL

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = 16


def mesh_of(devices):
    return jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def test_a_confident_label_keeps_its_loss_across_devices():
    mesh = mesh_of(8)
    z = jnp.zeros((1, CLASSES)).at[0, 11].set(50.0)
    loss = jax.shard_map(
        functools.partial(xentjax.softmax_cross_entropy, axis_name="model"), mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P()
    )
    np.testing.assert_allclose(loss(z, jnp.array([11])), np.log1p(15 * np.exp(-50.0)), rtol=58 * RTOL / 40)


def test_collectives_are_all_reduces_of_one_number_per_example(rng):
    mesh = mesh_of(8)
    loss = jax.shard_map(
        functools.partial(xentjax.softmax_cross_entropy, axis_name="model"), mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P()
    )
    z = jax.ShapeDtypeStruct((32, 1024), jnp.float32, sharding=NamedSharding(mesh, P(None, "model")))
    y = jax.ShapeDtypeStruct((32,), jnp.int32, sharding=NamedSharding(mesh, P()))
    text = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).sum())).lower(z, y).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    reduces = [line for line in text.splitlines() if "all-reduce(" in line]
    assert reduces and not any("1024]" in line or "128]" in line for line in reduces)


@pytest.mark.parametrize("devices", [8])
def test_largest_logit_and_hits_across_devices(devices, rng):
    mesh = mesh_of(devices)
    z = jnp.asarray(rng.normal(size=(20, CLASSES)), jnp.float32)
    y = jnp.asarray(rng.integers(0, CLASSES, 20), jnp.int32).at[:10].set(jnp.argmax(z[:10], -1).astype(jnp.int32))
    found = jax.shard_map(
        functools.partial(xentjax.row_statistics, axis_name="model"), mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P()
    )(z, y)
    np.testing.assert_array_equal(found.max_logit, z.max(-1))
    np.testing.assert_array_equal(found.correct, np.asarray(z).argmax(-1) == np.asarray(y))


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, "model")], ids=["examples", "both", "classes"])
def test_top_k_labels_on_an_explicit_mesh(spec, rng):
    z, ids = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), jnp.asarray(rng.integers(0, 6, (8, 2)), jnp.int32)
    t = 0.5 * np.eye(6)[np.asarray(ids)].sum(-2)
    p = np.exp(np.asarray(z, np.float64))
    p /= p.sum(-1, keepdims=True)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        labels = jax.device_put((ids, jnp.full((8, 2), 0.5)), NamedSharding(mesh, P(spec[0])))
        slope = jax.jit(jax.grad(lambda z: xentjax.softmax_cross_entropy_with_top_k_labels(z, *labels).sum()))
        np.testing.assert_allclose(slope(jax.device_put(z, NamedSharding(mesh, spec))), p - t, rtol=RTOL, atol=RTOL)
