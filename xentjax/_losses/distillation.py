"""Divergences between the predictions of a teacher and a student. Both predictions are given as logits.

Let p = softmax(teacher/T) and q = softmax(student/T), and let d_k = log(p_k/q_k) be the log-ratio. Because Σ p = Σ q = 1, the relative
entropy D(p‖q) is a sum over classes of terms that are not negative:

    D(p‖q) = Σ_k p_k·g(d_k),  g(d) = e^(−d) − 1 + d

For small d, g(d) is computed by a series. If p and q are nearly equal, D(p‖q) is about Σ_k p_k·d_k²/2. So the relative error of D(p‖q) is
small if the relative error of d is small (see `_core.log_ratio`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, log_ratio, mesh, numerics, rows

DIVERGENCES = ("forward", "reverse", "js", "tv")


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
        divergence: "forward", "reverse", "js" or "tv".
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
    if divergence not in DIVERGENCES:
        raise ValueError(f"{name}: divergence must be one of {', '.join(map(repr, DIVERGENCES))}; got {divergence!r}.")
    temperature = checks.positive(name, "temperature", temperature)
    beta = checks.fraction(name, "beta", beta)
    if isinstance(beta, float) and beta in (0.0, 1.0):
        raise ValueError(f"{name}: beta must lie strictly between 0 and 1; got {beta:g}. Use divergence='forward' or 'reverse'.")
    return _distillation(student, teacher, temperature, beta, divergence)


@functools.partial(jax.jit, static_argnames="divergence")
def _distillation(student: rows.Examples, teacher: rows.Examples, temperature: ArrayLike, beta: ArrayLike, divergence: str) -> Array:
    dtype = numerics.accumulation_dtype(student.logits.dtype, teacher.logits.dtype)
    p, q = (log_ratio.prediction(_softened(rows.of(batch), jnp.asarray(temperature, dtype))) for batch in (teacher, student))
    u, v = p.surprise, q.surprise
    d = differences.with_slope_of(log_ratio.of(p, q), v - u)
    if divergence == "forward":
        loss = _relative_entropy(p.row, u, v, d)
    elif divergence == "reverse":
        loss = _relative_entropy(p.row, v, u, -d)
    elif divergence == "tv":
        difference = _difference(u, v, d)
        loss = rows.class_sum(p.row, difference * jnp.sign(difference)) / 2  # |p − q|, with derivative 0 where p = q
    else:
        loss = _jensen_shannon(p.row, u, v, d, jnp.asarray(beta, dtype))
    impossible = p.stats.all_impossible | q.stats.all_impossible
    return rows.row_value(p.row, numerics.where(impossible, lax.stop_gradient(loss) + jnp.inf, loss))


def _relative_entropy(row: rows.Rows, u: Array, v: Array, d: Array) -> Array:
    """D(p‖q) from u = −log p and v = −log q; +∞ if q is 0 at a class where p is not."""
    loss = rows.class_sum(row, _excess(u, v, d))
    unmatched = numerics.is_infinite(v) & ~numerics.is_infinite(u)
    return numerics.where(rows.class_sum(row, unmatched.astype(loss.dtype)) > 0, loss + jnp.inf, loss)


def _jensen_shannon(row: rows.Rows, u: Array, v: Array, d: Array, beta: Array) -> Array:
    """β·D(p‖m) + (1 − β)·D(q‖m). With a = max(p, q) and b = min(p, q), log(m/a) = log1p(share·(b/a − 1)), share being the weight of b."""
    p_is_larger = d >= 0
    share = jnp.where(p_is_larger, 1 - beta, beta)
    above = -jnp.log1p(share * jnp.expm1(numerics.where(p_is_larger, -d, d)))  # log(a/m)
    p_to_m, q_to_m = numerics.where(p_is_larger, above, above + d), numerics.where(p_is_larger, above - d, above)
    of_mixture = numerics.where(p_is_larger, u + above, v + above)  # −log m
    return rows.class_sum(row, beta * _excess(u, of_mixture, p_to_m) + (1 - beta) * _excess(v, of_mixture, q_to_m))


def _softened(row: rows.Rows, temperature: Array) -> rows.Rows:
    """The row of logits/T. A logit of −∞ stays −∞, with derivative 0 in T. Logits that a mask hides are not divided."""
    z = rows.masked(row.values.astype(temperature.dtype), row.where, row.class_mask)
    impossible = z == -jnp.inf
    finite = numerics.finite(z)
    z = numerics.where(impossible, finite - lax.stop_gradient(finite), z) / temperature
    z += numerics.where(impossible, jnp.full_like(z, -jnp.inf), 0)
    return row._replace(raw=z, values=z)


# In the following, x and y are the surprises of two probabilities a = e^(−x) and b = e^(−y). The log-ratio d = log(a/b) = y − x is an
# argument of its own, because it is more accurate than the difference of x and y.


@jax.custom_jvp
def _excess(x: Array, y: Array, d: Array) -> Array:
    """a·log(a/b) − a + b = a·g(d) ≥ 0, with the differential −a·d·dx + (a − b)·dy."""
    near = d > -0.5
    small = numerics.where(near, d, 0)
    large = numerics.where(near, -1, d)  # a is much smaller than b, and e^(−d) may overflow
    return numerics.where(
        near, jnp.exp(-x) * differences.exponential_excess(-small), jnp.exp(-y) * (large * jnp.exp(large) - jnp.expm1(large))
    )


@_excess.defjvp
def _(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    x, y, d = primals
    return _excess(x, y, d), -jnp.exp(-x) * d * tangents[0] + _difference(x, y, d) * tangents[1]


@jax.custom_jvp
def _difference(x: Array, y: Array, d: Array) -> Array:
    """The difference a − b, accurate relative to its own size."""
    a_is_larger = d >= 0
    return numerics.where(a_is_larger, -jnp.exp(-x), jnp.exp(-y)) * jnp.expm1(-jnp.abs(d))


@_difference.defjvp
def _(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    x, y, d = primals
    return _difference(x, y, d), jnp.exp(-y) * tangents[1] - jnp.exp(-x) * tangents[0]
