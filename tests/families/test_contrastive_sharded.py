"""Contrastive losses of a batch that is sharded over devices: losses and derivatives equal those of the whole batch.

`test_contrastive.py` tests what the devices exchange.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xentjax._contrastive import losses as contrastive

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, FEATURES = 16, 4
LABELS = jnp.resize(jnp.array([0, 1, 2, 0, 3, 1, 4]), BATCH)
TOLERANCE = 1e-12  # float64


def of_pairs(loss, parameter):
    """A loss as a function of x, y, a learned parameter, labels, which it ignores, and a mask, all of this device."""
    return lambda x, y, value, labels, where, **more: loss(x, y, where=where, **{parameter: value}, **more)


LOSSES = {
    "info_nce": of_pairs(contrastive.info_nce, "temperature"),
    "nt_xent": of_pairs(contrastive.nt_xent, "temperature"),
    "clip_loss": of_pairs(contrastive.clip_loss, "logit_scale"),
    "siglip_loss": of_pairs(contrastive.siglip_loss, "logit_bias"),
    "clip_loss-labels": lambda x, y, value, labels, where, **more: contrastive.clip_loss(
        x, y, labels=labels, logit_scale=value, where=where, **more
    ),
    "siglip_loss-labels": lambda x, y, value, labels, where, **more: contrastive.siglip_loss(
        x, y, labels=labels, logit_bias=value, where=where, **more
    ),
    "supervised": lambda x, y, value, labels, where, **more: contrastive.supervised_contrastive_loss(
        x + y, labels, temperature=value, where=where, **more
    ),
}
names = pytest.mark.parametrize("name", LOSSES)


def mesh_of(*sizes):
    axes = ("data", "more")[: len(sizes)]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[: np.prod(sizes)])


def draw(rng):
    x = rng.normal(size=(BATCH, FEATURES))
    return jnp.asarray(x), jnp.asarray(x + rng.normal(size=x.shape)), jnp.asarray(0.7)


def derivatives(losses, arguments, directions):
    """Losses and their tangents; value, gradient and Hessian-vector product of Σ w·loss. `losses` are functions of both."""
    each, weighted = losses

    def total(*x):
        return weighted(*x)

    slope = jax.grad(total, range(len(arguments)))
    return jax.jvp(each, arguments, directions), total(*arguments), jax.jvp(slope, arguments, directions)


def sharded(name, mesh, where, chunk_size):
    """Functions that return the losses [batch] and Σ w·loss. The sum over devices is a psum inside `jax.shard_map`."""
    axes = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
    rows = P(axes)

    def local(x, y, value, labels, where):
        return LOSSES[name](x, y, value, labels, where, axis_name=axes, chunk_size=chunk_size)

    def local_sum(w, *arguments):
        return lax.psum(jnp.sum(w * local(*arguments)), axes)

    specs = (rows, rows, P(), rows, rows)
    each = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows)
    total = jax.shard_map(local_sum, mesh=mesh, in_specs=(rows, *specs), out_specs=P())
    w = jnp.linspace(0.5, 2, BATCH)
    return lambda x, y, v: each(x, y, v, LABELS, where), lambda x, y, v: total(w, x, y, v, LABELS, where)


def dense(name, where):
    def each(x, y, value):
        return LOSSES[name](x, y, value, LABELS, where)

    return each, lambda *arguments: jnp.sum(jnp.linspace(0.5, 2, BATCH) * each(*arguments))


def assert_equal(losses, expected, rng, where):
    """The losses and derivatives are those of the whole batch."""
    arguments = draw(rng)
    directions = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), arguments)
    x, y, value = arguments
    spoilt = jnp.where(where[:, None], x, jnp.nan), y, value
    theirs = jax.jit(lambda a, d: derivatives(expected, a, d))(arguments, directions)
    ours = jax.jit(lambda a, d: derivatives(losses, a, d))(spoilt, directions)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE * np.abs(other).max())


@names
@pytest.mark.parametrize(("devices", "chunk_size"), [(2, None), (4, 3), (8, None)])
def test_equal_to_the_whole_batch(name, devices, chunk_size, rng, x64):
    where = (jnp.arange(BATCH) % 7 != 3) & (jnp.arange(BATCH) < 14)  # no example of the last of eight devices counts
    assert_equal(sharded(name, mesh_of(devices), where, chunk_size), dense(name, where), rng, where)


@pytest.mark.parametrize("name", ["nt_xent", "siglip_loss"])
def test_two_mesh_axes(name, rng, x64):
    where = jnp.ones(BATCH, bool)
    assert_equal(sharded(name, mesh_of(2, 2), where, None), dense(name, where), rng, where)


def test_negatives_are_the_same_on_every_device(rng, x64):
    x, y, _ = draw(rng)
    more = jnp.asarray(rng.normal(size=(5, FEATURES)))

    def run(x, y, more):
        return contrastive.info_nce(x, y, negatives=more, axis_name="data")

    ours = jax.shard_map(run, mesh=mesh_of(4), in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
    both = [
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))
        for f in (ours, lambda x, y, more: contrastive.info_nce(x, y, negatives=more))
    ]
    for mine, other in zip(*(jax.tree.leaves(f(x, y, more)) for f in both), strict=True):
        np.testing.assert_allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE * np.abs(other).max())


@pytest.mark.exhaustive
@names
def test_gradients_inside_the_mapped_function(name, rng, x64):
    """As in a training step: the gradient of the psum on each device. JAX sums the gradient of replicated values over devices."""
    arguments, where = draw(rng), jnp.ones(BATCH, bool)

    def step(x, y, value, labels):
        def total(x, y, value):
            return lax.psum(jnp.sum(LOSSES[name](x, y, value, labels, None, axis_name="data")), "data")

        return jax.grad(total, (0, 1, 2))(x, y, value)

    rows = P("data")
    slopes = jax.jit(jax.shard_map(step, mesh=mesh_of(4), in_specs=(rows, rows, P(), rows), out_specs=(rows, rows, P())))(
        *arguments, LABELS
    )
    expected = jax.jit(jax.grad(lambda *a: jnp.sum(LOSSES[name](*a, LABELS, where)), (0, 1, 2)))(*arguments)
    for mine, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE * np.abs(other).max())


@pytest.mark.exhaustive
@names
def test_gradients_inside_an_axis_without_types(name, rng, x64):
    """There the gradient is that of the sum over devices, even without a psum: the transpose of all_gather is a sum over devices."""
    x, y, value = draw(rng)

    def slopes(x, y, value, labels, **more):
        return jax.grad(lambda *a: jnp.sum(LOSSES[name](*a, labels, None, **more)), (0, 1, 2))(x, y, value)

    @jax.jit
    def both():
        shares = (a.reshape(4, BATCH // 4, *a.shape[1:]) for a in (x, y, LABELS))
        of_x, of_y, of_value = jax.vmap(lambda x, y, labels: slopes(x, y, value, labels, axis_name="data"), axis_name="data")(*shares)
        # the gradient of the shared value is the sum of the devices' gradients
        return (of_x.reshape(x.shape), of_y.reshape(y.shape), of_value.sum()), slopes(x, y, value, LABELS)

    for mine, expected in zip(*both(), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
