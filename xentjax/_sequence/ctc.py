"""Connectionist temporal classification (CTC). Conventions are documented in `xentjax.sequence`.

Lattice. With U labels, there are U + 1 states "blank before label i", and U states "label i". A path starts in the first blank state.
From blank i, a frame leads to blank i with the class blank, and to label i + 1. From label i, a frame stays with the class of the label, and
leads to blank i + 1 with the class blank, and to label i + 1 unless it is the same class. A path ends in the last label or the last blank.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, values
from xentjax._sequence import arguments, frames, lattice


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

    loss = −log Σ_π Π_t p_t(π_t), where p_t = softmax(logits_t), and π runs over all alignments of the labels: sequences with one class per
    frame that become the labels when repeated classes are merged and blanks are removed.
    Gradient: ∂loss/∂z_tk = p_t(k) − γ_t(k), where γ_t(k) is the posterior probability of class k at frame t, given the labels.

    If the alignments of the labels hold more than half of the probability, the loss is computed from the probability of all other sequences.
    So a loss of 1e-15 keeps its digits in float32, and is never negative.

    Args:
        logits: [..., time, classes], unnormalized log-probabilities.
        labels: [..., max_labels] class indices without blanks. A label that is no class, or the blank, gives NaN.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        blank: class index of the blank.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., time, classes], True for classes that exist.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if `logits` are float64. +∞ with gradient 0 if no alignment exists, for example for more labels
        than frames. NaN if a label or a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `blank` is no class.

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
    weights, valid = from_logits(batch, sequences, blank)
    return loss(SURE, weights, valid, sequences.where)


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

    loss = −log Σ_π Π_t p_t(π_t) as in `ctc_loss`. Each frame needs only the probabilities of the blank and of the labels of its sequence.
    So they can be computed without storing the logits of all classes, for example by `fuse_linear`.
    Gradient: ∂loss/∂log p_t(k) = −γ_t(k), minus the posterior probability of class k at frame t; for a label, of this position.

    The probabilities of all other classes are not known here. So a small loss has the rounding error of a sum of log-probabilities, about
    eps·time, and may be slightly negative; only `ctc_loss` has a small relative error. Log-probabilities need not be normalized.

    Args:
        blank_log_probs: [..., time], log-probability of the blank.
        label_log_probs: [..., time, max_labels], log-probability of each label of the sequence. Equal labels have equal entries.
        labels: [..., max_labels], any integers. They are only compared with each other: equal neighbors need a blank between them.
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
    sequences = arguments.sequences(
        name, y, blanks.shape[:-1], blanks.shape[-1], logit_lengths, label_lengths, where, "blank_log_probs"
    )
    expected = (*blanks.shape, y.shape[-1])
    checks.shape(name, "label_log_probs", of_labels, expected, "the shape of blank_log_probs and one entry per label")
    return _ctc_from_log_probs(blanks, of_labels, sequences)


@jax.jit
def _ctc_from_log_probs(blanks: Array, of_labels: Array, sequences: arguments.Sequences) -> Array:
    sequences = with_a_label(sequences)
    if of_labels.shape[-1] < sequences.labels.shape[-1]:
        of_labels = jnp.zeros((*blanks.shape, 1), of_labels.dtype)
    live, valid = alive(sequences, blanks.shape[-1])
    dtype = numerics.accumulation_dtype(blanks.dtype, of_labels.dtype)
    blanks, of_labels = blanks.astype(dtype), of_labels.astype(dtype)
    blanks = jnp.maximum(jnp.where(live, blanks, 0), lattice.ABSENT)
    kept = live[..., None] & arguments.inside(sequences.counts, sequences.labels)[..., None, :]
    of_labels = jnp.maximum(jnp.where(kept, of_labels, 0), lattice.ABSENT)
    return loss(OPEN, _weights(blanks, of_labels, None, sequences, live), valid, sequences.where)


# Shared with the decoders ------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """The log-weights of one frame, or of all frames with a step axis first."""

    blank: Array  # [...]
    labels: Array  # [..., labels]
    lost: tuple[Array, Array] | None  # probabilities [..., labels + 1] and [..., labels]: classes that leave all paths from each state


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
    same = dict(zip(("labels", "logit_lengths", "label_lengths", "where"), sequences, strict=True))
    batch = arguments.frames(function, z, class_mask, axis_name, same, alive(sequences, z.shape[-2])[0])
    blank = arguments.blank(function, blank, batch.classes)
    arguments.check_labels(function, sequences, batch.classes, blank)
    return batch, sequences, blank


def with_a_label(sequences: arguments.Sequences) -> arguments.Sequences:
    """The same sequences with room for at least one label, so that no array is empty."""
    if sequences.labels.shape[-1]:
        return sequences
    none = jnp.zeros((*sequences.labels.shape[:-1], 1), sequences.labels.dtype)
    return sequences._replace(labels=none, counts=jnp.zeros(none.shape[:-1], jnp.int32))


def alive(sequences: arguments.Sequences, time: int) -> tuple[Array, Array]:
    """Which frames [..., time] belong to a sequence that counts, and which sequences [...] have valid lengths."""
    leading = sequences.labels.shape[:-1]
    live = jnp.ones((*leading, time), bool)
    if sequences.steps is not None:
        live = arguments.inside(sequences.steps, live)
    if sequences.where is not None:
        live &= sequences.where[..., None]
    return live, arguments.valid_lengths(sequences, time)


def from_logits(batch: rows.Examples, sequences: arguments.Sequences, blank: int) -> tuple[lattice.Arguments, Array]:
    """The lattice of a batch, and which sequences [...] are valid."""
    sequences = with_a_label(sequences)
    live, valid = alive(sequences, batch.logits.shape[-2])
    r = rows.of(batch)._replace(where=live)
    y = sequences.labels
    kept = arguments.inside(sequences.counts, y)
    valid &= jnp.all(~kept | (rows.is_class(r, y) & (y != blank)), axis=-1)
    y = jnp.where(kept, y, blank)
    index = jnp.concatenate([jnp.full_like(y[..., :1], blank), y], axis=-1)  # [..., 1 + labels]
    log_p, rest = frames.probabilities(r, index[..., None, :])
    lost = _lost(jnp.exp(log_p), rest, index, kept)
    return _weights(log_p[..., 0], log_p[..., 1:], lost, sequences, live), valid


def _lost(p: Array, rest: Array, index: Array, kept: Array) -> tuple[Array, Array]:
    """The probability of all classes that lead out of all paths, for the blank states and the label states of every frame.

    It is the sum over the classes outside `index`, plus a product with a matrix of 0 and 1 that selects the others of the sequence. Each
    class counts at its first position in `index` [..., 1 + labels].
    """
    n = index.shape[-1]
    same = index[..., :, None] == index[..., None, :]
    earlier = numerics.expand_leading(jnp.tri(n, k=-1, dtype=bool), same.ndim)
    first = ~jnp.any(same & earlier, axis=-1)  # no earlier position has the same class
    usable = jnp.concatenate([jnp.ones_like(kept[..., :1]), kept], axis=-1)
    # Column i says whether the class of a row is that of label i, whether this label exists, and likewise for the label after it.
    own = same & usable[..., None, :]  # [..., class, 1 + labels]; column 0 is the blank
    to_label = own[..., 1:]
    onward = jnp.concatenate([to_label[..., 1:], jnp.zeros_like(to_label[..., :1])], axis=-1)
    from_blank = own[..., :1] | jnp.concatenate([to_label, jnp.zeros_like(own[..., :1])], axis=-1)
    from_label = own[..., :1] | to_label | onward  # a repeated label is its own class, so staying covers it
    out = [(first[..., None] & ~living).astype(p.dtype) for living in (from_blank, from_label)]
    product = jnp.matmul(p, jnp.concatenate(out, axis=-1), precision=lax.Precision.HIGHEST) + rest[..., None]
    return product[..., :n], product[..., n:]


def _weights(
    blanks: Array, of_labels: Array, lost: tuple[Array, Array] | None, sequences: arguments.Sequences, live: Array
) -> lattice.Arguments:
    """The lattice from the log-probabilities of the blank [..., time] and the labels [..., time, labels]."""
    y, kept = sequences.labels, arguments.inside(sequences.counts, sequences.labels)
    of_labels = jnp.where(kept[..., None, :], of_labels, lattice.ABSENT)
    skips = jnp.concatenate([jnp.zeros_like(kept[..., :1]), y[..., 1:] != y[..., :-1]], axis=-1)
    count = jnp.sum(kept.astype(jnp.int32), axis=-1, keepdims=True)
    positions = lax.broadcasted_iota(jnp.int32, (*y.shape[:-1], y.shape[-1] + 1), y.ndim - 1)
    xs = Frame(blanks, of_labels, lost)
    return lattice.Arguments(
        start=(lattice.present(positions == 0, blanks), jnp.full(y.shape, lattice.ABSENT, blanks.dtype)),
        xs=jax.tree.map(lambda x: jnp.moveaxis(x, live.ndim - 1, 0), xs),
        shared=(),
        end=(lattice.present(positions == count, blanks), lattice.present(positions[..., :-1] + 1 == count, blanks)),
        fixed_xs=(),
        fixed=lattice.present(skips, blanks),
        live=jnp.moveaxis(live, -1, 0),
    )


def advance(alpha: tuple[Array, Array], x: Frame, shared: Any, fixed_x: Any, skips: Array, add: Any = lattice.add) -> tuple[Array, Array]:
    """α of the blank states [..., labels + 1] and the label states [..., labels] after a frame."""
    blank, label = alpha
    absent = jnp.full_like(blank[..., :1], lattice.ABSENT)
    from_label = jnp.concatenate([absent, label], axis=-1)
    to_blank = add(blank, from_label) + x.blank[..., None]
    to_label = add(label, blank[..., :-1], from_label[..., :-1] + skips) + x.labels
    return to_blank, to_label


def _lost_mass(mass: tuple[Array, Array], x: Frame) -> Array:
    assert x.lost is not None
    return sum((jnp.sum(m * p, axis=-1) for m, p in zip(mass, x.lost, strict=True)), jnp.zeros_like(x.blank))


SURE = lattice.Lattice(advance, _lost_mass)  # probabilities, with all that is lost
OPEN = lattice.Lattice(advance)  # weights alone


def loss(lattice_: lattice.Lattice, weights: lattice.Arguments, valid: Array, where: Array | None) -> Array:
    """The loss [...] of a lattice."""
    total, none = lattice.checked_total(lattice.log_total(lattice_, weights))
    return arguments.finish(-total, valid, none, where)
