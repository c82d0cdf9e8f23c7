"""Connectionist temporal classification (CTC). Conventions are documented in `xentjax.sequence`.

Lattice. With U labels, there are U + 1 states "blank after label i" for i = 0, …, U, and U states "label i" for i = 1, …, U. A path starts
in blank 0. In state blank i, a path stays if the class of the next frame is the blank, and moves to label i + 1 if it is the class of that
label. In state label i, a path stays if the class of the next frame is that of label i, and moves to blank i if it is the blank. It moves
to label i + 1 if the class is that of label i + 1, and differs from that of label i. A path ends in label U or blank U.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, values
from xentjax._sequence import arguments, devices, frames, lattice, scaled
from xentjax._sequence.scaled import Scaled


def ctc_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    blank: int = 0,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Connectionist temporal classification loss per sequence, shape [...].

    loss = −log Σ_π Π_t p_t(π_t), where p_t = softmax(logits_t), and π runs over all alignments of the labels. An alignment is a sequence
    with one class per frame. It becomes the labels when repeated classes are merged and then blanks are removed.
    Gradient: ∂loss/∂z_tk = p_t(k) − γ_t(k), where γ_t(k) is the posterior probability of class k at frame t, given the labels.

    If the alignments of the labels hold more than half of the probability, the loss is computed from the probability of all other sequences
    of classes. So even a loss of 1e-15 has a small relative error in float32. The loss is never negative.

    Args:
        logits: [..., time, classes], unnormalized log-probabilities.
        labels: [..., max_labels] class indices without blanks. A label outside the range of classes, or equal to the blank, gives NaN.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        blank: class index of the blank.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., time, classes], True for classes that exist.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if `logits` are float64. +∞ with gradient 0 if no alignment exists, for example if there are
        more labels than frames. NaN if a label or a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `blank` is outside the range of classes.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.zeros((3, 4))  # 3 frames, 4 classes with probability 1/4 each
        >>> float(xentjax.ctc_loss(logits, jnp.array([1, 2])))  # log(4³/5): 112, 122, 12_, 1_2 and _12
        2.54944...
        >>> float(xentjax.ctc_loss(logits, jnp.array([1, 1])))  # log(4³): 1_1, since repeats need a blank between them
        4.15888...

    Reference:
        Graves et al., Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural Networks, 2006.
    """
    return _ctc(*check(ctc_loss.__name__, logits, labels, logit_lengths, label_lengths, blank, axis_name, class_mask, where))


@functools.partial(jax.jit, static_argnames="blank")
def _ctc(batch: rows.Examples, sequences: arguments.Sequences, blank: int) -> Array:
    def of_batch(batch: rows.Examples, sequences: arguments.Sequences) -> Array:
        return loss(SURE, *from_logits(batch, sequences, blank), sequences.where)

    return devices.on_each(of_batch, batch.logits.ndim - 2, (batch, sequences))


def ctc_loss_from_log_probs(
    blank_log_probs: ArrayLike,
    label_log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Connectionist temporal classification loss from log-probabilities of the blank and the labels, shape [...].

    loss = −log Σ_π Π_t p_t(π_t) as in `ctc_loss`. Only the log-probabilities of the blank and of the labels of the sequence are needed. So
    they can be computed without storing the logits of all classes, for example by `fuse_linear`.
    Gradient: −γ. For an entry of `blank_log_probs`, γ is the posterior probability that the frame is a blank. For an entry of
    `label_log_probs`, γ is the posterior probability that the frame belongs to this label.

    This function does not get the probabilities of the other classes. So a small loss has the absolute rounding error of a sum of
    log-probabilities, about eps·time, and may be slightly negative. Only `ctc_loss` computes a small loss with a small relative error.
    Log-probabilities need not be normalized.

    Args:
        blank_log_probs: [..., time], log-probability of the blank.
        label_log_probs: [..., time, max_labels], log-probability of each label of the sequence. Equal labels have equal entries.
        labels: [..., max_labels], any integers. Only their equality matters: equal neighbors need a blank between them.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if the log-probabilities are float64. +∞ with gradient 0 if no alignment exists, NaN if a length
        is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> log_p, labels = jax.nn.log_softmax(jnp.arange(12.0).reshape(3, 4)), jnp.array([1, 2])
        >>> from_log_p = xentjax.ctc_loss_from_log_probs(log_p[:, 0], log_p[:, labels], labels)
        >>> bool(jnp.allclose(from_log_p, xentjax.ctc_loss(log_p, labels)))
        True

    Reference:
        Graves et al., Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural Networks, 2006.
    """
    name = "ctc_loss_from_log_probs"
    blanks = arguments.logits(name, "blank_log_probs", blank_log_probs, 1, "[..., time]")
    of_labels = checks.floating(name, "label_log_probs", label_log_probs)
    y = checks.identifiers(name, "labels", labels)
    sequences = arguments.sequences(name, y, blanks.shape[:-1], blanks.shape[-1], logit_lengths, label_lengths, where, "blank_log_probs")
    expected = (*blanks.shape, y.shape[-1])
    checks.shape(name, "label_log_probs", of_labels, expected, "the shape of blank_log_probs and one entry per label")
    live, kept = alive(sequences, blanks.shape[-1])[0], arguments.inside(sequences.counts, y)[..., None, :]
    values.logits(name, "blank_log_probs", blanks, live)
    values.logits(name, "label_log_probs", of_labels, live[..., None] & kept)
    return _ctc_from_log_probs(blanks, of_labels, sequences)


@jax.jit
def _ctc_from_log_probs(blanks: Array, of_labels: Array, sequences: arguments.Sequences) -> Array:
    return devices.on_each(_of_log_probs, blanks.ndim - 1, (blanks, of_labels, sequences))


def _of_log_probs(blanks: Array, of_labels: Array, sequences: arguments.Sequences) -> Array:
    live, valid = alive(sequences, blanks.shape[-1])
    dtype = numerics.accumulation_dtype(blanks.dtype, of_labels.dtype)
    log_p = jnp.concatenate([blanks.astype(dtype)[..., None], of_labels.astype(dtype)], axis=-1)
    log_p = jnp.where(live[..., None] & exists(sequences)[..., None, :], log_p, 0)
    return loss(OPEN, weights(log_p, None, sequences, live), valid, sequences.where)


# Shared with the decoders ------------------------------------------------------------------------------------------------


def check(
    function: str,
    logits: ArrayLike,
    labels: ArrayLike,
    logit_lengths: ArrayLike | None,
    label_lengths: ArrayLike | None,
    blank: int,
    axis_name: Any = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> tuple[rows.Examples, arguments.Sequences, int]:
    """The checked arguments of a function of logits and labels."""
    z = arguments.logits(function, "logits", logits, 2, "[..., time, classes]")
    sequences = arguments.sequences(function, labels, z.shape[:-2], z.shape[-2], logit_lengths, label_lengths, where, "logits")
    batch = arguments.frames(function, z, class_mask, axis_name, sequences, alive(sequences, z.shape[-2])[0])
    blank = arguments.blank(function, blank, batch.classes)
    arguments.check_labels(function, sequences, batch.classes, blank)
    return batch, sequences, blank


def alive(sequences: arguments.Sequences, time: int) -> tuple[Array, Array]:
    """Which frames [..., time] are before the end of a sequence that counts, and which sequences [...] have valid lengths."""
    leading = sequences.labels.shape[:-1]
    live = jnp.ones((*leading, time), bool)
    if sequences.steps is not None:
        live = arguments.inside(sequences.steps, live)
    if sequences.where is not None:
        live &= sequences.where[..., None]
    return live, arguments.valid_lengths(sequences, time)


def exists(sequences: arguments.Sequences) -> Array:
    """Whether a label is before the end of its sequence, shape [..., 1 + labels]. Entry 0 stands for the blank, and is True."""
    kept = arguments.inside(sequences.counts, sequences.labels)
    return jnp.concatenate([jnp.ones_like(kept, shape=(*kept.shape[:-1], 1)), kept], axis=-1)


def from_logits(batch: rows.Examples, sequences: arguments.Sequences, blank: int) -> tuple[lattice.Weights, Array]:
    """The lattice of a batch, and which sequences [...] are valid."""
    live, valid = alive(sequences, batch.logits.shape[-2])
    r = rows.of(batch)._replace(where=live)
    kept, y = exists(sequences), sequences.labels
    valid &= jnp.all(~kept[..., 1:] | (rows.is_class(r, y) & (y != blank)), axis=-1)
    index = jnp.where(kept[..., 1:], y, blank)
    index = jnp.concatenate([jnp.full_like(index, blank, shape=(*y.shape[:-1], 1)), index], axis=-1)
    log_p, rest = frames.probabilities(r, index[..., None, :])
    return weights(log_p, (rest, index), sequences, live), valid


def interleaved(label: Array, blank: Array) -> Array:
    """The states label 0, blank 0, label 1, blank 1, … from arrays [..., 1 + labels] of the labels and the blanks."""
    both = jnp.stack([label, jnp.broadcast_to(blank, label.shape)], axis=-1)
    return both.reshape(*label.shape[:-1], 2 * label.shape[-1])


class States(NamedTuple):
    """What belongs to the states label 0, label 1, … and blank 0, blank 1, … There is no label 0: its weight is 0.

    The two kinds are separate arrays, because XLA on CPUs then computes a step in long vectors.
    """

    label: Any  # [..., 1 + labels]
    blank: Any  # [..., 1 + labels], or [..., 1] if all blanks have the same


class _Fixed(NamedTuple):
    skips: Array  # [..., 1 + labels], whether a path may go on to a label from the label before it
    kept: Array  # [..., 1 + labels], as in `exists`
    index: Array | None  # [..., 1 + labels], the classes of the blank and the labels


def weights(log_p: Array, others: tuple[Array, Array] | None, sequences: arguments.Sequences, live: Array) -> lattice.Weights:
    """The lattice from the log-probabilities [..., time, 1 + labels] of the blank and the labels.

    `others` are the probability of all other classes, and the classes [..., 1 + labels] of the blank and the labels.
    """
    y, kept, time = sequences.labels, exists(sequences), live.ndim - 1
    skips = jnp.concatenate([jnp.zeros_like(kept, shape=(*y.shape[:-1], min(2, kept.shape[-1]))), y[..., 1:] != y[..., :-1]], axis=-1)
    positions = lax.broadcasted_iota(jnp.int32, kept.shape, kept.ndim - 1)
    last, labelled = positions == jnp.sum(kept, axis=-1, dtype=jnp.int32, keepdims=True) - 1, positions > 0
    log_p = jnp.moveaxis(log_p, time, 0)
    return lattice.Weights(
        start=States(jnp.zeros_like(kept), positions == 0),
        xs=States(jnp.where(kept & labelled, log_p, -jnp.inf), log_p[..., :1]),
        shared=(),
        end=States(lattice.present(last & labelled, log_p.dtype), lattice.present(last, log_p.dtype)),
        lost=None if others is None else jnp.moveaxis(others[0], time, 0),
        fixed_xs=(),
        fixed=_Fixed(skips, kept, None if others is None else others[1]),
        live=jnp.moveaxis(live, time, 0),
    )


def _advance(alpha: States, x: States, shared: Any, fixed_x: Any, fixed: _Fixed) -> States:
    (from_label,), (from_blank,) = (scaled.shifted(states, 1) for states in alpha)
    label = scaled.add(alpha.label, from_blank, scaled.selected(fixed.skips, from_label))
    return scaled.tree_map(scaled.normalized, States(scaled.times(label, x.label), scaled.times(scaled.add(*alpha), x.blank)))


def _retreat(
    bar: States, before: States, after: States, x: States, shared: Any, fixed_x: Any, fixed: _Fixed
) -> tuple[States, States, tuple[()]]:
    # of all edges that lead to a state, up to the exponent of α before the step
    to_label, to_blank = (Scaled(b * w.mantissa, w.exponent - a.exponent) for b, w, a in zip(bar, x, after, strict=True))
    (onward,) = scaled.shifted(to_label, -1)
    skipping = scaled.selected(scaled.moved(fixed.skips, -1, fill=False), onward)

    def along(alpha: Scaled, *edges: Scaled) -> Array:
        return functools.reduce(jnp.add, [edge.mantissa * scaled.power(alpha.exponent + edge.exponent) for edge in edges])

    of_label, of_blank = (b * a.mantissa for b, a in zip(bar, after, strict=True))
    slopes = States(of_label, jnp.sum(of_blank, axis=-1, keepdims=True))
    return States(along(before.label, to_label, skipping, to_blank), along(before.blank, to_blank, onward)), slopes, ()


def _lost(xs: States, rest: Array, fixed: _Fixed) -> States:
    """The probability of all classes that lead out of all paths, from every state [time, ..., 1 + labels].

    It is the sum over the classes outside `index`, plus a product with a matrix of 0 and 1 that selects the others of the sequence. Each
    class counts at its first position in `index`. A label loses less than the blank after it, since a path can stay in the label.
    """
    kept, index = fixed.kept, fixed.index
    assert index is not None
    same = index[..., :, None] == index[..., None, :]
    earlier = numerics.expand_leading(jnp.tri(index.shape[-1], k=-1, dtype=bool), same.ndim)
    first = ~jnp.any(same & earlier, axis=-1, keepdims=True)  # no earlier position has the same class
    own = same & kept[..., None, :]  # whether the class of a row is that of a column
    onward = scaled.moved(own, -1, fill=False)  # the label after that of a column
    p = jnp.exp(jnp.concatenate([xs.blank, xs.label[..., 1:]], axis=-1))
    out = (first & ~(own[..., :1] | onward | own)).astype(p.dtype)
    of_label = jnp.matmul(jnp.moveaxis(p, 0, -2), out, precision=lax.Precision.HIGHEST)
    of_label = jnp.moveaxis(of_label, -2, 0) + rest[..., None]
    following = scaled.moved(kept, -1, fill=False) & (scaled.moved(index, -1, fill=0) == index)  # the next label is the same
    staying = kept & ~following & (index != index[..., :1])
    return States(of_label, of_label + jnp.where(staying, p, jnp.zeros_like(p)))


SURE = lattice.Lattice(_advance, _retreat, _lost)
OPEN = lattice.Lattice(_advance, _retreat, None)


def loss(edges: lattice.Lattice, weights: lattice.Weights, valid: Array, where: Array | None) -> Array:
    """The loss [...] of a lattice."""
    total, none = lattice.checked_total(lattice.log_total(edges, weights))
    return arguments.finish(-total, valid, none, where)
