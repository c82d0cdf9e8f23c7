"""Remedies for wrong shapes and dtypes: the last sentences of an error message, or an empty text."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def floating(name: str, x: Array, labels: Any) -> str:
    """The remedy for an array without a floating dtype. `labels` are the labels that belong to it, or None."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return ""
    swapped = jnp.issubdtype(getattr(labels, "dtype", np.bool_), jnp.floating)
    return f" Use {name}.astype(jnp.float32)." + " If these are the labels, swap the first two arguments." * swapped


def lists(x: Any) -> str:
    """The remedy for nested lists that are not an array of numbers; otherwise empty."""
    if not isinstance(x, list | tuple):
        return ""
    try:
        text = np.asarray(x).dtype.kind in "US"
    except ValueError:
        return " Pad its lists to the same length."
    except TypeError:  # it contains traced arrays
        return ""
    return " Replace each string by an integer." if text else ""


def split_classes(name: str, axes: tuple[str, ...], inputs: str) -> str:
    """The remedy for an array per class that is not split over mesh axes as the logits are; empty if these are not split."""
    return f"Split the classes of {name} over mesh axis {axes[0]!r}, as the classes of {inputs} are." if axes else ""


def one_axis(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The remedy for a shape that differs from the expected one by an axis of length 1; otherwise empty."""
    for position in reversed(range(len(got))):
        if got[position] == 1 and got[:position] + got[position + 1 :] == expected:
            return f"Use {name}.squeeze({position - len(got) if position == len(got) - 1 else position})."
    for position in reversed(range(len(expected))):
        if expected[position] == 1 and expected[:position] + expected[position + 1 :] == got:
            return f"Use jnp.expand_dims({name}, {position})."
    return ""


def elements(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The remedy for labels of an element-wise loss that do not have the shape of the logits."""
    remedy = one_axis("labels", got, expected)
    if remedy or len(got) > len(expected):
        return remedy
    if got == expected[:-1] or got == (*expected[:-1], 1):
        return "If each example has one class of several, use softmax_cross_entropy. For one decision per class, use jax.nn.one_hot."
    return ""


def leading_axes(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The remedy for a shape that broadcasts to the expected one with more leading axes; otherwise empty."""
    target = (1,) * (len(expected) - len(got)) + got
    fits = len(target) == len(expected) and all(n in (1, m) for n, m in zip(target, expected, strict=True))
    return f"Use {name}.reshape{target} to broadcast it explicitly." if fits else ""
