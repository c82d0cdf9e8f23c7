"""The statistics of a row of logits, and the derivative rules behind all categorical losses.

For a row z with largest logit m and label y, let

    gap          d = z_y − m
    rest         R = Σ_{k≠y} e^(z_k − m)                over all classes but the label, so nothing cancels when the label dominates
    log-rest     ℓ = log R
    log-sum      c = lse(z) − m = log(e^d + R) = log1p(R + expm1(d))
    log-odds     a = d − ℓ
    surprise     u = −log p_y = c − d                   neither term is negative

m is treated as a constant. Every loss can be computed from these numbers:

    p_y = σ(a)        1 − p_y = σ(−a)        −log p_k = (m − z_k) + c for every class k

The surprise equals softplus(−a), which takes a logarithm for ℓ, an exponential and another logarithm. As c − d, it takes one logarithm.
XLA on CPUs unrolls loops over up to 512 rows, and each further logarithm makes compilation longer. So for up to 512 rows of more than 32
classes, the surprise is computed as c − d. For more rows, it is computed as softplus(−a), because XLA on CPUs does not vectorize c − d if
their number is odd. For up to 32 classes, it is computed as softplus(−a) at any number of rows.

Without a label, the sum leaves out one of the largest classes instead of the label. Then c = log1p(s) with
s = Σ_{z_k<m} e^(z_k − m) + (number of classes with z_k = m) − 1.

Derivatives. Both ℓ and c have the form log Σ_{k∈A} e^(z_k − m) for a set A of classes. With m constant, the derivatives are

    ∂d/∂z_y = 1        ∂ℓ/∂z_k = e^(z_k − m − ℓ) for k ≠ y        ∂c/∂z_k = e^(z_k − m − c) for every k        ∂u/∂d = −R/(R + e^d)

The softmaxes ∂ℓ/∂z and ∂c/∂z are over A. ∂u/∂d equals p_y − 1, but it contains no subtraction. JAX differentiates all other steps. In the
rules, the exponentials are differentiable functions of z. The factor 1/R = e^(−ℓ) has the derivative −ℓ̇·e^(−ℓ). So no power of a small sum
can overflow in a derivative of any order. The softmax p over all classes has its own rule: dp_k = p_k·(dz_k − Σ_j p_j dz_j). A second
derivative is a sum of such terms. If it is much smaller than 1 − p_y, it may be rounded away.

Loops. JAX may ignore a rule and differentiate the code of the function instead: `lax.scan` drops the rules of computations that are
differentiated twice. So the code of every function that has a rule also has the correct first derivative.

Memory. In float32, the sum and the gradient share one array of exponentials. This array becomes the gradient. In half precision, such an
array would be a float32 copy of the logits. So the sum reads a masked copy of the logits in their own dtype. The gradient recomputes the
exponentials from the bits of the logits (`numerics.widen`). Then no two loops share a float32 array. Without a label, the array of
exponentials also marks the largest classes: their entries are −1. So no loop needs the logits and their maximum to find these classes.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics, rows

_FEW_ROWS = 512  # for so few rows, compile time matters, and the time of operations per row does not
_FEW_CLASSES = 32  # XLA on CPUs sums up to 32 numbers in one loop; for more, it stores a tree of partial sums


class WithoutLabel(NamedTuple):
    """Statistics of a row that do not depend on its label, each of shape [...].

    For every class k, −log p_k = (reference − z_k) + log_sum.
    """

    reference: Array  # m, the largest logit; it has no derivative
    log_sum: Array  # c = lse(z) − m
    all_impossible: Array  # whether all logits of the row are −∞


class WithLabel(NamedTuple):
    """The statistics of a row and of its label, each of shape [...]. The label is a class index.

    The first three fields are as in `WithoutLabel`.
    """

    reference: Array
    log_sum: Array
    all_impossible: Array
    gap: Array  # d = z_y − m
    log_odds: Array  # a = log(p_y/(1 − p_y))
    surprise: Array  # −log p_y


Statistics = WithoutLabel | WithLabel


def of(r: rows.Rows) -> Statistics:
    """The statistics of every row: `of_label` if the labels are class indices, otherwise `of_row`."""
    return of_label(r) if r.labels_are_indices else of_row(r)


def of_row(r: rows.Rows) -> WithoutLabel:
    """The statistics of every row, each of shape [...], from one pass over the logits. Labels are ignored."""
    r = r._replace(adjustment=None)  # only the statistics of a label use it
    c = _log_sum(r.values, r.raw, r.class_mask, r.where, r.axis_name)
    return WithoutLabel(rows.reference(r), c, rows.largest(r) == -jnp.inf)


def of_label(r: rows.Rows) -> WithLabel:
    """The statistics of every row and of its label, each of shape [...], from one pass over the logits.

    The labels must be class indices.
    """
    m, d, total, rest, _ = _sums_with_label(r.values, r.raw, r.adjustment, r.given_labels, r.class_mask, r.where, r.axis_name, False)
    all_impossible = numerics.is_infinite(-d) & (total == 0)
    rest = numerics.where(all_impossible, jnp.zeros_like(rest), rest)
    a = d - rest
    if has_few_rows(r) and not has_few_classes(r):
        # If R < 1/2, the label is the largest class, and d is 0. If the logits are products, XLA may round z_y and m differently.
        exact = d - lax.stop_gradient(numerics.where((total < 0.5) & (d > -1), d, 0))
        log_sum, surprise = _log_sum_with_label(exact, total), _surprise_of_label(exact, total)
    else:
        # log(e^d + e^ℓ), with the larger of d and ℓ taken out of the logarithm
        log_sum, surprise = numerics.where(a > 0, d + numerics.softplus(-a), rest + numerics.softplus(a)), numerics.softplus(-a)
    return WithLabel(m, log_sum, all_impossible, gap=d, log_odds=a, surprise=surprise)


def finish(r: rows.Rows, stats: Statistics, loss: Array) -> Array:
    """The final loss, shape [...].

    +∞ is restored. Rows whose logits are all −∞ get gradient 0. Examples that do not count get a loss of exactly 0.
    """
    return rows.row_value(r, numerics.restore_infinity(numerics.where(stats.all_impossible, lax.stop_gradient(loss), loss)))


def log_normalizer(r: rows.Rows, stats: Statistics) -> Array:
    """lse(z) = log Σ_k e^(z_k) of every row, shape [...]; −∞ if all logits are −∞."""
    return numerics.where(stats.all_impossible, -jnp.inf, stats.reference + stats.log_sum)


def hits(r: rows.Rows, stats: Statistics) -> Array:
    """Whether the label has the largest logit, shape [...]. Every class that ties for the largest logit is a hit.

    For soft labels, the result tells whether a most likely class of the labels has the largest logit. For class indices, the gap to the
    largest logit decides without a second pass over the classes. `metrics.accuracy` needs another pass to find the first of the tied
    classes, and `metrics.top_k_accuracy` needs another pass to find the last of them.
    """
    if isinstance(stats, WithLabel):
        return rows.row_value(r, (stats.gap >= 0) & ~stats.all_impossible)
    best = rows.maximum(r.given_labels, r.class_mask, r.axis_name)[..., None] == r.given_labels
    top = rows.maximum(r.raw, r.class_mask, r.axis_name)[..., None] == r.raw
    hits = rows.class_sum(r, rows.combined_mask(best & top, r.class_mask, None).astype(jnp.int32))
    return rows.row_value(r, (hits > 0) & ~stats.all_impossible)


# The rules with a label --------------------------------------------------------------------------------------------------


def _log_sum_with_label(d: Array, total: Array) -> Array:
    """The log-sum c = log(e^d + R), shape [...]. It is log1p(R) if the label is the largest class."""
    excess = total + jnp.expm1(d)
    return jnp.log1p(numerics.where(excess < 0, 0, excess))  # below 0 only if no class is possible


@jax.custom_jvp
def _surprise_of_label(d: Array, total: Array) -> Array:
    """The surprise −log p_y = c − d, shape [...]. Neither term is negative.

    Its derivative with respect to d is −(1 − p_y) = −R/(e^d + R), without a subtraction.
    """
    return _log_sum_with_label(d, total) - d


@_surprise_of_label.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (d, total), (d_dot, total_dot) = primals, tangents
    whole = total + jnp.exp(d)
    scale = 1 / numerics.where(whole == 0, 1, whole)  # 0 only if no class is possible
    return _surprise_of_label(d, total), scale * total_dot - (scale * total) * d_dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7))
def _sums_with_label(
    values: Array,
    raw: Array,
    adjustment: rows.Adjustment | None,
    labels: Array,
    class_mask: Array | None,
    where: Array | None,
    axis_name: mesh.AxisName,
    differentiated: bool,
) -> tuple[Array, Array, Array, Array, Array]:
    """(m, d, R, ℓ, 1/R) as in the module docstring, each [...].

    If R is 0, ℓ is −INFINITE. Then 1 replaces 1/R, which multiplies only zeros.
    `raw` holds the numbers of `values` in the caller's dtype. `adjustment` is None, or computes the numbers of `values`. The rule
    differentiates with respect to `values` only. `differentiated` says whether the rule calls this function, so that the gradient can use
    the same array of exponentials.
    """
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name, adjustment)
    m = rows.reference(r)
    if adjustment is not None:
        exponentials = _adjusted_exponentials(r, adjustment, m, differentiated)
    elif differentiated or (factor := rows.off_label(r)) is None:
        exponentials = off_label_exponentials(r, m)
    else:
        exponentials = jnp.exp(values - m[..., None]) * factor
    total = rows.class_sum(r, exponentials)
    empty = numerics.underflows(total)  # no other class exists, or all exponentials underflow: p_y = 1
    one, total = (numerics.where(empty, number, total) for number in (1, 0))
    return m, gap(r, m), total, numerics.where(empty, -numerics.INFINITE, jnp.log(one)), 1 / one


@_sums_with_label.defjvp
def _(
    axis_name: mesh.AxisName, differentiated: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    values, raw, adjustment, labels, class_mask, where = primals
    m, d, total, log_sum, scale = _sums_with_label(*primals, axis_name, True)

    def linear(z: Array | rows.Adjustment, m: Array, total: Array, tangent: Array) -> tuple[Array, Array]:
        r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
        label = rows.on_label(r)
        # In half precision x + (−m), not x − m, so that this loop does not share the broadcast of m with the sum.
        if isinstance(z, rows.Adjustment):
            x = z.logits(m, total) + (-m)[..., None]
        else:
            x = z - m[..., None] if z.dtype == m.dtype else numerics.widen(z) + (-m)[..., None]
        off_label = exponentials_where(rows.combined_mask(~label, class_mask, where), x, rows.full_mask(r))
        at_label = numerics.where(rows.combined_mask(label, class_mask, where), tangent, 0)
        return rows.class_sum(r, at_label), rows.class_sum(r, off_label * tangent)

    # A separate backward pass gets the exponentials in float32, but only the logits in half precision.
    narrow = raw.dtype != values.dtype or adjustment is not None
    linear = jax.checkpoint(linear, prevent_cse=False) if narrow else linear
    # The conversion is exact, because `values` were converted from this dtype.
    z = values.astype(raw.dtype) if adjustment is None else adjustment
    d_dot, total_dot = linear(z, m, total, tangents[0])
    log_sum_dot = scale * total_dot
    return (m, d, total, log_sum, scale), (jnp.zeros_like(m), d_dot, total_dot, log_sum_dot, -scale * log_sum_dot)


# The rules without a label -----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _log_sum(values: Array, raw: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName) -> Array:
    """The log-sum c = lse(z) − m, shape [...]."""
    return exponentials(rows.Rows(raw, values, None, class_mask, where, axis_name)).log_sum


@_log_sum.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, class_mask, where = primals

    def linear(values: Array, raw: Array, tangent: Array) -> Array:
        r = rows.Rows(raw, values, None, class_mask, where, axis_name)
        return rows.class_sum(r, softmax(r) * tangent)

    linear = jax.checkpoint(linear, prevent_cse=False) if raw.dtype != values.dtype else linear
    return _log_sum(*primals, axis_name), linear(values, raw, tangents[0])


def softmax(r: rows.Rows) -> Array:
    """The probability p_k of every class, shape [..., classes]."""
    return _softmax(r.values, r.raw, r.class_mask, r.where, r.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _softmax(values: Array, raw: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName) -> Array:
    return exponentials(rows.Rows(raw, values, None, class_mask, where, axis_name)).probabilities


@_softmax.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, raw, class_mask, where = primals
    p, moved = _softmax(*primals, axis_name), rows.masked(tangents[0], where, class_mask)
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    return p, p * (moved - rows.as_column(r, rows.class_sum(r, p * moved)))


class Exponentials(NamedTuple):
    """The exponentials of every row, and their sums. `exponentials` makes them."""

    reference: Array  # m [...]
    marked: Array  # [..., classes]: e^(z_k − m) below the largest logit, −1 at the largest as a mark, 0 where masked
    rest: Array  # [...], Σ e^(z_k − m) over the classes below the largest
    ties: Array  # [...], the number of classes with the largest logit

    @property
    def excess(self) -> Array:
        """The sum s = Σ_k e^(z_k − m) − 1, shape [...]; 0 if there is no class.

        XLA may round the largest logit in the maximum differently from the largest logit in the sum. Then no class equals m, and `rest`
        includes all classes.
        """
        total = self.rest + (self.ties - 1)
        return numerics.where(total < 0, 0, total)  # not a maximum, which would halve the derivative at 0

    @property
    def log_sum(self) -> Array:
        """The log-sum c = log1p(s) = lse(z) − m, shape [...]."""
        return jnp.log1p(self.excess)

    @property
    def probabilities(self) -> Array:
        """The probability p_k of every class, shape [..., classes]. The code has the correct first derivatives."""
        scale = lax.optimization_barrier(1 / (1 + self.excess))  # computed once per row, not once per class
        return unmarked(self.marked) * scale[..., None]


def exponentials(r: rows.Rows) -> Exponentials:
    """The exponentials of every row, and their sums. The code has the correct first derivatives."""
    m = rows.reference(r)
    marked = marked_exponentials(r, m)
    return Exponentials(m, marked, *_rest_and_ties(r, m, marked))


def unmarked(marked: Array) -> Array:
    """The exponentials [..., classes] without the mark: e^(z_k − m) of every class, which is 1 at the largest."""
    return numerics.where(marked < -0.5, -marked, marked)


def marked_exponentials(r: rows.Rows, m: Array) -> Array:
    """e^(z_k − m) below the largest logit, −1 at the largest, 0 where masked, shape [..., classes].

    This one array also tells which classes are the largest, so the loops of a loss read it instead of the logits.
    """
    z, below = numerics.widen(r.raw) if r.half else r.values, (-m)[..., None]
    x, largest = z + below, -z == below  # not `x == 0`: if z is a product, XLA may round the product and the sum x once instead of twice
    keep = rows.full_mask(r)
    x = x if keep is None else numerics.where(keep, x, -jnp.inf)
    return numerics.where(largest if keep is None else largest & keep, -1 - x, jnp.exp(x))


def _rest_and_ties(r: rows.Rows, m: Array, marked: Array) -> tuple[Array, Array]:
    """Σ e^(z_k − m) over the classes below the largest, and the number of classes with the largest logit, each [...]."""
    if r.half:  # a sum over `marked` would store it in float32, so only gradients use it
        largest = same_as_largest(r, m)
        rest = rows.class_sum(r, _masked_exponentials(r, m, rows.combined_mask(~largest, r.class_mask, r.where)))
        return rest, rows.class_sum(r, numerics.where(largest, 1 + (numerics.widen(r.raw) - m[..., None]), 0))  # ones with a derivative
    if has_few_classes(r):
        return two_sums(r, jnp.maximum(marked, 0), jnp.maximum(-marked, 0))
    rest = rows.class_sum(r, jnp.maximum(marked, 0))
    ties = rest - rows.class_sum(r, marked)
    return rest, ties + lax.stop_gradient(jnp.round(ties) - ties)  # a whole number, with the derivative of the difference


# Helpers -----------------------------------------------------------------------------------------------------------------


def same_as_largest(r: rows.Rows, m: Array) -> Array:
    """Whether a class has the largest logit m of its row, shape [..., classes]."""
    return rows.masked(numerics.equal(lax.stop_gradient(r.raw), m.astype(r.raw.dtype)[..., None]), r.where, r.class_mask)


def has_few_rows(r: rows.Rows) -> bool:
    """Whether there are so few rows that LLVM unrolls loops over one number per row. It is False if the number of rows is symbolic."""
    leading = r.raw.shape[:-1]
    return all(isinstance(size, int) for size in leading) and math.prod(leading) <= _FEW_ROWS


def has_few_classes(r: rows.Rows) -> bool:
    """Whether this device holds so few classes that XLA sums over them in one loop.

    It is False if the number of classes is symbolic.
    """
    classes = r.raw.shape[-1]
    return isinstance(classes, int) and classes <= _FEW_CLASSES


def two_sums(r: rows.Rows, x: Array, y: Array) -> tuple[Array, Array]:
    """The sums Σ_k x_k and Σ_k y_k over the classes, each of shape [...].

    If there are few classes, both are computed as one sum of complex numbers, because XLA on CPUs would store the operands of two real
    sums.
    """
    if not has_few_classes(r):
        return rows.class_sum(r, x), rows.class_sum(r, y)
    both = jnp.sum(lax.complex(x, y), axis=-1)
    return rows.sum_over_devices(r, both.real), rows.sum_over_devices(r, both.imag)


def off_label_exponentials(r: rows.Rows, m: Array) -> Array:
    """e^(z_k − m) of all classes but the label, whose entry is 0, shape [..., classes]."""
    return _masked_exponentials(r, m, rows.combined_mask(~rows.on_label(r), r.class_mask, r.where))


def _adjusted_exponentials(r: rows.Rows, adjustment: rows.Adjustment, m: Array, differentiated: bool) -> Array:
    """`off_label_exponentials` of adjusted logits, as the input of a sum over classes."""
    factor = None if differentiated else rows.off_label(r._replace(class_mask=None, where=None))  # masked logits are −∞ in `adjustment`
    if factor is not None:
        return jnp.exp(adjustment.logits(m) - m[..., None]) * factor
    others = numerics.select_logits(~rows.on_label(r), adjustment.raw)
    return jnp.exp(dataclasses.replace(adjustment, raw=others).logits(m) - m[..., None])


def exponentials_where(keep: Array, x: Array, full_mask: Array | None) -> Array:
    """e^x where `keep`, 0 elsewhere, shape [..., classes].

    XLA on CPUs does not vectorize the exponential of a selection if the number of rows is odd. A hidden number may be NaN or infinite. Then
    the derivative of its exponential is not finite, so the number is replaced first.
    """
    if full_mask is None:
        return numerics.where(keep, jnp.exp(x), 0)
    return jnp.exp(numerics.where(keep, x, -jnp.inf))


def _masked_exponentials(r: rows.Rows, m: Array, keep: Array) -> Array:
    """e^(z_k − m) where `keep`, 0 elsewhere, shape [..., classes], as the input of a sum over classes."""
    if r.raw.dtype != m.dtype:
        return jnp.exp(numerics.select_logits(keep, r.raw).astype(m.dtype) - m[..., None])
    return exponentials_where(keep, r.raw - m[..., None], rows.full_mask(r))


def gap(r: rows.Rows, m: Array) -> Array:
    """The gap d = z_y − m, shape [...]: −INFINITE for a label of probability 0, NaN for a label out of range."""
    labels = r.given_labels
    local, inside = rows.local_index(r, labels)
    z = numerics.take_last(r.raw, local[..., None]).squeeze(-1).astype(m.dtype)
    if r.class_mask is not None:
        z = numerics.where(numerics.take_last(r.class_mask, local[..., None]).squeeze(-1), z, -jnp.inf)
    if (here := rows.is_here(r, labels)) is not None:
        z = rows.sum_over_devices(r, numerics.where(here, z, 0))
    d = numerics.nan_unless(inside, numerics.finite_difference(z, m))
    return d if r.where is None else numerics.where(r.where, d, jnp.zeros_like(d))
