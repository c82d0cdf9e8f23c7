"""Every error about an argument. Messages name the function, the argument, what is expected, what came, and the remedy.

What concerns mesh axes is in `mesh`. What depends on values is checked only inside `xentjax.checked`, which sets the context below
while it traces.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from xentjax._core import mesh, numerics, rows

# Part of the key of JAX's caches: a function traced with value checks is never used without, nor the other way round.
checking_values = jax.make_user_context(False)


def asarray(function: str, name: str, x: Any) -> Array:
    """`x` as an array, of whatever dtype."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {name} must be an array or convertible to one; got {type(x).__name__}.") from error


def integers(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array of indices, int32 or int64; TypeError unless its dtype is an integer one."""
    array = asarray(function, name, x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have an integer dtype; got {array.dtype}. Use {name}.astype(jnp.int32).")
    return array.astype(numerics.index_dtype(array))


def floating(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array; TypeError unless its dtype is floating."""
    array = asarray(function, name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        remedy = "" if jnp.issubdtype(array.dtype, jnp.complexfloating) else f" Use {name}.astype(jnp.float32)."
        raise TypeError(f"{function}: {name} must have a floating dtype; got {array.dtype}.{remedy}")
    return array


def boolean(function: str, name: str, x: ArrayLike) -> Array:
    """`x` as an array; TypeError unless its dtype is bool."""
    array = asarray(function, name, x)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must have dtype bool; got {array.dtype}. Use {name} != 0.")
    return array


def shape(function: str, name: str, x: Array, expected: tuple[int, ...], meaning: str, remedy: str = "") -> Array:
    """`x`; ValueError unless it has the expected shape."""
    if x.shape != expected:
        raise ValueError(f"{function}: {name} must have shape {expected}, {meaning}; got {x.shape}.{' ' + remedy if remedy else ''}")
    return x


def same_shape(function: str, name: str, x: Array, expected: tuple[int, ...], meaning: str) -> Array:
    """`x`; ValueError unless it has the shape of another argument. Nothing is broadcast, but the remedy may be to do so."""
    remedy = "" if x.shape == expected else _to_shape(name, x.shape, expected)
    if not remedy and x.ndim <= len(expected) and all(n in (1, m) for n, m in zip(x.shape[::-1], expected[::-1], strict=False)):
        remedy = f"Use jnp.broadcast_to({name}, {expected}) if that is meant."
    return shape(function, name, x, expected, meaning, remedy)


def counted(function: str, where: ArrayLike | None, expected: tuple[int, ...], meaning: str) -> Array | None:
    """`where` as an array of the expected shape, or None: which examples or elements count."""
    return None if where is None else same_shape(function, "where", boolean(function, "where", where), expected, meaning)


def number(function: str, name: str, x: ArrayLike, low: float = 0.0, high: float = math.inf) -> ArrayLike | None:
    """A scalar hyper-parameter; None if it is the Python number 0, so that its term is left out of the program.

    A Python number outside [low, high] raises ValueError; of an array only the shape can be known.
    """
    if isinstance(x, numbers.Real) or (isinstance(x, np.ndarray | np.generic) and x.ndim == 0):
        value = float(x)
        if not low <= value <= high or math.isinf(value):
            interval = f"at least {low:g}" if math.isinf(high) else f"at most {high:g}" if math.isinf(low) else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{function}: {name} must be a finite number {interval}; got {value:g}.")
        return None if value == 0 else value
    return shape(function, name, floating(function, name, x), (), "a scalar", "Use jax.vmap to try several values.")


def fraction(function: str, name: str, x: ArrayLike) -> ArrayLike:
    """A scalar in [0, 1] for which 0 is a value like any other."""
    checked = number(function, name, x, high=1.0)
    return 0.0 if checked is None else checked


def positive(function: str, name: str, x: ArrayLike) -> ArrayLike:
    """A scalar above 0: a Python number that is not raises ValueError; of an array only the shape can be known."""
    checked = number(function, name, x)
    if checked is None:
        raise ValueError(f"{function}: {name} must be above 0; got 0.")
    return checked


def count(function: str, name: str, x: int) -> int:
    """A Python integer of at least 1."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(f"{function}: {name} must be an integer, known before tracing; got {type(x).__name__}.")
    if x < 1:
        raise ValueError(f"{function}: {name} must be at least 1; got {x}.")
    return int(x)


def pos_weight(function: str, weight: ArrayLike | None, logits: Array) -> ArrayLike | None:
    """A weight of positive terms: a scalar, one per class along the last axis, or an array with the axes of the logits."""
    if weight is None or np.ndim(weight) == 0:
        checked = None if weight is None else number(function, "pos_weight", weight)
        return 0.0 if weight is not None and checked is None else checked
    w = floating(function, "pos_weight", weight)
    if w.ndim == logits.ndim and all(n in (1, m) for n, m in zip(w.shape, logits.shape, strict=True)):
        return w
    along = [i for i, n in enumerate(logits.shape) if (n,) == w.shape]
    target = tuple(n if i == along[0] else 1 for i, n in enumerate(logits.shape)) if along else ()
    remedy = f"Use pos_weight.reshape{target} for axis {along[0]}." if along else ""
    return shape(function, "pos_weight", w, logits.shape[-1:], "one weight per class along the last axis of logits", remedy)


def examples(
    function: str,
    logits: ArrayLike,
    labels: ArrayLike | None,
    axis: int,
    axis_name: str | tuple[str, ...] | None,
    class_mask: ArrayLike | None,
    where: ArrayLike | None,
    *,
    labelled: bool = True,
    inputs: str = "logits",
) -> rows.Examples:
    """The arguments that every categorical loss shares, checked as far as dtypes and shapes go; `labels` is None if not `labelled`."""
    z = floating(function, inputs, logits)
    if z.ndim == 0:
        raise ValueError(f"{function}: {inputs} must have a class axis; got a scalar. For one logit per decision use the sigmoid losses.")
    if not isinstance(axis, int | np.integer):
        raise TypeError(f"{function}: axis must be an integer; got {axis!r}.")
    if not -z.ndim <= axis < z.ndim:
        raise ValueError(f"{function}: axis must be in [{-z.ndim}, {z.ndim}) for {inputs} of shape {z.shape}; got {axis}.")
    axis = int(axis) % z.ndim
    if z.shape[axis] == 0:
        raise ValueError(f"{function}: {inputs} must have at least one class on axis {axis}; got shape {z.shape}.")
    leading = _without(z.shape, axis)
    y = _labels(function, labels, z.shape, axis, inputs, mesh.names(axis_name)) if labelled else None
    mask = None if class_mask is None else boolean(function, "class_mask", class_mask)
    if mask is not None and mask.shape not in ((z.shape[axis],), z.shape):
        raise ValueError(
            f"{function}: class_mask must have shape {(z.shape[axis],)}, one per class, or {z.shape}, the shape of {inputs}; "
            f"got {mask.shape}. {_as_the_logits('class_mask', mesh.names(axis_name))}".rstrip()
        )
    counts = counted(function, where, leading, f"the shape of {inputs} without its class axis")
    indices = None if y is None or y.ndim == z.ndim else y
    mesh.split_classes(function, axis_name, {inputs: z}, {"labels": indices, "where": counts})
    mesh.classes_alone(function, inputs, z, axis, indices)
    checked = rows.Examples(z, y, mask, counts, axis, axis_name)
    if checking_values.value:
        _check_values(function, checked, inputs)
    return checked


def class_weights(function: str, weights: ArrayLike | None, batch: rows.Examples) -> Array | None:
    """Weights per class [classes], or None."""
    if weights is None:
        return None
    w = floating(function, "class_weights", weights)
    remedy = _as_the_logits("class_weights", mesh.names(batch.axis_name))
    return shape(function, "class_weights", w, (batch.logits.shape[batch.axis],), "one weight per class", remedy)


def top_k(function: str, ids: ArrayLike, probs: ArrayLike, batch: rows.Examples) -> tuple[Array, Array]:
    """Sparse distributions, class indices and their probabilities, both [..., k]."""
    i, p = integers(function, "label_ids", ids), floating(function, "label_probs", probs)
    z, axis = batch.logits, batch.axis
    leading = _without(z.shape, axis)
    if i.ndim != z.ndim or i.shape[:-1] != leading:
        expected = f"({''.join(f'{n}, ' for n in leading)}k)" if leading else "(k,)"
        raise ValueError(
            f"{function}: label_ids must have shape {expected}, the shape of logits without its class axis and k classes per example; "
            f"got {i.shape}."
        )
    shape(function, "label_probs", p, i.shape, "the shape of label_ids")
    if checking_values.value:
        ignored = jnp.zeros((), bool) if batch.where is None else ~batch.where[..., None]
        check_indices(function, "label_ids", i, batch.classes, ignored)
        check(function, "label_probs", p, ~(p >= 0) & ~ignored, "is not a probability (it is negative or NaN)")
    return i, p


def elements(function: str, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array, Array | None]:
    """The arguments that every loss per element shares."""
    z = floating(function, "logits", logits)
    t = asarray(function, "labels", labels)
    if jnp.issubdtype(t.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: labels must have a boolean, integer or floating dtype; got {t.dtype}.")
    shape(function, "labels", t, z.shape, "the shape of logits, one label per logit", _elements_remedy(t.shape, z.shape))
    counts = counted(function, where, z.shape, "the shape of logits")
    if checking_values.value:
        ignored = jnp.zeros(z.shape, bool) if counts is None else ~counts
        check(function, "logits", z, jnp.isnan(z) & ~ignored, "is NaN")
        if t.dtype != jnp.bool_:
            check(function, "labels", t, ~((t >= 0) & (t <= 1)) & ~ignored, "is outside [0, 1]")
    return z, t, counts


def linear(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    classes_first: bool,
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
    """The arguments that every loss of a linear layer shares."""
    h, k = floating(function, "hidden", hidden), floating(function, "kernel", kernel)
    classes = linear_shapes(function, h.shape, k.shape, classes_first)
    b = None if bias is None else floating(function, "bias", bias)
    meaning = "the shape of hidden without its feature axis"
    counts = counted(function, where, h.shape[:-1], meaning)
    w = None if weights is None else same_shape(function, "weights", floating(function, "weights", weights), h.shape[:-1], meaning)
    if b is not None:
        shape(function, "bias", b, (classes,), "one per class")
    return h, k, b, counts, w


def linear_shapes(function: str, hidden: tuple[int, ...], kernel: tuple[int, ...], classes_first: bool) -> int:
    """The number of classes of a linear layer whose shapes fit each other."""
    if not hidden:
        raise ValueError(f"{function}: hidden must have a feature axis; got shape ().")
    features = hidden[-1]
    expected = f"(classes, {features})" if classes_first else f"({features}, classes)"
    if len(kernel) != 2 or kernel[1 if classes_first else 0] != features:
        turned = len(kernel) == 2 and kernel[0 if classes_first else 1] == features
        remedy = f" Use classes_first={not classes_first}." if turned else ""
        raise ValueError(f"{function}: kernel must have shape {expected} for hidden of shape {hidden}; got {kernel}.{remedy}")
    classes = kernel[0 if classes_first else 1]
    if classes == 0:
        raise ValueError(f"{function}: kernel must have at least one class; got shape {kernel}.")
    return classes


def linear_labels(
    function: str, labels: ArrayLike, leading: tuple[int, ...], classes: int, where: Array | None, axis_name: Any = None
) -> Array:
    """Labels of logits that do not exist: indices [*leading], or distributions [*leading, classes]; `classes` are those held here."""
    y = _labels(function, labels, (*leading, classes), len(leading), "hidden", mesh.names(axis_name))
    if checking_values.value:
        ignored = jnp.zeros((), bool) if where is None else ~where
        _check_label_values(function, y, classes * mesh.size(axis_name), ignored, len(leading))
    return y


def per_example(function: str, args: tuple, leading: tuple[int, ...]) -> tuple:
    """Pytrees of arrays that have an example's axes first."""

    def check(path, x):
        name = f"args{jax.tree_util.keystr(path)}"
        array = asarray(function, name, x)
        if array.shape[: len(leading)] != leading:
            expected = f"({''.join(f'{n}, ' for n in leading)}...)"
            raise ValueError(
                f"{function}: {name} must have shape {expected}, the leading axes of hidden first; got {array.shape}. "
                "What is not one per example is closed over by loss_fn."
            )
        return array

    return jax.tree_util.tree_map_with_path(check, args)


def loss_per_example(result: Any, logits: Array, has_aux: bool) -> tuple[Array, Any]:
    """What a user's loss returned for a chunk [examples, classes]: the losses in the dtype of the logits, and the rest."""
    function, examples = "fuse_linear", logits.shape[:1]
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"{function}: with has_aux=True loss_fn must return a pair (loss, aux); got {type(result).__name__}.")
    loss, aux = result if has_aux else (result, ())
    loss = floating(function, "the result of loss_fn", loss)  # type: ignore[arg-type]  # anything may come
    remedy = "Do not reduce inside: reduction='mean' does it." if loss.ndim == 0 else ""
    shape(function, "the result of loss_fn", loss, examples, f"one value per example for logits of shape {logits.shape}", remedy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if jnp.shape(leaf)[:1] != examples:
            name = f"aux{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"{function}: {name} must have shape ({examples[0]}, ...), one entry per example for logits of shape {logits.shape}; "
                f"got {jnp.shape(leaf)}."
            )
    return loss.astype(logits.dtype), jax.tree.map(jnp.asarray, aux)


def _labels(function: str, labels: ArrayLike | None, full: tuple[int, ...], axis: int, like: str, split: tuple = ()) -> Array:
    """Labels of logits of the shape `full`; `like` names the argument that has their leading axes."""
    y = asarray(function, "labels", labels)
    leading = _without(full, axis)
    if jnp.issubdtype(y.dtype, jnp.integer):
        remedy = _to_shape("labels", y.shape, leading)
        if y.shape == full:
            remedy = f"For one-hot integers use labels.argmax({axis}), or labels.astype(float) for a distribution."
        without = "feature axis" if like == "hidden" else "class axis"
        return shape(function, "labels", y, leading, f"the shape of {like} without its {without}", remedy)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(
            f"{function}: labels must have an integer dtype (class indices) or a floating one (distributions over classes); "
            f"got {y.dtype}. Use labels.astype(jnp.int32) for class indices."
        )
    remedy = "For class indices use labels.astype(jnp.int32)." if y.shape == leading else _as_the_logits("labels", split)
    of = "logits" if like == "hidden" else like
    return shape(function, "labels", y, full, f"the shape of {of}, because they are a distribution over classes", remedy)


def _as_the_logits(name: str, axes: tuple) -> str:
    return f"Its classes must be split over mesh axis {axes[0]!r} as those of logits are." if axes else ""


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _to_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """How to get from one shape to the other, if dropping or adding an axis of length 1 does it."""
    for position in reversed(range(len(got))):
        if got[position] == 1 and got[:position] + got[position + 1 :] == expected:
            return f"Use {name}.squeeze({position - len(got) if position == len(got) - 1 else position})."
    for position in reversed(range(len(expected))):
        if expected[position] == 1 and expected[:position] + expected[position + 1 :] == got:
            return f"Use jnp.expand_dims({name}, {position})."
    return ""


def _elements_remedy(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    remedy = _to_shape("labels", got, expected)
    if remedy or len(got) > len(expected):
        return remedy
    if got == expected[:-1] or got == (*expected[:-1], 1):
        return "For one class of several per example use softmax_cross_entropy, or jax.nn.one_hot for one decision per class."
    return ""


def _check_values(function: str, batch: rows.Examples, inputs: str) -> None:
    z, y = batch.logits, batch.labels
    ignored = jnp.zeros((), bool) if batch.where is None else ~batch.where
    over_classes = jnp.expand_dims(ignored, batch.axis) if ignored.ndim else ignored
    mask = rows.of(batch).class_mask
    missing = jnp.zeros((), bool) if mask is None else ~jnp.moveaxis(mask, -1, batch.axis)
    check(function, inputs, z, jnp.isnan(z) & ~over_classes & ~missing, "is NaN")
    if y is not None:
        _check_label_values(function, y, batch.classes, ignored, batch.axis)


def _check_label_values(function: str, y: Array, classes: int, ignored: Array, axis: int) -> None:
    if jnp.issubdtype(y.dtype, jnp.integer):
        check_indices(function, "labels", y, classes, ignored)
    else:
        over_classes = jnp.expand_dims(ignored, axis) if ignored.ndim else ignored
        check(function, "labels", y, ~(y >= 0) & ~over_classes, "is not a probability (it is negative or NaN)")


def check_indices(function: str, name: str, index: Array, classes: int, ignored: Array) -> None:
    wide = index.astype(numerics.index_dtype(index))
    check(function, name, index, ((wide < 0) | (wide >= classes)) & ~ignored, f"is outside [0, {classes})")


def check(function: str, name: str, x: Array, bad: Array, complaint: str) -> None:
    """Raise through checkify with the first position at which `bad` holds, and the value there."""
    flat = jnp.broadcast_to(bad, x.shape).reshape(-1)
    if flat.size == 0:
        return
    first = jnp.argmax(flat)
    position = jnp.unravel_index(first, x.shape)
    places = ", ".join(f"{{p{i}}}" for i in range(x.ndim))
    where = f"{name}[{places}]" if x.ndim else name
    payload: dict[str, Any] = {f"p{i}": p for i, p in enumerate(position)}
    checkify.check(~flat[first], f"{function}: {where} = {{value}} {complaint}.", value=x.reshape(-1)[first], **payload)
