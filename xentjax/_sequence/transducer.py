"""The transducer loss. Conventions are documented in `xentjax.sequence`.

Lattice. A path starts at frame t = 0 after u = 0 labels. There are two moves: the blank leads to frame t + 1, and the class of the next
label leads to u + 1 labels in the same frame. After all labels, the blank of the last frame ends the path. Each move increases t + u by 1.
So a step of the lattice is a step from one diagonal t + u to the next, and the states are the numbers u.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, numerics, rows, values
from xentjax._sequence import arguments, devices, frames, lattice, scaled
from xentjax._sequence.scaled import Scaled


def transducer_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    blank: int = 0,
    fastemit: ArrayLike = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Transducer (RNN-T) loss per sequence, shape [...].

    loss = −(1 + λ) log Σ_π Π_i p_i(π_i), where λ is `fastemit`, and π runs over all paths. A path consists of the labels in their order and
    of one blank per frame, and ends with a blank. p_i is the softmax of the logits at the frame and at the number of labels that the path
    has reached before element i.
    Gradient at frame t after u labels: ∂loss/∂z_k = β·(p_k − [k = b]) + (1 + λ)·γ·(p_k − [k = y]), where b is the blank, and y is the next
    label. β and γ are the posterior probabilities that a path is at t and u and continues with b or with y.

    For λ > 0, this gradient is not the derivative of the value. FastEmit increases only the gradient through the labels, so that labels are
    emitted earlier. If the paths together have a probability above 1/2, the loss is computed from the probability of everything else. So
    even a loss of 1e-15 has a small relative error in float32. The loss is never negative.

    Args:
        logits: [..., time, max_labels + 1, classes], unnormalized log-probabilities after u = 0, …, max_labels labels.
        labels: [..., max_labels] class indices without blanks. A label outside the range of classes, or equal to the blank, gives NaN.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        blank: class index of the blank.
        fastemit: λ ≥ 0, the weight of FastEmit regularization.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or the shape of `logits`, True for classes that exist.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if `logits` are float64. +∞ with gradient 0 if no path has a positive probability. NaN if a
        label or a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `blank` is outside the range of classes, or `fastemit` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.zeros((2, 2, 4))  # 2 frames, 1 label, 4 classes with probability 1/4 each
        >>> float(xentjax.transducer_loss(logits, jnp.array([3])))  # log(4³/2): the label is emitted in frame 0 or in frame 1
        3.46573...

    Reference:
        Graves, Sequence Transduction with Recurrent Neural Networks, 2012, arXiv 1211.3711; Yu et al., FastEmit: Low-Latency Streaming ASR
        with Sequence-Level Emission Regularization, 2021, arXiv 2010.11148.
    """
    name = "transducer_loss"
    z = arguments.logits(name, "logits", logits, 3, "[..., time, max_labels + 1, classes]")
    time, most = z.shape[-3], z.shape[-2] - 1
    sequences = arguments.sequences(name, labels, z.shape[:-3], time, logit_lengths, label_lengths, where, "logits", most)
    batch = arguments.frames(name, z, class_mask, axis_name, sequences, nodes_of(sequences, time).inside)
    blank = arguments.blank(name, blank, batch.classes)
    arguments.check_labels(name, sequences, batch.classes, blank)
    return _transducer(batch, sequences, checks.number(name, "fastemit", fastemit), blank)


@functools.partial(jax.jit, static_argnames="blank")
def _transducer(batch: rows.Examples, sequences: arguments.Sequences, fastemit: ArrayLike | None, blank: int) -> Array:
    return devices.on_each(functools.partial(_of_logits, blank), batch.logits.ndim - 3, (batch, sequences), (fastemit,))


def _of_logits(blank: int, batch: rows.Examples, sequences: arguments.Sequences, fastemit: ArrayLike | None) -> Array:
    nodes = nodes_of(sequences, batch.logits.shape[-3])
    blanks, of_labels, rest, valid = log_probabilities(batch, sequences, nodes, blank)
    lost = rest + jnp.where(nodes.blank, jnp.zeros_like(rest), jnp.exp(blanks))
    return _loss(True, nodes, blanks, of_labels, lost, valid, sequences.where, fastemit)


def transducer_loss_from_log_probs(
    blank_log_probs: ArrayLike,
    label_log_probs: ArrayLike,
    *,
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    fastemit: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    """Transducer loss from log-probabilities of the blank and of the next label, shape [...].

    loss = −(1 + λ) log Σ_π Π_i p_i(π_i) as in `transducer_loss`. Only the log-probabilities of the blank and of the next label are needed.
    They can be computed without storing all joint logits, for example by `fuse_linear`.
    Gradient: −γ_tu(blank) and −(1 + λ)·γ_tu(label). γ_tu(blank) and γ_tu(label) are the posterior probabilities that a path is at frame t
    after u labels, and continues with the blank or with the next label.

    This function does not get the probabilities of the other classes. So a small loss has the absolute rounding error of a sum of
    log-probabilities, and may be slightly negative. Only `transducer_loss` computes a small loss with a small relative error.
    Log-probabilities need not be normalized.

    Args:
        blank_log_probs: [..., time, max_labels + 1], log-probability of the blank after u = 0, …, max_labels labels.
        label_log_probs: [..., time, max_labels], log-probability of the next label after u = 0, …, max_labels − 1 labels.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        fastemit: λ ≥ 0, the weight of FastEmit regularization.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if the log-probabilities are float64. +∞ with gradient 0 if no path has a positive probability,
        NaN if a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `fastemit` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> half = jnp.log(jnp.full((2, 2), 0.5))  # 2 frames, 1 label
        >>> float(xentjax.transducer_loss_from_log_probs(half, half[:, :1]))  # log(2³/2)
        1.38629...

    Reference:
        Graves, Sequence Transduction with Recurrent Neural Networks, 2012, arXiv 1211.3711.
    """
    name = "transducer_loss_from_log_probs"
    blanks, of_labels, sequences = check_log_probs(name, blank_log_probs, label_log_probs, logit_lengths, label_lengths, where)
    nodes = nodes_of(sequences, blanks.shape[-2])
    values.logits(name, "blank_log_probs", blanks, nodes.blank)
    values.logits(name, "label_log_probs", of_labels, nodes.label[..., :-1])
    return _transducer_from_log_probs(blanks, of_labels, sequences, checks.number(name, "fastemit", fastemit))


@jax.jit
def _transducer_from_log_probs(blanks: Array, of_labels: Array, sequences: arguments.Sequences, fastemit: ArrayLike | None) -> Array:
    return devices.on_each(_of_log_probs, blanks.ndim - 2, (blanks, of_labels, sequences), (fastemit,))


def _of_log_probs(blanks: Array, of_labels: Array, sequences: arguments.Sequences, fastemit: ArrayLike | None) -> Array:
    nodes, dtype = nodes_of(sequences, blanks.shape[-2]), numerics.accumulation_dtype(blanks.dtype, of_labels.dtype)
    blanks, of_labels = blanks.astype(dtype), of_labels.astype(dtype)
    of_labels = jnp.concatenate([of_labels, jnp.zeros_like(blanks[..., :1])], axis=-1)
    blanks, of_labels = (jnp.where(kept, x, 0) for x, kept in ((blanks, nodes.blank), (of_labels, nodes.label)))
    return _loss(False, nodes, blanks, of_labels, None, nodes.valid, sequences.where, fastemit)


def check_log_probs(
    function: str,
    blank_log_probs: ArrayLike,
    label_log_probs: ArrayLike,
    logit_lengths: ArrayLike | None,
    label_lengths: ArrayLike | None,
    where: ArrayLike | None,
) -> tuple[Array, Array, arguments.Sequences]:
    """The checked log-probabilities of the blank and of the next label, and their sequences, whose labels are not known."""
    blanks = arguments.logits(function, "blank_log_probs", blank_log_probs, 2, "[..., time, max_labels + 1]")
    of_labels = checks.floating(function, "label_log_probs", label_log_probs)
    leading, time, most = blanks.shape[:-2], blanks.shape[-2], blanks.shape[-1] - 1
    if most < 0:
        raise ValueError(f"{function}: blank_log_probs must have shape [..., time, max_labels + 1]; got {blanks.shape}.")
    checks.shape(function, "label_log_probs", of_labels, (*leading, time, most), "one label fewer than blank_log_probs")
    none = jnp.zeros((*leading, most), jnp.int32)
    sequences = arguments.sequences(function, none, leading, time, logit_lengths, label_lengths, where, "blank_log_probs", most)
    return blanks, of_labels, sequences


# The lattice -------------------------------------------------------------------------------------------------------------


class Nodes(NamedTuple):
    """Which nodes and moves paths may use, with axes [..., time, max_labels + 1] if nothing else is said."""

    inside: Array  # whether the node belongs to a sequence that counts
    blank: Array  # whether the blank may follow at this node on a path that reaches the end
    label: Array  # whether the next label may follow at this node on such a path
    frames: Array  # [...], number of frames
    labels: Array  # [...], number of labels
    last: Array  # [..., max_labels + 1], whether u is the number of labels
    valid: Array  # [...], whether the lengths are possible


def nodes_of(sequences: arguments.Sequences, time: int) -> Nodes:
    leading, most = sequences.labels.shape[:-1], sequences.labels.shape[-1]
    frames_, labels = (jnp.full(leading, n, jnp.int32) if x is None else x for n, x in ((time, sequences.steps), (most, sequences.counts)))
    shape = (*leading, time, most + 1)
    t, u = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - i) for i in (2, 1))
    frames_, labels = frames_.astype(jnp.int32), labels.astype(jnp.int32)
    ends, all_labels = frames_[..., None, None], labels[..., None, None]
    inside = (t < ends) & (u <= all_labels)
    if sequences.where is not None:
        inside &= sequences.where[..., None, None]
    last = lax.broadcasted_iota(jnp.int32, (*leading, most + 1), len(leading)) == labels[..., None]
    blank = inside & ((t < ends - 1) | (u == all_labels))
    return Nodes(inside, blank, inside & (u < all_labels), frames_, labels, last, arguments.valid_lengths(sequences, time))


def log_probabilities(batch: rows.Examples, sequences: arguments.Sequences, nodes: Nodes, blank: int) -> tuple[Array, Array, Array, Array]:
    """At every node, log p of the blank and of the next label, and the probability of all other classes, [..., time, max_labels + 1].

    The last result says whether the lengths and the labels of a sequence are valid, shape [...]. Where there is no next label, the second
    result is log p of the blank, too.
    """
    r, y = rows.of(batch)._replace(where=nodes.inside), sequences.labels
    kept = arguments.inside(sequences.counts, y)
    valid = nodes.valid & jnp.all(~kept | (rows.is_class(r, y) & (y != blank)), axis=-1)
    following = jnp.where(kept, y, blank)
    following = jnp.concatenate([following, jnp.full_like(y, blank, shape=(*y.shape[:-1], 1))], axis=-1)
    index = jnp.stack([jnp.full_like(following, blank), following], axis=-1)
    log_p, rest = frames.probabilities(r, index[..., None, :, :])
    return log_p[..., 0], log_p[..., 1], rest, valid


def _loss(
    normalized: bool,
    nodes: Nodes,
    blanks: Array,
    of_labels: Array,
    lost: Array | None,
    valid: Array,
    where: Array | None,
    fastemit: ArrayLike | None,
) -> Array:
    def weights(blanks: Array, lost: Array | None) -> lattice.Weights:
        time, states = nodes.inside.shape[-2:]
        steps = lax.broadcasted_iota(jnp.int32, (time + states - 1, *nodes.frames.shape), 0)
        xs = [jnp.where(kept, x, -jnp.inf) for kept, x in ((nodes.blank, blanks), (nodes.label, of_labels))]
        first = jnp.zeros_like(nodes.last).at[..., 0].set(True)
        return lattice.Weights(
            start=first,
            xs=tuple(diagonals(x, -jnp.inf) for x in xs),
            shared=(),
            end=lattice.present(nodes.last, blanks.dtype),
            lost=None if lost is None else diagonals(lost, 0),
            fixed_xs=(),
            fixed=(),
            live=steps < (nodes.frames + nodes.labels)[None],
        )

    total, none = lattice.checked_total(lattice.log_total(SURE if normalized else OPEN, weights(blanks, lost)))
    loss = -total
    if fastemit is not None:
        labels_only = lattice.checked_total(lattice.log_total(OPEN, weights(lax.stop_gradient(blanks), None)))[0]
        loss += jnp.asarray(fastemit, loss.dtype) * differences.with_slope_of(loss, -labels_only)
    return arguments.finish(loss, valid, none, where)


def diagonals(x: Array, fill: float) -> Array:
    """`x` [..., time, n] with the diagonals t + u first, shape [time + n − 1, ..., n]; `fill` where a diagonal has no entry.

    Each row u of the transposed array is padded to time + n entries. Then all rows are joined, and cut into rows of time + n − 1 entries.
    So row u moves by u places, and entry t of row u comes to column t + u.
    """
    time, n = x.shape[-2:]
    padded = lax.pad(jnp.swapaxes(x, -1, -2), jnp.asarray(fill, x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(0, n, 0)])
    flat = padded.reshape(*x.shape[:-2], n * (time + n))[..., : n * (time + n - 1)]
    return jnp.moveaxis(flat.reshape(*x.shape[:-2], n, time + n - 1), -1, 0)


def _advance(alpha: Scaled, x: tuple[Scaled, Scaled], shared: Any, fixed_x: Any, fixed: Any) -> Scaled:
    by_blank, by_label = (scaled.times(scaled.normalized(alpha), weight) for weight in x)
    return scaled.add(by_blank, *scaled.shifted(by_label, 1))


def _moves(bar: Array, exponent: Array, k: Array, x: tuple[Scaled, Scaled]) -> tuple[Array, Array]:
    """The derivative with respect to the mantissas of α in two parts: through the blank, and through the next label."""
    arriving = Scaled(bar, -k)
    edges = (scaled.times(arriving, x[0]), scaled.times(scaled.shifted(arriving, -1)[0], x[1]))
    by_blank, by_label = (edge.mantissa * scaled.power(exponent + edge.exponent) for edge in edges)
    return by_blank, by_label


def _retreat(
    bar: Array, before: Scaled, after: Scaled, x: tuple[Scaled, Scaled], shared: Any, fixed_x: Any, fixed: Any
) -> tuple[Array, tuple[Array, Array], tuple[()]]:
    by_blank, by_label = _moves(bar, before.exponent, after.exponent, x)
    return by_blank + by_label, (before.mantissa * by_blank, before.mantissa * by_label), ()


SURE = lattice.Lattice(_advance, _retreat, lambda xs, lost, fixed: lost)
OPEN = lattice.Lattice(_advance, _retreat, None)
