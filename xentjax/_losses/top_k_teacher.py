"""Divergences between the predictions of a student and the k most probable classes of a teacher.

The teacher is given as k class indices i_j and their log-probabilities ℓ_j. The student has logits z of all classes. The loss compares two
short rows of numbers. If all classes that are not listed form one bucket, the rows have k + 1 numbers:

    teacher  ℓ_1 … ℓ_k            log(1 − Σ_j e^(ℓ_j))
    student  z_{i_1} … z_{i_k}    log Σ_{c not listed} e^(z_c)

The softmax of the second row is the distribution of the student over the k classes and the bucket. So a divergence of both rows is computed
as in `distillation`, with the same accuracy. The bucket of the student is computed from the exponentials of the logits in the bucket. The
difference of 1 and the other probabilities would lose digits by cancellation. For the bucket of the teacher, let ℓ_1 be the largest
log-probability. Then

    1 − Σ_j e^(ℓ_j) = −expm1(ℓ_1) − Σ_{j>1} e^(ℓ_j)

has a rounding error that is proportional to 1 − e^(ℓ_1), and not to 1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import blocks, checks, differences, log_ratio, mesh, numerics, rows, statistics, surprises, values
from xentjax._losses import distillation

OUTSIDE = ("tail", "renormalize", "ignore")


def top_k_distillation_loss(
    student_logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    divergence: str = "forward",
    outside: str = "tail",
    beta: ArrayLike = 0.5,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Divergence per example between the k listed classes of a teacher and a student, shape [...].

    Let p_j and q_j be the probabilities that the teacher and the student give to listed class j. `xentjax.distillation_loss` defines
    the divergences. `outside` selects how a divergence treats all classes that are not listed:

        "tail"         one additional class t, with p_t = 1 − Σ_j p_j and q_t = 1 − Σ_j q_j
        "renormalize"  left out; p_j and q_j are divided by their sums
        "ignore"       left out; p_j and q_j are used as they are, so they need not sum to 1. For "forward", the divergence is
                       Σ_j (p_j log(p_j/q_j) − p_j + q_j)

    With "tail" and "ignore", the loss is at most the divergence over all classes. If all classes are listed, each of the three losses is
    equal to this divergence. With "renormalize", the loss does not depend on the logits of classes that are not listed, and their gradient
    is 0.

    Gradient for "tail": if class c is not listed, ∂loss/∂z_c = q_c·(g_t − Σ_j q_j g_j), where g_j = ∂loss/∂q_j, and the sum includes
    class t. For the divergence "forward", this is q_c·(1 − p_t/q_t), and ∂loss/∂z_j = q_j − p_j for a listed class j.

    The loss is also differentiable with respect to `teacher_log_probs`.

    Args:
        student_logits: [..., classes], unnormalized log-probabilities. For a temperature T, pass logits / T, and the log-probabilities of
            the teacher at the same T.
        teacher_ids: [..., k], distinct class indices. The last axis has length k, whatever the value of `axis` is.
        teacher_log_probs: [..., k], at most 0. An entry of −∞ is padding: its class counts as not listed, and its index is ignored. Pass
            the log-probabilities in the dtype in which they were stored. This dtype determines by how much the sum of the probabilities
            may exceed 1 because of rounding.
        divergence: "forward" or "reverse" (Kullback–Leibler), "js" (Jensen–Shannon) or "tv" (total variation).
        outside: "tail", "renormalize" or "ignore".
        beta: β in (0, 1), weight of the teacher in the mixture of "js".
        axis: class axis of `student_logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`. Indices are global, and the teacher is not sharded.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `student_logits` or `teacher_log_probs` is float64. The unit is nats, but "tv" has no unit. NaN
        if the index of a listed class is out of range or repeated, or if a log-probability is above 0. For "tail", NaN also if the
        probabilities of the teacher sum to more than 1. If their sum is 1 within the rounding error, p_t is 0. Then "reverse" is +∞ if
        q_t > 0.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `beta` is outside (0, 1), or `divergence` or `outside` is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> teacher = jax.nn.log_softmax(jnp.array([3.0, 1.0, 0.0, -1.0]))
        >>> log_probs, ids = jax.lax.top_k(teacher, 2)
        >>> student = jnp.array([2.0, 1.0, 0.5, -1.0])
        >>> loss = xentjax.top_k_distillation_loss(student, ids, log_probs)
        >>> print(f"{loss:.4f}, of all classes {xentjax.distillation_loss(student, teacher):.4f}")
        0.1190, of all classes 0.1203

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    name = "top_k_distillation_loss"
    student = checks.examples(name, student_logits, None, axis, axis_name, class_mask, where, labelled=False, inputs="student_logits")
    ids = checks.integers(name, "teacher_ids", teacher_ids)
    log_probs = checks.floating(name, "teacher_log_probs", teacher_log_probs)
    checks.sparse(name, {"teacher_ids": ids, "teacher_log_probs": log_probs}, student, inputs="student_logits")
    mesh.check_class_split(name, axis_name, {}, {"teacher_ids": ids, "teacher_log_probs": log_probs})
    beta = distillation.check_divergence(name, divergence, beta)
    checks.option(name, "outside", outside, OUTSIDE)
    _check_values(name, ids, log_probs, student, outside)
    return _distillation(student, ids, log_probs, beta, divergence, outside)


@functools.partial(jax.jit, static_argnames=("divergence", "outside"))
def _distillation(student: rows.Examples, ids: Array, log_probs: Array, beta: ArrayLike, divergence: str, outside: str) -> Array:
    r = rows.of(student)
    dtype = numerics.accumulation_dtype(r.raw.dtype, log_probs.dtype)
    teacher = rows.Rows(log_probs, log_probs.astype(dtype), ids, r.class_mask, r.where, r.axis_name)
    loss = functools.partial(_loss, divergence=divergence, outside=outside, rounded_to=log_probs.dtype)
    return blocks.in_blocks(loss, (r, teacher), beta)


def _loss(student: rows.Rows, teacher: rows.Rows, beta: Array, *, divergence: str, outside: str, rounded_to: jax.typing.DTypeLike) -> Array:
    ids, log_p = teacher.given_labels, teacher.values
    listed = rows.masked(log_p != -jnp.inf, student.where)
    log_p = numerics.where(listed, log_p, -jnp.inf)
    negative, bound = _negative_tail(log_p, rounded_to)
    valid = jnp.all(~listed | (rows.is_class(student, ids) & (log_p <= 0)), axis=-1) & ~_repeats(ids, listed)
    if outside == "tail":
        valid &= negative <= bound

    q, has_tail = _reduced(student, ids, listed, outside)
    exists = jnp.concatenate([listed, has_tail[..., None]], axis=-1) if outside != "renormalize" else listed
    short = rows.Rows(q, q, None, exists, student.where, None)
    if outside == "ignore":
        u = surprises.surprise(short, statistics.of_row(short))[..., :-1]
        terms = _terms(numerics.where(listed, log_p, 0), numerics.where(listed, -u, 0), beta, divergence)
        loss = numerics.restore_infinity(jnp.sum(numerics.where(listed, terms, 0), axis=-1))
    else:
        p = log_p
        if outside == "tail":
            some = negative < 0
            log_tail = numerics.where(some, jnp.log(numerics.where(some, -negative, 1)), -jnp.inf)
            p = jnp.concatenate([log_p, log_tail[..., None]], axis=-1)
        loss = distillation.loss_of_rows(short._replace(raw=p, values=p), short, jnp.ones_like(beta), beta, divergence=divergence)
    return numerics.nan_or_zero(loss, valid, student.where)


def _reduced(r: rows.Rows, ids: Array, listed: Array, outside: str) -> tuple[Array, Array]:
    """The short row of the student [..., k + 1], up to an additive constant, and whether a class exists that is not listed [...].

    For "renormalize", the row has no bucket and shape [..., k].
    """
    z = numerics.where(listed, rows.at_index(r, r.values, ids, differentiated=True), -jnp.inf)
    if r.class_mask is not None:
        exists = rows.at_index(r, r.class_mask, ids) & listed
        z = numerics.where(exists, z, -jnp.inf)
    else:
        exists = listed
    has_tail = rows.class_count(r) > jnp.sum(exists.astype(z.dtype), axis=-1)
    m = jnp.max(lax.stop_gradient(z), axis=-1, initial=-jnp.inf)
    if outside == "renormalize":
        return z - _finite_or_zero(m)[..., None], has_tail
    others = _without(r, ids, listed)
    stats = statistics.of_row(others)
    m = _finite_or_zero(jnp.maximum(m, rows.largest(others)))
    tail = numerics.where(stats.all_impossible, -jnp.inf, (stats.reference - m) + stats.log_sum)
    return jnp.concatenate([z - m[..., None], tail[..., None]], axis=-1), has_tail


def _without(r: rows.Rows, ids: Array, listed: Array) -> rows.Rows:
    """The row, with −∞ as the logit of every listed class."""
    local, inside = rows.local_index(r, ids)
    here = rows.is_here(r, ids)
    used = listed & inside if here is None else listed & here
    raw = numerics.remove_last(r.raw, numerics.where(used, local, r.raw.shape[-1]))
    return r._replace(raw=raw, values=raw.astype(r.values.dtype))


def _finite_or_zero(m: Array) -> Array:
    return numerics.where(jnp.isfinite(m), m, 0)


def _negative_tail(log_p: Array, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """Σ_j e^(ℓ_j) − 1, shape [...], and a bound on its error if every ℓ_j was rounded to `dtype`."""
    position = lax.broadcasted_iota(jnp.int32, log_p.shape, log_p.ndim - 1, out_sharding=mesh.split_of(log_p))
    largest = position == lax.argmax(lax.stop_gradient(log_p), log_p.ndim - 1, jnp.int32)[..., None]
    terms = numerics.where(largest, jnp.expm1(log_p), jnp.exp(log_p))
    size = jnp.exp(log_p) * -numerics.where(log_p == -jnp.inf, 0, log_p)  # the derivative of e^ℓ, times the size of ℓ
    bound = 4 * float(jnp.finfo(dtype).eps) * jnp.sum(jnp.abs(terms) + size, axis=-1)
    return jnp.sum(terms, axis=-1), lax.stop_gradient(bound)


def _repeats(ids: Array, listed: Array) -> Array:
    """Whether a listed class index occurs twice, shape [...]."""
    ordered = jnp.sort(numerics.where(listed, ids, -1), axis=-1)
    return jnp.any((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0), axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _terms(log_p: Array, log_q: Array, beta: Array, divergence: str) -> Array:
    """The terms [..., k] of the divergence of numbers that need not sum to 1. No term is negative."""
    return distillation.terms(_pair(log_p, log_q), beta, divergence)


def _pair(log_p: Array, log_q: Array) -> log_ratio.Pair:
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    near = jnp.abs(d) < differences.NEAR
    small = numerics.where(near, d, 0)
    return log_ratio.Pair(p, q, d, numerics.where(near, q * (small * differences.exponential_series(small, 1)), p - q))


@_terms.defjvp
def _(divergence: str, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    log_p, log_q, beta = primals
    p, q, d, difference = pair = _pair(log_p, log_q)
    of_beta = jnp.zeros_like(d)
    if divergence == "forward":  # p·d − p + q
        slopes = p * d, -difference
    elif divergence == "reverse":
        slopes = difference, -q * d
    elif divergence == "tv":
        slopes = p * jnp.sign(difference) / 2, -q * jnp.sign(difference) / 2
    else:
        weight = beta[..., None]
        to_p, to_q = distillation.log_ratios_to_mixture(pair, weight)
        slopes = weight * p * to_p, (1 - weight) * q * to_q
        excess_p, excess_q = distillation.mixture_terms(pair, weight)
        of_beta = excess_p - excess_q
    return _terms(*primals, divergence), slopes[0] * tangents[0] + slopes[1] * tangents[1] + of_beta * tangents[2][..., None]


def _check_values(name: str, ids: Array, log_probs: Array, student: rows.Examples, outside: str) -> None:
    """Inside `xentjax.checked`, report log-probabilities above 0, indices that are out of range or repeated, and a sum above 1."""
    if not values.checking.value:
        return
    counts = student.where
    values.check(name, "teacher_log_probs", log_probs, lambda x: ~(x <= 0), "is not a log-probability (it is NaN or above 0)", counts)
    listed = log_probs != -jnp.inf if counts is None else (log_probs != -jnp.inf) & counts[..., None]
    values.indices(name, "teacher_ids", ids, student.classes, listed)

    def repeated(ids: Array) -> Array:
        same = (ids[..., :, None] == ids[..., None, :]) & listed[..., :, None] & listed[..., None, :]
        return jnp.any(jnp.tril(same, -1), axis=-1)

    values.check(name, "teacher_ids", ids, repeated, "is repeated", listed)
    if outside == "tail":
        log_p = numerics.where(listed, log_probs.astype(numerics.accumulation_dtype(log_probs.dtype)), -jnp.inf)
        negative, bound = _negative_tail(log_p, log_probs.dtype)
        total = numerics.where(negative > bound, 1 + negative, jnp.zeros_like(negative))
        values.check(name, "sum of exp(teacher_log_probs)", total, lambda x: x > 0, "is above 1", counts)
