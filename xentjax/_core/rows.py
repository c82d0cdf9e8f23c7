"""The statistics of a row of logits, and the one derivative rule behind every categorical loss.

For a row z with label y and largest logit m (a constant), two numbers carry all that a loss needs:

    gap      d = z_y − m
    log-rest ℓ = log Σ_{k≠y} e^(z_k − m)               the label left out, so nothing cancels when it dominates

Their difference is the log-odds a = d − ℓ of the label: p_y = σ(a), 1 − p_y = σ(−a), −log p_y = softplus(−a). For every class
−log p_k = (m − z_k) + c with c = lse − m = log(e^d + e^ℓ). Without a label the class left out is the largest itself:
c = log1p(s), s = Σ_{z_k<m} e^(z_k − m) + (number of ties − 1).

Derivatives. Both sums are logarithms of Σ_{k∈A} e^(z_k − m) over some classes A, so with m constant

    ∂d/∂z_y = 1        ∂ℓ/∂z_k = e^(z_k − m − ℓ) for k ≠ y        ∂c/∂z_k = e^(z_k − m − c) for every k

which are softmaxes over A, and JAX differentiates the rest: ∂(−log p_y)/∂z_y = −σ(−a) is p_y − 1 without the subtraction.
The exponentials are functions of z again, and 1/e^ℓ has the derivative −ℓ̇/e^ℓ, so the rule differentiates to any order by
products alone: no power of a small sum can overflow.

Masks: a class that does not exist (`class_mask`) and every class of an example that does not count (`where`) is left out of
all sums, by selection before the exponential: e^(−∞) = 0 with derivative 0 whatever its logit.

Memory. In float32 the sum and the gradient share one array of exponentials, which takes the buffer of the gradient. In half
precision such an array would be a float32 copy of the logits: the sum there reads a copy masked in its own dtype, and the
gradient makes its exponentials anew from the logits' bits (`numerics.widen`), so that no loop shares a wide array with another.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import mesh, numerics

FEW = 32  # classes up to which XLA on CPUs sums in one loop, without a tree of stored partial sums


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "labels", "class_mask", "where"], meta_fields=["axis", "axis_name"]
)
@dataclasses.dataclass(frozen=True)
class Examples:
    """The checked arguments of a categorical loss, as the caller gave them (`checks.examples` makes it)."""

    logits: Array
    labels: Array | None
    class_mask: Array | None
    where: Array | None
    axis: int
    axis_name: str | tuple[str, ...] | None

    @property
    def classes(self) -> int:
        """The number of classes over all devices."""
        return self.logits.shape[self.axis] * mesh.size(self.axis_name)


class Rows(NamedTuple):
    """Logits with the class axis last and what is known of each row; made by `of` inside the compiled part of a loss."""

    raw: Array  # [..., classes], the caller's dtype
    values: Array  # [..., classes], the accumulation dtype; derivatives come here, and are cast to the caller's dtype once
    labels: Array | None  # indices [...], or a distribution [..., classes] in the accumulation dtype; 0 in hidden examples
    class_mask: Array | None  # [..., classes]
    where: Array | None  # [...]
    axis_name: str | tuple[str, ...] | None

    @property
    def classes(self) -> int:
        """The number of classes over all devices."""
        return self.raw.shape[-1] * mesh.size(self.axis_name)

    @property
    def half(self) -> bool:
        """Whether the logits are narrower than the arithmetic."""
        return self.raw.dtype != self.values.dtype

    @property
    def hard(self) -> bool:
        """Whether the labels are indices."""
        return self.labels is not None and jnp.issubdtype(self.labels.dtype, jnp.integer)


class Statistics(NamedTuple):
    """What `statistics` finds in a row; −log p_k = (reference − z_k) + log_sum for every class k."""

    reference: Array  # m [...], no derivative
    log_sum: Array  # c = lse − m [...]
    gap: Array | None  # z_y − m [...] of the label, if it is an index
    log_odds: Array | None  # a [...] likewise
    dead: Array  # [...] whether all logits of the row are −∞


def of(examples: Examples) -> Rows:
    """The rows of checked arguments: class axis last, dtypes decided."""
    last = functools.partial(jnp.moveaxis, source=examples.axis, destination=-1)
    logits, labels, mask = examples.logits, examples.labels, examples.class_mask
    z = last(logits)
    dtype = numerics.accumulation_dtype(logits.dtype)
    if labels is not None:
        if jnp.issubdtype(labels.dtype, jnp.integer):
            labels = labels.astype(numerics.index_dtype(labels))
            if examples.where is not None:  # a hidden label becomes a class, so that nothing further looks one up that does not exist
                labels = numerics.where(examples.where, labels, 0)
        else:
            labels = masked(last(labels).astype(dtype), examples.where)
    if mask is not None:
        mask = last(mask) if mask.ndim == logits.ndim else mask
        mask = mesh.split_as(z, jnp.broadcast_to(numerics.expand_leading(mask, logits.ndim), z.shape))
    return Rows(z, z.astype(dtype), labels, mask, examples.where, examples.axis_name)


def adjusted(rows: Rows, scale: ArrayLike = 1.0, offset: Array | float = 0.0) -> Rows:
    """The rows of scale·(z − m) + offset, offset [..., classes]; −∞, NaN and what is masked stay as they are."""
    z = rows.values  # without m, a constant, a common shift of the logits would swallow the offset
    m = reference(rows)
    plain = numerics.where(jnp.isfinite(z), finite_values(rows) - m[..., None], 0)
    z = numerics.where(jnp.isfinite(z), jnp.asarray(scale, z.dtype) * plain + offset, z)
    return rows._replace(raw=z, values=z)


def statistics(rows: Rows) -> Statistics:
    """Reference, log-sum and (for labels that are indices) log-odds of every row; one pass over the logits."""
    if not rows.hard:
        c = _log_sum(rows.values, rows.raw, rows.class_mask, rows.where, rows.axis_name)
        return Statistics(reference(rows), c, None, None, largest(rows) == -jnp.inf)
    m, d, rest, _ = _log_sums(rows.values, rows.raw, rows.labels, rows.class_mask, rows.where, rows.axis_name)
    dead = numerics.is_infinite(-d) & numerics.is_infinite(-rest)
    rest = numerics.where(dead, jnp.zeros_like(rest), rest)
    a = d - rest
    # log(e^d + e^ℓ), relative to the larger of the two
    log_sum = numerics.where(a > 0, d + numerics.softplus(-a), rest + numerics.softplus(a))
    return Statistics(m, log_sum, d, a, dead)


def finite_values(rows: Rows) -> Array:
    """The logits as finite numbers; 0 in classes that do not exist and examples that do not count."""
    return masked(numerics.finite(rows.values), rows.where, rows.class_mask)


def kept(rows: Rows) -> Array | None:
    """Which classes exist, in examples that count [..., classes]; None means all."""
    return _and(None, rows.class_mask, rows.where)


def masked(per_class: Array, where: Array | None, class_mask: Array | None = None) -> Array:
    """`per_class` [..., n] with 0 in examples that do not count and classes that do not exist."""
    keep = _and(None, class_mask, where)
    return per_class if keep is None else numerics.where(keep, per_class, 0)


def over_devices(rows: Rows, partial_sum: Array) -> Array:
    """The sum over the devices that share the class axis."""
    return mesh.psum(partial_sum, mesh.names(rows.axis_name))


def class_sum(rows: Rows, x: Array) -> Array:
    """Σ over all classes, those of other devices too."""
    return over_devices(rows, jnp.sum(x, axis=-1))


def class_count(rows: Rows) -> Array | int:
    """How many classes exist: a number, or one per row [...] under `class_mask`; at least 1."""
    if rows.class_mask is None:
        return rows.classes
    return jnp.maximum(class_sum(rows, rows.class_mask.astype(rows.values.dtype)), 1)


def at_label(rows: Rows, per_class: Array) -> Array:
    """`per_class` [classes] or [..., classes] at the label of every example [...]."""
    return _taken(rows, per_class, rows.labels)


def at_index(rows: Rows, per_class: Array, index: Array, *, differentiated: bool = False) -> Array:
    """`per_class` [..., classes] at several global class indices of every row, `index` [..., k]; 0 or False where there is none."""
    local, here = _local(rows, index)[0], _here(rows, index)
    taken = numerics.take_last(mesh.split_as(rows.raw, per_class), local, differentiated=differentiated)
    if here is None:
        return taken
    found = over_devices(rows, numerics.where(here, taken, 0).astype(rows.values.dtype))
    return found > 0 if taken.dtype == jnp.bool_ else found


def widened(rows: Rows, number: Array) -> Array:
    """A number per row [..., 1], to meet an array over classes. It is made to vary over devices before it is widened.

    The gradient is then summed over devices as one number per row, not as one per class.
    """
    return mesh.vary(number, mesh.axes_of(rows.raw))[..., None]


def label_share(rows: Rows, index: Array) -> Array:
    """What a distribution gives to one class [...]; `index` [] is global."""
    return _taken(rows, rows.labels, jnp.broadcast_to(index, rows.raw.shape[:-1]))


def largest(rows: Rows) -> Array:
    """The largest logit of a row [...], −∞ where there is none; no derivative."""
    return _maximum(rows.raw, rows.class_mask, rows.axis_name).astype(rows.values.dtype)


def reference(rows: Rows) -> Array:
    """M [...], the largest logit as `statistics` subtracts it; no derivative."""
    return _reference(_maximum(rows.raw, rows.class_mask, rows.axis_name), rows)


def counted(rows: Rows) -> Array | None:
    """Which examples count: those in `where` that have a class at all; None means all."""
    if rows.class_mask is None:
        return rows.where
    some = class_sum(rows, rows.class_mask.astype(jnp.int32)) > 0
    return some if rows.where is None else some & rows.where


def row_value(rows: Rows, values: Array) -> Array:
    """One number per row, exactly 0 (or False) where an example does not count."""
    count = counted(rows)
    return values if count is None else numerics.where(count, values, jnp.zeros_like(values))


def close(rows: Rows, found: Statistics, loss: Array) -> Array:
    """A finished loss: +∞ restored, rows of only −∞ without gradient, exactly 0 where an example does not count."""
    return row_value(rows, numerics.restore_infinity(numerics.where(found.dead, lax.stop_gradient(loss), loss)))


def log_normalizer(rows: Rows, found: Statistics) -> Array:
    """lse(z) of every row; −∞ where all logits are."""
    return numerics.where(found.dead, -jnp.inf, found.reference + found.log_sum)


def hits(rows: Rows, found: Statistics) -> Array:
    """Whether the label, or the likeliest class of a distribution, has the largest logit; ties count."""
    if found.gap is not None:
        return row_value(rows, (found.gap >= 0) & ~found.dead)
    assert rows.labels is not None
    best = _maximum(rows.labels, rows.class_mask, rows.axis_name)[..., None] == rows.labels
    top = _maximum(rows.raw, rows.class_mask, rows.axis_name)[..., None] == rows.raw
    return row_value(rows, (class_sum(rows, _and(best & top, rows.class_mask, None).astype(jnp.int32)) > 0) & ~found.dead)


# The rule of a label ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _log_sums(values, raw, labels, class_mask, where, axis_name):
    """(m, d, ℓ, e^(−ℓ)), as the module docstring defines them.

    If nothing is left, ℓ = −INFINITE and 1 stands for its exponential, which then multiplies zeros.
    `raw` holds the same numbers as `values` in the caller's dtype, and the rule takes no derivative through it.

    JAX may differentiate this code in place of the rule: `lax.scan` drops rules from what a second derivative goes through. So
    it has the right derivative, if not at every margin; in half precision, whose bits have none, it has NaN.
    """
    rows = Rows(raw, values, labels, class_mask, where, axis_name)
    m = reference(rows)
    if rows.half:
        m += numerics.zero_without_derivative(values[..., 0])
    total = class_sum(rows, exponentials(rows, m, _and(~on_label(rows), class_mask, where)))
    empty = total == 0  # no other class exists, or all underflow: p_y = 1
    total = numerics.where(empty, jnp.ones_like(total), total)
    return m, _gap(rows, m), numerics.where(empty, -numerics.INFINITE, jnp.log(total)), 1 / total


@_log_sums.defjvp
def _(axis_name, primals, tangents):
    values, raw, labels, class_mask, where = primals
    m, d, log_sum, scale = _log_sums(values, raw, labels, class_mask, where, axis_name)

    def linear(z, m, scale, tangent):
        rows = Rows(raw, values, labels, class_mask, where, axis_name)
        label = on_label(rows)
        # x + (−m), not x − m, in half precision: not even the broadcast of m may be shared with the sum
        x = z - m[..., None] if z.dtype == m.dtype else numerics.widen(z) + (-m)[..., None]
        softmax = jnp.exp(numerics.where(_and(~label, class_mask, where), x, -jnp.inf)) * scale[..., None]
        return class_sum(rows, numerics.where(_and(label, class_mask, where), tangent, 0)), class_sum(rows, softmax * tangent)

    # What a backward pass of its own gets handed over is the exponentials in float32, and in half precision the logits.
    narrow = raw.dtype != values.dtype
    linear = jax.checkpoint(linear, prevent_cse=False) if narrow else linear
    z = values.astype(raw.dtype)  # exact: that is where they came from
    d_dot, log_sum_dot = linear(z, m, scale, tangents[0])
    return (m, d, log_sum, scale), (jnp.zeros_like(m), d_dot, log_sum_dot, -scale * log_sum_dot)


# The rule without a label ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _log_sum(values, raw, class_mask, where, axis_name):
    """C = lse − m."""
    rows = Rows(raw, values, None, class_mask, where, axis_name)
    m = reference(rows)
    return jnp.log1p(excess(*rest_and_ties(rows, m, marked_exponentials(rows, m))))


@_log_sum.defjvp
def _(axis_name, primals, tangents):
    values, raw, class_mask, where = primals

    def linear(values, raw, tangent):
        rows = Rows(raw, values, None, class_mask, where, axis_name)
        return class_sum(rows, softmax(rows) * tangent)

    linear = jax.checkpoint(linear, prevent_cse=False) if raw.dtype != values.dtype else linear
    return _log_sum(*primals, axis_name), linear(values, raw, tangents[0])


def softmax(rows: Rows) -> Array:
    """P for every class [..., classes]."""
    return _softmax(rows.values, rows.raw, rows.class_mask, rows.where, rows.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _softmax(values, raw, class_mask, where, axis_name):
    rows = Rows(raw, values, None, class_mask, where, axis_name)
    m = reference(rows)
    e = marked_exponentials(rows, m)
    scale = lax.optimization_barrier(1 / (1 + excess(*rest_and_ties(rows, m, e))))  # once per row, not once per class
    return numerics.where(e < -0.5, -e, e) * scale[..., None]


@_softmax.defjvp
def _(axis_name, primals, tangents):
    p = _softmax(*primals, axis_name)
    rows = Rows(primals[1], primals[0], None, *primals[2:], axis_name)
    moved = masked(tangents[0], rows.where, rows.class_mask)
    return p, p * (moved - widened(rows, class_sum(rows, p * moved)))


def marked_exponentials(rows: Rows, m: Array) -> Array:
    """e^(z_k − m) for every class, and −1 at the largest as a mark; 0 where masked. Its code has the right first derivative.

    One array then tells which classes are the largest, and all loops of a loss read it instead of the logits.
    """
    x = (numerics.widen(rows.raw) if rows.half else rows.values) + (-m)[..., None]
    keep = kept(rows)
    x = x if keep is None else numerics.where(keep, x, -jnp.inf)
    # not `x == 0`, whose broadcast 0 would be shared; what is above −tiny is 0, because XLA flushes smaller numbers
    return numerics.where(x > -jnp.finfo(x.dtype).tiny, -1 - x, jnp.exp(x))


def rest_and_ties(rows: Rows, m: Array, e: Array) -> tuple[Array, Array]:
    """Σ e^(z_k − m) over the classes below the largest, and how many are the largest; `e` comes from `marked_exponentials`."""
    if rows.half:  # there `e` must not be stored: only gradients make it
        largest = same_as_largest(rows, m)
        rest = class_sum(rows, exponentials(rows, m, _and(~largest, rows.class_mask, rows.where)))
        return rest + numerics.zero_without_derivative(rows.values[..., 0]), class_sum(rows, largest.astype(m.dtype))
    if rows.raw.shape[-1] <= FEW:
        return two_sums(rows, jnp.maximum(e, 0), jnp.maximum(-e, 0))
    rest = class_sum(rows, jnp.maximum(e, 0))
    ties = rest - class_sum(rows, e)  # a whole number with a derivative
    return rest, ties + lax.stop_gradient(jnp.round(ties) - ties)


def excess(rest: Array, ties: Array) -> Array:
    """Σ e^(z_k − m) over all classes, less 1; 0 if there is none."""
    return numerics.where(ties == 0, 0, rest + (ties - 1))


def same_as_largest(rows: Rows, m: Array) -> Array:
    """Whether a class has the largest logit [..., classes]."""
    return masked(numerics.same(lax.stop_gradient(rows.raw), m.astype(rows.raw.dtype)[..., None]), rows.where, rows.class_mask)


def two_sums(rows: Rows, x: Array, y: Array) -> tuple[Array, Array]:
    """Σ x and Σ y over the classes, as one complex sum if they are few: of two real sums XLA on CPUs would store the operands."""
    if rows.raw.shape[-1] > FEW:
        return class_sum(rows, x), class_sum(rows, y)
    both = jnp.sum(lax.complex(x, y), axis=-1)
    return over_devices(rows, both.real), over_devices(rows, both.imag)


def exponentials(rows, m, keep):
    """e^(z − m) where `keep`, 0 elsewhere, for a sum over classes."""
    if rows.raw.dtype != m.dtype:
        return jnp.exp(numerics.select_logits(keep, rows.raw).astype(m.dtype) - m[..., None])
    return jnp.exp(numerics.where(keep, rows.raw - m[..., None], -jnp.inf))


def _maximum(raw, mask, axis_name):
    """The largest logit of each row in the dtype of `raw`; it has no derivative."""
    top = _local_maximum(lax.stop_gradient(raw), mask)
    return top if axis_name is None else lax.pmax(top, axis_name)


def _local_maximum(raw, mask):
    z = raw if mask is None else numerics.select_logits(mask, raw)
    return jnp.max(z, axis=-1, initial=-jnp.inf)


def largest_class(rows):
    """The global index of a class with the largest logit [...]; a maximum, because devices would exchange more for an argmax."""
    z = lax.stop_gradient(rows.raw)
    z = z if rows.class_mask is None else numerics.select_logits(rows.class_mask, z)
    top = _maximum(z, None, rows.axis_name)
    index = jnp.max(numerics.where(numerics.same(z, top[..., None]), class_index(rows), -1), axis=-1)
    return index if rows.axis_name is None else lax.pmax(index, rows.axis_name)


def _reference(top, rows):
    """m: the maximum; 0 where there is none to subtract or the example does not count; NaN for a logit of +∞."""
    m = top.astype(rows.values.dtype)
    usable = m != -jnp.inf
    m -= numerics.where(m == jnp.inf, m, jnp.zeros_like(m))
    return numerics.where(usable if rows.where is None else usable & rows.where, m, jnp.zeros_like(m))


def _gap(rows, m):
    """The gap z_y − m: −INFINITE for an impossible label, NaN for an index out of range."""
    local, inside = _local(rows, rows.labels)
    z = numerics.take_last(rows.raw, local[..., None]).squeeze(-1).astype(m.dtype)
    if rows.class_mask is not None:
        z = numerics.where(numerics.take_last(rows.class_mask, local[..., None]).squeeze(-1), z, -jnp.inf)
    if (here := _here(rows, rows.labels)) is not None:
        z = over_devices(rows, numerics.where(here, numerics.finite(z), 0))
    d = numerics.nan_unless(inside, numerics.finite(z) - m)
    return d if rows.where is None else numerics.where(rows.where, d, jnp.zeros_like(d))


def _taken(rows, per_class, index):
    """`per_class` [classes] or [..., classes] at a global class index [...]; 0 where there is no such class."""
    local, here = _local(rows, index)[0], _here(rows, index)
    if per_class.ndim == 1 and not mesh.is_explicit(rows.raw):
        taken = jnp.take(per_class, local, mode="clip")
    else:
        per_class = jnp.broadcast_to(numerics.expand_leading(per_class, rows.raw.ndim), rows.raw.shape)
        return at_index(rows, per_class, index[..., None]).squeeze(-1)
    return taken if here is None else over_devices(rows, numerics.where(here, taken, 0))


def in_range(rows: Rows) -> Array:
    """Whether the label is a class at all [...], be it one that exists or not."""
    return is_class(rows, rows.labels)


def is_class(rows: Rows, index: Array | None) -> Array:
    """Whether an index is that of a class, be it one that exists or not."""
    return _local(rows, index)[1]


def class_index(rows: Rows) -> Array:
    """The global index of every class held here [..., classes]."""
    z, dtype = rows.raw, rows.labels.dtype if rows.hard and rows.labels is not None else jnp.int32
    index = lax.broadcasted_iota(dtype, z.shape, z.ndim - 1, out_sharding=mesh.split_of(z))
    return index if rows.axis_name is None else index + (lax.axis_index(rows.axis_name) * z.shape[-1]).astype(index.dtype)


def on_label(rows: Rows) -> Array:
    """Whether a class is the label [..., classes]."""
    assert rows.labels is not None
    return class_index(rows) == rows.labels[..., None]


def _local(rows, index):
    """The position of a global class index on this device (to be clipped), and whether the index is a class at all."""
    inside = (index >= 0) & (index < rows.classes)
    if rows.axis_name is None:
        return index, inside
    return index - (lax.axis_index(rows.axis_name) * rows.raw.shape[-1]).astype(index.dtype), inside


def _here(rows, index):
    """Whether a class index lives on this device; None when there is but one."""
    if rows.axis_name is None:
        return None
    local, _ = _local(rows, index)
    return (local >= 0) & (local < rows.raw.shape[-1])


def _and(over_classes, class_mask, where):
    """The classes of all masks given; None for all classes."""
    masks = [over_classes, class_mask, None if where is None else where[..., None]]
    return functools.reduce(lambda a, b: a if b is None else b if a is None else a & b, masks)
