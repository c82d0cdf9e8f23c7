"""fuse_linear_sharded: values and gradients equal the definition, whether the split is given or read from the arguments."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, LENGTH, FEATURES, CLASSES = 4, 12, 5, 16
TOLERANCE = 2e-6  # sums of up to 48 terms in float32, of the largest component


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh) if request.param == AxisType.Explicit else contextlib.nullcontext():
        yield mesh


@pytest.fixture
def arrays(mesh, rng):
    """Hidden, kernel, labels and which tokens count, on the mesh but not split. Other tokens hold NaN and labels of no class."""
    hidden, kernel = rng.normal(size=(BATCH, LENGTH, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    where = rng.uniform(size=(BATCH, LENGTH)) < 0.7
    where[0] = False  # on some devices no token counts
    labels = np.where(where, rng.integers(0, CLASSES, where.shape), -100)
    hidden[~where] = np.nan
    made = np.float32(hidden), np.float32(kernel), np.int32(labels), where
    return tuple(jax.device_put(x, NamedSharding(mesh, P())) for x in made)


def definition(hidden, kernel, labels, where, weights=None, bias=0.0):
    """Losses, Σ w·loss / Σ w, and its gradients of hidden and kernel, in float64."""
    where = np.asarray(where)
    h, k = np.where(where[..., None], hidden, 0).astype(np.float64), np.asarray(kernel, np.float64)
    z = h @ k + bias
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    onehot = np.arange(k.shape[1]) == np.asarray(labels)[..., None]
    w = where * (np.ones(where.shape) if weights is None else np.asarray(weights, np.float64))
    losses = -np.log(np.where(onehot, p, 1)).sum(-1) * w
    slope = (p - onehot) * w[..., None] / w.sum()
    return losses, losses.sum() / w.sum(), slope @ k.T, np.einsum("blf,blc->fc", h, slope)


def close(got, expected, tolerance=TOLERANCE):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), e, rtol=0, atol=tolerance * np.abs(e).max())


def put(mesh, *pairs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]


def slopes(fused, arrays, **more):
    hidden, kernel, labels, where = arrays
    return jax.value_and_grad(lambda h, k: fused(h, k, labels, where=where, **more), (0, 1))(hidden, kernel)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tokens", [P("data"), P(None, "data"), P(("data", "model")), P()], ids=str)
def test_split_as_the_options_say(mesh, arrays, tokens):
    named = {"mesh": mesh, "tokens": tokens, "axis_name": () if "model" in str(tokens) else "model"}
    _, *expected = definition(*arrays)
    arrays = (jnp.tile(arrays[0], (2, 1, 1)), arrays[1], *(jnp.tile(x, (2, 1)) for x in arrays[2:]))  # 8 sequences for 8 devices
    value, (of_hidden, of_kernel) = jax.jit(
        functools.partial(slopes, xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, chunk_size=5, **named))
    )(arrays)
    close((value, 2 * of_hidden[:BATCH], of_kernel), expected)


def test_split_as_the_arguments_are(mesh, arrays):
    hidden, kernel, labels, where = arrays
    hidden, kernel = put(mesh, (hidden, P("data")), (kernel, P(None, "model")))
    fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy)
    _, mean, of_hidden, of_kernel = definition(*arrays)
    close(fused(hidden, kernel, labels, where=where), mean)
    close(fused(hidden, np.asarray(arrays[1]), labels, where=where), mean)  # a NumPy kernel is on no mesh, so it is not split
    run = (
        fused
        if mesh.axis_types[0] == AxisType.Explicit
        else xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model")
    )
    value, found = jax.jit(lambda h, k: slopes(run, (h, k, labels, where)))(hidden, kernel)
    close((value, *found), (mean, of_hidden, of_kernel))
    assert found[0].sharding.is_equivalent_to(hidden.sharding, 3) and found[1].sharding.is_equivalent_to(kernel.sharding, 2)


def test_the_mesh_of_set_mesh(mesh, arrays):
    hidden, kernel, labels, where = map(np.asarray, arrays)
    fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, tokens=P("data"), axis_name="model")
    with jax.set_mesh(mesh):
        close(jax.jit(fused)(hidden, kernel, labels, where=where), definition(*arrays)[1])


def test_features_that_are_split_are_gathered_once(mesh, arrays):
    hidden, kernel, labels, where = arrays
    wide = jnp.pad(hidden, ((0, 0), (0, 0), (0, 1))), jnp.pad(kernel, ((0, 1), (0, 0)))  # 6 features for 2 devices
    h, k = put(mesh, (wide[0], P()), (wide[1], P("data", "model")))
    fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model")
    value, found = slopes(fused, (h, k, labels, where))
    _, mean, of_hidden, of_kernel = definition(*arrays)
    close((value, np.asarray(found[0])[..., :-1], np.asarray(found[1])[:-1]), (mean, of_hidden, of_kernel))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes_first", [False, True])
def test_reductions_weights_and_bias(mesh, arrays, rng, reduction, classes_first):
    hidden, kernel, labels, where = arrays
    weights, bias = put(mesh, (np.float32(rng.uniform(size=where.shape)), P()), (np.float32(rng.normal(size=CLASSES)), P()))
    fused = xentjax.fuse_linear_sharded(
        xentjax.softmax_cross_entropy,
        mesh=mesh,
        tokens=P("data"),
        axis_name="model",
        reduction=reduction,
        classes_first=classes_first,
        chunk_size=6,
    )

    @jax.jit
    def found(h, k, b, w):
        def value(h, k, b, w):
            return fused(h, k.T if classes_first else k, labels, where=where, weights=w, bias=b).sum()

        return value(h, k, b, w), *jax.grad(value, (0, 1, 2, 3))(h, k, b, w)

    value, of_hidden, of_kernel, of_bias, of_weights = found(hidden, kernel, bias, weights)
    losses, mean, h_bar, k_bar = definition(*arrays, weights, np.asarray(bias, np.float64))
    total = np.asarray(weights, np.float64)[np.asarray(where)].sum()
    scale = 1.0 if reduction == "mean" else total
    close((value, of_hidden, of_kernel), (mean * scale, h_bar * scale, k_bar * scale))
    each = np.where(where, losses / np.where(where, weights, 1), 0)
    close(of_weights, np.where(where, (each - mean) / total, 0) if reduction == "mean" else each)
    step = 1e-6  # of a central difference in float64
    shifted = [definition(*arrays, weights, np.asarray(bias, np.float64) + s * step * np.eye(CLASSES)[3])[1] for s in (1, -1)]
    close(of_bias[3], np.asarray((shifted[0] - shifted[1]) / (2 * step) * scale), 1e-5)


def test_values_per_token_are_split_as_the_tokens_are(mesh, arrays):
    hidden, kernel, labels, where = arrays
    fused = xentjax.fuse_linear_sharded(
        lambda z, y, *, axis_name: (xentjax.softmax_cross_entropy(z, y, axis_name=axis_name), y),
        mesh=mesh,
        tokens=P("data"),
        axis_name="model",
        reduction="none",
        has_aux=True,
    )
    losses, aux = fused(hidden, kernel, labels, where=where)
    close(losses, definition(*arrays)[0])
    np.testing.assert_array_equal(aux, np.where(where, labels, 0))
    assert losses.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


def test_arrays_per_class_are_split_and_differentiated(mesh, arrays, rng):
    hidden, kernel, labels, where = arrays
    parameters = put(mesh, (np.float32(rng.normal(size=CLASSES)), P()), (np.float32(1.7), P()))

    def loss(z, y, *, prior, temperature, axis_name):
        return xentjax.softmax_cross_entropy(z / temperature + prior[None], y, axis_name=axis_name)

    fused = xentjax.fuse_linear_sharded(loss, mesh=mesh, tokens=P("data"), axis_name="model", chunk_size=6)
    of_prior, of_temperature = jax.jit(jax.grad(lambda p, t: fused(hidden, kernel, labels, where=where, prior=p, temperature=t), (0, 1)))(
        *parameters
    )

    def mean(prior, temperature):
        return definition(hidden, np.asarray(kernel, np.float64) / temperature, labels, where, bias=prior)[1]

    prior, step = np.asarray(parameters[0], np.float64), 1e-6
    close(of_temperature, np.asarray((mean(prior, 1.7 + step) - mean(prior, 1.7 - step)) / (2 * step)), 1e-5)
    ends = [[mean(prior + s * step * e, np.float32(1.7)) for e in np.eye(CLASSES)] for s in (1, -1)]
    close(of_prior, (np.asarray(ends[0]) - np.asarray(ends[1])) / (2 * step), 1e-5)


def test_half_precision_sums_in_float32(mesh, arrays):
    hidden, kernel, labels, where = arrays
    h, k = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model", chunk_size=6)
    value, found = jax.jit(functools.partial(slopes, fused))((h, k, labels, where))
    _, mean, *expected = definition(h.astype(jnp.float32), k.astype(jnp.float32), labels, where)
    close(value, mean)
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    close(found, expected, 2**-7)  # the slope of the logits and the results are rounded to 8 bits


def test_under_vmap(mesh, arrays):
    hidden, kernel, labels, where = arrays
    fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model", chunk_size=6)
    values = jax.vmap(lambda k: fused(hidden, k, labels, where=where))(jnp.stack([kernel, 2 * kernel]))
    close(values, np.asarray([definition(hidden, s * kernel, labels, where)[1] for s in (1, 2)]))


@pytest.mark.exhaustive
def test_parts_of_the_batch_and_steps_of_accumulation_make_one_batch(mesh, arrays):
    """Three steps with two very uneven parts each. Sums and weights are added over devices and steps separately, and divided once."""
    hidden, kernel, labels, where = arrays
    where = where.at[1, 4:].set(False)
    _, mean, _, of_kernel = definition(hidden, kernel, labels, where)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(None, "model"), P("data"), P("data")), out_specs=P(None))
    def over_devices(hidden, kernel, labels, where):
        losses = xentjax.softmax_cross_entropy(jnp.where(where[..., None], hidden, 0) @ kernel, labels, axis_name="model", where=where)
        pair = xentjax.weighted_sum(losses, where=where).psum("data").mean()
        return jnp.stack([pair, xentjax.weighted_mean(losses, where=where, axis_name="data")])

    fused = xentjax.fuse_linear_sharded(
        xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model", reduction="sum", chunk_size=2
    )

    @jax.jit
    def accumulated(kernel):
        def step(sums, part):
            h, y, w = part
            both = jax.value_and_grad(fused, 1)(h, kernel, y, where=w)
            return sums + xentjax.WeightedSum(both, w.sum().astype(jnp.float32)), None

        parts = [jnp.moveaxis(x.reshape(BATCH, 3, LENGTH // 3, *x.shape[2:]), 1, 0) for x in (hidden, labels, where)]
        start = xentjax.WeightedSum((jnp.zeros(()), jnp.zeros_like(kernel)), jnp.zeros(()))
        return jax.lax.scan(step, start, tuple(parts))[0].mean()

    arguments = put(mesh, (hidden, P("data")), (kernel, P(None, "model")), (labels, P("data")), (where, P("data")))
    close(jax.jit(over_devices)(*arguments), np.asarray([mean, mean]))
    close(accumulated(kernel), (mean, of_kernel))


def test_the_main_loss_inside_shard_map(mesh, arrays):
    hidden, kernel, labels, where = arrays
    padded, exists = jnp.pad(kernel, ((0, 0), (0, 4)), constant_values=5.0), jnp.arange(CLASSES + 4) < CLASSES
    specs = P("data"), P(None, "model"), P("data"), P("data"), P("model")
    arguments = put(mesh, *zip((hidden, padded, labels, where, exists), specs, strict=True))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def total(hidden, kernel, labels, where, exists):
        more = {"where": where, "class_mask": exists, "chunk_size": 6, "reduction": "sum", "axis_name": "model"}
        return jax.lax.psum(xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, **more), "data")

    value, (of_hidden, of_kernel) = jax.jit(jax.value_and_grad(total, (0, 1)))(*arguments)
    _, *expected = definition(*arrays)
    close((value, of_hidden, np.asarray(of_kernel)[:, :CLASSES]), [np.asarray(where).sum() * e for e in expected])
    assert not np.asarray(of_kernel)[:, CLASSES:].any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_hidden_gathered_over_the_axis_that_splits_classes(mesh, arrays, reduction):
    # As in sequence parallelism before the head. For JAX, the gathered array may differ between devices, so its gradient is scattered.
    _, kernel, _, where = arrays
    specs = P("data", "model"), P(None, "model"), P("data"), P("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def total(hidden, kernel, labels, where):
        whole = jax.lax.all_gather(hidden, "model", axis=1, tiled=True)
        run = xentjax.fuse_linear(functools.partial(xentjax.softmax_cross_entropy, axis_name="model"), reduction=reduction, chunk_size=6)
        return jax.lax.psum(run(whole, kernel, labels, where=where).sum(), "data")

    found = jax.jit(jax.value_and_grad(total, (0, 1)))(*put(mesh, *zip(arrays, specs, strict=True)))
    tangent = jax.jit(lambda *a: jax.jvp(lambda k: total(a[0], k, *a[2:]), (a[1],), (a[1],))[1])(
        *put(mesh, *zip(arrays, specs, strict=True))
    )
    _, mean, of_hidden, of_kernel = definition(*arrays)
    scale = np.asarray(where).sum()
    close(found, (scale * mean, (scale * of_hidden, scale * of_kernel)))
    close(tangent, np.vdot(scale * of_kernel, np.asarray(kernel, np.float64)), 1e-5)  # terms of both signs


def test_an_argument_that_is_the_same_on_all_devices_is_differentiated_once(mesh, arrays):
    hidden, _, labels, where = arrays
    specs = P("data"), P(None, "model"), P("data"), P("data"), P()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def total(hidden, kernel, labels, where, temperature):
        def loss(z, y, temperature):
            return xentjax.softmax_cross_entropy(z / temperature[:, None], y, axis_name="model")

        run = xentjax.fuse_linear(loss, reduction="sum", chunk_size=6)
        return jax.lax.psum(run(hidden, kernel, labels, jnp.broadcast_to(temperature, labels.shape), where=where), "data")

    arguments = put(mesh, *zip((*arrays, np.float32(1.7)), specs, strict=True))
    value, slope = jax.jit(jax.value_and_grad(total, 4))(*arguments)

    def exact(temperature):
        kernel = np.asarray(arrays[1], np.float64) / temperature
        return np.asarray(where).sum() * definition(hidden, kernel, labels, where)[1]

    close((value, slope), (exact(np.float32(1.7)), np.asarray((exact(1.7 + 1e-6) - exact(1.7 - 1e-6)) / 2e-6)), 1e-5)


# Errors --------------------------------------------------------------------------------------------------------------------

H, K, Y = jnp.zeros((4, 6, 5)), jnp.zeros((5, 16)), jnp.zeros((4, 6), jnp.int32)
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
GIVEN = {"mesh": MESH, "tokens": P("data"), "axis_name": "model"}


def call(h=H, k=K, y=Y, *, loss=xentjax.softmax_cross_entropy, jit=False, **more):
    fused = xentjax.fuse_linear_sharded(loss, **{**GIVEN, **more})
    return (jax.jit(fused) if jit else fused)(h, k, y)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"mesh": None}, ValueError, "mesh must be given"),
        ({"tokens": None, "jit": True}, ValueError, r"tokens must be given .* Use tokens=P\(\)"),
        ({"axis_name": None, "jit": True}, ValueError, r"axis_name must be given .* Use axis_name=\(\)"),
        ({"tokens": P("data", None, "model")}, ValueError, "tokens must name at most the 2 leading axes"),
        ({"axis_name": "modle"}, ValueError, "must name axes of the mesh"),
        ({"axis_name": "data"}, ValueError, "each once"),
        ({"k": jnp.zeros((5, 18))}, ValueError, r"equal shares .* got 18. Pad classes by 2 and pass class_mask=jnp.arange\(20\) < 18"),
        ({"h": jnp.zeros((3, 6, 5)), "y": Y[:3]}, ValueError, "equal shares of the examples .* got 3"),
        ({"loss": lambda z, y: z[:, 0]}, TypeError, "loss_fn must take axis_name"),
        ({"loss": 3}, TypeError, "loss_fn must be a function"),
        ({"reduction": "average"}, ValueError, "reduction must be"),
        ({"k": jnp.zeros((16, 5))}, ValueError, "classes_first=True"),
        ({"y": Y[:, :3]}, ValueError, r"args\[0\] must have shape"),
    ],
)
def test_errors_say_what_to_do(more, error, message):
    with pytest.raises(error, match=f"fuse_linear_sharded: .*{message}"):
        call(**more)


def test_the_error_inside_shard_map_names_fuse_linear():
    inner = functools.partial(call, tokens=P("data"))
    with pytest.raises(ValueError, match=r"must be called outside jax\.shard_map; .* Use fuse_linear there"):
        jax.shard_map(inner, mesh=MESH, in_specs=(P("data"), P(None, "model"), P("data")), out_specs=P())(H, K, Y)


@pytest.mark.parametrize(("of_hidden", "of_kernel"), [(P(None, "data"), P()), (P("data"), P(None, "model"))])
def test_an_explicit_split_that_plain_fuse_linear_cannot_keep(of_hidden, of_kernel):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    h, k = put(mesh, (H, of_hidden), (K, of_kernel))
    for run in (xentjax.fuse_linear(xentjax.softmax_cross_entropy), xentjax.linear_softmax_cross_entropy):
        with pytest.raises(ValueError, match="Use fuse_linear_sharded"):
            run(h, k, Y)
