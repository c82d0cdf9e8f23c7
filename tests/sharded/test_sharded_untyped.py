"""Classes split over axes without types: `jax.shard_map(check_vma=False)`, `jax.pmap` and `jax.vmap(axis_name=…)`.

JAX transposes a sum over such an axis into another sum, so a gradient taken inside would be too large by the number of devices. It is
an error. Values, forward derivatives and the gradient of a whole `jax.vmap` are those of one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import xentjax
from tests.tables import cases

DEVICES, CLASSES = 4, 8
TOLERANCE = 3e-5  # of the largest component: float32, whose sums are taken in another order, squared scales of up to 64
pytestmark = pytest.mark.usefixtures("quick_compilation")
each_case = pytest.mark.parametrize("case", [c for c in cases.CATEGORICAL if c.thorough], ids=str)


def problem(case, rng):
    """Logits, labels, a direction, what there is per class, all over whole classes; labels are distributions where the loss takes them."""
    kind = case.kinds[-1]
    z, labels = case.draw(rng, (3,), classes=CLASSES, kind=kind)
    per_class = {name: jnp.asarray(x) for name, x in case.of_classes(CLASSES).items()}
    if "class_weights" in case.target:
        per_class["class_weights"] = jnp.linspace(0.5, 2.0, CLASSES)
    return z, labels, jnp.asarray(rng.normal(size=z.shape), z.dtype), per_class, kind == "distribution"


def split(x):
    """An array [..., classes] as [devices, ..., classes of a device]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], DEVICES, -1), -2, 0)


def join(x):
    """The inverse of `split`."""
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)


def per_device(case, z, labels, per_class, over_classes):
    """Losses as functions of a device's logits and of what else it holds, what each device holds, and along which axis it is mapped."""
    split_class = {name: split(x) if x.ndim == 1 else x for name, x in per_class.items()}
    axes = 0, (0 if over_classes else None), {name: 0 if x.ndim == 1 else None for name, x in per_class.items()}

    def losses(z, labels, per_class):
        return case(z, labels, axis_name="model", **per_class)

    return losses, (split(z), split(labels) if over_classes else labels, split_class), axes


def mesh():
    return jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def untyped_map(function, specs, out_specs):
    return jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=out_specs, check_vma=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [c for c in cases.CROSS_ENTROPY + cases.TOP_K + cases.STATISTICS if c.thorough], ids=str)
def test_value_tangent_and_outer_gradient_are_those_of_one_device(case, rng):
    z, labels, direction, per_class, over_classes = problem(case, rng)
    losses, arguments, axes = per_device(case, z, labels, per_class, over_classes)

    def forward(z, direction, labels, per_class):
        return jax.jvp(lambda z: losses(z, labels, per_class), (z,), (direction,))

    @jax.jit
    def both():
        mapped = jax.vmap(forward, (0, *axes), axis_name="model")(arguments[0], split(direction), *arguments[1:])
        outer = jax.grad(lambda z: jax.vmap(losses, axes, axis_name="model")(z, *arguments[1:])[0].sum())(arguments[0])
        value, tangent = jax.jvp(lambda z: case(z, labels, **per_class), (z,), (direction,))
        slope = jax.grad(lambda z: case(z, labels, **per_class).sum())(z)
        return (*(x[d] for x in mapped for d in (0, DEVICES - 1)), join(outer)), (value, value, tangent, tangent, slope)

    for mine, expected in zip(*both(), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.exhaustive
@each_case
def test_a_gradient_inside_is_an_error(case, rng):
    z, labels, _, per_class, over_classes = problem(case, rng)
    losses, arguments, axes = per_device(case, z, labels, per_class, over_classes)

    def slope(z, labels, per_class):
        return jax.grad(lambda z: losses(z, labels, per_class).sum())(z)

    specs = P(None, "model"), P(None, "model") if over_classes else P(), {k: P("model") if a == 0 else P() for k, a in axes[2].items()}
    for run, given in (
        (jax.vmap(slope, axes, axis_name="model"), arguments),
        (untyped_map(slope, specs, P(None, "model")), (z, labels, per_class)),
    ):
        with pytest.raises(ValueError, match=r"over axis 'model' needs jax\.shard_map with check_vma=True"):
            jax.make_jaxpr(run)(*given)


def weighted(values):
    return xentjax.weighted_mean(values, axis_name="model")


def weighted_pair(values):
    return xentjax.weighted_sum(values).psum("model").mean()


def confused(values):
    nothing = jnp.zeros(values.shape, jnp.int32)
    return xentjax.metrics.confusion(nothing, nothing, classes=2, weights=values).psum("model").counts.sum() / 8


def calibrated(values):
    logits, labels = jnp.zeros((*values.shape, 2)), jnp.zeros(values.shape, jnp.int32)
    return xentjax.metrics.calibration(logits, labels, weights=values).psum("model").counts.sum() / 8


def ranked(values):
    return xentjax.metrics.ranking(jnp.ones_like(values), jnp.ones(values.shape, bool), weights=values).psum("model").positives.sum() / 8


@pytest.mark.exhaustive
@pytest.mark.parametrize("mean", [weighted, weighted_pair, confused, calibrated, ranked])
def test_means_over_devices(mean):
    values = jnp.arange(8.0)
    for run in (
        jax.vmap(jax.grad(mean), axis_name="model"),
        jax.pmap(jax.grad(mean), "model"),
        untyped_map(jax.grad(mean), P("model"), P("model")),
        jax.grad(lambda x: untyped_map(mean, P("model"), P())(x).sum()),
    ):
        with pytest.raises(ValueError, match=r"over axis 'model' needs jax\.shard_map with check_vma=True"):
            jax.make_jaxpr(run)(values.reshape(4, 2))
    outer = jax.grad(lambda x: jax.vmap(mean, axis_name="model", out_axes=None)(x))(values.reshape(4, 2))
    np.testing.assert_array_equal(outer, np.full((4, 2), 1 / 8))
    inner = untyped_map(lambda x: jax.jvp(mean, (x,), (x,)), P("model"), (P(), P()))(values)
    np.testing.assert_array_equal(inner, (3.5, 3.5))


def test_one_axis_of_devices_and_one_of_vmap(rng):
    z, y = jnp.asarray(rng.normal(size=(3, 2, 16)), jnp.float32), jnp.array([1, 13])  # 16 classes: 2 in each of 2 lanes of 4 devices

    def of_batch(z):
        return jax.jvp(lambda z: xentjax.softmax_cross_entropy(z, y, axis_name=("model", "lanes")), (z,), (z,))

    def of_device(z):  # [3, 2, 1, 2 lanes, 2 classes]
        return jax.vmap(jax.vmap(of_batch), 2, axis_name="lanes", out_axes=None)(z.squeeze(2))

    value, tangent = untyped_map(of_device, P(None, None, "model"), P())(z.reshape(3, 2, 4, 2, 2))
    z, labels = np.asarray(z, np.float64), np.asarray(y)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    picked = z[:, range(2), labels]
    np.testing.assert_allclose(value, np.log(np.exp(z).sum(-1)) - picked, rtol=TOLERANCE)
    np.testing.assert_allclose(tangent, (p * z).sum(-1) - picked, rtol=TOLERANCE)


def test_metrics_over_devices_keep_their_values(rng):
    z, y = jnp.asarray(rng.normal(size=(5, CLASSES)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, 5), jnp.int32)
    hits = untyped_map(functools.partial(xentjax.metrics.accuracy, axis_name="model"), (P(None, "model"), P()), P())(z, y)
    np.testing.assert_array_equal(hits, np.asarray(z).argmax(-1) == np.asarray(y))
