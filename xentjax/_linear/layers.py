"""Checks of the arguments of a linear layer, and of the result of a loss function for one chunk of logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, values
from xentjax._linear.inputs import PyTree

_NAME = "fuse_linear"
_RESULT = "the result of loss_fn"


def arguments(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    classes_first: bool,
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
    """Check the arguments that all losses of a linear layer share, and convert them to arrays."""
    h, k = checks.floating(function, "hidden", hidden), checks.floating(function, "kernel", kernel)
    width = classes(function, h.shape, k.shape, classes_first)
    b = None if bias is None else checks.floating(function, "bias", bias)
    meaning = "the shape of hidden without its feature axis"
    counts = checks.where_mask(function, where, h.shape[:-1], meaning)
    w = (
        None
        if weights is None
        else checks.same_shape(function, "weights", checks.floating(function, "weights", weights), h.shape[:-1], meaning)
    )
    if b is not None:
        checks.shape(function, "bias", b, (width,), "one per class")
    values.finite(function, "hidden", h, counts)
    return h, k, b, counts, w


def check_values(function: str, kernel: Array, bias: Array | None, classes_first: bool, class_mask: Array | None = None) -> None:
    """Inside `xentjax.checked`, report kernel and bias values that are not finite.

    Only classes that exist are checked. A bias of −∞ is allowed. `fuse_linear` cannot call this function, because only its `loss_fn` knows
    which classes exist.
    """
    values.finite(function, "kernel", kernel, class_mask, 1 if classes_first else 0)
    if bias is not None:
        values.logits(function, "bias", bias, class_mask)


def classes(function: str, hidden: tuple[int, ...], kernel: tuple[int, ...], classes_first: bool) -> int:
    """The number of classes of a linear layer. Raises ValueError unless the shapes of `hidden` and `kernel` fit each other."""
    if not hidden:
        raise ValueError(f"{function}: hidden must have a feature axis; got shape ().")
    features = hidden[-1]
    expected = f"(classes, {features})" if classes_first else f"({features}, classes)"
    if len(kernel) != 2 or kernel[1 if classes_first else 0] != features:
        transposed = len(kernel) == 2 and kernel[0 if classes_first else 1] == features
        remedy = f" Use classes_first={not classes_first}." if transposed else ""
        raise ValueError(f"{function}: kernel must have shape {expected} for hidden of shape {hidden}; got {kernel}.{remedy}")
    classes = kernel[0 if classes_first else 1]
    if classes == 0:
        raise ValueError(f"{function}: kernel must have at least one class; got shape {kernel}.")
    return classes


def labels(
    function: str,
    labels: ArrayLike,
    leading: tuple[int, ...],
    classes: int,
    where: Array | None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Check labels: class indices [*leading], or soft labels [*leading, classes].

    `classes` is the number of classes on this device. Class indices are global: they number the classes of all devices along `axis_name`.
    """
    y = checks.labels_like(function, labels, (*leading, classes), len(leading), "hidden", mesh.names(axis_name))
    values.labels(function, y, classes * mesh.size(axis_name), where, len(leading))
    return y


def per_example(function: str, args: tuple, leading: tuple[int, ...]) -> tuple:
    """Check pytrees of arrays that must begin with the leading axes of `hidden`, and convert their leaves to arrays."""

    def check(path: tuple, x: ArrayLike) -> Array:
        name = f"args{jax.tree_util.keystr(path)}"
        array = checks.asarray(function, name, x)
        if array.shape[: len(leading)] != leading:
            expected = f"({''.join(f'{n}, ' for n in leading)}...)"
            raise ValueError(
                f"{function}: {name} must have shape {expected}, the leading axes of hidden first; got {array.shape}. "
                "If it does not belong to examples, let loss_fn close over it."
            )
        return array

    return jax.tree_util.tree_map_with_path(check, args)


def results_of(result: Any, logits: Array, reduction: str, has_aux: bool) -> tuple[PyTree, PyTree]:
    """Check the result of a user's loss function for logits [examples, classes].

    Returns the losses, and aux. With "none", the losses are a pytree of arrays. Otherwise they are one array. Floating losses are converted
    to the dtype of the logits.
    """
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"{_NAME}: with has_aux=True loss_fn must return a pair (loss, aux); got {type(result).__name__}.")
    loss, aux = result if has_aux else (result, ())
    loss = _values_per_example(loss, logits) if reduction == "none" else _loss_per_example(loss, logits, reduction)
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        _check_entries(f"aux{jax.tree_util.keystr(path)}", jnp.shape(leaf), logits)
    return loss, jax.tree.map(jnp.asarray, aux)


def _loss_per_example(loss: Any, logits: Array, reduction: str) -> Array:
    if not jax.tree_util.all_leaves([loss]) and loss is not None:
        raise TypeError(
            f"{_NAME}: with reduction={reduction!r} loss_fn must return one array, one loss per example; got {type(loss).__name__}. Use "
            "reduction='none' for several arrays, or has_aux=True for arrays that are not differentiated."
        )
    loss = checks.floating(_NAME, _RESULT, loss)  # type: ignore[arg-type]  # a user's function may return anything
    remedy = "Do not reduce inside loss_fn: reduction='mean' does it." if loss.ndim == 0 else ""
    checks.shape(_NAME, _RESULT, loss, logits.shape[:1], f"one value per example for logits of shape {logits.shape}", remedy)
    return loss.astype(logits.dtype)


def _values_per_example(values: PyTree, logits: Array) -> PyTree:
    if not jax.tree.leaves(values):
        raise TypeError(f"{_NAME}: loss_fn must return an array or a pytree of arrays; got {values!r}, which has none.")

    def check(path: tuple, x: Any) -> Array:
        name = f"{_RESULT}{jax.tree_util.keystr(path)}"
        array = checks.asarray(_NAME, name, x)
        remedy = "" if array.ndim else " Do not reduce inside loss_fn: reduce what the fused loss returns."
        _check_entries(name, array.shape, logits, remedy)
        if array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer):
            return array
        return checks.floating(_NAME, name, array).astype(logits.dtype)

    return jax.tree_util.tree_map_with_path(check, values)


def _check_entries(name: str, shape: tuple[int, ...], logits: Array, remedy: str = "") -> None:
    examples = logits.shape[:1]
    if shape[:1] != examples:
        raise ValueError(
            f"{_NAME}: {name} must have shape ({examples[0]}, ...), one entry per example for logits of shape {logits.shape}; "
            f"got {shape}.{remedy}"
        )
