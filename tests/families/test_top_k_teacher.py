"""Teachers known by k classes: bounds, tails, wrong teachers, devices, and linear layers."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import xentjax
from tests.sharded.test_sharded import mesh_of

DIVERGENCES = ("forward", "reverse", "js", "tv")
EPS = float(jnp.finfo(jnp.float32).eps)


def top_k(logits, k):
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return ids, log_probs


def logits_of(rng, *shape):
    return jnp.asarray(2 * rng.normal(size=shape), jnp.float32)


def test_a_lower_bound_and_equal_if_all_classes_are_listed(rng, quick_compilation):
    student, teacher = logits_of(rng, 20, 7), logits_of(rng, 20, 7)

    @jax.jit
    def losses(student, teacher):
        def listed(k, **keywords):
            return xentjax.top_k_distillation_loss(student, *top_k(teacher, k), **keywords)

        return [
            (
                xentjax.distillation_loss(student, teacher, divergence=d),
                listed(7, divergence=d, outside=o),
                listed(3, divergence=d, outside=o),
            )
            for d, o in zip(DIVERGENCES, ("tail", "tail", "ignore", "tail"), strict=True)
        ]

    for whole, of_all, of_some in losses(student, teacher):
        np.testing.assert_allclose(of_all, whole, rtol=40 * EPS)  # the log-probabilities are rounded, and so are 7 terms
        assert np.all(of_some <= whole * (1 + 40 * EPS)) and np.any(of_some < 0.95 * whole)


def exact(student, ids, log_probs):
    """The forward and the reverse divergence of one example, and the gradient of the first, with 60 digits."""
    e = [mpmath.exp(mpmath.mpf(float(z))) for z in student]
    q = [e[i] / sum(e) for i in ids]
    q.append(sum(x for i, x in enumerate(e) if i not in ids) / sum(e))
    p = [mpmath.exp(mpmath.mpf(float(x))) for x in log_probs]
    p.append(1 - sum(p))
    slope = [q[-1] / sum(x for i, x in enumerate(e) if i not in ids) * x * (1 - p[-1] / q[-1]) for x in e]
    for j, i in enumerate(ids):
        slope[i] = q[j] - p[j]
    return [float(sum(a * mpmath.log(a / b) for a, b in zip(*pair, strict=True))) for pair in ((p, q), (q, p))], [float(x) for x in slope]


@pytest.mark.parametrize(
    "student",
    [
        [0.0, -2.0, -20.0, -21.0, -22.0],  # the bucket holds 3e-9
        [0.0, -2.0, -120.0, -121.0, -122.0],  # e^(−120) underflows
        [0.0, -2.0, 40.0, 39.0, 1.0],  # the bucket holds nearly everything
        [1e4, 1e4 - 1, 1e4 - 18, 1e4 - 19, 1e4 - 19],  # a shift of all logits
    ],
)
@pytest.mark.parametrize("probs", [[1 - 2.0**-30], [0.625, 0.125]], ids=str)
def test_small_tails(student, probs, quick_compilation):
    ids, student = jnp.arange(len(probs)), jnp.array(student, jnp.float32)
    log_probs = jnp.array(np.log(probs), jnp.float32)

    @jax.jit
    def both(student, log_probs):
        of_student = functools.partial(xentjax.top_k_distillation_loss, teacher_ids=ids, teacher_log_probs=log_probs)
        return [jax.value_and_grad(functools.partial(of_student, divergence=d))(student) for d in ("forward", "reverse")]

    found = both(student, log_probs)
    values, slope = exact(student, tuple(range(len(probs))), log_probs)
    for (value, _), expected in zip(found, values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=20 * EPS)
    np.testing.assert_allclose(found[0][1], slope, rtol=40 * EPS, atol=EPS * max(map(abs, slope)))  # q_j − p_j may cancel


def test_equal_predictions_cost_nothing_and_nearly_equal_ones_their_squares(rng, quick_compilation):
    """The loss is ½ Σ p·d² for small log-ratios d. Its terms of third order are relatively of size d."""
    teacher = logits_of(rng, 4, 9)
    ids, log_probs = top_k(teacher, 4)
    step = 2.0**-10 * jnp.asarray(rng.normal(size=(4, 9)), jnp.float32)
    loss = jax.jit(xentjax.top_k_distillation_loss)
    assert np.all(loss(jax.nn.log_softmax(teacher), ids, log_probs) < 1e-12)  # squares of rounding errors of 1e-7
    q, h = jax.nn.softmax(np.float64(teacher)), np.float64(step)
    of_ids = functools.partial(np.take_along_axis, indices=np.asarray(ids), axis=-1)
    listed = of_ids(np.float64(q))
    moved = np.sum(q * h, -1)
    d = of_ids(h)
    rest = (moved - np.sum(listed * d, -1)) / (1 - listed.sum(-1))
    expected = (np.sum(listed * d**2, -1) + (1 - listed.sum(-1)) * rest**2 - moved**2) / 2
    np.testing.assert_allclose(loss(teacher + step, ids, log_probs), expected, rtol=0.02)


def test_wrong_teachers_are_nan_and_padding_is_ignored(quick_compilation):
    third = float(np.log(1 / 3))
    ids = jnp.array([[0, 1, 2], [0, 2, 0], [0, 1, 5], [0, -1, 2], [0, 1, 2], [0, 1, 2], [0, 0, 9]])
    log_probs = jnp.array([[third] * 3] * 4 + [[1e-3, -9.0, -9.0], [-0.1, -0.5, -9.0], [third, -jnp.inf, -jnp.inf]])
    student = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 5), (7, 5))

    @functools.partial(jax.jit, static_argnames="outside")
    def both(outside):
        value, pull = jax.vjp(lambda z: xentjax.top_k_distillation_loss(z, ids, log_probs, outside=outside), student)
        return value, pull(jnp.ones(7))[0]

    for outside, sums in (("tail", True), ("renormalize", False), ("ignore", False)):
        value, slope = both(outside)
        wrong = np.array([False, True, True, True, True, sums, False])
        np.testing.assert_array_equal(np.isnan(value), wrong)
        np.testing.assert_array_equal(np.isnan(slope).any(-1), wrong)
    one = xentjax.top_k_distillation_loss(student[6], jnp.array([0]), jnp.array([third]))
    np.testing.assert_allclose(both("tail")[0][6], one, rtol=4 * EPS)


@pytest.mark.parametrize(
    "ids, log_probs, message",
    [
        ([0, 3], [-1.0, -1.0], r"teacher_ids\[1\] = 3 is outside"),
        ([2, 2], [-1.0, -1.0], r"teacher_ids\[1\] = 2 is repeated"),
        ([0, 1], [0.5, -1.0], r"teacher_log_probs\[0\] = 0.5 is not a log-probability"),
        ([0, 1], [-0.25, -0.25], r"sum of exp\(teacher_log_probs\) = 1.55.* is above 1"),
    ],
)
def test_checked_names_the_wrong_value(ids, log_probs, message):
    with pytest.raises(ValueError, match=message):
        xentjax.checked(xentjax.top_k_distillation_loss)(jnp.zeros(3), jnp.array(ids), jnp.array(log_probs))


def test_unknown_words_and_shapes():
    arguments = jnp.zeros((2, 3)), jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1))
    for keywords, message in (({"outside": "bucket"}, "outside must be one of"), ({"divergence": "kl"}, "divergence must be one of")):
        with pytest.raises(ValueError, match=message):
            xentjax.top_k_distillation_loss(*arguments, **keywords)
    with pytest.raises(ValueError, match=r"teacher_ids must have shape \(2, k\), the shape of student_logits without"):
        xentjax.top_k_distillation_loss(arguments[0], arguments[1][0], arguments[2])
    with pytest.raises(ValueError, match=r"teacher_log_probs must have shape \(2, 1\), the shape of teacher_ids"):
        xentjax.top_k_distillation_loss(*arguments[:2], arguments[2][:, 0])


@pytest.mark.parametrize(
    "divergence, outside",
    [
        ("forward", "tail"),
        *[pytest.param(d, o, marks=pytest.mark.exhaustive) for d, o in (("js", "ignore"), ("reverse", "tail"), ("forward", "renormalize"))],
    ],
)
@pytest.mark.exhaustive
def test_classes_split_over_devices_and_a_linear_layer(divergence, outside, rng, quick_compilation):
    """Four devices hold two classes each, the last of which do not exist. One example does not count, one has padded ids."""
    student, teacher = logits_of(rng, 6, 8), logits_of(rng, 6, 7)
    ids, log_probs = top_k(teacher, 3)
    ids, log_probs = ids.at[1, 2].set(99), log_probs.at[1, 2].set(-jnp.inf)
    ids, student = ids.at[2].set(99), student.at[2].set(jnp.nan)
    exists, counts = jnp.arange(8) < 7, jnp.arange(6) != 2
    loss = functools.partial(xentjax.top_k_distillation_loss, divergence=divergence, outside=outside)

    @jax.jit
    def dense(student, log_probs):
        value, pull = jax.vjp(lambda z, p: loss(z, ids, p, class_mask=exists, where=counts), student, log_probs)
        return value, pull(jnp.ones_like(value))

    def of_shard(student, ids, log_probs, exists, counts):
        def f(z, p):
            return loss(z, ids, p, class_mask=exists, where=counts, axis_name="model")

        value, pull = jax.vjp(f, student, log_probs)
        return value, pull(jnp.ones_like(value))

    columns = P(None, "model")
    split = jax.shard_map(of_shard, mesh=mesh_of(4), in_specs=(columns, P(), P(), P("model"), P()), out_specs=(P(), (columns, P())))
    expected = dense(student, log_probs)
    found = jax.jit(split)(student, ids, log_probs, exists, counts)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=40 * EPS, atol=4 * EPS)
    assert np.all(np.isfinite(expected[0])) and expected[0][2] == 0

    hidden, kernel = logits_of(rng, 6, 4), logits_of(rng, 4, 8)

    @jax.jit
    def both(hidden, kernel):
        fused = xentjax.fuse_linear(lambda z, i, p: loss(z, i, p, class_mask=exists), reduction="sum", chunk_size=4)
        first = jax.value_and_grad(lambda h, w: fused(h, w, ids, log_probs, where=counts), (0, 1))(hidden, kernel)
        return first, jax.value_and_grad(lambda h, w: loss(h @ w, ids, log_probs, class_mask=exists, where=counts).sum(), (0, 1))(
            hidden, kernel
        )

    fused, plain = both(hidden, kernel)
    for x, y in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_rounded_log_probabilities_of_a_batch_in_blocks(rng):
    """The sum of rounded probabilities may exceed 1. The bound on the excess is that of the caller's dtype, also in float32 blocks."""
    log_probs = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(200, 16)), jnp.float32)).astype(jnp.bfloat16)
    assert jnp.max(jnp.sum(jnp.exp(log_probs.astype(jnp.float32)), axis=-1)) > 1 + 1e-3
    z = jnp.asarray(rng.normal(size=(200, 4_000)), jnp.bfloat16)
    ids = jnp.broadcast_to(jnp.arange(16), (200, 16))
    loss = jax.jit(xentjax.top_k_distillation_loss)(z, ids, log_probs)
    assert jnp.all(jnp.isfinite(loss))
