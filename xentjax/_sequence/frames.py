"""Log-probabilities of a few classes of a row, and the probability of all other classes, with one derivative rule.

Let V be the set of the blank and the labels that paths may take in a row of logits. The losses of sequences need log p_k for k ∈ V, and
U = Σ_{k∉V} p_k, the probability of the classes that no path can take. U is computed as a sum over the other classes. The difference
1 − Σ_{k∈V} p_k would lose digits by cancellation if U is small.

Derivatives. As in `surprises`, the pivot * is the class with p_* > 1/2, if there is one. q = 1 − p_* is computed from the sum over all
other classes.

    d log p_k = dz_k − Σ_{j≠*} p_j dz_j − p_* dz_*   for k ≠ *        d log p_* = q dz_* − Σ_{j≠*} p_j dz_j
    dU = Σ_{k∉V} p_k dz_k − U Σ_j p_j dz_j
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics, rows, statistics
from xentjax._sequence import scaled


def probabilities(r: rows.Rows, index: Array) -> tuple[Array, Array]:
    """Log p_k of the classes `index`, shape [..., n], and the probability U [...] of all classes that are not in `index`.

    `index` [..., n] holds global class indices. Its axes may have length 1 where the rows have more. If an index is outside the range of
    classes, callers must not use its result. The logarithm of a probability of 0 is ABSENT.
    """
    return _probabilities(r.values, r.raw, index, r.class_mask, r.where, r.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _probabilities(
    values: Array, raw: Array, index: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName
) -> tuple[Array, Array]:
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    e = statistics.exponentials(r)
    gap = _at(r, index) - e.reference[..., None]
    log_p = rows.masked(jnp.maximum(gap - e.log_sum[..., None], scaled.ABSENT), where)
    others = numerics.where(e.marked < -0.5, -e.marked, e.marked)
    rest = rows.class_sum(r, numerics.where(_member(r, index), 0, others)) / (1 + e.excess)
    return log_p, rest


@_probabilities.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    values, raw, index, class_mask, where = primals
    log_p, rest = _probabilities(*primals, axis_name)

    def linear(values: Array, raw: Array, tangent: Array) -> tuple[Array, Array]:
        r = rows.Rows(raw, values, None, class_mask, where, axis_name)
        c, m = statistics.of_row(r).log_sum, rows.reference(r)
        p, moved = statistics.softmax(r), rows.masked(tangent, where, class_mask)
        confident = lax.stop_gradient(c) < math.log(2)
        pivot = statistics.same_as_largest(r, m) & confident[..., None]
        # Now c becomes −log p of the pivot. c was computed with m as a constant. So m − z_* is added, which is 0 but has a derivative.
        c += rows.class_sum(r, numerics.where(pivot, m[..., None] - rows.finite_values(r), 0))
        weighed = p * moved
        by_others, by_pivot = (rows.class_sum(r, numerics.where(pivot, *pair)) for pair in ((0, weighed), (moved, 0)))
        by_rest = rows.class_sum(r, numerics.where(_member(r, index), 0, weighed))
        on_pivot = (_at(r, index) == m[..., None]) & confident[..., None]
        by_all = by_others + jnp.exp(-c) * by_pivot
        of_pivot = -jnp.expm1(-c) * by_pivot - by_others
        general = rows.at_index(r, moved, index) - by_all[..., None]
        of_index = numerics.where(on_pivot, jnp.broadcast_to(of_pivot[..., None], general.shape), general)
        return of_index, by_rest - rest * by_all

    # In half precision, a separate backward pass stores the logits, and computes their softmax in float32 again.
    linear = jax.checkpoint(linear, prevent_cse=False) if raw.dtype != values.dtype else linear
    return (log_p, rest), linear(values, raw, tangents[0])


def _at(r: rows.Rows, index: Array) -> Array:
    """The logits of the classes `index` as finite numbers, shape [..., n]; no derivative."""
    z = rows.at_index(r, lax.stop_gradient(r.raw), index).astype(r.values.dtype) if r.axis_name is None else _split_at(r, index)
    z = numerics.finite(z)
    if r.class_mask is not None:
        z = numerics.where(rows.at_index(r, r.class_mask, index), z, -numerics.INFINITE)
    return rows.masked(z, r.where)


def _split_at(r: rows.Rows, index: Array) -> Array:
    """`_at` for classes that are split over devices. A sum over devices follows, so infinite logits are made finite first."""
    return rows.at_index(r, numerics.finite(lax.stop_gradient(r.values)), index)


def _member(r: rows.Rows, index: Array) -> Array:
    """Whether a class is one of `index`, shape [..., classes]."""
    local, _ = rows.local_index(r, index)
    classes = lax.broadcasted_iota(local.dtype, (r.raw.shape[-1],), 0)
    if index.shape[-1] <= 4:
        found = functools.reduce(jnp.logical_or, [local[..., i, None] == _expanded(classes, local) for i in range(index.shape[-1])])
    else:
        found = jnp.any(local[..., None] == _expanded(classes, local[..., None]), axis=-2)
    return jnp.broadcast_to(found, r.raw.shape)


def _expanded(classes: Array, like: Array) -> Array:
    return numerics.expand_leading(classes, like.ndim)
