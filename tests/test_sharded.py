"""Classes split over devices: value and derivatives equal the dense ones, and nothing of class size is gathered."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_values import RTOL

import xentjax

CLASSES = 16


def sharded(case, kind, mesh, masked=False):
    """The case inside shard_map with its class axis split over the mesh, as a function of (z, labels, where)."""
    labels = P(None, "model") if kind == "distribution" and case.family == "classes" else P()
    given = arrays_of(case, masked)
    split = {name: P("model") if x.ndim == 1 else P() for name, x in given.items()}

    def local(z, labels, where, arrays):
        return case(z, labels, where=where, axis_name="model", **arrays)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "model"), labels, P(), split), out_specs=P())

    return lambda z, labels, where: mapped(z, labels, where, given)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def arrays_of(case, masked):
    """The keywords of a case that hold something for each class."""
    given = {name: jnp.asarray(x) for name, x in case.of_classes(CLASSES).items()}
    if "class_weights" in case.target:
        given["class_weights"] = jnp.linspace(0.5, 2.0, CLASSES)
    if masked:
        given["class_mask"] = jnp.arange(CLASSES) < 13  # the last shard is partly (with 8 devices wholly and partly) padding
    return given


def dense(case, masked):
    more = arrays_of(case, masked)
    return lambda z, labels, where: case(z, labels, where=where, **more)


ROWS = [
    pytest.param(c, k, 8, True, id=f"{c}-{k}")
    for c in cases.CATEGORICAL
    for k in c.kinds
    if c.thorough and (c.name != "row_statistics" or k == "index")
]
UNMASKED = [pytest.param(cases.CLASSES[4], k, 2, False, id=f"two-devices-{k}") for k in cases.CLASSES[4].kinds]


@pytest.mark.parametrize(("case", "kind", "devices", "masked"), ROWS + UNMASKED)
def test_equal_to_dense(case, kind, devices, masked, rng):
    mesh = mesh_of(devices)
    z, labels = case.draw(rng, (6,), classes=13, kind=kind)
    z = jnp.concatenate([z, z[:, :3] + 1], -1)
    if kind == "distribution":
        labels = jnp.pad(labels, ((0, 0), (0, 3)))
    z = z.at[0, 4].set(-jnp.inf) if "label_smoothing" not in case.target and case.family != "top_k" and kind == "index" else z
    where = jnp.array([True, True, False, True, True, True])
    z = z.at[2].set(jnp.nan)
    if kind == "index" and case.family == "classes":
        labels = labels.at[0].set(9).at[4].set(CLASSES)  # out of the global range, though not of int32
    v = jnp.asarray(rng.normal(size=z.shape), jnp.float32)

    def derivatives(loss):
        def total(z):
            return loss(z, labels, where).sum()

        value, tangent = jax.jvp(lambda z: loss(z, labels, where), (z,), (v,))
        return value, tangent, *jax.jvp(jax.grad(total), (z,), (v,))

    ours, theirs = (jax.jit(derivatives, static_argnums=0)(f) for f in (sharded(case, kind, mesh, masked), dense(case, masked)))
    for mine, expected, tolerance in zip(ours, theirs, (RTOL, 4 * RTOL, RTOL, 4 * RTOL), strict=True):  # sums of up to 16 terms along v
        steep = case.tolerance**2 if case.inputs == "cosines" else 1  # a scale of 30 or 64 enters second derivatives squared
        np.testing.assert_allclose(mine, expected, rtol=tolerance, atol=steep * tolerance)


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
