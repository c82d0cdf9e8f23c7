"""A row of logits: how it is represented, which of its classes and examples count, and how its classes are found and summed.

Masks: a class that does not exist (`class_mask`) and every class of an example that does not count (`where`) is left out of
all sums, by selection before the exponential: e^(−∞) = 0 with derivative 0 whatever its logit.

Classes may be split over the devices of a mesh axis. Indices are global, and sums and maxima over classes cross devices.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import mesh, numerics


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
    def labels_are_indices(self) -> bool:
        """Whether the labels are indices."""
        return self.labels is not None and jnp.issubdtype(self.labels.dtype, jnp.integer)


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


def finite_values(rows: Rows) -> Array:
    """The logits as finite numbers; 0 in classes that do not exist and examples that do not count."""
    return masked(numerics.finite(rows.values), rows.where, rows.class_mask)


def kept(rows: Rows) -> Array | None:
    """Which classes exist, in examples that count [..., classes]; None means all."""
    return all_of(None, rows.class_mask, rows.where)


def masked(per_class: Array, where: Array | None, class_mask: Array | None = None) -> Array:
    """`per_class` [..., n] with 0 in examples that do not count and classes that do not exist."""
    keep = all_of(None, class_mask, where)
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
    local, here = local_index(rows, index)[0], is_here(rows, index)
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
    return maximum(rows.raw, rows.class_mask, rows.axis_name).astype(rows.values.dtype)


def reference(rows: Rows) -> Array:
    """M [...], the largest logit as `statistics` subtracts it; no derivative."""
    return _reference(maximum(rows.raw, rows.class_mask, rows.axis_name), rows)


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


def maximum(raw, mask, axis_name):
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
    top = maximum(z, None, rows.axis_name)
    index = jnp.max(numerics.where(numerics.equal(z, top[..., None]), class_index(rows), -1), axis=-1)
    return index if rows.axis_name is None else lax.pmax(index, rows.axis_name)


def _reference(top, rows):
    """m: the maximum; 0 where there is none to subtract or the example does not count; NaN for a logit of +∞."""
    m = top.astype(rows.values.dtype)
    usable = m != -jnp.inf
    m -= numerics.where(m == jnp.inf, m, jnp.zeros_like(m))
    return numerics.where(usable if rows.where is None else usable & rows.where, m, jnp.zeros_like(m))


def _taken(rows, per_class, index):
    """`per_class` [classes] or [..., classes] at a global class index [...]; 0 where there is no such class."""
    local, here = local_index(rows, index)[0], is_here(rows, index)
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
    return local_index(rows, index)[1]


def class_index(rows: Rows) -> Array:
    """The global index of every class held here [..., classes]."""
    z, dtype = rows.raw, rows.labels.dtype if rows.labels_are_indices and rows.labels is not None else jnp.int32
    index = lax.broadcasted_iota(dtype, z.shape, z.ndim - 1, out_sharding=mesh.split_of(z))
    return index if rows.axis_name is None else index + (lax.axis_index(rows.axis_name) * z.shape[-1]).astype(index.dtype)


def on_label(rows: Rows) -> Array:
    """Whether a class is the label [..., classes]."""
    assert rows.labels is not None
    return class_index(rows) == rows.labels[..., None]


def local_index(rows, index):
    """The position of a global class index on this device (to be clipped), and whether the index is a class at all."""
    inside = (index >= 0) & (index < rows.classes)
    if rows.axis_name is None:
        return index, inside
    return index - (lax.axis_index(rows.axis_name) * rows.raw.shape[-1]).astype(index.dtype), inside


def is_here(rows, index):
    """Whether a class index lives on this device; None when there is but one."""
    if rows.axis_name is None:
        return None
    local, _ = local_index(rows, index)
    return (local >= 0) & (local < rows.raw.shape[-1])


def all_of(over_classes, class_mask, where):
    """The classes of all masks given; None for all classes."""
    masks = [over_classes, class_mask, None if where is None else where[..., None]]
    return functools.reduce(lambda a, b: a if b is None else b if a is None else a & b, masks)
