"""Losses with angular margins. They train embeddings, for example of faces or products.

Each class has a direction in the space of the embeddings. The predicted class is the class whose direction has the smallest angle to the
embedding. With a margin, the loss is low only if the angle to the direction of the label is clearly smaller than all other angles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics


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
    """Cross-entropy of scaled cosines with a margin on the label's angle, one value per example, shape [...].

    loss = −log(e^(s·ψ)/(e^(s·ψ) + Σ_{k≠y} e^(s·cos θ_k))) with θ = arccos(cosines) and ψ = cos(m1·θ_y + m2) − m3.
    Gradient: let p be the softmax of the logits, which are s·ψ for the label and s·cos θ_k for every class k ≠ y. Then
    ∂loss/∂cos θ_k = s·p_k for k ≠ y, and ∂loss/∂cos θ_y = s·(p_y − 1)·m1·sin(m1·θ_y + m2)/sin θ_y.

    SphereFace uses m1 > 1, ArcFace uses m2 > 0, and CosFace uses m3 > 0. The default is ArcFace. With m1 = 1 and m2 = m3 = 0, the loss is
    the cross-entropy of the scaled cosines (normalized softmax). The loss of soft labels t is Σ_k t_k·loss(k), where loss(k) is the loss of
    class index k.

    If the angle of the label is 0 or π, the exact gradient may be infinite. So the gradient uses max(sin² θ_y, eps) instead of sin² θ_y.
    Here eps is the machine epsilon of the dtype of `cosines`. If m1·θ_y + m2 is above π, the loss decreases as θ_y grows. The formula of
    Deng et al. has the same property. For millions of classes, fuse the loss with the layer that computes the cosines, as in the example.

    Args:
        cosines: [..., classes], in [−1, 1], cosine of the angle between the embedding and the direction of each class.
        labels: [...] class indices, or [..., classes] soft labels.
        scale: s > 0, inverse temperature.
        m1: ≥ 0, factor of θ_y, the angle of the label.
        m2: ≥ 0, in radians, added to m1·θ_y.
        m3: ≥ 0, subtracted from cos(m1·θ_y + m2).
        axis: class axis of `cosines`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `cosines` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, a margin is negative, or `scale` is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> def unit(x, axis):
        ...     return x / jnp.linalg.norm(x, axis=axis, keepdims=True)
        >>> hidden, kernel = jnp.eye(3)[:2] + 0.1, jnp.eye(3)
        >>> fused = xentjax.fuse_linear(xentjax.margin_cross_entropy, reduction="none")  # never holds all cosines at once
        >>> fused(unit(hidden, -1), unit(kernel, 0), jnp.array([0, 1])).tolist()
        [2.05...e-20, 2.05...e-20]

    Reference:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2018, arXiv 1801.07698 (all three margins);
        Liu et al., SphereFace, 2017, arXiv 1704.08063; Wang et al., CosFace, 2018, arXiv 1801.09414.
    """
    name = "margin_cross_entropy"
    batch = checks.examples(name, cosines, labels, axis, axis_name, class_mask, where, inputs="cosines")
    margins = tuple(checks.number(name, n, x) for n, x in (("m1", m1), ("m2", m2), ("m3", m3)))
    if isinstance(m1, int | float) and m1 == 1:  # then the formula needs no angle, only its sine
        return _margin(batch, checks.positive(name, "scale", scale), margins[1:])
    return _margin(batch, checks.positive(name, "scale", scale), margins)


@jax.jit
def _margin(batch: rows.Examples, scale: ArrayLike, margins: tuple[ArrayLike | None, ...]) -> Array:
    """The loss for the margins (m1, m2, m3), or (m2, m3) if m1 = 1."""
    plain = rows.of(batch)
    dtype = plain.values.dtype
    scale = jnp.asarray(scale, dtype)
    *m1, m2, m3 = (jnp.zeros((), dtype) if m is None else jnp.asarray(m, dtype) for m in margins)
    r = rows.adjusted(plain, jnp.multiply, scale)
    stats = statistics.of(r)
    # The least sin² θ in a derivative. The cosines are rounded to the caller's dtype, so its eps is used and not that of the arithmetic.
    least = jnp.asarray(jnp.finfo(plain.raw.dtype).eps, dtype)

    def phi(log_odds: Array, cosine: Array) -> Array:
        if m1:
            moved = jnp.cos(m1[0] * numerics.angle(cosine, least) + m2)
        else:
            moved = jnp.cos(m2) * cosine - jnp.sin(m2) * numerics.sine(cosine, least)
        moved = scale * (moved - m3 - cosine)
        return odds.surprise(log_odds + numerics.where(numerics.is_infinite(-cosine), jnp.zeros_like(moved), moved))

    if isinstance(stats, statistics.WithLabel):
        loss = phi(stats.log_odds, rows.reference(plain) + numerics.weighted(1 / scale, stats.gap))
    else:
        loss = odds.expected(r, stats, phi, of_class=rows.finite_values(plain))
    return statistics.finish(r, stats, loss)
