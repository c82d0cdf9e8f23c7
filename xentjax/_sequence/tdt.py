"""The token-and-duration transducer (TDT). Conventions are documented in `xentjax.sequence`.

Lattice. A node is a frame t = 0, …, T and a number u of labels so far. A move takes the blank or the class of the next label, and a
duration d from the list of durations. The blank leads from (t, u) to (t + d, u), and the next label leads to (t + d, u + 1). A path starts
at (0, 0). It ends with a blank that leads to frame T after all labels. The blank never has duration 0.

Every move increases t + u. A blank of duration d increases it by d, and a label by d + 1. A diagonal holds all nodes with the same t + u. A
step of the lattice leads from one diagonal to the next. Let D be the longest duration. The states are the nodes of the current diagonal and
of the D diagonals after it. In a step, each path at a node of the current diagonal makes one move, which ends on a later diagonal. A path
whose move ends on a later diagonal waits there until that diagonal is the current one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, rows, values
from xentjax._sequence import arguments, devices, frames, lattice, scaled, transducer
from xentjax._sequence.scaled import Scaled


def tdt_loss(
    logits: ArrayLike,
    duration_logits: ArrayLike,
    labels: ArrayLike,
    *,
    durations: Sequence[int] = (0, 1, 2, 3, 4),
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    blank: int = 0,
    sigma: ArrayLike = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Token-and-duration transducer (TDT) loss per sequence, shape [...].

    loss = −log Σ_π Π_i e^(−σ)·p_i(k_i)·q_i(d_i), where σ is `sigma`, and π runs over all paths. A path is a list of pairs of a class k_i
    and a duration d_i. It starts at frame 0. Pair i advances it by d_i frames, and the durations add up to the number of frames. The
    classes are the labels in their order, with any number of blanks before, between and after them. The last class is a blank. The
    duration of a blank is at least 1. p_i and q_i are the softmaxes of `logits` and of `duration_logits`. Both are taken at the frame and
    the number of labels that the path has reached before pair i. The equations of the paper also admit paths that end with a label. As in
    NeMo, these paths are left out.
    Gradient at frame t after u labels: ∂loss/∂z_k = β·(p_k − [k = b]) + γ·(p_k − [k = y]), where b is the blank, and y is the next label. β
    and γ are the posterior probabilities that a path is at t and u and continues with b or with y. For logit v_j of duration j,
    ∂loss/∂v_j = (β + γ)·q_j − δ_j, where δ_j is the posterior probability that a path is at t and u and continues with duration j.

    If the paths together have a probability above 1/2, the loss is computed from the probability of all other outcomes. So even a loss of
    1e-15 has a small relative error in float32. The loss is never negative. With σ > 0, the loss is at least σ times the number of pairs of
    the shortest path. So models learn to prefer few pairs with long durations. The paper uses σ = 0.05.

    Args:
        logits: [..., time, max_labels + 1, classes], unnormalized log-probabilities after u = 0, …, max_labels labels.
        duration_logits: [..., time, max_labels + 1, durations], unnormalized log-probabilities of the durations.
        labels: [..., max_labels] class indices without blanks. A label outside the range of classes, or equal to the blank, gives NaN.
        durations: different Python integers, at least 0, and at least one of them above 0. Entry j belongs to `duration_logits[..., j]`.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        blank: class index of the blank.
        sigma: σ ≥ 0, which is subtracted from the log-probabilities of all classes.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`. The durations are not sharded.
        class_mask: [classes] or the shape of `logits`, True for classes that exist.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if any of the logits are float64. +∞ with gradient 0 if no path has a positive probability. NaN
        if a label or a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `blank` is outside the range of classes, a duration is invalid, or `sigma` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, of_durations = jnp.zeros((2, 2, 4)), jnp.zeros((2, 2, 3))  # 2 frames, 1 label, 4 classes, 3 durations
        >>> # With 2 pairs, the label takes 0 frames and the blank 2, or each takes 1. With 3 pairs, the label takes 0, in frame 0 or 1.
        >>> float(xentjax.tdt_loss(logits, of_durations, jnp.array([3]), durations=(0, 1, 2)))  # −log(2/12² + 2/12³)
        4.19662...

    Reference:
        Xu et al., Efficient Sequence Transduction by Jointly Predicting Tokens and Durations, 2023, arXiv 2304.06795.
    """
    name = "tdt_loss"
    z = arguments.logits(name, "logits", logits, 3, "[..., time, max_labels + 1, classes]")
    time, most = z.shape[-3], z.shape[-2] - 1
    durations = checked_durations(name, durations)
    v = checks.floating(name, "duration_logits", duration_logits)
    checks.shape(name, "duration_logits", v, (*z.shape[:-1], len(durations)), "one logit per duration at each node of logits")
    sequences = arguments.sequences(name, labels, z.shape[:-3], time, logit_lengths, label_lengths, where, "logits", most)
    inside = transducer.nodes_of(sequences, time).inside
    batch = arguments.frames(name, z, class_mask, axis_name, sequences, inside)
    mesh.check_class_split(name, axis_name, {}, {"duration_logits": v})
    values.logits(name, "duration_logits", v, inside)
    blank = arguments.blank(name, blank, batch.classes)
    arguments.check_labels(name, sequences, batch.classes, blank)
    return _tdt(batch, v, sequences, checks.number(name, "sigma", sigma), durations, blank)


@functools.partial(jax.jit, static_argnames=("durations", "blank"))
def _tdt(
    batch: rows.Examples,
    of_durations: Array,
    sequences: arguments.Sequences,
    sigma: ArrayLike | None,
    durations: tuple[int, ...],
    blank: int,
) -> Array:
    of_sequences = batch, of_durations, sequences
    return devices.on_each(functools.partial(_of_logits, durations, blank), batch.logits.ndim - 3, of_sequences, (sigma,))


def _of_logits(
    durations: tuple[int, ...],
    blank: int,
    batch: rows.Examples,
    of_durations: Array,
    sequences: arguments.Sequences,
    sigma: ArrayLike | None,
) -> Array:
    nodes = transducer.nodes_of(sequences, batch.logits.shape[-3])
    dtype = numerics.accumulation_dtype(batch.logits.dtype, of_durations.dtype)
    *of_classes, valid = transducer.log_probabilities(batch, sequences, nodes, blank)
    blanks, of_labels, rest = (x.astype(dtype) for x in of_classes)
    v = rows.Rows(of_durations, of_durations.astype(dtype), None, None, nodes.inside, None)
    every = lax.broadcasted_iota(jnp.int32, (*[1] * (v.values.ndim - 1), len(durations)), v.values.ndim - 1)
    log_q, _ = frames.probabilities(v, every)  # `surprises.surprise` is at most INFINITE, so large differences of logits would be lost
    return _loss(True, durations, nodes, (blanks, of_labels, log_q), rest, sigma, valid, sequences.where)


def tdt_loss_from_log_probs(
    blank_log_probs: ArrayLike,
    label_log_probs: ArrayLike,
    duration_log_probs: ArrayLike,
    *,
    durations: Sequence[int] = (0, 1, 2, 3, 4),
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Token-and-duration transducer (TDT) loss from log-probabilities of the blank, the next label and the durations, shape [...].

    loss = −log Σ_π Π_i p_i(k_i)·q_i(d_i) as in `tdt_loss`. Only the log-probabilities of the blank, of the next label and of the durations
    are needed. They can be computed without storing all joint logits, for example by `fuse_linear`.
    Gradient: minus the posterior probability that a path, at frame t after u labels, continues with the blank, with the next label, or with
    the duration.

    This function does not get the probabilities of the other classes. So a small loss has the absolute rounding error of a sum of
    log-probabilities, and may be slightly negative. Only `tdt_loss` computes a small loss with a small relative error. Log-probabilities
    need not be normalized. To apply the σ of `tdt_loss`, subtract σ from `blank_log_probs` and `label_log_probs`.

    Args:
        blank_log_probs: [..., time, max_labels + 1], log-probability of the blank after u = 0, …, max_labels labels.
        label_log_probs: [..., time, max_labels], log-probability of the next label after u = 0, …, max_labels − 1 labels.
        duration_log_probs: [..., time, max_labels + 1, durations], log-probabilities of the durations.
        durations: different Python integers, at least 0, and at least one of them above 0.
        logit_lengths: [...], number of frames of each sequence; None: all. Frames after the end may hold anything.
        label_lengths: [...], number of labels of each sequence; None: all. Labels after the end may hold anything.
        where: [...], True for sequences that count.

    Returns:
        [...], in nats, float32, or float64 if any of the log-probabilities are float64. +∞ with gradient 0 if no path has a positive
        probability. NaN if a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or a duration is invalid.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> half = jnp.log(jnp.full((2, 2), 0.5))  # 2 frames, 1 label
        >>> of_durations = jnp.log(jnp.full((2, 2, 2), 0.5))
        >>> # The path "label for 1 frame, blank for 1 frame", or two blanks of 1 frame, and the label for 0 frames before either of them
        >>> float(xentjax.tdt_loss_from_log_probs(half, half[:, :1], of_durations, durations=(0, 1)))  # −log(1/4² + 2/4³)
        2.36712...

    Reference:
        Xu et al., Efficient Sequence Transduction by Jointly Predicting Tokens and Durations, 2023, arXiv 2304.06795.
    """
    name = "tdt_loss_from_log_probs"
    blanks, of_labels, sequences = transducer.check_log_probs(name, blank_log_probs, label_log_probs, logit_lengths, label_lengths, where)
    of_durations = checks.floating(name, "duration_log_probs", duration_log_probs)
    durations = checked_durations(name, durations)
    meaning = "one entry per duration at each node of blank_log_probs"
    checks.shape(name, "duration_log_probs", of_durations, (*blanks.shape, len(durations)), meaning)
    nodes = transducer.nodes_of(sequences, blanks.shape[-2])
    values.logits(name, "blank_log_probs", blanks, nodes.inside)
    values.logits(name, "label_log_probs", of_labels, nodes.label[..., :-1])
    values.logits(name, "duration_log_probs", of_durations, nodes.inside)
    return _tdt_from_log_probs(blanks, of_labels, of_durations, sequences, durations)


@functools.partial(jax.jit, static_argnames="durations")
def _tdt_from_log_probs(
    blanks: Array, of_labels: Array, of_durations: Array, sequences: arguments.Sequences, durations: tuple[int, ...]
) -> Array:
    of_sequences = blanks, of_labels, of_durations, sequences
    return devices.on_each(functools.partial(_of_log_probs, durations), blanks.ndim - 2, of_sequences)


def _of_log_probs(
    durations: tuple[int, ...], blanks: Array, of_labels: Array, of_durations: Array, sequences: arguments.Sequences
) -> Array:
    nodes = transducer.nodes_of(sequences, blanks.shape[-2])
    dtype = numerics.accumulation_dtype(blanks.dtype, of_labels.dtype, of_durations.dtype)
    of_labels = jnp.concatenate([of_labels, jnp.zeros_like(of_labels, shape=(*blanks.shape[:-1], 1))], axis=-1)

    def kept(inside: Array, x: Array) -> Array:
        return jnp.where(inside, x.astype(dtype), 0)

    log_p = kept(nodes.inside, blanks), kept(nodes.label, of_labels), kept(nodes.inside[..., None], of_durations)
    return _loss(False, durations, nodes, log_p, None, None, nodes.valid, sequences.where)


def checked_durations(function: str, durations: Sequence[int]) -> tuple[int, ...]:
    """The durations as a tuple of Python integers. Raises TypeError or ValueError if they are invalid."""
    try:
        found = tuple(operator.index(d) for d in durations)
    except TypeError as error:
        raise TypeError(f"{function}: durations must be Python integers, known before tracing; got {durations!r}.") from error
    if min(found, default=-1) < 0 or len(set(found)) < len(found) or max(found) == 0:
        raise ValueError(f"{function}: durations must be different numbers of frames, all at least 0 and one above 0; got {found}.")
    return found


# The lattice -------------------------------------------------------------------------------------------------------------


def _loss(
    normalized: bool,
    durations: tuple[int, ...],
    nodes: transducer.Nodes,
    log_p: tuple[Array, Array, Array],
    rest: Array | None,
    sigma: ArrayLike | None,
    valid: Array,
    where: Array | None,
) -> Array:
    """The loss [...], from log p of the blank, of the next label [..., time, n], and of the durations [..., time, n, durations].

    `rest` [..., time, n] is the probability of all classes except the blank and the next label. It is None if `normalized` is False.
    """
    blanks, of_labels, of_durations = log_p
    lost = None if rest is None else _lost(durations, nodes, log_p, rest)
    if sigma is not None:  # the probability 1 − e^(−σ) of every move is lost
        sigma = jnp.asarray(sigma, blanks.dtype)
        blanks, of_labels = blanks - sigma, of_labels - sigma
        lost = None if lost is None else lost * jnp.exp(-sigma) - jnp.expm1(-sigma)
    xs = jnp.stack([blanks, of_labels, *jnp.moveaxis(of_durations, -1, 0)], axis=-3)
    steps = jnp.arange(blanks.shape[-2] + blanks.shape[-1] - 1, dtype=jnp.int32)
    first, nothing = jnp.zeros_like(nodes.last).at[..., 0].set(True), [jnp.zeros_like(nodes.last)] * max(durations)
    u = numerics.expand_leading(jnp.arange(blanks.shape[-1], dtype=jnp.int32), nodes.last.ndim)
    weights = lattice.Weights(
        start=(first, *nothing),
        xs=transducer.diagonals(xs, -jnp.inf),
        shared=(),
        end=tuple(lattice.present(x, blanks.dtype) for x in (nodes.last, *nothing)),
        lost=None if lost is None else transducer.diagonals(lost, 0),
        fixed_xs=steps,
        fixed=(nodes.frames[..., None] + u, nodes.labels[..., None] - u),
        live=steps.reshape(-1, *[1] * nodes.frames.ndim) < (nodes.frames + nodes.labels)[None],
    )
    total, none = lattice.checked_total(lattice.log_total(_lattice(durations, normalized), weights))
    return arguments.finish(-total, valid, none, where)


def _lost(durations: tuple[int, ...], nodes: transducer.Nodes, log_p: tuple[Array, Array, Array], rest: Array) -> Array:
    """The probability, at each node, that the next move of the model belongs to no path of the lattice, shape [..., time, n]."""
    blanks, of_labels, of_durations = log_p
    t, u = (jnp.arange(size, dtype=jnp.int32) for size in blanks.shape[-2:])
    t, u = numerics.expand_leading(t[:, None], blanks.ndim), numerics.expand_leading(u, blanks.ndim)
    moves = _moves(durations, nodes.frames[..., None, None] - t, nodes.labels[..., None, None] - u)
    q = jnp.exp(of_durations)
    with_blank, with_label = (jnp.sum(jnp.where(jnp.stack(possible, axis=-1), 0, q), axis=-1) for possible in zip(*moves, strict=True))
    return rest + jnp.exp(blanks) * with_blank + jnp.where(nodes.label, jnp.exp(of_labels), 0) * with_label


@functools.cache
def _lattice(durations: tuple[int, ...], normalized: bool) -> lattice.Lattice:
    """The lattice for these durations. α is a tuple: α of the current diagonal, and partial sums of α of each of the next D diagonals."""

    def lost(xs: Array, lost: Array, fixed: Any) -> tuple[Array, ...]:
        return lost, *[jnp.zeros_like(lost)] * max(durations)

    return lattice.Lattice(functools.partial(_advance, durations), functools.partial(_retreat, durations), lost if normalized else None)


def _moves(durations: tuple[int, ...], frames_left: Array, labels_left: Array) -> list[tuple[Array, Array]]:
    """For each duration, whether it is possible with the blank, and with the next label."""
    return [
        (((d < frames_left) | ((d == frames_left) & (labels_left == 0))) & (d > 0), (d < frames_left) & (labels_left > 0))
        for d in durations
    ]


def _parts(x: Scaled) -> list[Scaled]:
    return [Scaled(x.mantissa[..., i, :], x.exponent[..., i, :]) for i in range(x.mantissa.shape[-2])]


def _advance(durations: tuple[int, ...], alpha: tuple[Scaled, ...], x: Scaled, shared: Any, n: Array, fixed: Any) -> tuple[Scaled, ...]:
    here, *waiting = alpha
    blank, label, *of_durations = _parts(x)
    by_blank, by_label = scaled.times(here, blank), scaled.times(here, label)
    arriving = [[state] for state in waiting] + [[]]
    for d, q, kept in zip(durations, of_durations, _moves(durations, fixed[0] - n, fixed[1]), strict=True):
        if d > 0:
            arriving[d - 1].append(scaled.selected(kept[0], scaled.times(by_blank, q)))
        arriving[d].append(scaled.shifted(scaled.selected(kept[1], scaled.times(by_label, q)), 1)[0])
    return tuple(scaled.normalized(scaled.add(*terms)) for terms in arriving)


def _retreat(
    durations: tuple[int, ...],
    bar: tuple[Array, ...],
    before: tuple[Scaled, ...],
    after: tuple[Scaled, ...],
    x: Scaled,
    shared: Any,
    n: Array,
    fixed: Any,
) -> tuple[tuple[Array, ...], Array, tuple[()]]:
    here, *waiting = before
    blank, label, *of_durations = _parts(x)
    arriving = [Scaled(m, -state.exponent) for m, state in zip(bar, after, strict=True)]

    def derivative(edge: Scaled, kept: Array) -> Array:
        return jnp.where(kept, edge.mantissa * scaled.power(here.exponent + edge.exponent), jnp.zeros_like(edge.mantissa))

    by_blank, by_label, nothing = [], [], jnp.zeros_like(here.mantissa)
    for d, q, kept in zip(durations, of_durations, _moves(durations, fixed[0] - n, fixed[1]), strict=True):
        by_blank.append(derivative(scaled.times(scaled.times(arriving[d - 1], blank), q), kept[0]) if d > 0 else nothing)
        by_label.append(derivative(scaled.times(scaled.times(scaled.shifted(arriving[d], -1)[0], label), q), kept[1]))
    by_class = [functools.reduce(jnp.add, x) for x in (by_blank, by_label)]
    of_x = jnp.stack([*by_class, *map(jnp.add, by_blank, by_label)], axis=-2)
    of_waiting = [x.mantissa * scaled.power(state.exponent + x.exponent) for x, state in zip(arriving, waiting, strict=False)]
    return (by_class[0] + by_class[1], *of_waiting), here.mantissa[..., None, :] * of_x, ()
