"""Margins between angles: embeddings whose classes (persons, products) are told apart by the angle to a direction per class."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics, surprises


def margin_cross_entropy(
    cosines: ArrayLike,
    labels: ArrayLike,
    *,
    scale: ArrayLike = 64.0,
    m1: ArrayLike = 1.0,
    m2: ArrayLike = 0.5,
    m3: ArrayLike = 0.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of cosines with margins at the label's angle, one value per example [...].

    loss = −log(e^(s·ψ)/(e^(s·ψ) + Σ_{k≠y} e^(s·cos θ_k))),  ψ = cos(m1·θ_y + m2) − m3,  θ = arccos(cosines).
    Gradient: with p of the logits that the formula shows, s·p_k for k ≠ y and s·(p_y − 1)·m1·sin(m1·θ_y + m2)/sin θ_y for the label.

    SphereFace is m1 > 1, ArcFace m2 > 0 (the default), CosFace m3 > 0; m1 = 1, m2 = m3 = 0 is normalised softmax. Where the angle of
    the label is 0 or π the exact gradient may be infinite: there sin² θ is at least one eps of the dtype of `cosines`. Past
    m1·θ + m2 = π the loss falls again, as in the papers. For millions of classes see the example.

    Args:
        cosines: [..., classes], cosines of the angles between an embedding and each class's direction, in [−1, 1].
        labels: [...] class indices, or [..., classes] distributions, which cost Σ_k t_k·loss(k).
        scale: s > 0, inverse temperature.
        m1: ≥ 0, factor of the label's angle.
        m2: ≥ 0, added to it, in radians.
        m3: ≥ 0, subtracted from its cosine.
        axis: the class axis of `cosines`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 cosines).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative margin, a `scale` that is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> def unit(x, axis):
        ...     return x / jnp.linalg.norm(x, axis=axis, keepdims=True)
        >>> hidden, kernel = jnp.eye(3)[:2] + 0.1, jnp.eye(3)
        >>> fused = xentjax.fuse_linear(xentjax.margin_cross_entropy, reduction="none")  # the cosines never exist at once
        >>> fused(unit(hidden, -1), unit(kernel, 0), jnp.array([0, 1])).tolist()
        [2.05...e-20, 2.05...e-20]

    Reference:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2018, arXiv 1801.07698 (all three margins); Liu et
        al., SphereFace, 2017, arXiv 1704.08063; Wang et al., CosFace, 2018, arXiv 1801.09414.
    """
    name = "margin_cross_entropy"
    batch = checks.examples(name, cosines, labels, axis, axis_name, class_mask, where, inputs="cosines")
    margins = tuple(checks.number(name, n, x) for n, x in (("m1", m1), ("m2", m2), ("m3", m3)))
    if isinstance(m1, int | float) and m1 == 1:  # needs no angle
        return _margin(batch, checks.positive(name, "scale", scale), margins[1:])
    return _margin(batch, checks.positive(name, "scale", scale), margins)


@jax.jit
def _margin(batch, scale, margins):
    plain = rows.of(batch)
    dtype = plain.values.dtype
    scale = jnp.asarray(scale, dtype)
    *m1, m2, m3 = (jnp.zeros((), dtype) if m is None else jnp.asarray(m, dtype) for m in margins)
    r = rows.adjusted(plain, scale)
    stats = statistics.of(r)
    least = jnp.asarray(
        jnp.finfo(plain.raw.dtype).eps, dtype
    )  # that of sin² θ: what the cosines are rounded to, not what they are computed in

    def phi(log_odds, cosine):
        if m1:
            moved = jnp.cos(m1[0] * _angle(cosine, least) + m2)
        else:
            moved = jnp.cos(m2) * cosine - jnp.sin(m2) * _sine(cosine, least)
        moved = scale * (moved - m3 - cosine)
        return odds.surprise(log_odds + numerics.where(numerics.is_infinite(-cosine), jnp.zeros_like(moved), moved))

    if isinstance(stats, statistics.WithLabel):
        loss = phi(stats.log_odds, rows.reference(plain) + stats.gap / scale)
    else:
        assert r.labels is not None
        loss = rows.class_sum(r, r.labels * phi(surprises.class_log_odds(r), rows.finite_values(plain)))
    return statistics.finish(r, stats, loss)


@jax.custom_jvp
def _angle(cosine: Array, least: Array) -> Array:
    """The angle, with a finite derivative −1/sin at both ends."""
    return jnp.arccos(jnp.clip(cosine, -1, 1))


_angle.defjvp(lambda primals, tangents: (_angle(*primals), -tangents[0] / _bounded_sine(*primals)))


@jax.custom_jvp
def _sine(cosine: Array, least: Array) -> Array:
    """√(1 − c²), with a finite derivative −c/sin at both ends."""
    inside = jnp.abs(cosine) < 1
    return numerics.where(inside, jnp.sqrt(numerics.where(inside, (1 - cosine) * (1 + cosine), jnp.ones_like(cosine))), 0)


_sine.defjvp(lambda primals, tangents: (_sine(*primals), -primals[0] * tangents[0] / _bounded_sine(*primals)))


def _bounded_sine(cosine: Array, least: Array) -> Array:
    return jnp.sqrt(jnp.maximum((1 - cosine) * (1 + cosine), least))
