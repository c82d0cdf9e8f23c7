"""Every loss × {logits, fused} × {1, 2, 4, 8} shards of the classes × {Auto, Explicit} meshes: value, gradient, tangent, Hessian product.

All equal those of one device, which test_values.py and test_gradients.py hold against the formulas.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from tests.tables import cases

TOKENS, FEATURES, CLASSES = 24, 4, 16
BAD = np.array([7, 20])  # out of the range of all classes, not of a device's
EXISTING = 13  # the last shards of 2, 4 and 8 hold padding, the last of 8 nothing else
TOLERANCE = 3e-5  # of the largest component: float32, whose sums of 16 terms are taken in another order, squared scales of up to 64
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Distillation(cases.Case):
    """Its labels are a teacher's probabilities, whose logits are split as the student's are."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("distribution",)


def distillation(divergence):
    def function(z, probs, **more):
        return xentjax.distillation_loss(z, jnp.log(probs), divergence=divergence, **more)

    return Distillation(f"distillation_loss_{divergence}", function, value=None, gradient=None)  # the formulas are not asked


CASES = [c for c in cases.CATEGORICAL if c.thorough] + [distillation("forward"), distillation("reverse")]


@functools.cache
def problem(case, kind):
    """Logits, hidden, kernel, labels, which tokens count, what there is per class, and a direction for each of the first three.

    What does not count is NaN. Two labels that do count are no class, and an impossible one is there where the loss is finite with it.
    """
    rng = np.random.default_rng(5)
    z, labels = case.draw(rng, (TOKENS,), classes=EXISTING, kind=kind)
    z = jnp.concatenate([z, z[:, : CLASSES - EXISTING] + 1], -1)
    if kind == "distribution":
        labels = jnp.pad(labels, ((0, 0), (0, CLASSES - EXISTING)))
    elif case.family == "classes":
        labels = labels.at[BAD].set(jnp.array([CLASSES, -1]))
        if "label_smoothing" not in case.target and case.inputs == "logits":
            z, labels = z.at[0, 4].set(-jnp.inf), labels.at[0].set(9)
    hidden, kernel = rng.normal(size=(TOKENS, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    if case.inputs == "cosines":
        hidden, kernel = 0.95 * hidden / np.linalg.norm(hidden, axis=1, keepdims=True), kernel / np.linalg.norm(kernel, axis=0)
    per_class = {name: jnp.asarray(x) for name, x in case.of_classes(CLASSES).items()}
    if "class_weights" in case.target:
        per_class["class_weights"] = jnp.linspace(0.5, 2.0, CLASSES)
    per_class["class_mask"] = jnp.arange(CLASSES) < EXISTING
    arrays = z.at[5].set(jnp.nan), jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
    where = (jnp.arange(TOKENS) % 5 != 3).at[5].set(False)
    return arrays, labels, where, per_class, tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in arrays)


def derivatives(losses, fused, arrays, directions):
    """Of the losses of logits and of a number made of hidden and kernel: values, gradients and both along a direction; one program."""

    def along(f, x, direction):
        def value_and_slopes(*x):
            value, pull = jax.vjp(f, *x)
            return value, pull(jnp.ones_like(value))

        return jax.jvp(value_and_slopes, x, direction)

    (z, *layer), (of_z, *of_layer) = arrays, directions
    return along(losses, (z,), (of_z,)), along(fused, tuple(layer), tuple(of_layer))


@functools.cache
def expected(case, kind):
    arrays, labels, where, per_class, directions = problem(case, kind)

    def losses(z):
        return case(z, labels, where=where, **per_class)

    def mean(hidden, kernel):
        values = case(jnp.dot(hidden, kernel, precision="highest"), labels, where=good(where), **per_class)
        return values.sum() / good(where).sum().astype(jnp.float32)

    return jax.jit(functools.partial(derivatives, losses, mean))(arrays, directions)


def good(where):
    """Which tokens count and have a label: a mean over others is NaN."""
    return where & ~jnp.isin(jnp.arange(TOKENS), BAD)


@pytest.mark.by_module
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_one_device(case, shards, types):
    kind = case.kinds[(shards in (2, 8)) ^ (types == AxisType.Explicit) if len(case.kinds) > 1 else 0]
    mesh = jax.make_mesh((8 // shards, shards), ("data", "model"), axis_types=(types,) * 2)
    arrays, labels, where, per_class, directions = problem(case, kind)
    specs = P("data", "model"), P("data"), P(None, "model")
    arrays, directions = (
        tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(values, specs, strict=True))
        for values in (arrays, directions)
    )
    of_labels = P("data", "model") if kind == "distribution" and case.family == "classes" else P("data")
    split = jax.tree.map(lambda x: P("model") if x.ndim == 1 else P(), per_class)
    labels, where, labelled, per_class = jax.device_put(
        (labels, where, good(where), per_class),
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), (jax.tree.map(lambda _: of_labels, labels), P("data"), P("data"), split)),
    )

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data", "model"), of_labels, P("data"), split), out_specs=P("data"))
    def losses(z, labels, where, per_class):
        return case(z, labels, where=where, axis_name="model", **per_class)

    chunk_size = shards if types == AxisType.Auto else None  # three chunks on each device, or one
    reduction = "none" if shards in (2, 8) else "mean"
    options = {"mesh": mesh, "tokens": P("data"), "axis_name": "model", "reduction": reduction, "chunk_size": chunk_size}
    fused = xentjax.fuse_linear_sharded(case, **options)

    def mean(hidden, kernel):
        values = fused(hidden, kernel, labels, where=labelled, **per_class)
        return xentjax.weighted_mean(values, where=labelled) if reduction == "none" else values

    @jax.jit
    def ours(arrays, directions):
        return derivatives(lambda z: losses(z, labels, where, per_class), mean, arrays, directions)

    def close(path, mine, theirs):
        largest = np.abs(theirs)[np.isfinite(theirs)].max(initial=0)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE * largest, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, ours(arrays, directions), expected(case, kind))


@pytest.mark.parametrize("case", [c for c in CASES if c.arrays], ids=str)
def test_what_there_is_per_class_is_split(case):
    """Values alone, of every such loss. In the short run, the test above has one loss of each module, on one of the meshes."""
    (z, *_), labels, where, per_class, _ = problem(case, "index")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.tree.map(lambda x: P("model") if x.ndim == 1 else P(), per_class)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "model"), split), out_specs=P())
    def losses(z, per_class):
        return case(z, labels, where=where, axis_name="model", **per_class)

    expected = case(z, labels, where=where, **per_class)
    np.testing.assert_allclose(jax.jit(losses)(z, per_class), expected, rtol=TOLERANCE)
