"""Divergences between the predictions of a teacher and a student. Both predictions are given as logits.

Let p = softmax(teacher/T) and q = softmax(student/T), and let d_k = log(p_k/q_k) be the log-ratio. Because Σ p = Σ q = 1, the relative
entropy D(p‖q) is a sum over classes of terms that are not negative:

    D(p‖q) = Σ_k p_k·g(d_k),  g(d) = e^(−d) − 1 + d

For small d, g(d) is computed by a series. If p and q are nearly equal, D(p‖q) is about Σ_k p_k·d_k²/2. So the relative error of D(p‖q) is
small if the relative error of d is small (see `_core.log_ratio`).

Derivatives. The gradient of D(p‖q) with respect to student/T is q − p. The gradient of D(q‖p) with respect to teacher/T is p − q. Every
other gradient with respect to student/T has the form q_k·(x_k − Σ_j q_j x_j), with one number x_k for each class. For teacher/T, p replaces
q. `log_ratio.centred` computes the factor in parentheses accurately, also if its two terms are nearly equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from xentjax._core import blocks, checks, differences, log_ratio, mesh, numerics, rows

_PairOf = Callable[[Array], log_ratio.Pair]  # after which number the pair is computed, see `log_ratio.pair`

DIVERGENCES = ("forward", "reverse", "js", "tv")
_FAR = 2.0**100  # a larger log-ratio is INFINITE/T, for temperatures T up to 2²⁰


def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    divergence: str = "forward",
    beta: ArrayLike = 0.5,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Divergence per example between the predictions of a teacher and a student, shape [...].

    With p = softmax(teacher/T) and q = softmax(student/T), the loss is

        "forward"  D(p‖q) = Σ_k p_k log(p_k/q_k)
        "reverse"  D(q‖p)
        "js"       β·D(p‖m) + (1 − β)·D(q‖m),  m = βp + (1 − β)q
        "tv"       ½ Σ_k |p_k − q_k|, the total variation distance

    Gradient: T·∂loss/∂student_k is

        "forward"  q_k − p_k
        "reverse"  q_k (log(q_k/p_k) − D(q‖p))
        "js"       (1 − β) q_k (log(q_k/m_k) − D(q‖m))
        "tv"       ½ q_k (s_k − Σ_j q_j s_j),  s = sign(q − p)

    For the gradient with respect to the teacher, exchange p with q, β with 1 − β, and "forward" with "reverse".

    The loss is differentiable with respect to both logits. If the teacher is not trained with the student, apply `jax.lax.stop_gradient` to
    `teacher_logits`.

    For large T, the gradient is proportional to 1/T². One factor 1/T arises because q depends on student/T. The other factor arises because
    the division by T brings p and q closer together. If you add a loss on labels and tune T, multiply the distillation loss by
    `temperature**2`, as Hinton et al. do. "tv" is an exception. Its gradient is proportional to 1/T, so multiply "tv" by `temperature`.

    Args:
        student_logits: [..., classes], unnormalized log-probabilities.
        teacher_logits: [..., classes], unnormalized log-probabilities, with the shape of `student_logits`.
        temperature: T > 0, the divisor of all logits of student and teacher.
        divergence: "forward" or "reverse" (Kullback–Leibler), "js" (Jensen–Shannon) or "tv" (total variation).
        beta: β in (0, 1), weight of the teacher in the mixture m. Only "js" uses it. β = 1/2 gives the Jensen-Shannon divergence.
        axis: class axis of `student_logits` and `teacher_logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if either argument is float64. The unit is nats, but "tv" has no unit and is at most 1. Equal logits
        give exactly 0. "forward" is +∞ if q_k = 0 < p_k for some class k, and "reverse" is +∞ if p_k = 0 < q_k for some class k.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `temperature` is not above 0, `beta` is outside (0, 1), or `divergence` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> teacher = jnp.array([2.0, 0.0, -1.0])
        >>> student = teacher + jnp.array([1e-4, 0.0, 0.0])  # nearly equal logits
        >>> print(f"{xentjax.distillation_loss(student, teacher):.3e}")
        6.57...e-10

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; Agarwal et al., On-Policy
        Distillation of Language Models, 2023, arXiv 2306.13649 ("reverse" and "js").
    """
    name = "distillation_loss"
    common = (None, axis, axis_name, class_mask, where)  # None: no labels
    student = checks.examples(name, student_logits, *common, labelled=False, inputs="student_logits")
    teacher_logits = checks.floating(name, "teacher_logits", teacher_logits)
    # Before the shapes are compared: if the teacher is not split over devices, its shape differs for that reason.
    mesh.check_class_split(name, axis_name, {"teacher_logits": teacher_logits}, {})
    checks.same_shape(name, "teacher_logits", teacher_logits, student.logits.shape, "the shape of student_logits")
    teacher = checks.examples(name, teacher_logits, *common, labelled=False, inputs="teacher_logits")
    beta = check_divergence(name, divergence, beta)
    temperature = checks.positive(name, "temperature", temperature)
    return _distillation(student, teacher, temperature, beta, divergence)


def check_divergence(function: str, divergence: str, beta: ArrayLike) -> ArrayLike:
    """The checked `beta`. Raises ValueError if `divergence` is unknown or the number `beta` is outside (0, 1)."""
    checks.option(function, "divergence", divergence, tuple(DIVERGENCES))
    beta = checks.fraction(function, "beta", beta)
    if isinstance(beta, float) and beta in (0.0, 1.0):
        raise ValueError(f"{function}: beta must lie strictly between 0 and 1; got {beta:g}. Use divergence='forward' or 'reverse'.")
    return beta


@functools.partial(jax.jit, static_argnames="divergence")
def _distillation(student: rows.Examples, teacher: rows.Examples, temperature: ArrayLike, beta: ArrayLike, divergence: str) -> Array:
    loss = functools.partial(loss_of_rows, divergence=divergence)
    return blocks.in_blocks(loss, (rows.of(teacher), rows.of(student)), temperature, beta)


def loss_of_rows(teacher: rows.Rows, student: rows.Rows, temperature: Array, beta: Array, *, divergence: str) -> Array:
    """The loss [...] of two rows of logits with the same masks."""
    p, q = _softened(teacher, temperature), _softened(student, temperature)
    loss = _divergence(log_ratio.operands(p, q, temperature), beta, p.axis_name, divergence)
    all_impossible = (rows.largest(p) == -jnp.inf) | (rows.largest(q) == -jnp.inf)
    loss = numerics.where(all_impossible, lax.stop_gradient(loss) + jnp.inf, numerics.restore_infinity(loss))
    return rows.row_value(p, loss)


def _softened(row: rows.Rows, temperature: Array) -> rows.Rows:
    """The row, with its `values` divided by T.

    A logit of −∞ stays −∞, with derivative 0 in T. Logits that a mask hides are replaced by 0 before the division.
    """
    z = rows.masked(row.values, row.where, row.class_mask)
    impossible = z == -jnp.inf
    finite = numerics.finite(z)
    z = numerics.where(impossible, finite - lax.stop_gradient(finite), z) / temperature[..., None]
    return row._replace(values=z + numerics.where(impossible, jnp.full_like(z, -jnp.inf), 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _divergence(both: log_ratio.Operands, beta: Array, axis_name: mesh.AxisName, divergence: str) -> Array:
    """The divergence of teacher and student, which are p and q in `both`."""
    pair = log_ratio.pair(both, axis_name, both.numbers.error)
    return rows.class_sum(_row(both.p_values, both, axis_name), terms(pair, beta, divergence))


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _(
    axis_name: mesh.AxisName, divergence: str, primals: tuple[log_ratio.Operands, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    (both, beta), (moved, beta_moved) = primals, tangents
    p, q = (_row(z, both, axis_name) for z in (both.p_values, both.q_values))
    loss = _divergence(both, beta, axis_name, divergence)
    pair = functools.partial(log_ratio.pair, both, axis_name)
    total = jnp.zeros_like(loss)
    for row, z_dot, slope, after in (  # not after the same number: XLA would store what both gradients share
        (p, moved.p_values, _slope_of_teacher, both.numbers.q_total),
        (q, moved.q_values, _slope_of_student, loss),
    ):
        if not isinstance(z_dot, SymbolicZero):
            total += rows.class_sum(row, slope(row, pair, beta, divergence, after) * rows.masked(z_dot, both.where, both.class_mask))
    if divergence == "js" and not isinstance(beta_moved, SymbolicZero):
        to_p, to_q = mixture_terms(pair(loss), beta[..., None])
        total += (rows.class_sum(p, to_p) - rows.class_sum(q, to_q)) * beta_moved
    return loss, total


def _row(z: Array, both: log_ratio.Operands, axis_name: mesh.AxisName) -> rows.Rows:
    return rows.Rows(z, z, None, both.class_mask, both.where, axis_name)


def terms(pair: log_ratio.Pair, beta: Array, divergence: str) -> Array:
    """The terms of the sum over classes. No term is negative."""
    if divergence == "forward":
        return _excess(pair.p, pair.log_ratio, pair.difference)
    if divergence == "reverse":
        return _excess(pair.q, -pair.log_ratio, -pair.difference)
    if divergence == "tv":
        return jnp.abs(pair.difference) / 2
    beta = beta[..., None]
    of_p, of_q = mixture_terms(pair, beta)
    return beta * of_p + (1 - beta) * of_q


def _slope_of_student(row: rows.Rows, pair: _PairOf, beta: Array, divergence: str, after: Array) -> Array:
    """The gradient with respect to student/T. It is q − p for "forward", and q_k·(x_k − Σ_j q_j x_j) with a number x_k for all others."""
    if divergence == "forward":
        return -pair(after).difference

    def terms(after: Array) -> tuple[Array, Array]:
        both = pair(after)
        if divergence == "reverse":
            return both.q, -both.log_ratio
        if divergence == "tv":
            return both.q, jnp.sign(both.difference) / -2
        return both.q, (1 - beta)[..., None] * log_ratios_to_mixture(both, beta[..., None])[1]

    return log_ratio.centred(row, terms, after)


def _slope_of_teacher(row: rows.Rows, pair: _PairOf, beta: Array, divergence: str, after: Array) -> Array:
    """The gradient with respect to teacher/T.

    It equals the gradient of the student after three exchanges: p with q, β with 1 − β, and "forward" with "reverse".
    """
    if divergence == "tv":  # the same signs as for the student, so that they are computed once

        def signs(after: Array) -> tuple[Array, Array]:
            both = pair(after)
            return both.p, jnp.sign(both.difference) / 2

        return log_ratio.centred(row, signs, after)

    def exchanged(after: Array) -> log_ratio.Pair:
        p, q, d, difference = pair(after)
        return log_ratio.Pair(q, p, -d, -difference)

    return _slope_of_student(row, exchanged, 1 - beta, {"forward": "reverse", "reverse": "forward"}.get(divergence, divergence), after)


def mixture_terms(pair: log_ratio.Pair, beta: Array) -> tuple[Array, Array]:
    """The terms of D(p‖m) and of D(q‖m). They need p − m = (1 − β)(p − q) and q − m = −β(p − q)."""
    to_p, to_q = log_ratios_to_mixture(pair, beta)
    return _excess(pair.p, to_p, (1 - beta) * pair.difference), _excess(pair.q, to_q, -beta * pair.difference)


def log_ratios_to_mixture(pair: log_ratio.Pair, beta: Array) -> tuple[Array, Array]:
    """log(p/m) and log(q/m).

    Let a = max(p, q) and b = min(p, q), and let `share` be the weight of b in m. Then log(m/a) = log1p(share·(b − a)/a).
    """
    d = pair.log_ratio
    p_is_larger = d >= 0
    share = jnp.where(p_is_larger, 1 - beta, beta)
    larger = numerics.where(p_is_larger, pair.p, pair.q)
    change = numerics.where(p_is_larger, -pair.difference, pair.difference) / numerics.where(larger == 0, 1, larger)
    above = -jnp.log1p(share * change)  # log(a/m)
    return numerics.where(p_is_larger, above, above + d), numerics.where(p_is_larger, above - d, above)


def _excess(a: Array, d: Array, difference: Array) -> Array:
    """a·log(a/b) − a + b, which is never negative, for d = log(a/b) and `difference` = a − b.

    It equals a·g(d), with g as in the module docstring. The result is INFINITE if the class has logit −∞ in b but not in a.
    """
    near = jnp.abs(d) < differences.NEAR
    small = numerics.where(near, d, 0)
    far = numerics.where(d > _FAR, numerics.INFINITE, a * d - difference)
    return numerics.where(near, a * (small * small * differences.exponential_series(-small, 2)), far)
