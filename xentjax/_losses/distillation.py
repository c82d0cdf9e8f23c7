"""Divergences between the predictions of a student and of a teacher, both given as logits.

With p = softmax(teacher/T), q = softmax(student/T) and the log-ratio d_k = log p_k − log q_k, every divergence is a sum over classes of
terms that are not negative, because Σ p = Σ q = 1:

    D(p‖q) = Σ p·g(d),  g(d) = e^(−d) − 1 + d,  with a series for small d

So nearly equal distributions keep a divergence that is right relative to its own size, d²/2, if d itself is. As a difference of two
surprises d would have the rounding of its terms. It is made of the exact difference of the logits instead, δ = z − z' less a constant
near lse(z) − lse(z'), and of what that constant misses, d = δ − L with L = log Σ q·e^δ = log1p(Σ q·(e^δ − 1)), a sum of numbers of
the size of the result. Its derivative is that of the surprises.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, numerics, rows, statistics, surprises

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
    """Divergence between the softened predictions of teacher and student, one value per example [...].

    With p = softmax(teacher/T), q = softmax(student/T):  "forward" D(p‖q) = Σ p log(p/q);  "reverse" D(q‖p);
    "js" β·D(p‖m) + (1 − β)·D(q‖m), m = βp + (1 − β)q;  "tv" ½ Σ|p − q|.
    Gradient: T·∂/∂student is q − p for "forward", q·(log(q/p) − D(q‖p)) for "reverse",
    (1 − β)·q·(log(q/m) − D(q‖m)) for "js", ½ q·(s − Σ q s) with s = sign(q − p) for "tv"; those of the teacher are the same with
    p and q, β and 1 − β, "forward" and "reverse" exchanged.

    Differentiable in both logits: put `jax.lax.stop_gradient` on a teacher that is not trained with the student. The gradient
    shrinks as 1/T², twice: through q's dependence on student/T, and because softened p and q lie closer. Multiply the loss by
    `temperature**2`, as Hinton et al. do, where it is added to a loss on labels and T is tuned. Exactly 0 for equal logits.

    Args:
        student_logits: [..., classes], unnormalised log-probabilities in nats.
        teacher_logits: [..., classes], the same of the teacher.
        temperature: T > 0, divides both logits.
        divergence: "forward", "reverse", "js" or "tv".
        beta: β in (0, 1), weight of the teacher in m; only for "js". 1/2 is the Jensen-Shannon divergence.
        axis: the class axis of both.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, ≥ 0 ("tv" ≤ 1); float32 (float64 if either has it). +∞ where D(p‖q) has q = 0 < p.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `temperature` not above 0, `beta` outside (0, 1), an unknown `divergence`.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> teacher = jnp.array([2.0, 0.0, -1.0])
        >>> student = teacher + jnp.array([1e-4, 0.0, 0.0])  # as close as float32 logits get
        >>> print(f"{xentjax.distillation_loss(student, teacher):.3e}")
        6.57...e-10

    Reference:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; Agarwal et al., On-Policy
        Distillation of Language Models, 2023, arXiv 2306.13649 (reverse, js).
    """
    name = "distillation_loss"
    student = checks.floating(name, "student_logits", student_logits)
    teacher = checks.floating(name, "teacher_logits", teacher_logits)
    checks.same_shape(name, "teacher_logits", teacher, student.shape, "the shape of student_logits")
    both = [
        checks.examples(name, z, None, axis, axis_name, class_mask, where, labelled=False, inputs=inputs)
        for inputs, z in (("student_logits", student), ("teacher_logits", teacher))
    ]
    if divergence not in DIVERGENCES:
        raise ValueError(f"{name}: divergence must be one of {', '.join(map(repr, DIVERGENCES))}; got {divergence!r}.")
    softness = checks.positive(name, "temperature", temperature)
    share = checks.fraction(name, "beta", beta)
    if isinstance(share, float) and share in (0.0, 1.0):
        raise ValueError(f"{name}: beta must lie strictly between 0 and 1; got {share:g}. Use divergence='forward' or 'reverse'.")
    return _divergence(*both, softness, share, divergence)


@functools.partial(jax.jit, static_argnames="divergence")
def _divergence(student, teacher, temperature, beta, divergence):
    dtype = numerics.accumulation_dtype(student.logits.dtype, teacher.logits.dtype)
    p, q = (_softened(rows.of(batch), jnp.asarray(temperature, dtype)) for batch in (teacher, student))
    of_p, of_q = statistics.of_row(p), statistics.of_row(q)
    u, v = surprises.surprise(p, of_p), surprises.surprise(q, of_q)
    d = _log_ratio(p, q, of_p, of_q, u, v)
    if divergence == "forward":
        loss = _relative_entropy(p, u, v, d)
    elif divergence == "reverse":
        loss = _relative_entropy(p, v, u, -d)
    elif divergence == "tv":
        apart = _difference(u, v, d)
        loss = rows.class_sum(p, apart * jnp.sign(apart)) / 2  # |p − q| with derivative 0 where they are equal
    else:
        loss = _jensen_shannon(p, u, v, d, jnp.asarray(beta, dtype))
    dead = of_p.dead | of_q.dead
    return rows.row_value(p, numerics.where(dead, lax.stop_gradient(loss) + jnp.inf, loss))


def _softened(r, temperature):
    """The rows of logits/T; a logit of −∞ stays, with derivative 0 in T, and what a mask hides is not divided."""
    z = rows.masked(r.values.astype(temperature.dtype), r.where, r.class_mask)
    impossible = z == -jnp.inf
    finite = numerics.finite(z)
    z = numerics.where(impossible, finite - lax.stop_gradient(finite), z) / temperature
    z += numerics.where(impossible, jnp.full_like(z, -jnp.inf), 0)
    return r._replace(raw=z, values=z)


def _log_ratio(p, q, of_p, of_q, u, v):
    """The log-ratio d of every class, as the module docstring makes it."""
    logits, lost = _exact_difference(rows.finite_values(p), rows.finite_values(q))
    largest, lost_too = _exact_difference(of_p.reference, of_q.reference)
    delta = (logits - largest[..., None]) + (lost - lost_too[..., None]) - (of_p.log_sum - of_q.log_sum)[..., None]
    # Σ q(e^δ − 1), as fallen + e^L·risen: of two forms for a class the one that does not overflow, p = q·e^(δ − L)
    change, ahead = jnp.expm1(-jnp.abs(delta)), delta > 0
    fallen = rows.class_sum(p, numerics.where(ahead, 0, jnp.exp(-v) * change))
    risen = rows.class_sum(p, numerics.where(ahead, -jnp.exp(-u) * change, 0))
    # e^L = 1 + fallen + e^L·risen; where half of p has moved, d is large and needs no more than the first step
    missed = jnp.log1p(jnp.clip((fallen + risen) / jnp.maximum(1 - risen, 0.5), -0.5, 0.5))
    return differences.with_slope_of(lax.stop_gradient(delta - missed[..., None]), v - u)


def _exact_difference(x, y):
    """The rounded x − y and its rounding error, of which x − y is exactly the sum (Knuth)."""
    rounded = x - y
    of_y = rounded - x
    return rounded, (x - (rounded - of_y)) - (y + of_y)


def _relative_entropy(r, u, v, d):
    """D(p‖q) from u = −log p, v = −log q; +∞ where a class with a finite logit in p is impossible in q."""
    loss = rows.class_sum(r, _excess(u, v, d))
    unmatched = numerics.is_infinite(v) & ~numerics.is_infinite(u)
    return numerics.where(rows.class_sum(r, unmatched.astype(loss.dtype)) > 0, loss + jnp.inf, loss)


def _jensen_shannon(r, u, v, d, beta):
    """With the larger of p and q as the unit, log m is a log1p of what m falls short of it."""
    ahead = d >= 0
    share = jnp.where(ahead, 1 - beta, beta)  # of the smaller
    lead = -jnp.log1p(share * jnp.expm1(numerics.where(ahead, -d, d)))  # log(larger/m)
    p_to_m, q_to_m = numerics.where(ahead, lead, lead + d), numerics.where(ahead, lead - d, lead)
    surprise = numerics.where(ahead, u + lead, v + lead)  # −log m
    return rows.class_sum(r, beta * _excess(u, surprise, p_to_m) + (1 - beta) * _excess(v, surprise, q_to_m))


# x, y are surprises of probabilities a = e^(−x), b = e^(−y), d = y − x given apart because it is known better than its terms.


@jax.custom_jvp
def _excess(x, y, d):
    """a·log(a/b) − a + b ≥ 0, which is a·g(d); its differential is −a·d·dx + (a − b)·dy."""
    near = d > -0.5
    small = numerics.where(near, d, 0)
    large = numerics.where(near, -1, d)  # a ≪ b, where e^(−d) may overflow
    return numerics.where(
        near, jnp.exp(-x) * differences.exponential_excess(-small), jnp.exp(-y) * (large * jnp.exp(large) - jnp.expm1(large))
    )


@_excess.defjvp
def _(primals, tangents):
    x, y, d = primals
    return _excess(x, y, d), -jnp.exp(-x) * d * tangents[0] + _difference(x, y, d) * tangents[1]


@jax.custom_jvp
def _difference(x, y, d):
    """Of the probabilities, a − b, relative to its own size."""
    ahead = d >= 0
    return numerics.where(ahead, -jnp.exp(-x), jnp.exp(-y)) * jnp.expm1(-jnp.abs(d))


@_difference.defjvp
def _(primals, tangents):
    x, y, d = primals
    return _difference(x, y, d), jnp.exp(-y) * tangents[1] - jnp.exp(-x) * tangents[0]
