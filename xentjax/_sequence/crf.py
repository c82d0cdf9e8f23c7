"""Linear-chain conditional random fields (CRF). Conventions are documented in `xentjax.sequence`.

Loss. The score of every tagging is compared with the score of the labels. The weight of a tagging is e^(its score − the score of the
labels), so the weight of the labels is 1. Let R be the sum of the weights of all other taggings. Then loss = log(1 + R) = softplus(log R),
which is accurate for every R.

Lattice. The lattice contains the taggings that have differed from the labels at this position or before. Its states are their tags. A
tagging that has not differed yet has weight 1 and needs no state. It enters the lattice at the first position where it differs from the
labels. The log-weight of each step is a score minus the score of the labels. Where the tagging agrees with the labels, this difference is 0
and its derivative is 0. So no derivative is a difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values
from xentjax._sequence import arguments, devices, lattice, scaled
from xentjax._sequence.scaled import Scaled


def crf_loss(
    unary: ArrayLike,
    labels: ArrayLike,
    transitions: ArrayLike,
    *,
    start: ArrayLike | None = None,
    end: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Negative log-probability of a tagging under a linear-chain conditional random field, shape [...].

    loss = log Σ_v e^(s(v)) − s(y), with s(y) = a(y_1) + Σ_t z_t(y_t) + Σ_t w(y_{t−1}, y_t) + b(y_T)

    Here v runs over all taggings, z is `unary`, w is `transitions`, a is `start` and b is `end`.
    Gradient: ∂loss/∂z_t(k) = P(y_t = k) − [y_t = k]. Likewise, the gradient of every other score is the expected number of times that a
    tagging uses it, under the model, minus the number of times that the labels use it.

    Even a loss of 1e-15 has a small relative error in float32. The loss is never negative.

    Args:
        unary: [..., time, tags], scores of the tags at every position.
        labels: [..., time] tag indices. A label outside the range of tags gives NaN.
        transitions: [tags, tags], scores of a tag (row) followed by another (column). −∞ forbids a transition.
        start: [tags], scores of the first tag; None: 0.
        end: [tags], scores of the last tag; None: 0.
        where: [..., time], True for positions that count. Other positions are left out, as if the sequence did not contain them.

    Returns:
        [...], in nats, float32, or float64 if any of the scores are float64. +∞ with gradient 0 if the labels are forbidden. 0 for a
        sequence without positions that count.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> unary, labels = jnp.zeros((3, 2)), jnp.array([0, 0, 1])
        >>> forbidden = jnp.array([[0.0, 0.0], [-jnp.inf, 0.0]])  # tag 1 is never followed by tag 0
        >>> float(xentjax.crf_loss(unary, labels, forbidden))  # log 4: 000, 001, 011, 111
        1.38629...

    Reference:
        Lafferty et al., Conditional Random Fields: Probabilistic Models for Segmenting and Labeling Sequence Data, 2001.
    """
    name = "crf_loss"
    of_labels, of_transitions = (getattr(x, "dtype", jnp.bool_) for x in (labels, transitions))
    if jnp.issubdtype(of_labels, jnp.floating) and jnp.issubdtype(of_transitions, jnp.integer):
        raise TypeError(
            f"{name}: labels must have an integer dtype, and transitions a floating dtype; got {of_labels} and {of_transitions}. "
            f"Use {name}(unary, labels, transitions)."
        )
    model = check(name, unary, transitions, start, end, where)
    y = checks.integers(name, "labels", labels)
    checks.same_shape(name, "labels", y, model.unary.shape[:-1], "the shape of unary without its tag axis")
    values.indices(name, "labels", y, model.unary.shape[-1], model.where)
    return _crf(model, y)


@jax.jit
def _crf(model: Model, labels: Array) -> Array:
    return on_each_device(_of_tagging, model, labels)


def _of_tagging(model: Model, labels: Array) -> Array:
    model = prepared(model)
    live, tags = model.where, model.unary.shape[-1]
    assert live is not None
    y = jnp.where(live, labels, 0)
    valid = jnp.all((y >= 0) & (y < tags), axis=-1)
    y = jnp.clip(y, 0, tags - 1)
    first, before = _before(live, y)
    here = y[..., None] == lax.broadcasted_iota(y.dtype, model.unary.shape, live.ndim)

    def at(mask: Array, x: Array) -> Array:
        return jnp.sum(jnp.where(mask, x, jnp.zeros_like(x)), axis=-1)

    shape = model.unary.shape
    leaving = jnp.where(first[..., None], jnp.broadcast_to(_row(model.start, shape), shape), model.transitions[before])
    ending = jnp.broadcast_to(_row(model.end, (*shape[:-2], tags)), (*shape[:-2], tags))
    last = _last(live, y)[..., None] == lax.broadcasted_iota(y.dtype, ending.shape, ending.ndim - 1)
    gold = [at(here, model.unary), at(here, leaving), at(last, ending)]
    none = jnp.any(gold[0] == -jnp.inf, axis=-1) | jnp.any(live & (gold[1] == -jnp.inf), axis=-1)
    none |= jnp.any(live, axis=-1) & (gold[2] == -jnp.inf)
    gold = [jnp.where(x == -jnp.inf, jnp.zeros_like(x), x) for x in gold]

    def compared(same: Array, x: Array, gold: Array) -> Array:
        """`x` minus the score of the labels. At the tag of the labels, it is exactly 0, with derivative 0."""
        return jnp.where(same, jnp.zeros_like(x), jnp.minimum(x - gold[..., None], jnp.finfo(x.dtype).max))

    xs = _Position(
        unary=compared(here, model.unary, gold[0]),
        entering=jnp.where(here, jnp.full_like(leaving, -jnp.inf), compared(here, leaving, gold[1])),
        transition=jnp.where(first, jnp.zeros_like(gold[1]), -gold[1]),
    )
    weights = of(model, live, xs, (jnp.where(first, -1, before), jnp.where(first, -1, y)), compared(last, ending, gold[2]))
    total = lattice.log_total(CHAIN, weights)
    return arguments.finish(numerics.softplus(total), valid, none, None)


class Model(NamedTuple):
    """The checked scores of a conditional random field."""

    unary: Array  # [..., time, tags]
    transitions: Array  # [tags, tags]
    start: Array | None  # [tags]
    end: Array | None  # [tags]
    where: Array | None  # [..., time]


def check(
    function: str,
    unary: ArrayLike,
    transitions: ArrayLike,
    start: ArrayLike | None,
    end: ArrayLike | None,
    where: ArrayLike | None,
) -> Model:
    """The checked scores."""
    u = arguments.logits(function, "unary", unary, 2, "[..., time, tags]")
    tags = u.shape[-1]
    if tags == 0:
        raise ValueError(f"{function}: unary must have at least one tag; got shape {u.shape}.")
    w = checks.shape(
        function,
        "transitions",
        checks.floating(function, "transitions", transitions),
        (tags, tags),
        "one row and one column per tag of unary",
    )
    ends = [
        None if x is None else checks.shape(function, name, checks.floating(function, name, x), (tags,), "one score per tag of unary")
        for name, x in (("start", start), ("end", end))
    ]
    counts = checks.where_mask(function, where, u.shape[:-1], "the shape of unary without its tag axis")
    values.logits(function, "unary", u, counts)
    for name, x in (("transitions", w), ("start", ends[0]), ("end", ends[1])):
        if x is not None:
            values.logits(function, name, x)
    return Model(u, w, ends[0], ends[1], counts)


def on_each_device(f: Callable[..., Any], model: Model, *batched: Array) -> Any:
    """`f(model, *batched)`, where an explicit mesh may split the batch (see `devices`)."""

    def of_batch(unary: Array, where: Array | None, *others: Any) -> Any:
        *rest, transitions, start, end = others
        return f(Model(unary, transitions, start, end, where), *rest)

    shared = (model.transitions, model.start, model.end)
    return devices.on_each(of_batch, model.unary.ndim - 2, (model.unary, model.where, *batched), shared)


def prepared(model: Model) -> Model:
    """The scores in one dtype, 0 at positions that do not count, and all arrays present."""
    dtype = numerics.accumulation_dtype(*(x.dtype for x in model[:4] if x is not None))
    live = jnp.ones(model.unary.shape[:-1], bool) if model.where is None else model.where

    def converted(x: Array | None) -> Array:
        return jnp.zeros(model.unary.shape[-1], dtype) if x is None else x.astype(dtype)

    unary = jnp.where(live[..., None], model.unary, jnp.zeros_like(model.unary))
    return Model(converted(unary), converted(model.transitions), converted(model.start), converted(model.end), live)


def partition(model: Model) -> lattice.Weights:
    """The lattice of all taggings of a prepared model."""
    live, shape = model.where, model.unary.shape
    assert live is not None
    nothing = jnp.full(live.shape, -1, jnp.int32)
    first = _before(live, nothing)[0]
    entering = jnp.where(first[..., None], jnp.broadcast_to(_row(model.start, shape), shape), -jnp.inf)
    xs = _Position(model.unary, entering, jnp.zeros(live.shape, model.unary.dtype))
    ending = (*shape[:-2], shape[-1])
    return of(model, live, xs, (nothing, nothing), jnp.broadcast_to(_row(model.end, ending), ending))


def score(model: Model, y: Array) -> Array:
    """The score of a tagging [..., time] under a prepared model, shape [...]."""
    live, tags = model.where, model.unary.shape[-1]
    assert live is not None
    first, before = _before(live, y)
    tag = numerics.expand_leading(jnp.arange(tags, dtype=y.dtype), y.ndim + 1)
    source = jnp.where(first[..., None], _row(model.start, model.unary.shape), model.transitions[before])
    chosen = jnp.where((y[..., None] == tag) & live[..., None], model.unary + source, 0)
    last = _last(live, y)[..., None] == tag[0]
    return jnp.sum(chosen, axis=(-2, -1)) + jnp.sum(jnp.where(last, _row(model.end, last.shape), 0), axis=-1)


def _row(x: Array | None, shape: tuple[int, ...]) -> Array:
    assert x is not None
    return numerics.expand_leading(x, len(shape))


def _before(live: Array, y: Array) -> tuple[Array, Array]:
    """Whether a position is the first that counts, and the label of the last position before it that counts, each [..., time]."""
    index = lax.broadcasted_iota(jnp.int32, live.shape, live.ndim - 1)
    latest = lax.cummax(jnp.where(live, index, -1), axis=live.ndim - 1)
    earlier = jnp.concatenate([jnp.full_like(latest[..., :1], -1), latest[..., :-1]], axis=-1)
    return live & (earlier < 0), jnp.take_along_axis(y, jnp.maximum(earlier, 0), axis=-1)


def _last(live: Array, y: Array) -> Array:
    """The label of the last position that counts, shape [...]."""
    if y.shape[-1] == 0:
        return jnp.zeros(y.shape[:-1], y.dtype)
    index = lax.broadcasted_iota(jnp.int32, live.shape, live.ndim - 1)
    latest = jnp.max(jnp.where(live, index, 0), axis=-1, keepdims=True)
    return jnp.take_along_axis(y, latest, axis=-1).squeeze(-1)


# The lattice -------------------------------------------------------------------------------------------------------------


class _Position(NamedTuple):
    """The log-weights of a position."""

    unary: Any  # [..., tags]
    entering: Any  # [..., tags], of a tagging that enters the lattice at this position
    transition: Any  # [...], added to the log-weights of all transitions except that of the labels, whose log-weight is 0


def of(model: Model, live: Array, xs: _Position, gold: tuple[Array, Array], end: Array) -> lattice.Weights:
    """The lattice. `gold` are the tags before and after the transition of the labels at each position [..., time]; −1 if there is none."""
    time, tags = live.ndim - 1, model.unary.shape[-1]
    move = jax.tree.map(lambda x: jnp.moveaxis(x, time, 0), (xs, gold, live))
    shared = jnp.broadcast_to(numerics.expand_leading(model.transitions, live.ndim + 1), (*live.shape[:-1], tags, tags))
    return lattice.Weights(jnp.zeros(end.shape, bool), move[0], shared, end, None, move[1], (), move[2])


def _masks(alpha: Scaled, gold: tuple[Array, Array]) -> tuple[Array, Array]:
    """Whether a tag is that of the labels before and after the transition, each [..., tags]."""
    tag = lax.broadcasted_iota(gold[0].dtype, alpha.mantissa.shape, alpha.mantissa.ndim - 1)
    return gold[0][..., None] == tag, gold[1][..., None] == tag


def _advance(alpha: Scaled, x: _Position, transitions: Scaled, gold: tuple[Array, Array], fixed: Any) -> Scaled:
    alpha = lax.optimization_barrier(scaled.normalized(alpha))  # normalized once per tag, not once per transition
    source, target = _masks(alpha, gold)
    along = scaled.times(Scaled(*(part[..., None] for part in alpha)), transitions)
    moved = scaled.add_over(scaled.selected(~(source[..., None] & target[..., None, :]), along), -2)
    moved = scaled.times(moved, Scaled(*(part[..., None] for part in x.transition)))
    kept = scaled.add_over(scaled.selected(source, alpha), -1)  # the transition of the labels has weight 1
    kept = scaled.selected(target, Scaled(*(jnp.broadcast_to(part[..., None], target.shape) for part in kept)))
    return scaled.times(scaled.add(moved, kept, x.entering), x.unary)


def _retreat(
    bar: Array, alpha: Scaled, after: Scaled, x: _Position, transitions: Scaled, gold: tuple[Array, Array], fixed: Any
) -> tuple[Array, _Position, Array]:
    source, target = _masks(alpha, gold)
    arriving = scaled.times(Scaled(bar, -after.exponent), x.unary)
    step = Scaled(*(part[..., None] for part in x.transition))
    onward = Scaled(*(part[..., None, :] for part in scaled.times(arriving, step)))
    flow = scaled.times(transitions, onward)
    flow = flow.mantissa * scaled.power(flow.exponent + alpha.exponent[..., None])
    flow = jnp.where(source[..., None] & target[..., None, :], jnp.zeros_like(flow), flow)
    kept = jnp.where(target, arriving.mantissa, jnp.zeros_like(bar)), jnp.where(target, arriving.exponent, jnp.zeros_like(bar))
    mantissa, exponent = (jnp.sum(part, axis=-1, keepdims=True) for part in kept)
    by_gold = jnp.where(source, mantissa * scaled.power(exponent + alpha.exponent), jnp.zeros_like(bar))
    moved = jnp.sum(flow, axis=-1)
    entering = scaled.times(arriving, x.entering)
    of_x = _Position(bar * after.mantissa, entering.mantissa * scaled.power(entering.exponent), jnp.sum(alpha.mantissa * moved, axis=-1))
    return moved + by_gold, of_x, alpha.mantissa[..., None] * flow


CHAIN = lattice.Lattice(_advance, _retreat, None, segments=False)
