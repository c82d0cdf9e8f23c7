"""The statistics of a row of logits, and the one derivative rule behind every categorical loss.

For a row z with label y and largest logit m (a constant), two numbers contain all that a loss needs:

    gap      d = z_y − m
    log-rest ℓ = log Σ_{k≠y} e^(z_k − m)               without the label, so nothing cancels when the label dominates

Their difference is the log-odds a = d − ℓ of the label: p_y = σ(a), 1 − p_y = σ(−a), −log p_y = softplus(−a). For every class
−log p_k = (m − z_k) + c with c = lse − m = log(e^d + e^ℓ). Without a label, the sum leaves out the largest class instead:
c = log1p(s), s = Σ_{z_k<m} e^(z_k − m) + (number of ties − 1).

Derivatives. Both ℓ and c are logarithms of Σ_{k∈A} e^(z_k − m) over some classes A, so with m constant

    ∂d/∂z_y = 1        ∂ℓ/∂z_k = e^(z_k − m − ℓ) for k ≠ y        ∂c/∂z_k = e^(z_k − m − c) for every k

where the last two are softmaxes over A. JAX differentiates the rest: ∂(−log p_y)/∂z_y = −σ(−a) equals p_y − 1 but has no subtraction.
The exponentials are again functions of z, and 1/e^ℓ has the derivative −ℓ̇/e^ℓ. So derivatives of any order consist of products
alone, and no power of a small sum can overflow. Without a label, p itself has a rule: dp = p·(dz − Σ p dz).

Loops. JAX may differentiate the code behind a rule instead of the rule: `lax.scan` drops rules in computations that a second derivative
goes through. So the code behind each rule has the right first derivative too.

Memory. In float32 the sum and the gradient share one array of exponentials, which takes the buffer of the gradient. In half
precision such an array would be a float32 copy of the logits. There the sum reads a copy of the logits that is masked in their own
dtype, and the gradient recomputes the exponentials from the bits of the logits (`numerics.widen`), so that no two loops share a wide
array. Without a label, the array of exponentials also marks the largest classes, by −1, so that no loop needs the logits and the maximum
to find them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import numerics, rows

_FEW = 32  # classes up to which XLA on CPUs sums in one loop, without a tree of stored partial sums


class WithoutLabel(NamedTuple):
    """Statistics of a row without its label, each [...]; −log p_k = (reference − z_k) + log_sum for every class k."""

    reference: Array  # m, the largest logit; no derivative
    log_sum: Array  # c = lse − m
    dead: Array  # whether all logits of the row are −∞


class WithLabel(NamedTuple):
    """The same for a row whose label is an index, and two statistics of that label, each [...]."""

    reference: Array
    log_sum: Array
    dead: Array
    gap: Array  # d = z_y − m
    log_odds: Array  # a = log(p_y/(1 − p_y))


Statistics = WithoutLabel | WithLabel


def of(r: rows.Rows) -> Statistics:
    """`of_label` if the labels are indices, otherwise `of_row`."""
    return of_label(r) if r.labels_are_indices else of_row(r)


def of_row(r: rows.Rows) -> WithoutLabel:
    """The statistics of every row, from one pass over the logits. Labels are ignored."""
    c = _log_sum(r.values, r.raw, r.class_mask, r.where, r.axis_name)
    return WithoutLabel(rows.reference(r), c, rows.largest(r) == -jnp.inf)


def of_label(r: rows.Rows) -> WithLabel:
    """The statistics of every row and of its label, an index, from one pass over the logits."""
    m, d, rest, _ = _log_sums(r.values, r.raw, r.labels, r.class_mask, r.where, r.axis_name)
    dead = numerics.is_infinite(-d) & numerics.is_infinite(-rest)
    rest = numerics.where(dead, jnp.zeros_like(rest), rest)
    a = d - rest
    # log(e^d + e^ℓ), relative to the larger of the two
    log_sum = numerics.where(a > 0, d + numerics.softplus(-a), rest + numerics.softplus(a))
    return WithLabel(m, log_sum, dead, gap=d, log_odds=a)


def finish(r: rows.Rows, stats: Statistics, loss: Array) -> Array:
    """A finished loss: +∞ is restored, rows of only −∞ get no gradient, examples that do not count get exactly 0."""
    return rows.row_value(r, numerics.restore_infinity(numerics.where(stats.dead, lax.stop_gradient(loss), loss)))


def log_normalizer(r: rows.Rows, stats: Statistics) -> Array:
    """lse(z) of every row; −∞ where all logits are."""
    return numerics.where(stats.dead, -jnp.inf, stats.reference + stats.log_sum)


def hits(r: rows.Rows, stats: Statistics) -> Array:
    """Whether the label, or a most likely class of soft labels, has the largest logit. Every tied class is a hit.

    The gap to the largest logit decides this without a second pass over the classes. `metrics.accuracy` needs a pass to find the first of
    the tied classes, `metrics.top_k_accuracy` to find the last.
    """
    if isinstance(stats, WithLabel):
        return rows.row_value(r, (stats.gap >= 0) & ~stats.dead)
    assert r.labels is not None
    best = rows.maximum(r.labels, r.class_mask, r.axis_name)[..., None] == r.labels
    top = rows.maximum(r.raw, r.class_mask, r.axis_name)[..., None] == r.raw
    return rows.row_value(r, (rows.class_sum(r, rows.all_of(best & top, r.class_mask, None).astype(jnp.int32)) > 0) & ~stats.dead)


# The rule of a label ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _log_sums(values, raw, labels, class_mask, where, axis_name):
    """(m, d, ℓ, e^(−ℓ)), as the module docstring defines them.

    If the sum is 0, ℓ = −INFINITE, and 1 replaces e^(−ℓ), which then multiplies only zeros.
    `raw` holds the same numbers as `values` in the caller's dtype, and the rule takes no derivative through it.
    """
    r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
    m = rows.reference(r)
    total = rows.class_sum(r, exponentials(r, m, rows.all_of(~rows.on_label(r), class_mask, where)))
    empty = total == 0  # no other class exists, or all underflow: p_y = 1
    total = numerics.where(empty, jnp.ones_like(total), total)
    return m, _gap(r, m), numerics.where(empty, -numerics.INFINITE, jnp.log(total)), 1 / total


@_log_sums.defjvp
def _(axis_name, primals, tangents):
    values, raw, labels, class_mask, where = primals
    m, d, log_sum, scale = _log_sums(values, raw, labels, class_mask, where, axis_name)

    def linear(z, m, scale, tangent):
        r = rows.Rows(raw, values, labels, class_mask, where, axis_name)
        label = rows.on_label(r)
        # x + (−m), not x − m, in half precision: not even the broadcast of m may be shared with the sum
        x = z - m[..., None] if z.dtype == m.dtype else numerics.widen(z) + (-m)[..., None]
        softmax = jnp.exp(numerics.where(rows.all_of(~label, class_mask, where), x, -jnp.inf)) * scale[..., None]
        return rows.class_sum(r, numerics.where(rows.all_of(label, class_mask, where), tangent, 0)), rows.class_sum(r, softmax * tangent)

    # What a backward pass of its own gets handed over is the exponentials in float32, and in half precision the logits.
    narrow = raw.dtype != values.dtype
    linear = jax.checkpoint(linear, prevent_cse=False) if narrow else linear
    z = values.astype(raw.dtype)  # exact: that is where they came from
    d_dot, log_sum_dot = linear(z, m, scale, tangents[0])
    return (m, d, log_sum, scale), (jnp.zeros_like(m), d_dot, log_sum_dot, -scale * log_sum_dot)


# The rule without a label ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _log_sum(values, raw, class_mask, where, axis_name):
    """The number c = lse − m."""
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    m = rows.reference(r)
    return jnp.log1p(excess(*rest_and_ties(r, m, marked_exponentials(r, m))))


@_log_sum.defjvp
def _(axis_name, primals, tangents):
    values, raw, class_mask, where = primals

    def linear(values, raw, tangent):
        r = rows.Rows(raw, values, None, class_mask, where, axis_name)
        return rows.class_sum(r, softmax(r) * tangent)

    linear = jax.checkpoint(linear, prevent_cse=False) if raw.dtype != values.dtype else linear
    return _log_sum(*primals, axis_name), linear(values, raw, tangents[0])


def softmax(r: rows.Rows) -> Array:
    """The probability p of every class [..., classes]."""
    return _softmax(r.values, r.raw, r.class_mask, r.where, r.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _softmax(values, raw, class_mask, where, axis_name):
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    m = rows.reference(r)
    e = marked_exponentials(r, m)
    scale = lax.optimization_barrier(1 / (1 + excess(*rest_and_ties(r, m, e))))  # once per row, not once per class
    return numerics.where(e < -0.5, -e, e) * scale[..., None]


@_softmax.defjvp
def _(axis_name, primals, tangents):
    values, raw, class_mask, where = primals
    p, moved = _softmax(*primals, axis_name), rows.masked(tangents[0], where, class_mask)
    r = rows.Rows(raw, values, None, class_mask, where, axis_name)
    return p, p * (moved - rows.widened(r, rows.class_sum(r, p * moved)))


def marked_exponentials(r: rows.Rows, m: Array) -> Array:
    """e^(z_k − m) for every class, and −1 at the largest as a mark; 0 where masked. Its code has the right first derivative.

    One array then tells which classes are the largest, and all loops of a loss read it instead of the logits.
    """
    z, below = numerics.widen(r.raw) if r.half else r.values, (-m)[..., None]
    x, largest = z + below, -z == below  # not `x == 0`: z may be a product, of which XLA makes x with one rounding instead of two
    keep = rows.kept(r)
    x = x if keep is None else numerics.where(keep, x, -jnp.inf)
    return numerics.where(largest if keep is None else largest & keep, -1 - x, jnp.exp(x))


def rest_and_ties(r: rows.Rows, m: Array, e: Array) -> tuple[Array, Array]:
    """Σ e^(z_k − m) over the classes below the largest, and how many are the largest; `e` comes from `marked_exponentials`."""
    if r.half:  # there `e` must not be stored: only gradients make it
        largest = same_as_largest(r, m)
        rest = rows.class_sum(r, exponentials(r, m, rows.all_of(~largest, r.class_mask, r.where)))
        return rest, rows.class_sum(r, numerics.where(largest, 1 + (numerics.widen(r.raw) - m[..., None]), 0))  # ones with a derivative
    if few(r):
        return two_sums(r, jnp.maximum(e, 0), jnp.maximum(-e, 0))
    rest = rows.class_sum(r, jnp.maximum(e, 0))
    ties = rest - rows.class_sum(r, e)  # a whole number with a derivative
    return rest, ties + lax.stop_gradient(jnp.round(ties) - ties)


def excess(rest: Array, ties: Array) -> Array:
    """Σ e^(z_k − m) over all classes, less 1; 0 if there is none.

    If XLA rounds the largest logit differently in the maximum and in the sum, no class equals m, and `rest` contains all classes.
    """
    total = rest + (ties - 1)
    return numerics.where(total < 0, 0, total)  # not a maximum, which halves the derivative at 0


def same_as_largest(r: rows.Rows, m: Array) -> Array:
    """Whether a class has the largest logit [..., classes]."""
    return rows.masked(numerics.same(lax.stop_gradient(r.raw), m.astype(r.raw.dtype)[..., None]), r.where, r.class_mask)


def few(r: rows.Rows) -> bool:
    """Whether the classes held here are few enough for one loop over them; a symbolic number of classes never is."""
    classes = r.raw.shape[-1]
    return isinstance(classes, int) and classes <= _FEW


def two_sums(r: rows.Rows, x: Array, y: Array) -> tuple[Array, Array]:
    """Σ x and Σ y over the classes, as one complex sum for few classes: XLA on CPUs would store the operands of two real sums."""
    if not few(r):
        return rows.class_sum(r, x), rows.class_sum(r, y)
    both = jnp.sum(lax.complex(x, y), axis=-1)
    return rows.over_devices(r, both.real), rows.over_devices(r, both.imag)


def exponentials(r, m, keep):
    """e^(z − m) where `keep`, 0 elsewhere, for a sum over classes."""
    if r.raw.dtype != m.dtype:
        return jnp.exp(numerics.select_logits(keep, r.raw).astype(m.dtype) - m[..., None])
    return jnp.exp(numerics.where(keep, r.raw - m[..., None], -jnp.inf))


def _gap(r, m):
    """The gap z_y − m: −INFINITE for an impossible label, NaN for an index out of range."""
    local, inside = rows.local_index(r, r.labels)
    z = numerics.take_last(r.raw, local[..., None]).squeeze(-1).astype(m.dtype)
    if r.class_mask is not None:
        z = numerics.where(numerics.take_last(r.class_mask, local[..., None]).squeeze(-1), z, -jnp.inf)
    if (here := rows.is_here(r, r.labels)) is not None:
        z = rows.over_devices(r, numerics.where(here, numerics.finite(z), 0))
    d = numerics.nan_unless(inside, numerics.finite(z) - m)
    return d if r.where is None else numerics.where(r.where, d, jnp.zeros_like(d))
