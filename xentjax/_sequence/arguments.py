"""Checks of the arguments that losses of sequences share: lengths, labels, the blank, masks."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, rows, values


class Sequences(NamedTuple):
    """The checked labels and lengths of a batch of sequences; `...` are the axes of the batch."""

    labels: Array  # [..., max_labels], int
    steps: Array | None  # [...], lengths in frames; None: all frames
    counts: Array | None  # [...], lengths in labels; None: all labels
    where: Array | None  # [...]


def sequences(
    function: str,
    labels: ArrayLike,
    shape: tuple[int, ...],
    time: int,
    logit_lengths: ArrayLike | None,
    label_lengths: ArrayLike | None,
    where: ArrayLike | None,
    inputs: str,
    most: int | None = None,
) -> Sequences:
    """The checked labels, lengths and mask of sequences with axes `shape`.

    `inputs` is the name of the argument that has the frames, and `time` is the number of frames. `most` is the number of labels per
    sequence, or None if the shape of `inputs` does not determine it.
    """
    y = checks.integers(function, "labels", labels)
    if y.ndim != len(shape) + 1 or y.shape[:-1] != shape or most not in (None, y.shape[-1]):
        last = "max_labels" if most is None else str(most)
        expected = f"({''.join(f'{n}, ' for n in shape)}{last}{'' if shape else ','})"
        reason = "" if most is None else f", because {inputs} have max_labels + 1 = {most + 1} rows per frame"
        raise ValueError(
            f"{function}: labels must have shape {expected}, one row of labels per sequence of {inputs}{reason}; "
            f"got {y.shape}.{_remedy(y.shape, shape, time, inputs)}"
        )
    steps = _lengths(function, "logit_lengths", logit_lengths, shape, inputs)
    counts = _lengths(function, "label_lengths", label_lengths, shape, inputs)
    mask = checks.where_mask(function, where, shape, f"one per sequence of {inputs}")
    for name, lengths, high in (("logit_lengths", steps, time), ("label_lengths", counts, y.shape[-1])):
        if lengths is not None:
            values.check(function, name, lengths, functools.partial(_outside, high=high), f"is outside [0, {high}]", mask)
    return Sequences(y, steps, counts, mask)


def _remedy(got: tuple[int, ...], shape: tuple[int, ...], time: int, inputs: str) -> str:
    """The remedy for labels of the wrong shape, or an empty text. Sequences have axes `shape` and `time` frames."""
    if len(got) <= len(shape):
        return " Pad all label sequences to one length, and pass label_lengths."
    return f" If the time is on axis 0 of {inputs}, use jnp.swapaxes({inputs}, 0, 1)." if len(shape) == 1 and got[:1] == (time,) else ""


def _lengths(function: str, name: str, lengths: ArrayLike | None, shape: tuple[int, ...], inputs: str) -> Array | None:
    if lengths is None:
        return None
    x, meaning = checks.asarray(function, name, lengths), f"one per sequence of {inputs}"
    if x.ndim == len(shape) + 1 and x.shape[-1] != 1:
        checks.shape(function, name, x, shape, meaning, "If it is a mask that is True before the end, use its sum(-1).")
    return checks.same_shape(function, name, checks.integers(function, name, x), shape, meaning)


def _outside(x: Array, high: int) -> Array:
    return (x < 0) | (x > high)


def blank(function: str, index: int, classes: int | None) -> int:
    """The checked class index of the blank. `classes` is None while the number of classes is not known."""
    try:
        found = operator.index(index)
    except TypeError as error:
        raise TypeError(f"{function}: blank must be a Python integer, known before tracing; got {type(index).__name__}.") from error
    if found < 0 and classes is None:
        raise ValueError(f"{function}: blank must be a class, at least 0; got {found}.")
    if classes is not None and not 0 <= found < classes:
        remedy = f" Use blank={classes - 1} for the last class." if found == -1 else ""
        raise ValueError(f"{function}: blank must be a class in [0, {classes}); got {found}.{remedy}")
    return found


def logits(function: str, name: str, x: ArrayLike, axes: int, meaning: str) -> Array:
    """`x` in a floating dtype, with at least `axes` axes."""
    array = checks.floating(function, name, x)
    if array.ndim < axes:
        raise ValueError(f"{function}: {name} must have shape {meaning}; got {array.shape}.")
    return array


def frames(
    function: str, z: Array, class_mask: ArrayLike | None, axis_name: mesh.AxisName, sequences: Sequences, live: Array
) -> rows.Examples:
    """The frames `z` [..., classes] with their checked masks and no labels.

    All devices must have the same `sequences`. Inside `xentjax.checked`, the logits of frames where `live` is True are checked.
    """
    with values.checking(False):
        batch = checks.examples(function, z, None, -1, axis_name, class_mask, None, labelled=False)
    same = (sequences.labels, sequences.steps, sequences.counts, sequences.where)
    names = ("labels", "logit_lengths", "label_lengths", "where")
    mesh.check_class_split(function, axis_name, {}, dict(zip(names, same, strict=True)))
    values.examples(function, dataclasses.replace(batch, where=live), "logits")
    return batch


def check_labels(function: str, sequences: Sequences, classes: int, blank: int | None) -> None:
    """Inside `xentjax.checked`, report labels that are outside [0, classes) or are the blank. Labels after the end are not checked."""

    def bad(y: Array) -> Array:
        return (y < 0) | (y >= classes) | (False if blank is None else y == blank)

    complaint = f"is outside [0, {classes})" + ("" if blank is None else f" or the blank ({blank})")
    kept = inside(sequences.counts, sequences.labels)
    if sequences.where is not None:
        kept &= sequences.where[..., None]
    values.check(function, "labels", sequences.labels, bad, complaint, kept)


# In the compiled part of a loss ------------------------------------------------------------------------------------------


def inside(lengths: Array | None, like: Array) -> Array:
    """Whether a position is before the end of its sequence, in the shape of `like` [..., n]."""
    if lengths is None:
        return jnp.ones(like.shape, bool)
    position = lax.broadcasted_iota(lengths.dtype, like.shape, like.ndim - 1)
    return position < lengths[..., None]


def valid_lengths(sequences: Sequences, time: int) -> Array:
    """Whether both lengths of a sequence are possible, shape [...]."""
    valid = jnp.ones(sequences.labels.shape[:-1], bool)
    for lengths, high in ((sequences.steps, time), (sequences.counts, sequences.labels.shape[-1])):
        if lengths is not None:
            valid &= ~_outside(lengths, high)
    return valid


def finish(loss: Array, valid: Array | None, none: Array, where: Array | None) -> Array:
    """The loss [...]: +∞ for sequences without a path, NaN for sequences that are not valid, and 0 for sequences that do not count."""
    loss = numerics.where(none, jnp.full_like(loss, jnp.inf), loss)
    return numerics.nan_or_zero(loss, valid, where)
