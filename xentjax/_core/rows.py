"""Rows of logits: their representation, their masks, class indices, and sums over classes.

A row holds the logits of one example. `of` turns the checked arguments of a loss into `Rows`. The other functions compute from `Rows`.

Masks: `class_mask` marks the classes that exist, and `where` marks the examples that count. Sums leave out classes that do not exist. For
examples that do not count, they leave out all classes. To leave out a class, its logit is replaced by −∞ before the exponential. So
e^(−∞) = 0, with derivative 0.

Devices: The classes may be split over the devices of mesh axes (`axis_name`). Each device then holds some of the classes. Class indices are
global, and sums and maxima over classes include the classes of all devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics

_LONG = 2**15  # XLA on CPUs sums rows of more than 2¹⁵ computed numbers at an eighth of the speed


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "labels", "class_mask", "where"], meta_fields=["axis", "axis_name"]
)
@dataclasses.dataclass(frozen=True)
class Examples:
    """The checked arguments of a categorical loss, in the shapes and dtypes of the caller.

    `checks.examples` makes `Examples` from the arguments of a public function. Functions that compute or check their own logits construct
    `Examples` directly.
    """

    logits: Array
    labels: Array | None
    class_mask: Array | None
    where: Array | None
    axis: int
    axis_name: mesh.AxisName

    @property
    def classes(self) -> int:
        """The number of classes on all devices together."""
        return self.logits.shape[self.axis] * mesh.size(self.axis_name)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["raw", "reference", "terms"], meta_fields=["change"])
@dataclasses.dataclass(frozen=True)
class Adjustment:
    """How to compute adjusted logits, in the accumulation dtype, from half-precision logits z: change(z − m, *terms).

    If two loops read the adjusted logits, XLA stores them in full. So each loop computes them again. The barriers hide from XLA that it is
    the same computation.
    """

    raw: Array  # z [..., classes], in the caller's dtype; −∞ in classes that do not exist and in examples that do not count
    reference: Array  # m [..., 1]
    terms: tuple[Array, ...]
    change: Callable[..., Array]

    def logits(self, *after: Array) -> Array:
        """The adjusted logits [..., classes], computed when the numbers `after` are known. In place of −∞, they have about −INFINITE.

        Loops need different numbers `after`, because XLA merges equal barriers.
        """
        z, m, terms, _ = lax.optimization_barrier((self.raw, self.reference, self.terms, after))
        # −INFINITE, unless m is larger. XLA on CPUs would store a constant that is broadcast to all classes.
        least = -jnp.maximum(jnp.abs(m), numerics.INFINITE)
        return self.change(jnp.maximum(z.astype(m.dtype) - m, least), *terms)


class Rows(NamedTuple):
    """Logits with the class axis last, together with their labels and masks. `of` makes them in the compiled part of a loss."""

    raw: Array  # [..., classes], the logits in the caller's dtype
    values: Array  # [..., classes], the logits in the accumulation dtype; gradients arrive here and are cast to the caller's dtype once
    labels: Array | None  # [...] class indices, or [..., classes] soft labels in the caller's dtype; 0 in examples that do not count
    class_mask: Array | None  # [..., classes], or None if all classes exist
    where: Array | None  # [...], or None if all examples count
    axis_name: mesh.AxisName
    adjustment: Adjustment | None = None  # if not None, another way to compute `values`, which stores less

    @property
    def classes(self) -> int:
        """The number of classes on all devices together."""
        return self.raw.shape[-1] * mesh.size(self.axis_name)

    @property
    def half(self) -> bool:
        """Whether the logits have a narrower dtype than the arithmetic."""
        return self.raw.dtype != self.values.dtype

    @property
    def labels_are_indices(self) -> bool:
        """Whether the labels are class indices; False if they are soft labels or if there are no labels."""
        return self.labels is not None and jnp.issubdtype(self.labels.dtype, jnp.integer)

    @property
    def given_labels(self) -> Array:
        """The labels, for functions that need them: class indices, or soft labels in the accumulation dtype."""
        assert self.labels is not None
        return self.labels if self.labels_are_indices else self.labels.astype(self.values.dtype)


def of(examples: Examples) -> Rows:
    """The rows of the checked arguments of a loss."""
    last = functools.partial(jnp.moveaxis, source=examples.axis, destination=-1)
    logits, labels, mask = examples.logits, examples.labels, examples.class_mask
    z = last(logits)
    dtype = numerics.accumulation_dtype(logits.dtype)
    if labels is not None:
        if jnp.issubdtype(labels.dtype, jnp.integer):
            labels = labels.astype(numerics.index_dtype(labels))
            if examples.where is not None:  # examples that do not count may hold any label; class 0 can be looked up
                labels = numerics.where(examples.where, labels, 0)
        else:
            labels = masked(last(labels), examples.where)
    if mask is not None:
        mask = last(mask) if mask.ndim == logits.ndim else mask
        mask = mesh.split_as(z, jnp.broadcast_to(numerics.expand_leading(mask, logits.ndim), z.shape))
    return Rows(z, z.astype(dtype), labels, mask, examples.where, examples.axis_name)


def adjusted(rows: Rows, change: Callable[..., Array], *terms: Array) -> Rows:
    """The rows with the logits change(z − m, *terms), where m is the largest logit of each row.

    `change` acts on each class alone. Each of the `terms` can be broadcast to [..., classes]. m is a constant, so subtracting it changes no
    probability. If all logits share a large shift, rounding would lose an added term without this subtraction. Infinite and NaN logits stay
    as they are.
    """
    z, keep = rows.values, full_mask(rows)
    raw = numerics.select_logits(keep, rows.raw) if rows.half and keep is not None else rows.raw
    m = reference(rows._replace(raw=raw, class_mask=None) if rows.half else rows)
    plain = numerics.where(jnp.isfinite(z), relative(rows, m), 0)
    terms = tuple(numerics.expand_leading(x, z.ndim) for x in terms)
    z = numerics.where(jnp.isfinite(z), change(plain, *terms), z)
    adjustment = Adjustment(raw, m[..., None], terms, change) if rows.half else None
    return rows._replace(raw=z, values=z, adjustment=adjustment)


# Masks -------------------------------------------------------------------------------------------------------------------


def finite_values(rows: Rows) -> Array:
    """The logits as finite numbers, shape [..., classes]; 0 in classes that do not exist and in examples that do not count."""
    return masked(numerics.finite(rows.values), rows.where, rows.class_mask)


def relative(rows: Rows, m: Array) -> Array:
    """The differences z − m as finite numbers, shape [..., classes]; 0 in classes that do not exist and in examples that do not count.

    m [...] is the largest logit. See `numerics.finite_difference`.
    """
    return masked(numerics.finite_difference(rows.values, m[..., None]), rows.where, rows.class_mask)


def not_infinite(rows: Rows) -> Array:
    """Whether a logit is not ±∞, shape [..., classes].

    It is False in classes that do not exist and in examples that do not count.
    """
    return masked(jnp.isfinite(rows.values) | jnp.isnan(rows.values), rows.where, rows.class_mask)


def full_mask(rows: Rows) -> Array | None:
    """Whether a class exists and its example counts, shape [..., classes]; None if there are no masks."""
    return combined_mask(None, rows.class_mask, rows.where)


def masked(per_class: Array, where: Array | None, class_mask: Array | None = None) -> Array:
    """`per_class` [..., n], with 0 in examples that do not count and in classes that do not exist."""
    keep = combined_mask(None, class_mask, where)
    return per_class if keep is None else numerics.where(keep, per_class, 0)


@overload
def combined_mask(over_classes: Array, class_mask: Array | None, where: Array | None) -> Array: ...
@overload
def combined_mask(over_classes: None, class_mask: Array | None, where: Array | None) -> Array | None: ...
def combined_mask(over_classes: Array | None, class_mask: Array | None, where: Array | None) -> Array | None:
    """The logical AND of the masks, shape [..., classes]; None if all masks are None."""
    masks = [over_classes, class_mask, None if where is None else where[..., None]]
    return functools.reduce(lambda a, b: a if b is None else b if a is None else a & b, masks)


def counted(rows: Rows) -> Array | None:
    """Whether an example is in `where` and has at least one class, shape [...]; None if there are no masks."""
    if rows.class_mask is None:
        return rows.where
    some = class_sum(rows, rows.class_mask.astype(jnp.int32)) > 0
    return some if rows.where is None else some & rows.where


def row_value(rows: Rows, values: Array) -> Array:
    """`values` [...], one per row, with exactly 0 (or False) in examples that do not count."""
    count = counted(rows)
    return values if count is None else numerics.where(count, values, jnp.zeros_like(values))


# Sums and maxima over classes --------------------------------------------------------------------------------------------


def sum_over_devices(rows: Rows, partial_sum: Array) -> Array:
    """The sum of `partial_sum` over the devices that share the classes."""
    return mesh.psum(partial_sum, mesh.names(rows.axis_name))


def class_sum(rows: Rows, x: Array) -> Array:
    """The sum of `x` [..., classes] over the classes of all devices, shape [...]."""
    return sum_over_devices(rows, jnp.sum(x, axis=-1))


def class_minimum(rows: Rows, per_class: Array) -> Array:
    """The minimum of `per_class` [..., classes] over all classes, including those on other devices."""
    least = jnp.min(per_class, axis=-1)
    return least if rows.axis_name is None else lax.pmin(least, rows.axis_name)


def class_count(rows: Rows) -> Array | int:
    """The number of classes that exist, at least 1.

    It is an integer. With `class_mask`, it is an array with one number per row, shape [...].
    """
    if rows.class_mask is None:
        return rows.classes
    return jnp.maximum(class_sum(rows, rows.class_mask.astype(rows.values.dtype)), 1)


def as_column(rows: Rows, number: Array) -> Array:
    """`number` [...], one per row, as a column [..., 1] to be combined with an array over classes.

    The column is made to vary over the devices that share the classes, before it is broadcast to all classes. So its gradient is summed
    over devices as one number per row, not as one number per class.
    """
    return mesh.vary(number, mesh.axes_of(rows.raw))[..., None]


def largest(rows: Rows) -> Array:
    """The largest logit of every row, shape [...], in the accumulation dtype; −∞ if the row has no class. It has no derivative."""
    if rows.adjustment is not None:
        top = maximum(rows.adjustment.logits(), None, rows.axis_name)
        return numerics.where(top < -(2.0**80), -jnp.inf, top)  # a smaller number is that of −∞, times a scale above 2⁻⁴⁰
    return maximum(rows.raw, rows.class_mask, rows.axis_name).astype(rows.values.dtype)


def reference(rows: Rows) -> Array:
    """The number m that `statistics` subtracts from every logit of a row, shape [...]. It has no derivative.

    m is the largest logit. If the largest logit is −∞ or the example does not count, m is 0. If the largest logit is +∞, m is NaN.
    """
    m = largest(rows)
    usable = m != -jnp.inf
    m -= numerics.where(m == jnp.inf, m, jnp.zeros_like(m))
    return numerics.where(usable if rows.where is None else usable & rows.where, m, jnp.zeros_like(m))


def maximum(x: Array, class_mask: Array | None, axis_name: mesh.AxisName) -> Array:
    """The largest entry of every row of `x` [..., classes], shape [...], in the dtype of `x`. It has no derivative."""
    x = lax.stop_gradient(x)
    x = x if class_mask is None else numerics.select_logits(class_mask, x)
    top = jnp.max(x, axis=-1, initial=-jnp.inf)
    return top if axis_name is None else lax.pmax(top, axis_name)


def largest_class(rows: Rows) -> Array:
    """The global index of a class with the largest logit, shape [...]. If several classes tie, it is the last of them.

    It is computed as a maximum of indices. For an argmax, devices would have to exchange more.
    """
    z = lax.stop_gradient(rows.raw)
    z = z if rows.class_mask is None else numerics.select_logits(rows.class_mask, z)
    top = maximum(z, None, rows.axis_name)
    index = jnp.max(numerics.where(numerics.equal(z, top[..., None]), class_index(rows), -1), axis=-1)
    return index if rows.axis_name is None else lax.pmax(index, rows.axis_name)


# Class indices -----------------------------------------------------------------------------------------------------------


def class_index(rows: Rows, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """The global index of every class of this device, shape [..., classes]. The default dtype is an integer dtype."""
    z, default = rows.raw, rows.given_labels.dtype if rows.labels_are_indices else jnp.int32
    index = lax.broadcasted_iota(default if dtype is None else dtype, z.shape, z.ndim - 1, out_sharding=mesh.split_of(z))
    return index if rows.axis_name is None else index + (lax.axis_index(rows.axis_name) * z.shape[-1]).astype(index.dtype)


def on_label(rows: Rows) -> Array:
    """Whether a class is the label of its row, shape [..., classes]. Labels must be class indices."""
    return class_index(rows) == rows.given_labels[..., None]


def off_label(rows: Rows) -> Array | None:
    """1 for every class except the label, and 0 for the label, shape [..., classes]; None if there are masks or more than 2¹⁵ classes.

    Labels must be class indices. The result is computed without a comparison: XLA on CPUs stores comparisons, selections and integers that
    enter a sum over classes, but not floating-point products. A masked logit may be NaN, so it must be replaced and cannot be multiplied
    by 0. float32 represents the indices of so few classes exactly.
    """
    if rows.class_mask is not None or rows.where is not None or not isinstance(rows.classes, int) or rows.classes > _LONG:
        return None
    distance = class_index(rows, jnp.float32) - rows.given_labels.astype(jnp.float32)[..., None]
    return jnp.minimum(jnp.abs(distance), 1).astype(rows.values.dtype)


def in_range(rows: Rows) -> Array:
    """Whether the label, a class index, lies in [0, classes), shape [...]. `class_mask` is ignored."""
    return is_class(rows, rows.given_labels)


def is_class(rows: Rows, index: Array) -> Array:
    """Whether a global class index lies in [0, classes). The result has the shape of `index`. `class_mask` is ignored."""
    return local_index(rows, index)[1]


def at_label(rows: Rows, per_class: Array) -> Array:
    """`per_class` [classes] or [..., classes] at the label of every row, shape [...].

    The labels are class indices. Callers must not use the result for a label out of range (see `at_index`).
    """
    return _at_class(rows, per_class, rows.given_labels)


def at_index(rows: Rows, per_class: Array, index: Array, *, differentiated: bool = False) -> Array:
    """`per_class` [..., classes] at several classes of every row, shape [..., k].

    `index` [..., k] holds global class indices. If an index is out of range, callers must not use its result, which is 0, False, or the
    entry of another class.
    """
    local, here = local_index(rows, index)[0], is_here(rows, index)
    taken = numerics.take_last(mesh.split_as(rows.raw, per_class), local, differentiated=differentiated)
    if here is None:
        return taken
    found = sum_over_devices(rows, numerics.where(here, taken, 0).astype(rows.values.dtype))
    return found > 0 if taken.dtype == jnp.bool_ else found


def label_share(rows: Rows, index: Array) -> Array:
    """The soft label of one class in every row, shape [...]. `index` [] is the global index of the class."""
    return _at_class(rows, rows.given_labels, jnp.broadcast_to(index, rows.raw.shape[:-1]))


def local_index(rows: Rows, index: Array) -> tuple[Array, Array]:
    """The position of a global class index on this device, and whether the index lies in [0, classes).

    The position is not clipped.
    """
    inside = (index >= 0) & (index < rows.classes)
    if rows.axis_name is None:
        return index, inside
    return index - (lax.axis_index(rows.axis_name) * rows.raw.shape[-1]).astype(index.dtype), inside


def is_here(rows: Rows, index: Array) -> Array | None:
    """Whether this device holds the class of a global index; None if classes are not split."""
    if rows.axis_name is None:
        return None
    local, _ = local_index(rows, index)
    return (local >= 0) & (local < rows.raw.shape[-1])


def of_this_device(rows: Rows, per_class: Array) -> Array:
    """The entries of `per_class` [..., all classes] for the classes on this device."""
    if rows.axis_name is None:
        return per_class
    size = rows.raw.shape[-1]
    return lax.dynamic_slice_in_dim(per_class, lax.axis_index(rows.axis_name) * size, size, per_class.ndim - 1)


def table_row(rows: Rows, table: Array) -> Array:
    """The row of a table for the label of every example, shape [..., classes on this device].

    `table` has shape [all classes, classes on this device]. The result is NaN if the label is out of range, and 0 if the example does not
    count.
    """
    chosen = _table_row(table, rows.given_labels, out_sharding=mesh.split_of(rows.values))
    return masked(numerics.nan_unless(in_range(rows)[..., None], chosen), rows.where)


@functools.partial(jax.jit, static_argnames="out_sharding")  # for the reason given at `numerics._lookup`
def _table_row(table: Array, index: Array, out_sharding: Any) -> Array:
    return table.at[index].get(mode="clip", out_sharding=out_sharding)


def table_sum(rows: Rows, table: Array) -> Array:
    """Σ_j t_j table_jk for soft labels t, shape [..., classes on this device].

    `table` has shape [all classes, all classes].
    """
    # Each device multiplies its part of the labels by the table's rows for them. The products are summed and split over devices.
    product = jnp.tensordot(rows.given_labels, of_this_device(rows, table.T).T, 1, precision="highest")
    if rows.axis_name is None:
        return product
    return lax.psum_scatter(product, rows.axis_name, scatter_dimension=product.ndim - 1, tiled=True)


def _at_class(rows: Rows, per_class: Array, index: Array) -> Array:
    """`per_class` [classes] or [..., classes] at one global class index of every row, `index` [...]."""
    if per_class.ndim > 1 or mesh.is_explicit(rows.raw):
        per_class = jnp.broadcast_to(numerics.expand_leading(per_class, rows.raw.ndim), rows.raw.shape)
        return at_index(rows, per_class, index[..., None]).squeeze(-1)
    taken = jnp.take(per_class, local_index(rows, index)[0], mode="clip")
    here = is_here(rows, index)
    return taken if here is None else sum_over_devices(rows, numerics.where(here, taken, 0))
