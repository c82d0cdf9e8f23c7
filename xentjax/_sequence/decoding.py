"""Decoders and posteriors of CTC and of transducers. Conventions are documented in `xentjax.sequence`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, rows, values
from xentjax._sequence import arguments, ctc, devices, frames, lattice, scaled, tdt


def ctc_greedy_decode(logits: ArrayLike, *, logit_lengths: ArrayLike | None = None, blank: int = 0) -> tuple[Array, Array]:
    """The most probable class of each frame, with repeats merged and blanks removed, shape [..., time], and their number, shape [...].

    The labels are those classes k_t = argmax_k logits_tk for which k_t ≠ blank and k_t ≠ k_{t−1}.
    Gradient: none, since the results are integers.

    Args:
        logits: [..., time, classes], unnormalized log-probabilities.
        logit_lengths: [...], number of frames of each sequence; None: all.
        blank: class index of the blank.

    Returns:
        The labels [..., time], int32, with −1 after the end; and their number [...], int32, which is 0 if the number of frames is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `blank` is outside the range of classes.

    Example:
        >>> import jax, xentjax
        >>> logits = jax.nn.one_hot(jax.numpy.array([1, 1, 0, 1, 2]), 3)
        >>> labels, length = xentjax.sequence.ctc_greedy_decode(logits)
        >>> labels.tolist(), int(length)
        ([1, 1, 2, -1, -1], 3)

    Reference:
        Graves et al., Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural Networks, 2006.
    """
    name = "ctc_greedy_decode"
    z = arguments.logits(name, "logits", logits, 2, "[..., time, classes]")
    checks.class_axis(name, "logits", z.shape, -1)
    none = jnp.zeros((*z.shape[:-2], 0), jnp.int32)
    sequences = arguments.sequences(name, none, z.shape[:-2], z.shape[-2], logit_lengths, None, None, "logits")
    live, valid = ctc.alive(sequences, z.shape[-2])
    values.logits(name, "logits", z, live)
    return _greedy(z, live & valid[..., None], arguments.blank(name, blank, z.shape[-1]))


@functools.partial(jax.jit, static_argnames="blank")
def _greedy(logits: Array, live: Array, blank: int) -> tuple[Array, Array]:
    return devices.on_each(functools.partial(_best_classes, blank), logits.ndim - 2, (logits, live))


def _best_classes(blank: int, logits: Array, live: Array) -> tuple[Array, Array]:
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    before = jnp.concatenate([jnp.full_like(best[..., :1], blank), best[..., :-1]], axis=-1)
    kept = (best != blank) & (best != before) & live
    order = jnp.argsort(~kept, axis=-1, stable=True)
    count = jnp.sum(kept, axis=-1, dtype=jnp.int32)
    labels = jnp.take_along_axis(best, order, axis=-1)
    return jnp.where(arguments.inside(count, best), labels, -1), count


def ctc_alignment(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    blank: int = 0,
) -> tuple[Array, Array]:
    """The most probable alignment of the labels, shape [..., time], and its log-probability, shape [...].

    The path π maximizes ℓ = Σ_t log p_t(π_t) over all alignments of the labels. Alignments are defined in `ctc_loss`.
    Gradient of the log-probability: ∂ℓ/∂z_tk = [k = π_t] − p_t(k). The path has no gradient.

    Args:
        logits: [..., time, classes], unnormalized log-probabilities.
        labels: [..., max_labels] class indices without blanks.
        logit_lengths: [...], number of frames of each sequence; None: all.
        label_lengths: [...], number of labels of each sequence; None: all.
        blank: class index of the blank.

    Returns:
        The class of every frame [..., time], int32, which is −1 after the end, and everywhere if no alignment exists or an argument is
        invalid; and the log-probability [...], float32, or float64 if `logits` are float64. It is −∞ if no alignment exists, and NaN if
        a label or a length is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `blank` is outside the range of classes.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[0.0, 3.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
        >>> path, log_prob = xentjax.sequence.ctc_alignment(logits, jnp.array([1, 2]))
        >>> path.tolist()
        [1, 0, 2, 2]

    Reference:
        Viterbi, Error Bounds for Convolutional Codes and an Asymptotically Optimum Decoding Algorithm, 1967.
    """
    return _alignment(*ctc.check("ctc_alignment", logits, labels, logit_lengths, label_lengths, blank))


@functools.partial(jax.jit, static_argnames="blank")
def _alignment(batch: rows.Examples, sequences: arguments.Sequences, blank: int) -> tuple[Array, Array]:
    return devices.on_each(functools.partial(_best_path, blank), batch.logits.ndim - 2, (batch, sequences))


def _best_path(blank: int, batch: rows.Examples, sequences: arguments.Sequences) -> tuple[Array, Array]:
    weights, valid = ctc.from_logits(batch, sequences, blank)
    weights = lax.stop_gradient(weights)
    start, end, xs = (ctc.interleaved(*x) for x in (weights.start, weights.end, weights.xs))
    xs = xs * 2.0**-32  # so that no sum overflows
    start, skips = lattice.present(start, xs.dtype), ctc.interleaved(weights.fixed.skips, jnp.zeros_like(weights.fixed.skips))

    def forward(alpha: Array, inputs: Any) -> tuple[Array, Array]:
        x, live = inputs
        moved = [alpha, *(scaled.moved(alpha, i, -jnp.inf) for i in (1, 2))]
        moved[2] = jnp.where(skips, moved[2], -jnp.inf)
        best = functools.reduce(jnp.maximum, moved)
        back = jnp.where(best == moved[0], 0, jnp.where(best == moved[1], 1, 2)).astype(jnp.int8)
        return jnp.where(live[..., None], best + x, alpha), back

    alpha, back = lax.scan(forward, mesh.vary(start, mesh.axes_of(weights)), (xs, weights.live))
    last = alpha + end
    state = jnp.argmax(last, axis=-1).astype(jnp.int32)
    none = jnp.max(last, axis=-1) == -jnp.inf

    def backward(state: Array, inputs: Any) -> tuple[Array, Array]:
        back, live = inputs
        step = jnp.take_along_axis(back, state[..., None], axis=-1).squeeze(-1)
        return jnp.where(live, state - step.astype(state.dtype), state), state

    _, states = lax.scan(backward, state, (back, weights.live), reverse=True)
    y = jnp.concatenate([jnp.full_like(sequences.labels, blank, shape=(*state.shape, 1)), sequences.labels], axis=-1)
    classes = ctc.interleaved(y, jnp.full_like(y[..., :1], blank)).astype(jnp.int32)
    path = jnp.take_along_axis(classes, jnp.moveaxis(states, 0, -1), axis=-1)
    used = jnp.moveaxis(weights.live, 0, -1) & (valid & ~none)[..., None]
    r = rows.of(batch)._replace(where=used)
    log_p = frames.probabilities(r, jnp.where(used, path, blank)[..., None])[0].squeeze(-1)
    total = numerics.where(none, -jnp.inf, jnp.sum(jnp.where(used, log_p, 0), axis=-1))
    return jnp.where(used, path, -1), numerics.nan_unless(valid, total)


def ctc_posteriors(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    logit_lengths: ArrayLike | None = None,
    label_lengths: ArrayLike | None = None,
    blank: int = 0,
) -> Array:
    """Posterior probabilities of the blank and of every label at every frame, given all labels, shape [..., time, 1 + max_labels].

    γ_t(i) = Σ_π p(π)·[a_t = i] / Σ_π p(π), where π runs over all alignments of the labels, as in `ctc_loss`. If frame t of π is a blank,
    then a_t = 0; otherwise frame t belongs to the a_t-th label.
    Gradient: the gradient of `ctc_loss` is ∂loss/∂z_tk = p_t(k) − γ_t(k), where γ_t(k) adds up the entries of class k. So the derivatives
    of γ_t(k) are a part of the second derivatives of `ctc_loss`.

    Args:
        logits: [..., time, classes], unnormalized log-probabilities.
        labels: [..., max_labels] class indices without blanks.
        logit_lengths: [...], number of frames of each sequence; None: all.
        label_lengths: [...], number of labels of each sequence; None: all.
        blank: class index of the blank.

    Returns:
        [..., time, 1 + max_labels], float32, or float64 if `logits` are float64. Entry 0 is the blank, and entry i is the i-th label. The
        entries of a frame sum to 1. All entries are 0 after the end, and in all frames if no alignment exists. NaN if a label or a length
        is invalid.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `blank` is outside the range of classes.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> posteriors = xentjax.sequence.ctc_posteriors(jnp.zeros((2, 4)), jnp.array([3]))  # 33, 3_ or _3
        >>> posteriors.tolist()
        [[0.333..., 0.666...], [0.333..., 0.666...]]

    Reference:
        Graves et al., Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural Networks, 2006.
    """
    return _posteriors(*ctc.check("ctc_posteriors", logits, labels, logit_lengths, label_lengths, blank))


@functools.partial(jax.jit, static_argnames="blank")
def _posteriors(batch: rows.Examples, sequences: arguments.Sequences, blank: int) -> Array:
    return devices.on_each(functools.partial(_of_states, blank), batch.logits.ndim - 2, (batch, sequences))


def _of_states(blank: int, batch: rows.Examples, sequences: arguments.Sequences) -> Array:
    weights, valid = ctc.from_logits(batch, sequences, blank)
    total, slopes = lattice.value_and_slopes(ctc.OPEN, weights._replace(lost=None))
    found = jnp.moveaxis(jnp.concatenate([slopes.xs.blank, slopes.xs.label[..., 1:]], axis=-1), 0, -2)
    found = jnp.where(lattice.checked_total(total)[1][..., None, None], 0, found)
    return numerics.nan_unless(jnp.broadcast_to(valid[..., None, None], found.shape), found)


def transducer_greedy_decode(
    joint: Callable[[Array, Any], Array],
    predictor: Callable[[Array, Any], tuple[Any, Any]],
    encoded: ArrayLike,
    state: Any,
    *,
    max_labels: int,
    max_labels_per_frame: int | None = None,
    logit_lengths: ArrayLike | None = None,
    blank: int = 0,
) -> tuple[Array, Array]:
    """Labels of a transducer that always takes the most probable class, shape [..., max_labels], and their number, shape [...].

    At frame t after u labels, k = argmax joint(encoded_t, prediction_u). If k is the blank, then t ← t + 1. Otherwise, k is emitted, and
    u ← u + 1.
    Gradient: none, since the results are integers.

    Args:
        joint: (frames [..., features], prediction) → logits [..., classes].
        predictor: (labels [...], state) → (prediction, next state). The first call gets the blank as label, and the initial state.
        encoded: [..., time, features], the output of the encoder.
        state: the initial state of the predictor, a pytree of arrays whose leading axes are `...`.
        max_labels: number of labels after which decoding stops.
        max_labels_per_frame: number of labels after which decoding goes on to the next frame; None: `max_labels`.
        logit_lengths: [...], number of frames of each sequence; None: all.
        blank: class index of the blank.

    Returns:
        The labels [..., max_labels], int32, with −1 after the end; and their number [...], int32.

    Raises:
        TypeError: an argument has the wrong dtype, or `predictor` does not return a pair.
        ValueError: an argument or the result of `joint` has the wrong shape, `blank` is outside the range of classes, or a number of labels
            is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> def predictor(label, last):  # remembers the last label
        ...     return label, label
        >>> def joint(frame, last):  # emits the class of the frame, unless it is the last label
        ...     return jax.nn.one_hot(jnp.where(frame[..., 0] == last, 0, frame[..., 0]), 4)
        >>> frames = jnp.array([[2], [2], [1], [3]])
        >>> labels, length = xentjax.sequence.transducer_greedy_decode(joint, predictor, frames, jnp.array(0), max_labels=5)
        >>> labels.tolist(), int(length)
        ([2, 1, 3, -1, -1], 3)

    Reference:
        Graves, Sequence Transduction with Recurrent Neural Networks, 2012, arXiv 1211.3711.
    """

    def score(frame: Array, prediction: Any) -> tuple[Array, ArrayLike]:
        return joint(frame, prediction), 0

    return _decode("transducer_greedy_decode", score, predictor, encoded, state, max_labels, max_labels_per_frame, logit_lengths, blank)


def tdt_greedy_decode(
    joint: Callable[[Array, Any], tuple[Array, Array]],
    predictor: Callable[[Array, Any], tuple[Any, Any]],
    encoded: ArrayLike,
    state: Any,
    *,
    max_labels: int,
    durations: Sequence[int] = (0, 1, 2, 3, 4),
    max_labels_per_frame: int | None = None,
    logit_lengths: ArrayLike | None = None,
    blank: int = 0,
) -> tuple[Array, Array]:
    """Labels of a token-and-duration transducer that always takes the most probable class and duration, shape [..., max_labels].

    The second result is their number, shape [...]. At frame t after u labels, let z, v = joint(encoded_t, prediction_u), let k = argmax z,
    and let d be the duration with the largest v. If k is not the blank, it is emitted, and u ← u + 1. In both cases t ← t + d. As in NeMo,
    a blank with duration 0 advances by one frame.
    Gradient: none, since the results are integers.

    Args:
        joint: (frames [..., features], prediction) → logits [..., classes] and duration logits [..., durations].
        predictor: (labels [...], state) → (prediction, next state). The first call gets the blank as label, and the initial state.
        encoded: [..., time, features], the output of the encoder.
        state: the initial state of the predictor, a pytree of arrays whose leading axes are `...`.
        max_labels: number of labels after which decoding stops.
        durations: different Python integers, at least 0, and at least one of them above 0, as in `tdt_loss`.
        max_labels_per_frame: number of labels after which decoding goes on to the next frame; None: `max_labels`.
        logit_lengths: [...], number of frames of each sequence; None: all.
        blank: class index of the blank.

    Returns:
        The labels [..., max_labels], int32, with −1 after the end; and their number [...], int32.

    Raises:
        TypeError: an argument has the wrong dtype, or `predictor` or `joint` does not return a pair.
        ValueError: an argument has the wrong shape, or a duration is invalid.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> def predictor(label, state):  # this model needs no labels
        ...     return label, state
        >>> def joint(frame, prediction):  # the frame holds its class and its duration
        ...     return jax.nn.one_hot(frame[..., 0], 4), jax.nn.one_hot(frame[..., 1], 3)
        >>> frames = jnp.array([[2, 2], [3, 1], [0, 1], [1, 2]])  # the first label skips the second frame
        >>> labels, length = xentjax.sequence.tdt_greedy_decode(
        ...     joint, predictor, frames, jnp.array(0), max_labels=3, durations=(0, 1, 2)
        ... )
        >>> labels.tolist(), int(length)
        ([2, 1, -1], 2)

    Reference:
        Xu et al., Efficient Sequence Transduction by Jointly Predicting Tokens and Durations, 2023, arXiv 2304.06795.
    """
    name = "tdt_greedy_decode"
    durations = tdt.checked_durations(name, durations)

    def score(frame: Array, prediction: Any) -> tuple[Array, ArrayLike]:
        logits, of_durations = _pair(name, "joint", joint(frame, prediction), "(logits, duration logits)")
        if of_durations.shape[-1] != len(durations):
            raise ValueError(f"{name}: joint must return one duration logit for each of {durations}; got shape {of_durations.shape}.")
        index, each = (numerics.expand_leading(jnp.array(x, jnp.int32), of_durations.ndim) for x in (range(len(durations)), durations))
        chosen = jnp.argmax(of_durations, axis=-1, keepdims=True).astype(jnp.int32) == index
        return logits, jnp.sum(jnp.where(chosen, each, 0), axis=-1)

    return _decode(name, score, predictor, encoded, state, max_labels, max_labels_per_frame, logit_lengths, blank)


def _decode(
    name: str,
    score: Callable[[Array, Any], tuple[Array, ArrayLike]],
    predictor: Callable[[Array, Any], tuple[Any, Any]],
    encoded: ArrayLike,
    state: Any,
    max_labels: int,
    max_labels_per_frame: int | None,
    logit_lengths: ArrayLike | None,
    blank: int,
) -> tuple[Array, Array]:
    """The labels and their number.

    `score` returns the logits, and the number of frames by which the decoder advances. A blank advances by at least one frame.
    """
    x = checks.asarray(name, "encoded", encoded)
    if x.ndim < 2:
        raise ValueError(f"{name}: encoded must have shape [..., time, features]; got {x.shape}.")
    blank = arguments.blank(name, blank, None)
    most, per_frame = checks.count(name, "max_labels", max_labels), max_labels_per_frame
    per_frame = most if per_frame is None else checks.count(name, "max_labels_per_frame", per_frame)
    leading, time = x.shape[:-2], x.shape[-2]
    none = jnp.zeros((*leading, 0), jnp.int32)
    steps = arguments.sequences(name, none, leading, time, logit_lengths, None, None, "encoded").steps
    if time == 0:
        return jnp.full((*leading, most), -1, jnp.int32), jnp.zeros(leading, jnp.int32)
    zero = jnp.zeros_like(x[..., 0, 0], jnp.int32)  # split over devices like the sequences, as the loop demands of its carry
    ends = zero + time if steps is None else jnp.clip(steps.astype(jnp.int32), 0, time)
    labels = jnp.broadcast_to(zero[..., None] - 1, (*leading, most))

    def predicted(labels: Array, state: Any) -> tuple[Any, Any]:
        return _pair(name, "predictor", predictor(labels, state), "(prediction, next state)")

    def unfinished(carry: Any) -> Array:
        return jnp.any((carry[0] < ends) & (carry[1] < most))

    def step(carry: Any) -> Any:
        t, count, in_frame, labels, prediction, state = carry
        at = jnp.broadcast_to(jnp.minimum(t, time - 1)[..., None, None], (*leading, 1, x.shape[-1]))
        logits, skipped = score(jnp.take_along_axis(x, at, axis=-2).squeeze(-2), prediction)
        if logits.ndim != len(leading) + 1 or logits.shape[:-1] != leading:
            expected = f"({''.join(f'{n}, ' for n in leading)}classes{'' if leading else ','})"
            raise ValueError(f"{name}: joint must return logits of shape {expected}; got {logits.shape}.")
        arguments.blank(name, blank, logits.shape[-1])
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        running = (t < ends) & (count < most)
        emits = running & (best != blank)
        skipped = jnp.where(emits & (in_frame + 1 < per_frame), skipped, jnp.maximum(skipped, 1))
        place = lax.broadcasted_iota(jnp.int32, labels.shape, labels.ndim - 1) == count[..., None]
        labels = jnp.where(place & emits[..., None], best[..., None], labels)
        following = predicted(jnp.where(emits, best, blank), state)
        prediction, state = jax.tree.map(
            lambda new, old: jnp.where(emits.reshape(*leading, *[1] * (new.ndim - len(leading))), new, old), following, (prediction, state)
        )
        t, in_frame = jnp.where(running, t + skipped, t), jnp.where(skipped > 0, 0, in_frame + 1)
        return t, count + emits.astype(count.dtype), in_frame, labels, prediction, state

    prediction, state = predicted(zero + blank, state)
    carry = lax.while_loop(unfinished, step, (zero, zero, zero, labels, prediction, state))
    return carry[3], carry[1]


def _pair(name: str, function: str, result: Any, parts: str) -> tuple[Any, Any]:
    """`result`, unchanged. Raises TypeError unless the caller's function returned a pair."""
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise TypeError(f"{name}: {function} must return a pair {parts}; got {type(result).__name__}.")
    return result[0], result[1]
