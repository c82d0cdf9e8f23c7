"""Checks of the arguments of a linear layer, and of the result of a loss function for one chunk of logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, values
from xentjax._linear.inputs import PyTree


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


def loss_per_example(result: Any, logits: Array, has_aux: bool) -> tuple[Array, PyTree]:
    """Check the result of a user's loss function for logits [examples, classes].

    Returns the losses in the dtype of the logits, and aux.
    """
    function, examples = "fuse_linear", logits.shape[:1]
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"{function}: with has_aux=True loss_fn must return a pair (loss, aux); got {type(result).__name__}.")
    loss, aux = result if has_aux else (result, ())
    loss = checks.floating(function, "the result of loss_fn", loss)  # type: ignore[arg-type]  # a user's function may return anything
    remedy = "Do not reduce inside loss_fn: reduction='mean' does it." if loss.ndim == 0 else ""
    checks.shape(function, "the result of loss_fn", loss, examples, f"one value per example for logits of shape {logits.shape}", remedy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if jnp.shape(leaf)[:1] != examples:
            name = f"aux{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"{function}: {name} must have shape ({examples[0]}, ...), one entry per example for logits of shape {logits.shape}; "
                f"got {jnp.shape(leaf)}."
            )
    return loss.astype(logits.dtype), jax.tree.map(jnp.asarray, aux)
