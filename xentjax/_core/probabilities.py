"""The probability p_k of every class, and 1 − p_k, both with a small relative error at any margin.

Let m be the largest logit, and s = Σ_{z_k<m} e^(z_k − m) + (number of classes with z_k = m) − 1 as in `statistics`. Then
p_k = e^(z_k − m)/(1 + s). Only a class with p_k > 1/2 can have a small 1 − p_k. There is at most one such class. It is called the pivot and
has the index *. For it, 1 − p_* is s/(1 + s), where s is the sum of the exponentials of all other classes.

Derivatives. With the tangent dz of the logits and b = Σ_{j≠*} p_j dz_j,

    dp_k = p_k (dz_k − b − p_* dz_*)  for k ≠ *        dp_* = p_* ((1 − p_*) dz_* − b)

The second line is the first one with 1 − p_* written out. So the gradient at the pivot is not a difference of nearly equal numbers of the
size of p_*.

Speed. b and p_* dz_* are computed as one sum of complex numbers. This sum is broadcast to all classes before it is split into two real
numbers. So the transpose contains one sum of complex numbers, too. XLA on CPUs would store the operands of two real sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics, rows, statistics


def with_complements(r: rows.Rows) -> tuple[Array, Array]:
    """p_k and 1 − p_k of every class, each of shape [..., classes]; 0 and 1 for classes that do not exist."""
    return _with_complements(r.values, r.raw, r.class_mask, r.where, r.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _with_complements(
    values: Array, raw: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName
) -> tuple[Array, Array]:
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    e = statistics.exponentials(r)
    largest = e.marked < -0.5
    scale, rest = lax.optimization_barrier((1 / (1 + e.excess), e.excess / (1 + e.excess)))  # once per row, not once per class
    p = statistics.unmarked(e.marked) * scale[..., None]
    return p, numerics.where(largest & (p > numerics.MOST), jnp.broadcast_to(rest[..., None], p.shape), 1 - p)


@_with_complements.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, raw, class_mask, where = primals
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    p, rest = _with_complements(values, raw, class_mask, where, axis_name)
    moved = rows.masked(tangents[0], where, class_mask)
    pivot = lax.stop_gradient(p) > numerics.MOST
    weighted = p * moved
    by_class = lax.complex(numerics.where(pivot, 0, weighted), numerics.where(pivot, weighted, 0))
    both = jnp.broadcast_to(rows.as_column(r, rows.class_sum(r, by_class)), p.shape)
    by_others, by_pivot = both.real, both.imag
    dot = p * numerics.where(pivot, rest * moved - by_others, moved - (by_others + by_pivot))
    return (p, rest), (dot, -dot)
