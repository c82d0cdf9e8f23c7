"""Bi-tempered loss. It generalizes cross-entropy. If t1 < 1, its logarithm is bounded. If t2 > 1, its softmax has heavy tails.

Definitions. The tempered logarithm is log_t(x) = (x^(1 − t) − 1)/(1 − t). Its inverse is exp_t(x) = (1 + (1 − t)x)^(1/(1 − t)). At t = 1,
these functions are log and exp. The probabilities are p_k = exp_t2(z_k − λ). The normalizer λ is the number for which the p_k sum to 1. The
loss is −log_t1 p_y − (1 − Σ_k p_k^(2 − t1))/(2 − t1). At t1 = t2 = 1, it is cross-entropy.

Normalizer. λ is the root of the function log_t2 Z(λ), where

    Z(λ) = Σ_k p_k = Σ_k (1 + (t2 − 1)(λ − z_k))^(−1/(t2 − 1))        log_t2 Z = (1 − Z^(1 − t2))/(t2 − 1)

The function log_t2 Z(λ) decreases in λ, and it is convex. If all logits are equal, it is linear. Halley's method finds its root. Its steps
need three sums over classes, Σ p_k, Σ p_k^t2 and Σ p_k^(2·t2 − 1). Near the root, each step triples the number of correct digits.

Derivatives. The steps of Halley's method are not differentiated. Let u_k = −log p_k and r_k = p_k^t2/Σ_j p_j^t2. Because Σ p = 1, the
derivative rule of u_k is

    du_k = −p_k^(t2 − 1)·(dz_k − Σ_j r_j dz_j) + (v_k − p_k^(t2 − 1)·Σ_j p_j v_j/Σ_j p_j^t2)·dt2

Here v_k is the derivative of u_k with respect to t2 at a fixed λ.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import blocks, checks, differences, log_ratio, mesh, numerics, rows, statistics

_STEPS = 7  # the largest number of steps. In float64, they are exact for logits up to 10⁹ apart among 100,000 classes, at any t2 in [1, 4]


def bi_tempered_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    t1: ArrayLike = 0.8,
    t2: ArrayLike = 1.2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Bi-tempered logistic loss per example, shape [...].

    loss = −log_t1 p_y − (1 − Σ_k p_k^(2 − t1))/(2 − t1) with p_k = exp_t2(z_k − λ), where λ is the number for which Σ_k p_k = 1.
    Gradient: ∂loss/∂z = g − r·Σ_k g_k with g_k = p_k^(t2 − t1)·(p_k − [k = y]) and r_k = p_k^t2/Σ_j p_j^t2.

    Here log_t(x) = (x^(1 − t) − 1)/(1 − t), and exp_t is its inverse. At t1 = t2 = 1, the loss is cross-entropy. If t1 < 1, the loss is
    bounded, so the influence of far outliers is limited. If t2 > 1, the probabilities have heavy tails, so wrong labels near the decision
    boundary do little harm.

    The loss of soft labels t is Σ_k t_k·loss(k), where loss(k) is the loss of class index k. This sum equals the loss of
    the paper up to a term that depends only on the labels.

    Args:
        logits: [..., classes], any real numbers.
        labels: [...] class indices, or [..., classes] soft labels.
        t1: in [0, 1], temperature of the logarithm.
        t2: ≥ 1, temperature of the exponential.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `t1` is outside [0, 1], or `t2` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[0.0, 10.0], [0.0, 1000.0]])  # even here the loss is below 1/(1 − t1)
        >>> xentjax.bi_tempered_cross_entropy(logits, jnp.array([0, 0]), t1=0.5, t2=2.0).tolist()
        [1.32966..., 1.93580...]

    Reference:
        Amid et al., Robust Bi-Tempered Logistic Loss Based on Bregman Divergences, 2019, arXiv 1906.03361.
    """
    name = "bi_tempered_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _bi_tempered(batch, checks.fraction(name, "t1", t1), checks.number(name, "t2", t2, low=1.0))


@jax.jit
def _bi_tempered(batch: rows.Examples, t1: ArrayLike, t2: ArrayLike | None) -> Array:
    return blocks.in_blocks(_loss, (rows.of(batch),), jnp.asarray(t1), jnp.asarray(t2))


def _loss(r: rows.Rows, t1: Array, t2: Array) -> Array:
    alpha, heavy = 1 - t1, t2 - 1
    u = _surprises(r.values, heavy, r.class_mask, r.where, r.axis_name)
    power = jnp.exp(-(1 + alpha)[..., None] * u)  # p^(2 − t1)
    loss = (_of_index if r.labels_are_indices else _of_soft_labels)(r, u, power, alpha)
    all_impossible = rows.largest(r) == -jnp.inf
    return rows.row_value(r, numerics.restore_infinity(numerics.where(all_impossible, lax.stop_gradient(loss), loss)))


def _of_index(r: rows.Rows, u: Array, power: Array, alpha: Array) -> Array:
    label = rows.on_label(r)
    rest = rows.class_sum(r, numerics.where(label, 0, jnp.exp(-u)))  # 1 − p_y
    # In an example that does not count, u is INFINITE. `row_value` replaces it by 0.
    own = rows.row_value(r, rows.class_sum(r, numerics.where(label, u, 0)))
    others = rows.class_sum(r, numerics.where(label, 0, power))
    return numerics.nan_unless(rows.in_range(r), _label_terms(own, rest, alpha) + others / (1 + alpha))


def _of_soft_labels(r: rows.Rows, u: Array, power: Array, alpha: Array) -> Array:
    """Σ_k t_k·loss(k) for soft labels t, shape [...].

    loss(k) is the tempered logarithm (1 − p_k^α)/α minus (1 − Σ_j p_j^(1 + α))/(1 + α), which is one number per row. If class k holds most
    of the probability, the two terms may be nearly equal, and their difference would lose digits. Then loss(k) is computed as in
    `_of_index`, once per row.
    """
    largest = u < -math.log(numerics.MOST)
    own = rows.class_sum(r, numerics.where(largest, u, 0))
    rest = rows.class_sum(r, numerics.where(largest, 0, jnp.exp(-u)))
    others = rows.class_sum(r, numerics.where(largest, 0, power))
    of_largest = _label_terms(own, rest, alpha) + others / (1 + alpha)
    per_row = (1 - others - rows.class_sum(r, numerics.where(largest, power, 0))) / (1 + alpha)
    of_others = numerics.tempered(u, jnp.broadcast_to(alpha[..., None], u.shape)) - rows.as_column(r, per_row)
    losses = numerics.where(largest, jnp.broadcast_to(rows.as_column(r, of_largest), u.shape), of_others)
    return rows.class_sum(r, numerics.weighted(r.given_labels, rows.masked(losses, r.where)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _surprises(values: Array, heavy: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName) -> Array:
    """−log p_k of every class, shape [..., classes]. It is `numerics.INFINITE` for a masked class, and for a class with logit −∞.

    `heavy` [...] is t2 − 1.
    """
    r = rows.Rows(values, values, None, class_mask, where, axis_name)
    x = _solve(r, heavy)[..., None] - rows.relative(r, rows.reference(r))
    return numerics.where(rows.not_infinite(r), numerics.scaled_log1p(x, heavy[..., None]), numerics.INFINITE)


@_surprises.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, heavy, class_mask, where = primals
    u = _surprises(*primals, axis_name)
    r = rows.Rows(values, values, None, class_mask, where, axis_name)
    keep = rows.not_infinite(r)
    slope = jnp.exp(-heavy[..., None] * u)  # ∂u_k/∂λ = −∂u_k/∂z_k = p_k^(t2 − 1)
    weight = jnp.exp(-u) * slope  # p_k^t2
    total = rows.class_sum(r, weight)
    total = numerics.where(total == 0, 1, total)
    moved = numerics.where(keep, tangents[0], 0)
    dot = -slope * log_ratio.centred_tangent(r, weight / rows.as_column(r, total), moved)
    in_heavy = _slope_in_heavy(numerics.where(keep, u, 0), heavy[..., None])
    mean = rows.class_sum(r, jnp.exp(-u) * in_heavy) / total
    dot += (in_heavy - slope * rows.as_column(r, mean)) * rows.as_column(r, tangents[1])
    return u, dot


def _slope_in_heavy(u: Array, heavy: Array) -> Array:
    """∂u/∂h of u = log(1 + hx)/h at a fixed x: −(e^(−hu) − 1 + hu)/h²."""
    y = heavy * u
    near = y < differences.NEAR
    small = numerics.where(near, u, 0)
    h = numerics.where(near, 1, jnp.broadcast_to(heavy, u.shape))
    far = (jnp.expm1(-y) + y) / (h * h)
    return -numerics.where(near, small * small * differences.exponential_series(-heavy * small, 2), far)


def _solve(r: rows.Rows, heavy: Array) -> Array:
    """λ − m [...] for the largest logit m, by Halley's method.

    The starting point is the root if all logits are equal. Each step triples the number of correct digits. So if a step changes λ by less
    than eps^(1/3), one more step is enough. In a program for one device, the loop ends then. In a program for several devices, the number
    of steps is fixed.
    """
    below, keep = rows.reference(r)[..., None] - r.values, rows.full_mask(r)
    below = below if keep is None else numerics.where(keep, below, jnp.inf)
    fixed = lax.stop_gradient((below, heavy))

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        steps, offset, before = state
        return (steps < _STEPS - 1) & ~blocks.every(jnp.abs(offset - before) <= tolerance)

    def one_more(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        steps, offset, _ = state
        return steps + 1, _step(r, *fixed, offset), offset

    start = numerics.tempered(jnp.log(_sums(r, *fixed, jnp.zeros_like(fixed[1]))[0]), -fixed[1])
    tolerance = jnp.finfo(start.dtype).eps ** (1 / 3)
    _, offset, _ = lax.while_loop(unfinished, one_more, one_more((jnp.zeros((), jnp.int32), start, start)))
    return _step(r, below, heavy, offset)  # its derivative is that of the root


def _step(r: rows.Rows, below: Array, heavy: Array, offset: Array) -> Array:
    """One step of Halley's method from `offset` [...]. `below` holds m − z_k."""
    total, slope, curvature = _sums(r, below, heavy, offset)
    f = numerics.tempered(jnp.log(total), -heavy)  # Z^(t2 − 1)·log_t2 Z
    bend = f * (1 + heavy) / 2 * (curvature / slope * (total / slope) - 1)
    return offset + f * (total / slope) / jnp.maximum(1 - bend, 0.1)


def _sums(r: rows.Rows, below: Array, heavy: Array, offset: Array) -> tuple[Array, Array, Array]:
    """Σ p_k, Σ p_k^t2 and Σ p_k^(2·t2 − 1) for λ = m + `offset`. If a row has no class, the first two are 1.

    XLA on CPUs computes a selection for each class slowly, so t2 = 1 has no branch of its own. If t2 − 1 is below 2⁻⁶⁰, the code uses 2⁻⁶⁰.
    The results are the same.
    """
    h = jnp.maximum(heavy, 2.0**-60)[..., None]
    x = offset[..., None] + below
    p, shrink = jnp.exp(-jnp.log1p(h * x) * (1 / h)), 1 / (1 + h * x)
    total, slope = (numerics.where(y == 0, 1, y) for y in statistics.two_sums(r, p, p * shrink))
    return total, slope, rows.class_sum(r, p * shrink * shrink)


def _label_terms(own: Array, rest: Array, alpha: Array) -> Array:
    """The terms of the loss that depend on the label's probability p: (1 − p^α)/α − (1 − p^(1 + α))/(1 + α) with α = 1 − t1.

    p is given twice, as e^(−own) and as 1 − rest. The difference is the integral of s(1 − s)^(α − 1) over s from 0 to `rest`. If `rest` is
    small, the two terms are nearly equal, and their difference loses digits. Then the series of the integral is used.
    """
    near = (rest < 0.25) & (own < 1)
    small, far = numerics.where(near, rest, 0), numerics.where(near, jnp.ones_like(own), own)
    terms = 28 if rest.dtype == jnp.float64 else 13
    series = jnp.full_like(rest, 1 / (terms + 2))
    for n in range(terms - 1, -1, -1):
        series = 1 / (n + 2) + (n + 1 - alpha) / (n + 1) * small * series
    return numerics.where(near, small * small * series, numerics.tempered(far, alpha) - numerics.tempered(far, 1 + alpha))
