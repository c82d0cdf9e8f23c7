"""Wrong mesh axes raise while tracing, and say what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax

MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
Z, Y, W = jnp.zeros((8, 16)), jnp.zeros(8, jnp.int32), jnp.ones(16)
SPLIT = P("data", "model")


def over_devices(function, specs, *arguments, check_vma=True, out_specs=None):
    out_specs = P("data") if out_specs is None else out_specs
    mapped = jax.shard_map(function, mesh=MESH, in_specs=specs, out_specs=out_specs, check_vma=check_vma)
    return jax.jit(mapped)(*arguments)


def loss(z, y, **more):
    return xentjax.softmax_cross_entropy(z, y, axis_name="model", **more)


@pytest.mark.parametrize(
    "function",
    [
        xentjax.softmax_cross_entropy,
        xentjax.poly_cross_entropy,
        xentjax.row_statistics,
        functools.partial(xentjax.logit_adjusted_cross_entropy, class_log_prior=W),
        xentjax.metrics.accuracy,
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap])
def test_outside_shard_map(function, wrap):
    with pytest.raises(ValueError, match=r"axis_name must name an axis of a surrounding jax\.shard_map; got 'model'"):
        wrap(functools.partial(function, axis_name="model"))(Z, Y)


def test_an_axis_of_another_mesh():
    with pytest.raises(ValueError, match=r"axis_name must name an axis of a surrounding .* got 'tensor'"):
        over_devices(lambda z, y: xentjax.softmax_cross_entropy(z, y, axis_name="tensor"), (SPLIT, P("data")), Z, Y)


def test_labels_split_along_classes():
    with pytest.raises(ValueError, match="softmax_cross_entropy: labels must be the same on all devices of mesh axis 'model'"):
        over_devices(loss, (SPLIT, P(("data", "model"))), Z, jnp.zeros(32, jnp.int32))
    with pytest.raises(ValueError, match="labels must be the same on all devices"):  # of one shape with the others by chance
        over_devices(loss, (P(None, "model"), P("model")), jnp.zeros((2, 16)), Y)


def test_labels_split_along_classes_on_an_explicit_mesh():
    z, y = (jax.device_put(x, NamedSharding(EXPLICIT, s)) for x, s in ((Z, SPLIT), (Y, P("model"))))
    with pytest.raises(ValueError, match="labels must not be split over mesh axis 'model', which splits the classes of logits"):
        jax.jit(xentjax.softmax_cross_entropy)(z, y)


def test_where_split_along_classes():
    with pytest.raises(ValueError, match="where must be the same on all devices of mesh axis 'model'"):
        over_devices(lambda z, y, w: loss(z, y, where=w), (P(None, "model"), P(), P("model")), jnp.zeros((2, 16)), Y[:2], jnp.ones(8, bool))


def test_logits_that_are_not_split():
    with pytest.raises(
        ValueError, match=r"logits must be split along the class axis over mesh axis 'model'.*got the same .*shape \(4, 16\)"
    ):
        over_devices(loss, (P("data"), P("data")), Z, Y)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"class_weights": W}, r"class_weights must have shape \(4,\).*got \(16,\). Split the classes of .* over mesh axis 'model'"),
        ({"class_mask": W > 0}, r"class_mask must have shape \(4,\).*got \(16,\). Split the classes of .* over mesh axis 'model'"),
    ],
)
def test_what_there_is_per_class_on_all_devices(more, message):
    with pytest.raises(ValueError, match=message):
        over_devices(lambda z, y: loss(z, y, **more), (SPLIT, P("data")), Z, Y)


def test_distributions_that_are_not_split():
    with pytest.raises(ValueError, match=r"labels must have shape \(4, 4\).*got \(4, 16\). Split the classes of .* over mesh axis 'model'"):
        over_devices(loss, (SPLIT, P("data")), Z, Z)


def test_a_label_on_padding_matches_no_class():
    # 13 classes on 4 devices: three columns of the last device are padding, whose logits are the largest
    z = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32).at[:, 13:].set(9.0)
    y = jnp.array([0, 12, 13, 14, 15, 16, -1, 3], jnp.int32)

    def both(z, y, mask):
        return loss(z, y, class_mask=mask), jax.grad(lambda z: loss(z, y, class_mask=mask).sum())(z)

    values, slopes = over_devices(
        both,
        (SPLIT, P("data"), P("model")),
        z,
        y,
        jnp.arange(16) < 13,
        out_specs=(P("data"), SPLIT),
    )
    existing = np.asarray(z, np.float64)[:, :13]
    expected = np.log(np.exp(existing).sum(-1)) - existing[range(8), np.minimum(y, 12)]
    np.testing.assert_allclose(values[jnp.array([0, 1, 7])], expected[[0, 1, 7]], rtol=1e-6)  # one rounding of a sum of 13 terms
    assert np.isposinf(values[2:5]).all() and np.isnan(values[5:7]).all()
    assert (np.asarray(slopes)[jnp.array([0, 1, 7]), 13:] == 0).all()


# Fused ---------------------------------------------------------------------------------------------------------------------

H, K = jnp.ones((8, 5)), jnp.zeros((5, 16))
LAYER = P("data"), P(None, "model"), P("data")


def fused(loss_fn=loss, **more):
    run = xentjax.fuse_linear(loss_fn, reduction="sum", **more)
    return lambda h, k, y: jax.lax.psum(run(h, k, y), "data")


def test_without_types_a_fused_loss_over_devices_is_refused():
    with pytest.raises(ValueError, match=r"loss_fn that uses mesh axis 'model' needs jax\.shard_map with check_vma=True"):
        over_devices(fused(), LAYER, H, K, Y, check_vma=False, out_specs=P())


def test_losses_that_differ_between_the_devices_that_share_them():
    def differing(z, y):
        return loss(z, y) * (1.0 + jax.lax.axis_index("model").astype(jnp.float32))

    with pytest.raises(ValueError, match="must return the same losses on all devices of mesh axis 'model'"):
        over_devices(fused(differing), LAYER, H, K, Y, out_specs=P("model"))


@pytest.mark.parametrize("name", ["weights", "where"])
def test_weights_that_differ_between_devices_that_share_a_loss(name):
    def run(h, k, y, w):
        return xentjax.fuse_linear(loss, reduction="sum")(h, k, y, **{name: w if name == "weights" else w > 0})

    with pytest.raises(ValueError, match=f"{name} must be the same on all devices of mesh axis 'model'"):
        over_devices(run, (*LAYER, P(("data", "model"))), H, K, Y, jnp.ones(32))


def test_a_closed_over_array_that_all_devices_would_share():
    def run(h, k, y, temperature, vary):
        if vary:
            temperature = (
                jax.lax.pcast(temperature, "data", to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(temperature, "data")
            )
        return fused(lambda z, y: loss(z / temperature, y))(h, k, y)

    def slope(vary):
        mapped = functools.partial(run, vary=vary)
        return jax.grad(lambda t: over_devices(mapped, (*LAYER, P()), H, K.at[0].set(jnp.arange(16.0)), Y, t, out_specs=P()))(2.0)

    with pytest.raises(ValueError, match=r"must vary over mesh axes \['data'\] as the examples do.*pcast"):
        slope(False)
    z = np.arange(16.0)

    def total(t):  # all labels are 0
        return 8 * (np.log(np.exp(z / t).sum()) - z[0] / t)

    np.testing.assert_allclose(slope(True), (total(2 + 1e-6) - total(2 - 1e-6)) / 2e-6, rtol=1e-5)
