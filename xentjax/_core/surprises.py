"""The surprise −log p_k of classes, its sum over soft labels (their cross-entropy), and the entropy.

Let m be the largest logit and c = lse(z) − m (see `statistics`). Then −log p_k = (m − z_k) + c. Neither term is negative, so nothing
cancels.

Derivatives. ∂(−log p_k)/∂z_j = p_j − [j = k]. This difference cancels only at a class that holds most of the probability. At most one class
does. If the largest class has p_* > 1/2, it is called the pivot and has the index *. Let q = 1 − p_* = −expm1(−c), where c is computed from
the sum of the exponentials of all other classes. Then

    d(−log p_k) = Σ_{j≠*} p_j dz_j + p_* dz_* − dz_k  for k ≠ *        d(−log p_*) = Σ_{j≠*} p_j dz_j − q dz_*

Let v_k be the derivative of a loss with respect to −log p_k, and let s = Σ_k v_k and r = Σ_{k≠*} v_k. Then the gradient of the loss is
s·p_j − v_j at every class j ≠ *, and r·p_* − v_*·q at the pivot. Both terms of each component have a small relative error at any margin.

Speed. The cross-entropy of soft labels has its own derivative rule. The general rule takes twice the time, because XLA on CPUs stores
several arrays for it. The special rule stores one array, which becomes the gradient. This array holds e^(z_k − m), except that the entries
of the largest classes are marked by −1. The sums of the special rule are written so that no two loops share an array of the size of the
logits. A constant or a number per row counts as such an array if it is broadcast to that size (`benchmarks/NOTES.md`). If the logits are in
half precision, loops would share the converted logits. If the cross-entropy of soft labels is the whole loss, it is then computed in
blocks where `blocks` allows it, and each block is converted in the cache.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import blocks, mesh, numerics, rows, statistics


def surprise(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """−log p_k for every class, shape [..., classes]; INFINITE for classes that do not exist."""
    return _surprise(r.values, r.raw, stats.reference, stats.log_sum, None, r.class_mask, r.where, r.axis_name)[0]


def surprise_at(r: rows.Rows, stats: statistics.Statistics, index: Array) -> Array:
    """−log p_k for several classes of every row, shape [..., k].

    `index` [..., k] holds the classes. The result is NaN if an index is out of range, and INFINITE if a class does not exist.
    """
    index = rows.masked(index.astype(numerics.index_dtype(index)), r.where)
    inside = rows.is_class(r, index)
    u, _ = _surprise(r.values, r.raw, stats.reference, stats.log_sum, index, r.class_mask, r.where, r.axis_name)
    return rows.masked(numerics.nan_unless(inside, u), r.where)


def class_log_odds(r: rows.Rows) -> Array:
    """The log-odds log(p_k/(1 − p_k)) of every class, shape [..., classes].

    Only the largest class can have a small 1 − p_k. Its surprise does not determine such a small number accurately enough. So the log-odds
    of the largest class are computed as if that class were the label.
    """
    top = r._replace(labels=rows.largest_class(r))
    stats = statistics.of_label(top)
    u = jnp.maximum(surprise(top, stats), 0.5)  # changes only the largest class: all others have p_k ≤ 1/2 < e^(−1/2)
    # It varies over devices before it is broadcast to all classes, so that its gradient is summed as one number per row.
    of_top = mesh.vary(stats.log_odds, mesh.axes_of(u))[..., None]
    return jnp.where(rows.on_label(top), of_top, numerics.log_odds_of_surprise(u))


def expected(r: rows.Rows, whole: bool = False) -> Array:
    """Σ_k t_k (−log p_k) for the soft labels t of every row, shape [...].

    `whole` says that it is the whole loss. Then it may be computed in blocks, which round its gradient to the dtype of the logits.
    """
    return blocks.in_blocks(_expected_of_row, (r,)) if whole and r.half else _expected_of_row(r)


def _expected_of_row(r: rows.Rows) -> Array:
    return _expected(r.values, r.raw, r.given_labels, r.class_mask, r.where, r.axis_name)


def entropy(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """H(p) = −Σ_k p_k log p_k of every row, shape [...]. It is computed as c + Σ_k p_k (m − z_k), whose terms are never negative."""
    return entropy_and_mean(r, stats)[0]


def entropy_and_mean(r: rows.Rows, stats: statistics.Statistics) -> tuple[Array, Array]:
    """H(p), and the mean Σ_k p_k (z_k − m) under p, which is at most 0. Each has shape [...]."""
    labels = r.labels if isinstance(stats, statistics.WithLabel) else None
    return _entropy(r.values, r.raw, stats, labels, r.class_mask, r.where, r.axis_name, False)


def total(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """Σ_k −log p_k over the K classes that exist, shape [...]. It is computed as K·c + Σ_k (m − z_k)."""
    below = _below(r.values, r.raw, stats.reference, r.class_mask, r.where, r.axis_name)
    return rows.class_count(r) * stats.log_sum + numerics.where(below == jnp.inf, numerics.INFINITE, below)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _below(values: Array, raw: Array, m: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName) -> Array:
    """Σ_k (m − z_k), shape [...], for a constant m. Its tangent is that of `values`, which are `raw` in the accumulation dtype.

    The barrier keeps XLA from storing a conversion of the logits, or a broadcast of m, that this sum would share with another loop.
    """
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    z, m = lax.optimization_barrier((raw, m))
    return rows.class_sum(r, rows.masked(m[..., None] - z.astype(m.dtype), where, class_mask))


@_below.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, _, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    return _below(*primals, axis_name), -rows.class_sum(r, rows.masked(tangents[0], where, class_mask))


def of_label_and_largest(r: rows.Rows, beta: Array) -> Array:
    """β·(−log p_y) + (1 − β)·(−log max_k p_k) of every row, shape [...]. `beta` is [...]. Labels must be class indices.

    If several classes are largest, they share the derivative of the second term equally.
    """

    def loss(r: rows.Rows, beta: Array) -> Array:
        return _of_label_and_largest(r.values, r.raw, r.given_labels, beta, r.class_mask, r.where, r.axis_name)

    return blocks.in_blocks(loss, (r,), beta) if r.half else loss(r, beta)


def of_soft_labels_and_largest(r: rows.Rows, beta: Array) -> Array:
    """`of_label_and_largest` for soft labels t, shape [...]: β·Σ_k t_k (−log p_k) + (1 − β)·(Σ_k t_k)·(−log max_k p_k).

    This is a cross-entropy of other soft labels: β·t_k, plus (1 − β)·Σ_j t_j, which the largest classes share equally.
    """

    def loss(r: rows.Rows, beta: Array) -> Array:
        largest = statistics.same_as_largest(r, rows.reference(r)).astype(r.values.dtype)
        total, ties = statistics.two_sums(r, r.given_labels, largest)
        share = rows.as_column(r, (1 - beta) * total / jnp.maximum(ties, 1))
        return _expected_of_row(r._replace(labels=beta[..., None] * r.given_labels + share * largest))

    return blocks.in_blocks(loss, (r,), beta)


# The general rule --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _surprise(
    values: Array,
    raw: Array,
    m: Array,
    c: Array,
    index: Array | None,
    class_mask: Array | None,
    where: Array | None,
    axis_name: mesh.AxisName,
) -> tuple[Array, Array]:
    """−log p_k of all classes, or of the classes `index`; and −log p of the largest class, which is used only if that class is the pivot.

    m and c are functions of `values`. The rule takes their derivatives into account, and ignores the tangents of the arguments m and c.
    """
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    x = rows.relative(r, m)
    if class_mask is not None:
        x = numerics.where(class_mask, x, -numerics.INFINITE)
    u = c[..., None] - _at(r, x, index)
    if class_mask is not None and index is None:
        u = numerics.where(class_mask, u, numerics.INFINITE)
    return u, c + _zero_at_largest(r, m, _is_pivot(r, m, c))


@_surprise.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, raw, m, c, index, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    u, of_pivot = _surprise(values, raw, m, c, None, class_mask, where, axis_name)
    pivot, moved = _is_pivot(r, m, c), rows.masked(tangents[0], where, class_mask)
    by_others = rows.class_sum(r, numerics.where(pivot, 0, jnp.exp(-u) * moved))
    by_pivot = rows.class_sum(r, numerics.where(pivot, moved, 0))
    dot_of_pivot = by_others + jnp.expm1(-of_pivot) * by_pivot
    dot_of_others = by_others + jnp.exp(-of_pivot) * by_pivot
    if index is not None:
        on_pivot = _at(r, pivot, index)
        dot = number_where(on_pivot, dot_of_pivot[..., None], dot_of_others[..., None] - _at(r, moved, index))
        return _surprise(*primals, axis_name), (dot, dot_of_pivot)
    dot = number_where(pivot, rows.as_column(r, dot_of_pivot), rows.as_column(r, dot_of_others) - moved)
    return (u, of_pivot), (dot if class_mask is None else numerics.where(class_mask, dot, 0), dot_of_pivot)


def number_where(condition: Array, number: Array, x: Array) -> Array:
    """`number` [..., 1] where `condition`, elsewhere `x` [..., classes].

    It is a sum of products, because a selection would first broadcast `number` to all classes, on every device.
    """
    return condition.astype(x.dtype) * number + numerics.where(condition, 0, x)


def _is_pivot(r: rows.Rows, m: Array, c: Array) -> Array:
    """Whether a class holds most of the probability, shape [..., classes]."""
    return statistics.same_as_largest(r, m) & (lax.stop_gradient(c) < -math.log(numerics.MOST))[..., None]


def _zero_at_largest(r: rows.Rows, m: Array, largest: Array) -> Array:
    """Σ (m − z_k) over the classes in `largest` [..., classes], which all have the logit m: 0 with a derivative, shape [...]."""
    return rows.class_sum(r, numerics.where(largest, -rows.relative(r, m), 0))


def _at(r: rows.Rows, per_class: Array, index: Array | None) -> Array:
    """`per_class` [..., classes], or only its entries at the classes `index` [..., k]."""
    return per_class if index is None else rows.at_index(r, per_class, index, differentiated=per_class.dtype != jnp.bool_)


# The rule of soft labels -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _expected(values: Array, raw: Array, t: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName) -> Array:
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    e = statistics.exponentials(r)
    log_sum = e.log_sum
    _, below, s = _label_sums(r, e, t)
    return below + s * log_sum


@_expected.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, t, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)

    def linear(values: Array, raw: Array, t: Array, z_dot: Array) -> Array:
        return rows.class_sum(r, _slope(values, raw, t, class_mask, where, axis_name) * z_dot)

    # In half precision, a separate backward pass gets the logits, not their gradient in float32.
    linear = jax.checkpoint(linear, prevent_cse=False) if r.half else linear
    dot = linear(values, raw, t, tangents[0]) + rows.class_sum(r, surprise(r, statistics.of_row(r)) * tangents[2])
    return _expected(*primals, axis_name), dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _slope(values: Array, raw: Array, t: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName) -> Array:
    """The gradient of `_expected` with respect to the logits, shape [..., classes]: s·p − t, but r·p_* − t_*·q at the pivot."""
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    e = statistics.exponentials(r)
    others, _, s = _label_sums(r, e, t)
    total = 1 + e.excess
    of_pivot = (others * e.ties - (s - others) * e.rest) / total
    # Without the barrier, XLA would compute these numbers per row in the loop over classes, once per class.
    scale, of_pivot, confident = lax.optimization_barrier((s / total, of_pivot, total < 2))
    direct = e.marked * scale[..., None] - t
    of_largest = numerics.where(confident[..., None], jnp.broadcast_to(of_pivot[..., None], direct.shape), -e.marked * scale[..., None] - t)
    slope = numerics.where(e.marked < -0.5, of_largest, direct)  # not `< 0`: the sums broadcast a 0 too, and loops must not share it
    return rows.masked(slope, where, class_mask)


@_slope.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, t, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    z_dot, t_dot = (rows.masked(x, where, class_mask) for x in (tangents[0], tangents[2]))
    p = statistics.softmax(r)
    s, s_dot, mean = (rows.as_column(r, rows.class_sum(r, x)) for x in (t, t_dot, p * z_dot))
    dot = p * (s * (z_dot - mean) + s_dot) - t_dot
    # The gradient sums to 0 over the classes, and so does its derivative. So the component of the pivot is minus the sum of the others.
    stats = statistics.of_row(r)
    pivot = _is_pivot(r, stats.reference, stats.log_sum)
    balance = -rows.class_sum(r, numerics.where(pivot, 0, dot))
    return _slope(*primals, axis_name), rows.masked(number_where(pivot, rows.as_column(r, balance), dot), where, class_mask)


def _label_sums(r: rows.Rows, e: statistics.Exponentials, t: Array) -> tuple[Array, Array, Array]:
    """Σ t_k over the classes below the largest, Σ t_k (m − z_k) over the same classes, and Σ t_k over all, each [...]."""
    s, keep, fixed = rows.class_sum(r, t), rows.full_mask(r), lax.stop_gradient(e.marked)
    # t·b is computed as (t·2⁶⁰)·(b·2⁻⁶⁰). At a class of probability 0, 2¹²⁷ replaces b·2⁻⁶⁰. So the term represents ∞ if t is above 2⁻⁶⁸.
    # A selection, as in `numerics.weighted`, would be stored.
    amplified = t * 2.0**60
    below = jnp.minimum((e.reference[..., None] - r.values) * 2.0**-60, 2.0**127)
    below = below if keep is None else numerics.where(keep, below, 2.0**127)
    if r.half or statistics.has_few_classes(r):
        largest = statistics.same_as_largest(r, e.reference) if r.half else fixed < -0.5
        return *statistics.two_sums(r, numerics.where(largest, 0, t), amplified * numerics.where(largest, 0, below)), s
    # Both sums need terms of 0 at the largest classes. XLA on CPUs would store a selection, or a factor that two loops share. So both sums
    # use products, with different factors.
    return rows.class_sum(r, t + t * jnp.minimum(fixed, -0.0)), rows.class_sum(r, (amplified * below) * jnp.minimum(1 + fixed, 1)), s


# The rule of a label and the largest class -------------------------------------------------------------------------------
#
# The loss is c + β(m − z_y). Its gradient is p − t with t_k = β·[k = y] + (1 − β)·[k is largest]/n for n largest classes. Let R be the sum
# of the exponentials of all classes below the largest. At a largest class, p = 1/(n + R), p − 1/n = −R·p/n and p − 1 = −(R + n − 1)·p. So
# its component is β·p − (1 − β)·R·p/n, or −β·(R + n − 1)·p − (1 − β)·R·p/n if it is the label. Nothing cancels in one of these products. As
# in `_slope`, the gradient is one sweep over the marked exponentials. At the largest classes, n and −marked differ from whole numbers only
# by their derivatives.


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def _of_label_and_largest(
    values: Array, raw: Array, labels: Array, beta: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName
) -> Array:
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
    e = statistics.exponentials(r)
    mean = (e.ties - lax.stop_gradient(e.ties)) / lax.stop_gradient(jnp.maximum(e.ties, 1))  # of z − m at the largest: 0 with a derivative
    return e.log_sum - numerics.weighted(beta, statistics.gap(r, e.reference)) - (1 - beta) * mean


@_of_label_and_largest.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, labels, beta, class_mask, where = primals
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)

    def linear(values: Array, raw: Array, beta: Array, z_dot: Array) -> Array:
        return rows.class_sum(r, _slope_of_label_and_largest(values, raw, labels, beta, class_mask, where, axis_name) * z_dot)

    linear = jax.checkpoint(linear, prevent_cse=False) if r.half else linear  # as in the rule of `_expected`
    of_label, of_largest = _one_hot(r)
    lead = rows.class_sum(r, (of_largest - of_label) * rows.relative(r, rows.reference(r)))  # m − z_y with its derivative
    dot = linear(values, raw, beta, tangents[0]) + lead * tangents[3]
    return _of_label_and_largest(*primals, axis_name), dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def _slope_of_label_and_largest(
    values: Array, raw: Array, labels: Array, beta: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName
) -> Array:
    """The gradient of `_of_label_and_largest` with respect to the logits, shape [..., classes]."""
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
    e = statistics.exponentials(r)
    scale = numerics.nan_unless(rows.in_range(r), 1 / (1 + e.excess))
    count = lax.stop_gradient(jnp.maximum(e.ties, 1))
    columns = (scale, e.rest, e.ties, e.rest / count, e.ties / count)
    scale, rest, ties, mean_rest, one = (x[..., None] for x in lax.optimization_barrier(columns))  # once per row, not once per class
    label, largest, beta = rows.on_label(r), e.marked < -0.5, beta[..., None]
    to_largest = (1 - beta) * (mean_rest + (one + e.marked)) * scale  # (1 − β)(1/n − p)
    off_label = numerics.where(largest, -e.marked * scale * beta - to_largest, e.marked * scale)
    at_label = numerics.where(largest, -beta * (rest + (ties + e.marked)) * scale - to_largest, e.marked * scale - beta)
    return rows.masked(numerics.where(label, at_label, off_label), where, class_mask)


@_slope_of_label_and_largest.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, labels, beta, class_mask, where = primals
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
    of_label, of_largest = _one_hot(r)

    def slope(values: Array, beta: Array) -> Array:
        t = beta[..., None] * of_label + (1 - beta)[..., None] * of_largest
        return _slope(values, raw, t, class_mask, where, axis_name)

    return _slope_of_label_and_largest(*primals, axis_name), jax.jvp(slope, (values, beta), (tangents[0], tangents[3]))[1]


def _one_hot(r: rows.Rows) -> tuple[Array, Array]:
    """The label and the largest class as distributions, each [..., classes]. Tied classes share the second equally."""
    largest = statistics.same_as_largest(r, rows.reference(r)).astype(r.values.dtype)
    ties = jnp.maximum(rows.class_sum(r, largest), 1)
    both = rows.on_label(r).astype(r.values.dtype), largest / rows.as_column(r, ties)
    of_label, of_largest = (rows.masked(x, r.where, r.class_mask) for x in both)
    return numerics.nan_unless(rows.in_range(r)[..., None], of_label), of_largest


# The rule of the entropy -------------------------------------------------------------------------------------------------
#
# In float32, the sum and the gradient use the exponentials that the gradient of the loss stores anyway. In half precision, or without a
# gradient, the sum computes its own exponentials and stores nothing. A lower bound replaces a logit of −∞. It is one number per row, since
# XLA on CPUs would store a constant that is broadcast to all classes.


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7))
def _entropy(
    values: Array,
    raw: Array,
    stats: statistics.Statistics,
    labels: Array | None,
    class_mask: Array | None,
    where: Array | None,
    axis_name: mesh.AxisName,
    differentiated: bool,
) -> tuple[Array, Array]:
    """`entropy_and_mean`. The rule takes the derivatives of `stats` into account, and ignores its tangents."""
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
    z, m, low = lax.optimization_barrier((raw, stats.reference, stats.reference - 1000))
    x = rows.masked(jnp.maximum(z.astype(m.dtype), low[..., None]) - m[..., None], where, class_mask)
    if r.half or not differentiated:
        total = rows.class_sum(r, jnp.exp(x) * x)
    else:
        e, of_label = _exponentials(r, stats)
        total = rows.class_sum(r, e * x)
        if isinstance(stats, statistics.WithLabel) and of_label is not None:
            total += of_label * numerics.where(of_label > 0, stats.gap, 0)
    mean = total * jnp.exp(-stats.log_sum)
    return stats.log_sum - mean, mean


@_entropy.defjvp
def _(
    axis_name: mesh.AxisName, differentiated: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, raw, stats, labels, class_mask, where = primals
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
    h, mean = _entropy(*primals, axis_name, True)
    z = numerics.widen(raw) if r.half else values
    log_p = rows.masked(jnp.maximum(z + (-stats.reference)[..., None], -numerics.INFINITE), where, class_mask) - stats.log_sum[..., None]
    if r.half:
        p = jnp.exp(log_p)
    else:
        e, of_label = _exponentials(r, stats)
        scale = jnp.exp(-stats.log_sum)
        p = e * scale[..., None]
        if of_label is not None:
            p = numerics.where(rows.on_label(r), jnp.broadcast_to((of_label * scale)[..., None], p.shape), p)
    moved = rows.masked(p * tangents[0], where, class_mask)
    spread, total = rows.class_sum(r, moved * (log_p + h[..., None])), rows.class_sum(r, moved)
    return (h, mean), (-spread, spread + total)  # −Σ dp_k log p_k, and Σ dp_k (z_k − m) + Σ p_k dz_k


def _exponentials(r: rows.Rows, stats: statistics.Statistics) -> tuple[Array, Array | None]:
    """e^(z_k − m) of all classes [..., classes]; with a label, 0 at the label, whose exponential [...] is the second result."""
    m = stats.reference
    if isinstance(stats, statistics.WithLabel):
        return statistics.off_label_exponentials(r, m), jnp.exp(stats.gap)
    return statistics.unmarked(statistics.marked_exponentials(r, m)), None
