"""Log-probabilities of a few classes of a row, and the probability of all other classes, with one derivative rule.

Let V be the set of the blank and the labels that paths may take in a row of logits, or of all durations of TDT. The losses of sequences
need log p_k for k ∈ V, and U = Σ_{k∉V} p_k, the probability of the classes that no path can take. U is computed as a sum over the classes
outside V. The difference 1 − Σ_{k∈V} p_k would lose digits by cancellation if U is small. U is the only sum that reads all classes. Let m
be the largest logit. The sum Σ_{k∈V} e^(z_k − m) needs only the logits of V. If a class of V has the logit m, the log-sum c = lse(z) − m is
computed as log1p of the sum of e^(z_k − m) over all classes except this one.

Derivatives. The pivot * is the class of V with p_* > 1/2, if there is one. Its q = 1 − p_* is computed from log p_*. With
A = Σ_{j∉V} p_j dz_j and B = Σ_{j∈V} p_j dz_j,

    d log p_k = dz_k − A − B   for k ≠ *        d log p_* = q dz_* − A − Σ_{j∈V, j≠*} p_j dz_j
    dU = (Σ_{k∈V} p_k) A − U B                  dc = A + B

Only A reads all classes. So the gradient is one product for each class, with additional terms only at the classes of V.

Memory. XLA on CPUs stores the operands of a sum if they contain a selection, but not if they are products. So a factor of 0 removes the
classes of V from the sums U and A. The gradient computes the exponentials again, as e^(z_k − m − c), so it shares no array with the value.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics, rows

_PRODUCT = 256  # classes up to which a product looks up the tangents of logits


def probabilities(r: rows.Rows, index: Array) -> tuple[Array, Array]:
    """Log p_k of the classes `index`, shape [..., n], and the probability U [...] of all classes that are not in `index`.

    `index` [..., n] holds global class indices. Its leading axes are those of the rows, or have length 1. If an index is outside the range
    of classes, callers must not use its result.
    """
    return _probabilities(r.values, r.raw, index, r.class_mask, r.where, r.axis_name)[:2]


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _probabilities(
    values: Array, raw: Array, index: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName
) -> tuple[Array, Array, Array, Array]:
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    m = rows.reference(r)
    z, outside = _at(r, index), _outside(r, index)
    rest = _of_rows(rows.class_sum(r, jnp.exp(_existing(r, values) - m[..., None]) * outside), where)
    first = _first(index)
    largest = z >= m[..., None]  # not `z - m >= 0`: if z is a product, XLA may round the product and the difference once instead of twice
    most = jnp.asarray(jnp.finfo(z.dtype).max, z.dtype)  # the clamp keeps XLA from rounding a product and the difference only once
    gap = numerics.where(z == -jnp.inf, z, numerics.where(largest, 0, lax.clamp(-most, z, most) - m[..., None]))
    below = jnp.sum(numerics.where(first & ~largest, jnp.exp(gap), 0), axis=-1)
    count = jnp.sum((first & largest).astype(m.dtype), axis=-1)  # how often the largest logit occurs in V
    total = rest + (below + count)
    total = numerics.where(total > 0, total, 1)  # all logits are −∞
    log_sum = _of_rows(numerics.where(count > 0, jnp.log1p(rest + (below + (count - 1))), jnp.log(total)), where)
    log_p = rows.masked(gap - log_sum[..., None], where)
    return log_p, rest / total, (below + count) / total, log_sum


@_probabilities.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    values, raw, index, class_mask, where = primals
    log_p, rest, inside, log_sum = _probabilities(*primals, axis_name)

    def linear(values: Array, raw: Array, tangent: Array) -> tuple[Array, ...]:
        r = rows.Rows(raw, values, None, class_mask, where, axis_name)
        z, moved = numerics.widen(raw) if r.half else values, rows.masked(tangent, where, class_mask)
        gap = _existing(r, z) + (-rows.reference(r))[..., None]  # a sum, so that XLA does not store `z − m` of the value for this loop
        p = jnp.exp(gap - rows.as_column(r, log_sum)) * _outside(r, index)
        by_rest = _of_rows(rows.class_sum(r, p * moved), where)
        of_index = _moved_at(r, moved, index)
        p_index, pivot = jnp.exp(log_p), lax.stop_gradient(log_p) > -math.log(2)
        weighed = numerics.where(_first(index), p_index * of_index, 0)
        by_index, by_others = (jnp.sum(x, axis=-1) for x in (weighed, numerics.where(pivot, 0, weighed)))
        by_all = by_rest + by_index
        of_pivot = -jnp.expm1(log_p) * of_index - (by_rest + by_others)[..., None]
        of_rest = inside * by_rest - rest * by_index
        return numerics.where(pivot, of_pivot, of_index - by_all[..., None]), of_rest, -of_rest, by_all

    # If the backward pass is separate, the forward pass stores the logits, log p and three numbers per row. The rest is computed again.
    linear = jax.checkpoint(linear, prevent_cse=False)
    return (log_p, rest, inside, log_sum), linear(values, raw, tangents[0])


def _of_rows(x: Array, where: Array | None) -> Array:
    """One number per row, 0 in rows that do not count."""
    return x if where is None else numerics.where(where, x, 0)


def _existing(r: rows.Rows, z: Array) -> Array:
    """The logits `z`, with −∞ for classes that do not exist."""
    return z if r.class_mask is None else numerics.where(r.class_mask, z, -jnp.inf)


def _first(index: Array) -> Array:
    """Whether an entry of `index` [..., n] is the first with its class."""
    same = index[..., :, None] == index[..., None, :]
    earlier = numerics.expand_leading(jnp.tri(index.shape[-1], k=-1, dtype=bool), same.ndim)
    return ~jnp.any(same & earlier, axis=-1)


def _outside(r: rows.Rows, index: Array) -> Array:
    """1 for classes that are not in `index`, and 0 for the others, shape [..., classes] with the leading axes of `index`."""
    return lax.optimization_barrier(1 - _member(r, index).astype(r.values.dtype))


def _moved_at(r: rows.Rows, moved: Array, index: Array) -> Array:
    """The tangents of the logits of the classes `index`, shape [..., n].

    Up to four tangents are computed as sums of selections. The transpose of such a sum is a selection, which XLA computes in the loop of
    the gradient. More tangents are looked up. The transpose of a lookup is a loop over all indices. If there are few classes, a product
    with a matrix of 0 and 1 takes a third of the time of this loop on CPUs.
    """
    if index.shape[-1] > 4:
        classes = r.raw.shape[-1]
        if isinstance(classes, int) and classes <= _PRODUCT and index.ndim > 1 and index.shape[-2] == 1:  # all frames share the index
            local = rows.local_index(r, index)[0]
            class_index = lax.broadcasted_iota(local.dtype, (*local.shape[:-2], classes, local.shape[-1]), local.ndim - 2)
            matrix = (local == class_index).astype(moved.dtype)
            return rows.sum_over_devices(r, jnp.matmul(moved, matrix, precision=lax.Precision.HIGHEST))
        return rows.at_index(r, moved, index)
    classes = rows.class_index(r, index.dtype)
    chosen = (numerics.where(classes == index[..., i : i + 1], moved, 0) for i in range(index.shape[-1]))
    return jnp.stack([rows.class_sum(r, x) for x in chosen], axis=-1)


def _at(r: rows.Rows, index: Array) -> Array:
    """The logits of the classes `index`, −∞ for a class that does not exist, shape [..., n]. They are not differentiated."""
    z = rows.at_index(r, lax.stop_gradient(r.raw), index).astype(r.values.dtype)
    if r.class_mask is not None:
        z = numerics.where(rows.at_index(r, r.class_mask, index), z, -jnp.inf)
    return rows.masked(z, r.where)


def _member(r: rows.Rows, index: Array) -> Array:
    """Whether a class is one of `index`, shape [..., classes] with the leading axes of `index`."""
    local, _ = rows.local_index(r, index)
    classes = lax.broadcasted_iota(local.dtype, (r.raw.shape[-1],), 0)
    if index.shape[-1] <= 4:
        found = functools.reduce(jnp.logical_or, [local[..., i, None] == _expanded(classes, local) for i in range(index.shape[-1])])
    else:
        found = jnp.any(local[..., None] == _expanded(classes, local[..., None]), axis=-2)
    return found


def _expanded(classes: Array, like: Array) -> Array:
    return numerics.expand_leading(classes, like.ndim)
