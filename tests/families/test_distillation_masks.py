"""Divergences of teacher and student: impossible and missing classes, masks, axes, dtypes, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.families.test_distillation import RTOL, each, loss
from tests.sharded.test_sharded import mesh_of
from tests.tables.table_distillation import divergence

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnums=0)
def value_and_slopes(function, student, teacher):
    value, pull = jax.vjp(function, student, teacher)
    return value, pull(jnp.ones_like(value))


@pytest.mark.exhaustive
@each
def test_impossible_in_both_is_not_there(kind, rng):
    student, teacher = (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2))
    less = [jnp.concatenate([z, jnp.full((4, 2), -jnp.inf)], -1) for z in (student, teacher)]
    value, found = value_and_slopes(loss(kind), *less)
    whole, slopes = value_and_slopes(loss(kind), student, teacher)
    np.testing.assert_allclose(value, whole, rtol=RTOL)
    for slope, expected in zip(found, slopes, strict=True):
        np.testing.assert_allclose(slope[:, :6], expected, rtol=RTOL, atol=RTOL)
        np.testing.assert_array_equal(slope[:, 6:], np.zeros((4, 2)))


@pytest.mark.exhaustive
@each
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 4.0])
def test_impossible_for_one_of_them(kind, who, temperature):
    student, teacher = jnp.array([0.5, -0.5, 1.0]), jnp.array([1.0, 0.0, -0.25])
    student, teacher = (z.at[1].set(-jnp.inf) if name == who else z for name, z in (("student", student), ("teacher", teacher)))
    value = loss(kind, temperature=temperature)(student, teacher)
    infinite = (kind, who) in (("forward", "student"), ("reverse", "teacher"))
    expected = np.inf if infinite or temperature < 1 else divergence(kind, *(np.float64(z) for z in (student, teacher)), temperature)
    if temperature < 1:  # the definition overflows in float64
        assert np.isinf(value) == infinite and value >= 0
        return
    np.testing.assert_allclose(value, expected, rtol=RTOL)

    def total(s, t, temperature):
        return loss(kind, temperature=temperature)(s, t)

    arguments = student, teacher, jnp.float32(temperature)
    first, second = jax.jit(lambda *x: jax.jvp(jax.grad(total, (0, 1, 2)), x, tuple(map(jnp.ones_like, x))))(*arguments)
    assert all(np.isfinite(x).all() for x in (*first, *second))
    if infinite:
        p, q = (jax.nn.softmax(z / temperature) for z in (teacher, student))
        towards = (q - p, p - q)[kind == "reverse"] / temperature
        np.testing.assert_allclose(first[kind == "reverse"], towards, rtol=RTOL)


@pytest.mark.exhaustive
@each
def test_nothing_to_compare(kind):
    gone, there = jnp.full(3, -jnp.inf), jnp.array([1.0, 0.0, 2.0])
    function = loss(kind)
    for pair in ((gone, there), (there, gone), (gone, gone)):
        value, slopes = value_and_slopes(function, *pair)
        assert value == jnp.inf
        for slope in slopes:
            np.testing.assert_array_equal(slope, np.zeros(3))


@pytest.mark.exhaustive
@each
@pytest.mark.parametrize("per_row", [False, True])
def test_missing_classes(kind, per_row, rng):
    student, teacher = (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2))
    mask = jnp.arange(6) != 2
    spoilt = [z.at[:, 2].set(x) for z, x in ((student, jnp.nan), (teacher, 1e30))]
    mask = jnp.broadcast_to(mask, (4, 6)) if per_row else mask
    less = [jnp.delete(z, 2, axis=-1) for z in (student, teacher)]
    value, found = value_and_slopes(loss(kind, class_mask=mask, temperature=2.0), *spoilt)
    expected, slopes = value_and_slopes(loss(kind, temperature=2.0), *less)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    for slope, expected in zip(found, slopes, strict=True):
        np.testing.assert_allclose(jnp.delete(slope, 2, axis=-1), expected, rtol=RTOL, atol=RTOL)
        assert not slope[:, 2].any()
    nothing = value_and_slopes(loss(kind, class_mask=jnp.zeros_like(mask)), *spoilt)
    assert not any(x.any() for x in jax.tree.leaves(nothing))


@pytest.mark.exhaustive
@each
def test_masked_rows_leave_the_temperature_alone(kind, rng):
    student, teacher = (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2))
    where = jnp.array([True, False, True, False])
    spoilt = [z.at[1].set(jnp.nan).at[3].set(jnp.inf) for z in (student, teacher)]

    def slope(pair, where):
        return jax.jit(jax.grad(lambda t: loss(kind, temperature=t, where=where)(*pair).sum()))(1.5)

    np.testing.assert_allclose(slope(spoilt, where), slope([z[::2] for z in (student, teacher)], None), rtol=RTOL)


@each
def test_nan_stays_in_its_row(kind, rng):
    student, teacher = (jnp.asarray(rng.normal(size=(3, 6)), jnp.float32) for _ in range(2))
    function = loss(kind)
    for pair in ((student.at[1, 2].set(jnp.nan), teacher), (student, teacher.at[1, 2].set(jnp.nan))):
        found, slopes = value_and_slopes(function, *pair)
        np.testing.assert_array_equal(jnp.isnan(found), [False, True, False])
        assert all(np.isfinite(slope[::2]).all() and np.isnan(slope[1]).any() for slope in slopes)


@pytest.mark.exhaustive
@each
def test_axis_and_dtypes(kind, rng):
    student, teacher = (jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32) for _ in range(2))
    expected = loss(kind)(student, teacher)
    found = loss(kind, axis=1)(*(jnp.moveaxis(z, -1, 1) for z in (student, teacher)))
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    half = student.astype(jnp.bfloat16)
    mixed, slopes = value_and_slopes(loss(kind), half, teacher)
    assert mixed.dtype == jnp.float32
    np.testing.assert_allclose(mixed, loss(kind)(half.astype(jnp.float32), teacher), rtol=RTOL)
    assert [x.dtype for x in slopes] == [jnp.bfloat16, jnp.float32]


@each
def test_temperatures_by_vmap(kind, rng):
    student, teacher = (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2))
    several = jnp.array([0.5, 1.0, 8.0])
    found = jax.vmap(lambda t, b: loss(kind, temperature=t, beta=b)(student, teacher))(several, several / 10)
    for row, t in zip(found, several.tolist(), strict=True):
        expected = divergence(kind, *(np.float64(z) for z in (student, teacher)), t, t / 10)
        np.testing.assert_allclose(row, expected, rtol=RTOL)


@pytest.mark.exhaustive
@each
@pytest.mark.parametrize("masked", [False, True])
def test_classes_split_over_devices(kind, masked, rng):
    student, teacher, v, w = (jnp.asarray(rng.normal(size=(5, 16)), jnp.float32) for _ in range(4))
    student, teacher = student.at[0, 3].set(-jnp.inf).at[2].set(jnp.nan), teacher.at[0, 3].set(-jnp.inf)
    where = jnp.array([True, True, False, True, True])
    mask = jnp.arange(16) < (13 if masked else 16)

    def dense(s, t, **keywords):
        return loss(kind, temperature=1.5, **keywords)(s, t)

    def local(s, t, where, mask):
        return dense(s, t, where=where, class_mask=mask if masked else None, axis_name="model")

    split = P(None, "model")
    mapped = jax.shard_map(local, mesh=mesh_of(8), in_specs=(split, split, P(), P("model")), out_specs=P())

    def derivatives(function):
        def total(s, t):
            return function(s, t).sum()

        pair, direction = (student, teacher), (v, w)
        return *jax.jvp(function, pair, direction), *jax.jvp(jax.grad(total, (0, 1)), pair, direction)

    ours = jax.jit(lambda: derivatives(lambda s, t: mapped(s, t, where, mask)))()
    theirs = jax.jit(lambda: derivatives(lambda s, t: dense(s, t, where=where, class_mask=mask if masked else None)))()
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=RTOL, atol=RTOL)


STUDENT_SHAPE = r"class_mask must have shape \(2,\), one per class, or \(5, 2\), the shape of student_logits; got \(16,\)."
SPLIT, WHOLE = P(None, "model"), P()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((WHOLE, SPLIT), "student_logits must be split along the class axis over mesh axis 'model'"),
        ((SPLIT, WHOLE), "teacher_logits must be split along the class axis over mesh axis 'model'"),
        ((SPLIT, SPLIT), f"{STUDENT_SHAPE} Split the classes of class_mask over mesh axis 'model', as the classes of student_logits are"),
    ],
    ids=["student", "teacher", "class_mask"],
)
def test_errors_name_the_argument_that_is_not_split(specs, message):
    def local(student, teacher, mask):
        mask = mask if specs == (SPLIT, SPLIT) else None
        return loss("forward", class_mask=mask, axis_name="model")(student, teacher)

    mapped = jax.shard_map(local, mesh=mesh_of(8), in_specs=(*specs, P()), out_specs=P())
    with pytest.raises(ValueError, match=f"^distillation_loss: {message}"):
        jax.jit(mapped)(jnp.zeros((5, 16)), jnp.zeros((5, 16)), jnp.ones(16, bool))
