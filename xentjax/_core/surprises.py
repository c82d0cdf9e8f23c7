"""The surprise −log p of classes, and its expectation under soft labels, the cross-entropy of distributions.

With m the largest logit and c = lse − m (`statistics.of`), −log p_k = (m − z_k) + c. Neither term is negative, so nothing cancels.

Derivatives. ∂(−log p_k)/∂z_j = p_j − [j = k], which cancels only at a class that holds most of the probability. At most one class
does: the pivot *, which is the largest class if its p_* > 1/2. Let q = 1 − p_* = −expm1(−c), the sum of the exponentials over the other
classes divided by the sum over all classes. Then

    d(−log p_k) = Σ_{j≠*} p_j dz_j + p_* dz_* − dz_k  for k ≠ *        d(−log p_*) = Σ_{j≠*} p_j dz_j − q dz_*

A loss with slopes v_k in the surprises then has the gradient s·p_j − v_j with s = Σ v, and at the pivot r·p_* − v_*·q with r = Σ_{k≠*} v_k.
Both terms of each component keep their relative accuracy at any margin.

Speed. The cross-entropy of soft labels has a derivative rule of its own, because the arrays that XLA on CPUs stores for the general rule
double the time. The special rule stores one array, which becomes the gradient: e^(z_k − m), and −1 at the largest classes as a mark. Its
sums are written so that no two loops share an array of the size of the logits. A constant, or a number per row, that is broadcast to that
size counts as such an array (`benchmarks/README.md`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics, rows, statistics


def surprise(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """−log p_k for every class [..., classes]; INFINITE for classes that do not exist."""
    return _surprise(r.values, r.raw, stats.reference, stats.log_sum, None, r.class_mask, r.where, r.axis_name)[0]


def surprise_at(r: rows.Rows, stats: statistics.Statistics, index: Array) -> Array:
    """−log p at several classes of a row, `index` [..., k]; NaN where an index is out of range, INFINITE where it does not exist."""
    index = rows.masked(index.astype(numerics.index_dtype(index)), r.where)
    inside = rows.is_class(r, index)
    u, _ = _surprise(r.values, r.raw, stats.reference, stats.log_sum, index, r.class_mask, r.where, r.axis_name)
    return rows.masked(numerics.nan_unless(inside, u), r.where)


def class_log_odds(r: rows.Rows) -> Array:
    """log(p_k/(1 − p_k)) for every class [..., classes].

    Only the largest class can have a small 1 − p_k, about which its surprise carries too little information. So the log-odds of the largest
    class are computed as if it were the label.
    """
    top = r._replace(labels=rows.largest_class(r))
    stats = statistics.of_label(top)
    u = jnp.maximum(surprise(top, stats), 0.5)  # p_k ≤ 1/2 for the others; e^(−1/2) > 1/2 leaves them as they are
    of_top = mesh.vary(stats.log_odds, mesh.axes_of(u))[..., None]  # before it is as wide as the classes, its gradient's sum likewise
    return jnp.where(rows.on_label(top), of_top, numerics.log_odds_of_surprise(u))


def expected(r: rows.Rows, t: Array) -> Array:
    """Σ_k t_k (−log p_k) [...] for soft labels t [..., classes], which are 0 in examples that do not count."""
    return _expected(r.values, r.raw, t, r.class_mask, r.where, r.axis_name)


def entropy(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """H(p) = −Σ_k p_k log p_k of every row, as c + Σ_k p_k(m − z_k): neither term is ever negative."""
    return _entropy(r.values, stats.reference, stats.log_sum, r.class_mask, r.where, r.axis_name)


def total(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """Σ_k −log p_k over the classes that exist, as K·c + Σ_k (m − z_k)."""
    below = rows.class_sum(r, rows.masked(stats.reference[..., None] - r.values, r.where, r.class_mask))
    return rows.class_count(r) * stats.log_sum + numerics.where(below == jnp.inf, numerics.INFINITE, below)


# The general rule --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _surprise(values, raw, m, c, index, class_mask, where, axis_name):
    """−log p of all classes, or of those in `index`; and −log p of the largest class, used where that class is the pivot.

    The rule treats m and c as the functions of `values` that they are, and ignores their own tangents.
    """
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    z = rows.finite_values(r)
    if class_mask is not None:
        z = numerics.where(class_mask, z, -numerics.INFINITE)
    u = (m[..., None] - _at(r, z, index)) + c[..., None]
    if class_mask is not None and index is None:
        u = numerics.where(class_mask, u, numerics.INFINITE)
    # m − z is 0 there, but has a derivative
    return u, c + rows.class_sum(r, numerics.where(_pivot(r, m, c), m[..., None] - rows.finite_values(r), 0))


@_surprise.defjvp
def _(axis_name, primals, tangents):
    values, raw, m, c, index, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    u, of_pivot = _surprise(values, raw, m, c, None, class_mask, where, axis_name)
    pivot, moved = _pivot(r, m, c), rows.masked(tangents[0], where, class_mask)
    by_others = rows.class_sum(r, numerics.where(pivot, 0, jnp.exp(-u) * moved))
    by_pivot = rows.class_sum(r, numerics.where(pivot, moved, 0))
    dot_of_pivot = by_others + jnp.expm1(-of_pivot) * by_pivot
    dot_of_others = by_others + jnp.exp(-of_pivot) * by_pivot
    if index is not None:
        on_pivot = _at(r, pivot, index)
        dot = _either(on_pivot, dot_of_pivot[..., None], dot_of_others[..., None] - _at(r, moved, index))
        return _surprise(*primals, axis_name), (dot, dot_of_pivot)
    dot = _either(pivot, rows.widened(r, dot_of_pivot), rows.widened(r, dot_of_others) - moved)
    return (u, of_pivot), (dot if class_mask is None else numerics.where(class_mask, dot, 0), dot_of_pivot)


def _either(condition, number, x):
    """`number` [..., 1] where `condition`, `x` elsewhere; a product: a selection would first widen the number, on every device."""
    return condition.astype(x.dtype) * number + numerics.where(condition, 0, x)


def _pivot(r, m, c):
    """Whether a class holds more than half of the probability [..., classes]."""
    return statistics.same_as_largest(r, m) & (lax.stop_gradient(c) < math.log(2))[..., None]


def _at(r, per_class, index):
    """`per_class`, or its entries at the classes `index` [..., k]."""
    return per_class if index is None else rows.at_index(r, per_class, index, differentiated=per_class.dtype != jnp.bool_)


def _fill(like, number):
    """A number per row at every class, in the shape of `like`."""
    return jnp.broadcast_to(number[..., None], like.shape)


# The rule of soft labels -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _expected(values, raw, t, class_mask, where, axis_name):
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    m = rows.reference(r)
    e = statistics.marked_exponentials(r, m)
    log_sum = jnp.log1p(statistics.excess(*statistics.rest_and_ties(r, m, e)))
    _, below, s = _label_sums(r, m, e, t)
    return below + s * log_sum


@_expected.defjvp
def _(axis_name, primals, tangents):
    values, raw, t, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)

    def linear(values, raw, t, z_dot):
        return rows.class_sum(r, _slope(values, raw, t, class_mask, where, axis_name) * z_dot)

    # In half precision a backward pass of its own is handed the logits, not their gradient in float32.
    linear = jax.checkpoint(linear, prevent_cse=False) if r.half else linear
    dot = linear(values, raw, t, tangents[0]) + rows.class_sum(r, surprise(r, statistics.of_row(r)) * tangents[2])
    return _expected(*primals, axis_name), dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _slope(values, raw, t, class_mask, where, axis_name):
    """The gradient s·p − t; at the pivot r·p_* − t_*·q."""
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    m = rows.reference(r)
    e = statistics.marked_exponentials(r, m)
    rest, ties = statistics.rest_and_ties(r, m, e)
    others, _, s = _label_sums(r, m, e, t)
    total = 1 + statistics.excess(rest, ties)
    of_pivot = (others * ties - (s - others) * rest) / total
    # Numbers per row are made before the loop over classes; XLA would make them once per class.
    scale, of_pivot, confident = lax.optimization_barrier((s / total, of_pivot, total < 2))
    direct = e * scale[..., None] - t
    of_largest = numerics.where(confident[..., None], _fill(direct, of_pivot), -e * scale[..., None] - t)
    slope = numerics.where(e < -0.5, of_largest, direct)  # not `e < 0`: the sums have a broadcast 0 of their own
    return rows.masked(slope, where, class_mask)


@_slope.defjvp
def _(axis_name, primals, tangents):
    values, raw, t, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    z_dot, t_dot = (rows.masked(x, where, class_mask) for x in (tangents[0], tangents[2]))
    p = statistics.softmax(r)
    s, s_dot, mean = (rows.widened(r, rows.class_sum(r, x)) for x in (t, t_dot, p * z_dot))
    dot = p * (s * (z_dot - mean) + s_dot) - t_dot
    # The gradient sums to 0 over the classes, and so does its derivative.
    stats = statistics.of_row(r)
    pivot = _pivot(r, stats.reference, stats.log_sum)
    balance = -rows.class_sum(r, numerics.where(pivot, 0, dot))
    return _slope(*primals, axis_name), rows.masked(_either(pivot, rows.widened(r, balance), dot), where, class_mask)


def _label_sums(r, m, e, t):
    """Σ t_k over the classes below the largest, Σ t_k (m − z_k) over them, and Σ t_k; `e` comes from `statistics.marked_exponentials`."""
    s, keep, fixed = rows.class_sum(r, t), rows.kept(r), lax.stop_gradient(e)
    below = jnp.minimum(m[..., None] - r.values, numerics.INFINITE)
    below = below if keep is None else numerics.where(keep, below, numerics.INFINITE)
    if r.half or statistics.few(r):
        largest = statistics.same_as_largest(r, m) if r.half else fixed < -0.5
        return *statistics.two_sums(r, numerics.where(largest, 0, t), t * numerics.where(largest, 0, below)), s
    # Two ways to say 0 at the largest: XLA on CPUs stores what it selects, and what two loops share.
    return rows.class_sum(r, t + t * jnp.minimum(fixed, -0.0)), rows.class_sum(r, (t * below) * jnp.minimum(1 + fixed, 1)), s


# The rule of the largest class -------------------------------------------------------------------------------------------


def smallest(r: rows.Rows, stats: statistics.Statistics) -> Array:
    """−log max_k p_k of every row; classes that tie share the derivative."""
    return _smallest(r.values, r.raw, stats.reference, stats.log_sum, r.class_mask, r.where, r.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def _smallest(values, raw, m, c, class_mask, where, axis_name):
    """c, which the rule differentiates as the surprise of the largest classes.

    The code adds the mean of m − z_k over these classes, which is 0 but has a derivative.
    """
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    largest = statistics.same_as_largest(r, m)
    return c + rows.class_sum(r, numerics.where(largest, m[..., None] - rows.finite_values(r), 0)) / _ties(r, largest)


@_smallest.defjvp
def _(axis_name, primals, tangents):
    values, raw, m, c, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    u, largest, moved = _smallest(*primals, axis_name), statistics.same_as_largest(r, m), rows.masked(tangents[0], where, class_mask)
    ties = _ties(r, largest)
    p = jnp.exp(-_surprise(values, raw, m, c, None, class_mask, where, axis_name)[0])
    by_others = rows.class_sum(r, numerics.where(largest, 0, p * moved))
    # n·p − 1 for n ties; for one this is −q
    return u, by_others + jnp.expm1(jnp.log(ties) - u) * rows.class_sum(r, numerics.where(largest, moved, 0)) / ties


def _ties(r, largest):
    return jnp.maximum(rows.class_sum(r, largest.astype(r.values.dtype)), 1)


# The rule of the entropy ---------------------------------------------------------------------------------------------------
#
# A rule, so that the gradient is one loop over the logits, with exponentials of its own: what it shared with a sum would be stored.


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _entropy(z, m, c, class_mask, where, axis_name):
    x = z - m[..., None]
    x = rows.masked(numerics.where(x == -jnp.inf, -numerics.INFINITE, x), where, class_mask)
    terms = jnp.exp(x - c[..., None]) * x
    # The selection keeps XLA on CPUs from storing c and m at every class for its reduction; it stores the terms instead.
    return c - _class_sum(numerics.where(x > -numerics.INFINITE, terms, 0), axis_name)


@_entropy.defjvp
def _(axis_name, primals, tangents):
    z, m, c, class_mask, where = primals
    h = _entropy(z, m, c, class_mask, where, axis_name)
    log_p = rows.masked(jnp.maximum(z + (-m)[..., None], -numerics.INFINITE), where, class_mask) - c[..., None]
    slope = rows.masked(-jnp.exp(log_p) * (log_p + h[..., None]), where, class_mask)  # that of c, lse − m, is in it
    return h, _class_sum(slope * tangents[0], axis_name)


def _class_sum(x, axis_name):
    return mesh.psum(jnp.sum(x, axis=-1), mesh.names(axis_name))
