"""Checks of arguments that several public functions share. They check dtypes, shapes, axes, and the ranges of Python numbers.

All these properties can be checked while tracing. A check converts its argument to an array and returns the array, or it raises TypeError
or ValueError. The error message names the function and the argument. It says what is expected and what the caller passed, and it suggests a
remedy.

Other checks are in other modules. `mesh` checks mesh axes. `values` checks the values of arrays, but only inside `xentjax.checked`. A check
that only one function or one family of functions needs is in the file of that function or family.
"""

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import mesh, numerics, remedies, rows, values

_LABELS = "Rules for labels: https://github.com/xentjax/xentjax/blob/main/docs/conventions.md#labels"


def asarray(function: str, name: str, x: Any) -> Array:
    """`x` as an array of any dtype. Integers that are too large for JAX are replaced.

    A large positive integer becomes the largest integer of JAX, and a large negative integer becomes the smallest. Neither of the two is
    ever a valid class. `jnp.asarray` would truncate such integers: 2³² + 1 would become class 1.
    """
    return _converted(function, name, _saturated(x))


def integers(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array of class indices, int32 or int64. Raises TypeError unless `x` has an integer dtype."""
    return _integers(function, name, asarray(function, name, x))


def identifiers(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array of integers. Two of its entries are equal exactly if they are equal in `x`.

    If `x` has integers that are too large for JAX, all entries are replaced by small integers.
    """
    whole = oversized_integers(x)
    if whole is not None:
        x = np.unique(whole, return_inverse=True)[1].reshape(whole.shape).astype(np.int32)
    return _integers(function, name, _converted(function, name, x))


def floating(function: str, name: str, x: ArrayLike, labels: ArrayLike | None = None) -> Array:
    """`x` as an array. Raises TypeError unless it has a floating dtype that can represent infinity.

    `labels` are the labels that belong to `x`, if any. They are not checked. The error message asks whether the caller swapped both.
    """
    array = asarray(function, name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{function}: {name} must have a floating dtype; got {array.dtype}.{remedies.floating(name, array, labels)}")
    return _with_infinities(function, name, array)


def real(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array of a floating dtype. Integers are converted, because counts and weights may be integers."""
    array = quantities(function, name, x)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.integer) else floating(function, name, array)


def quantities(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array of any dtype. Integers that are too large for JAX are converted to floating-point numbers."""
    whole = oversized_integers(x)
    return _converted(function, name, x if whole is None else whole.astype(np.float64))


def _integers(function: str, name: str, array: Array) -> Array:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have an integer dtype; got {array.dtype}. Use {name}.astype(jnp.int32).")
    return array.astype(numerics.index_dtype(array))


def _converted(function: str, name: str, x: Any) -> Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        remedy = remedies.lists(x)
        raise TypeError(f"{function}: {name} must be an array or convertible to one; got {type(x).__name__}.{remedy}") from error


def _saturated(x: Any) -> Any:
    """`x`, or, if it has integers too large for JAX, a NumPy array with these clipped to the integers that JAX can represent."""
    whole = oversized_integers(x)
    if whole is None:
        return x
    low, high = integer_limits()
    above, below = whole > high, whole < low
    return np.where(above, high, np.where(below, low, np.where(above | below, 0, whole).astype(np.int64))).astype(_widest())


def oversized_integers(x: Any) -> np.ndarray | None:
    """`x` as a NumPy array of integers if any of them is too large for JAX, else None.

    The widest integer dtype of JAX is int32, or int64 with `jax_enable_x64`.
    """
    if isinstance(x, Array) or hasattr(x, "__jax_array__"):
        return None
    try:
        whole = np.asarray(x)
    except Exception:  # not an array, or it contains traced arrays; then `jnp.asarray` decides
        return None
    wide = whole.dtype in (np.int64, np.uint64) or (whole.dtype == object and all(isinstance(i, int | np.integer) for i in whole.flat))
    low, high = integer_limits()
    return whole if wide and whole.size and not (low <= whole.min() and whole.max() <= high) else None


def _widest() -> np.dtype:
    """JAX's widest integer dtype."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64))


def integer_limits() -> tuple[int, int]:
    """The smallest and the largest integer of JAX's widest integer dtype. No number of classes reaches them."""
    info = np.iinfo(_widest())
    return int(info.min), int(info.max)


def _with_infinities(function: str, name: str, array: Array) -> Array:
    if not _has_infinities(array.dtype):
        raise TypeError(f"{function}: {name} must have a dtype with infinities; got {array.dtype}. Use {name}.astype(jnp.bfloat16).")
    return array


@functools.cache
def _has_infinities(dtype: np.dtype) -> bool:
    """Whether a floating dtype can represent infinity."""
    return bool(np.isinf(np.asarray(np.inf, dtype)))


def boolean(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array. Raises TypeError unless its dtype is bool."""
    array = asarray(function, name, x)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must have dtype bool; got {array.dtype}. Use {name} != 0.")
    return array


def shape(function: str, name: str, x: Array, expected: tuple[int, ...], meaning: str, remedy: str = "") -> Array:
    """`x`, unchanged. Raises ValueError unless it has the expected shape."""
    if x.shape != expected:
        raise ValueError(f"{function}: {name} must have shape {expected}, {meaning}; got {x.shape}.{' ' + remedy if remedy else ''}")
    return x


def same_shape(function: str, name: str, x: Array, expected: tuple[int, ...], meaning: str) -> Array:
    """`x`, unchanged. Raises ValueError unless it has the shape of another argument.

    `x` is never broadcast here. The error message may suggest that the caller broadcasts it.
    """
    remedy = "" if x.shape == expected else remedies.one_axis(name, x.shape, expected)
    if not remedy and x.ndim <= len(expected) and all(n in (1, m) for n, m in zip(x.shape[::-1], expected[::-1], strict=False)):
        remedy = f"Use jnp.broadcast_to({name}, {expected}) to broadcast it explicitly."
    return shape(function, name, x, expected, meaning, remedy)


def where_mask(function: str, where: ArrayLike | None, expected: tuple[int, ...], meaning: str) -> Array | None:
    """The mask `where` of examples or elements that count, as a Boolean array of the expected shape; None if all count."""
    return None if where is None else same_shape(function, "where", boolean(function, "where", where), expected, meaning)


def weights(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array of floating dtype. Inside `xentjax.checked`, weights that are negative or NaN are reported."""
    w = real(function, name, x)
    values.weights(function, name, w)
    return w


def example_weights(
    function: str, weights: ArrayLike | None, where: ArrayLike | None, expected: tuple[int, ...], meaning: str, *, signed: bool = False
) -> tuple[Array | None, Array | None]:
    """`weights` in a floating dtype and `where` in dtype bool, each of the expected shape or None.

    Inside `xentjax.checked`, weights of examples that count are reported if they are negative or NaN, unless `signed` is True.
    """
    w = None if weights is None else same_shape(function, "weights", floating(function, "weights", weights), expected, meaning)
    counts = where_mask(function, where, expected, meaning)
    if w is not None and not signed:
        values.weights(function, "weights", w, counts)
    return w, counts


def number(
    function: str, name: str, x: ArrayLike, low: float = 0.0, high: float = math.inf, interval: str | None = None
) -> ArrayLike | None:
    """A scalar hyper-parameter in [low, high]. The Python number 0 becomes None.

    The caller then leaves the term of this hyper-parameter out of the program. A Python number that is infinite or outside [low, high]
    raises ValueError. An array may be traced, so only its shape and dtype are checked. Its dtype may be an integer dtype. Inside
    `xentjax.checked`, its value is checked too. `interval` describes the range in error messages. If an end of the interval is open,
    the caller must reject that end.
    """
    if interval is None:
        interval = f"at least {low:g}" if math.isinf(high) else f"at most {high:g}" if math.isinf(low) else f"in [{low:g}, {high:g}]"
    if isinstance(x, numbers.Real) or (isinstance(x, np.ndarray | np.generic) and x.ndim == 0):
        value = float(x)
        if not low <= value <= high or math.isinf(value):
            raise ValueError(f"{function}: {name} must be a finite number {interval}; got {value:g}.")
        return None if value == 0 else value
    scalar = shape(function, name, real(function, name, x), (), "a scalar", "Use jax.vmap to try several values.")
    values.number(function, name, scalar, low, high, interval)
    return scalar


def fraction(function: str, name: str, x: ArrayLike) -> ArrayLike:
    """A scalar hyper-parameter in [0, 1]. Unlike in `number`, the Python number 0 stays 0."""
    checked = number(function, name, x, high=1.0)
    return 0.0 if checked is None else checked


def positive(function: str, name: str, x: ArrayLike) -> ArrayLike:
    """A scalar hyper-parameter above 0. Any other Python number raises ValueError. An array is checked as in `number`."""
    checked = number(function, name, x)
    if checked is None:
        raise ValueError(f"{function}: {name} must be above 0; got 0.")
    if isinstance(checked, Array):
        values.check(function, name, checked, lambda v: v == 0, "is not above 0")
    return checked


def count(function: str, name: str, x: int) -> int:
    """`x` as a Python integer. Raises TypeError unless it is an integer, and ValueError if it is below 1."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(f"{function}: {name} must be an integer, known before tracing; got {type(x).__name__}.")
    if x < 1:
        raise ValueError(f"{function}: {name} must be at least 1; got {x}.")
    return int(x)


def pos_weight(function: str, weight: ArrayLike | None, logits: Array) -> ArrayLike | None:
    """The checked weight of the positive terms of a sigmoid loss.

    It is a scalar, an array [classes] for the last axis, or an array with as many axes as the logits. In the third case, each axis has its
    full length or length 1.
    """
    if weight is None or np.ndim(weight) == 0:
        checked = None if weight is None else number(function, "pos_weight", weight)
        return 0.0 if weight is not None and checked is None else checked
    w = weights(function, "pos_weight", weight)
    if w.ndim == logits.ndim and all(n in (1, m) for n, m in zip(w.shape, logits.shape, strict=True)):
        return w
    along = [i for i, n in enumerate(logits.shape) if (n,) == w.shape]
    target = tuple(n if i == along[0] else 1 for i, n in enumerate(logits.shape)) if along else ()
    remedy = f"Use pos_weight.reshape{target} for axis {along[0]}." if along else remedies.leading_axes("pos_weight", w.shape, logits.shape)
    return shape(function, "pos_weight", w, logits.shape[-1:], "one weight per class along the last axis of logits", remedy)


def class_axis(function: str, name: str, shape: tuple[int, ...], axis: int, remedy: str = "") -> int:
    """The class axis as a non-negative integer. A scalar has no class axis: it raises an error whose message ends with `remedy`."""
    if not shape:
        raise ValueError(f"{function}: {name} must have a class axis; got a scalar.{remedy}")
    try:
        position = operator.index(axis)
    except TypeError as error:
        several = f" Use jnp.moveaxis and reshape to put all classes of {name} on one axis." if isinstance(axis, tuple | list) else ""
        raise TypeError(f"{function}: axis must be an integer; got {axis!r}.{several}") from error
    if not -len(shape) <= position < len(shape):
        raise ValueError(f"{function}: axis must be in [{-len(shape)}, {len(shape)}) for {name} of shape {shape}; got {axis}.")
    position %= len(shape)
    if shape[position] == 0:
        raise ValueError(f"{function}: {name} must have at least one class on axis {position}; got shape {shape}.")
    return position


def examples(
    function: str,
    logits: ArrayLike,
    labels: ArrayLike | None,
    axis: int,
    axis_name: mesh.AxisName,
    class_mask: ArrayLike | None,
    where: ArrayLike | None,
    *,
    labelled: bool = True,
    inputs: str = "logits",
) -> rows.Examples:
    """The arguments that all categorical losses share, with checked dtypes, shapes and axes.

    `inputs` is the name of the argument `logits` in error messages. With `labelled=False`, `labels` is ignored and the result has no
    labels.
    """
    z = floating(function, inputs, logits, labels)
    axis = class_axis(function, inputs, z.shape, axis, " For one logit per decision use the sigmoid losses.")
    leading = _without(z.shape, axis)
    y = labels_like(function, labels, z.shape, axis, inputs, mesh.names(axis_name)) if labelled else None
    mask = None if class_mask is None else boolean(function, "class_mask", class_mask)
    if mask is not None and mask.shape not in ((z.shape[axis],), z.shape):
        raise ValueError(
            f"{function}: class_mask must have shape {(z.shape[axis],)}, one per class, or {z.shape}, the shape of {inputs}; "
            f"got {mask.shape}. {remedies.split_classes('class_mask', mesh.names(axis_name), inputs)}".rstrip()
        )
    counts = where_mask(function, where, leading, f"the shape of {inputs} without its class axis")
    indices = None if y is None or y.ndim == z.ndim else y
    mesh.check_class_split(function, axis_name, {inputs: z}, {"labels": indices, "where": counts})
    mesh.check_class_axis(function, inputs, z, axis, indices)
    checked = rows.Examples(z, y, mask, counts, axis, axis_name)
    values.examples(function, checked, inputs)
    return checked


def class_weights(function: str, class_weights: ArrayLike | None, batch: rows.Examples) -> Array | None:
    """The checked weights per class [classes], or None."""
    if class_weights is None:
        return None
    w = weights(function, "class_weights", class_weights)
    remedy = remedies.split_classes("class_weights", mesh.names(batch.axis_name), "logits")
    return shape(function, "class_weights", w, (batch.logits.shape[batch.axis],), "one weight per class", remedy)


def top_k(function: str, ids: ArrayLike, probs: ArrayLike, batch: rows.Examples) -> tuple[Array, Array]:
    """Checked sparse soft labels: k class indices per example and their probabilities, both of shape [..., k]."""
    i, p = integers(function, "label_ids", ids), floating(function, "label_probs", probs)
    sparse(function, {"label_ids": i, "label_probs": p}, batch)
    values.indices(function, "label_ids", i, batch.classes, batch.where)
    values.probabilities(function, "label_probs", p, batch.where)
    return i, p


def option(function: str, name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    """Raise ValueError unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{function}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def sparse(function: str, named: dict[str, Array], batch: rows.Examples, inputs: str = "logits") -> None:
    """Raise ValueError unless class indices and a number for each of them, the two entries of `named`, have shape [..., k]."""
    (ids, i), (numbers, x) = named.items()
    z, leading = batch.logits, _without(batch.logits.shape, batch.axis)
    if i.ndim != z.ndim or i.shape[:-1] != leading:
        expected = f"({''.join(f'{n}, ' for n in leading)}k)" if leading else "(k,)"
        raise ValueError(
            f"{function}: {ids} must have shape {expected}, the shape of {inputs} without its class axis, followed by k classes per "
            f"example; got {i.shape}."
        )
    shape(function, numbers, x, i.shape, f"the shape of {ids}")


def elements(function: str, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array, Array | None]:
    """The arguments (logits, labels, where) that all element-wise losses share, with checked dtypes and shapes."""
    z = floating(function, "logits", logits, labels)
    t = quantities(function, "labels", labels)
    if jnp.issubdtype(t.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: labels must have a boolean, integer or floating dtype; got {t.dtype}.")
    t = _with_infinities(function, "labels", t) if jnp.issubdtype(t.dtype, jnp.floating) else t
    shape(function, "labels", t, z.shape, "the shape of logits, one label per logit", remedies.elements(t.shape, z.shape))
    counts = where_mask(function, where, z.shape, "the shape of logits")
    values.logits(function, "logits", z, counts)
    values.bits(function, "labels", t, counts)
    return z, t, counts


def labels_like(function: str, labels: ArrayLike | None, full: tuple[int, ...], axis: int, like: str, split: tuple[str, ...] = ()) -> Array:
    """The checked labels for logits of shape `full`. They are class indices or soft labels.

    `like` names the argument that has the leading axes of the logits. `split` holds the mesh axes that split the classes.
    """
    y = asarray(function, "labels", labels)
    leading = _without(full, axis)
    if jnp.issubdtype(y.dtype, jnp.integer):
        remedy = "" if y.shape == leading else _remedy_of_indices(y.shape, full, axis, like)
        without = "feature axis" if like == "hidden" else "class axis"
        return shape(function, "labels", y, leading, f"the shape of {like} without its {without}", remedy)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        one_hot = y.dtype == jnp.bool_ and y.shape == full
        remedy = f"one-hot labels, use labels.argmax({axis})" if one_hot else "class indices, use labels.astype(jnp.int32)"
        raise TypeError(
            f"{function}: labels must have an integer dtype (class indices) or a floating dtype (soft labels); "
            f"got {y.dtype}. For {remedy}. {_LABELS}"
        )
    y = _with_infinities(function, "labels", y)
    of = "logits" if like == "hidden" else like
    remedy = "For class indices, use labels.astype(jnp.int32)." if y.shape == leading else remedies.split_classes("labels", split, of)
    remedy = f"{remedy} {_LABELS}".lstrip()
    return shape(function, "labels", y, full, f"the shape of {of}, because floating labels are soft labels", remedy)


def _remedy_of_indices(got: tuple[int, ...], full: tuple[int, ...], axis: int, like: str) -> str:
    """The remedy for class indices that do not have the shape of the logits without their class axis; otherwise empty."""
    if got == full:
        one_hot = f"For one-hot integers, use labels.argmax({axis}), or labels.astype(float) for soft labels."
        return f"{one_hot} For one binary label per logit, put zeros and the logits on a class axis, or use a sigmoid loss."
    remedy = remedies.one_axis("labels", got, _without(full, axis))
    others = [i for i in range(len(full)) if _without(full, i) == got]
    if remedy or like == "hidden" or not others:
        return remedy
    return f"If the classes are on axis {others[0]}, pass axis={others[0]}."


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape without one axis."""
    return shape[:axis] + shape[axis + 1 :]
