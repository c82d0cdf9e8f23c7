"""Samples of classes: samplers whose probabilities are known, and what is drawn from them.

What everything here shares:

- A sampler is a NamedTuple of arrays, a pytree that passes through `jax.jit`. `sample(key, shape)` draws independent ids [*shape],
  int32, in a fixed number of steps; `log_prob(ids)` is log P(id) in nats, NaN outside [0, classes). Any pytree with these two methods
  is a sampler.
- `key`: from `jax.random.key`. Nothing is drawn without one, and the same key draws the same ids.
- Classes are drawn with replacement, so that the number of times that class k is among n draws has the expectation n·P(k).
- Gradient: none. What is drawn does not depend on anything that is learned.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core
from jax.typing import ArrayLike

from xentjax._core import checks, numerics

_MOST_CLASSES = 2**31 - 1  # ids are int32
_MOST_ORDERED_CLASSES = 2**24  # float32, in which a log-uniform id is made, holds no larger odd number


class UniformSampler(NamedTuple):
    """Every class alike, P(k) = 1/classes; made by `uniform_sampler`, draws ids [...]."""

    classes: Array
    """How many classes there are []."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent ids [*shape], int32."""
        return _uniform(one_key("UniformSampler.sample", key), self.classes, tuple(shape))

    def log_prob(self, ids: ArrayLike) -> Array:
        """−log classes for every id [...]; NaN for what is no class."""
        return _uniform_log_prob(checks.integers("UniformSampler.log_prob", "ids", ids), self.classes)


class LogUniformSampler(NamedTuple):
    """Classes in the order of their frequency under Zipf's law, P(k) ≈ 1/((k + 1)·log(classes + 1)); draws ids [...].

    Made by `log_uniform_sampler`, which has the formula.
    """

    classes: Array
    """How many classes there are []."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent ids [*shape], int32."""
        return _log_uniform(one_key("LogUniformSampler.sample", key), self.classes, tuple(shape))

    def log_prob(self, ids: ArrayLike) -> Array:
        """The logarithm of P(id) for every id [...]; NaN for what is no class."""
        return _log_uniform_log_prob(checks.integers("LogUniformSampler.log_prob", "ids", ids), self.classes)


class AliasSampler(NamedTuple):
    """Any distribution over classes, drawn from with two looks into a table; made by `alias_sampler`, draws ids [...]."""

    threshold: Array
    """How often a class that is hit is kept, in units of 2⁻³², [classes] uint32."""
    alias: Array
    """The class taken instead otherwise, [classes] int32."""
    log_probs: Array
    """log P(k), [classes]; −∞ for weight 0."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Ids [*shape], int32, independent."""
        return _aliased(one_key("AliasSampler.sample", key), self.threshold, self.alias, tuple(shape))

    def log_prob(self, ids: ArrayLike) -> Array:
        """The logarithm of P(id) for every id [...]; −∞ for weight 0, NaN for what is no class."""
        return _alias_log_prob(checks.integers("AliasSampler.log_prob", "ids", ids), self.log_probs)


def uniform_sampler(classes: int) -> UniformSampler:
    """The sampler that draws every class alike, ids [...].

    P(k) = 1/classes.
    Gradient: none.

    Args:
        classes: how many classes there are, at least 1.

    Returns:
        `UniformSampler`.

    Raises:
        TypeError: `classes` is not a Python integer.
        ValueError: `classes` < 1 or above 2³¹ − 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> jnp.exp(xentjax.uniform_sampler(4).log_prob(jnp.array([0, 3, 4]))).tolist()  # there is no class 4
        [0.25, 0.25, nan]

    Reference:
        Jean et al., On Using Very Large Target Vocabulary for Neural Machine Translation, 2014, arXiv 1412.2007.
    """
    return UniformSampler(_classes("uniform_sampler", classes, _MOST_CLASSES))


def log_uniform_sampler(classes: int) -> LogUniformSampler:
    """The sampler for classes in falling order of frequency under Zipf's law, ids [...]; needs no table.

    P(k) = log((k + 2)/(k + 1)) / log(classes + 1).
    Gradient: none.

    Args:
        classes: how many classes there are, at least 1. Draws are made in float32: above some 10⁶ classes rare neighbours share
            their probability unevenly, by k·2⁻²² of it.

    Returns:
        `LogUniformSampler`.

    Raises:
        TypeError: `classes` is not a Python integer.
        ValueError: `classes` < 1 or above 2²⁴.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> ids = xentjax.log_uniform_sampler(2**20 - 1).sample(jax.random.key(0), (10_000,))
        >>> round(float((ids < 2**10 - 1).mean()), 1)  # as many draws below a thousand as above
        0.5

    Reference:
        Zipf, Human Behavior and the Principle of Least Effort, 1949.
    """
    return LogUniformSampler(_classes("log_uniform_sampler", classes, _MOST_ORDERED_CLASSES))


def alias_sampler(weights: ArrayLike) -> AliasSampler:
    """The sampler of a distribution given by weights or counts, ids [...]; a draw takes two numbers of a table and no search.

    P(k) = weights_k / Σ weights.
    Gradient: none.

    The table is made once, outside `jax.jit`, in time proportional to the number of classes.

    Args:
        weights: [classes], ≥ 0, not all 0; for `negative_sampling_loss` the counts of words to the power 3/4.

    Returns:
        `AliasSampler`.

    Raises:
        TypeError: weights that are traced or not numbers.
        ValueError: another shape than [classes], a weight that is negative or not finite, weights that are all 0.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> sampler = xentjax.alias_sampler(jnp.array([16.0, 1.0, 0.0]) ** 0.75)
        >>> jnp.exp(sampler.log_prob(jnp.arange(3))).tolist()
        [0.88888..., 0.11111..., 0.0]
        >>> ids = jax.jit(lambda sampler, key: sampler.sample(key, (1000,)))(sampler, jax.random.key(0))  # the table is an argument
        >>> jnp.bincount(ids, length=3)[2].tolist()
        0

    Reference:
        Walker, An Efficient Method for Generating Discrete Random Variables with General Distributions, 1977; Vose, A Linear Algorithm
        for Generating Random Numbers with a Given Distribution, 1991.
    """
    probs = probabilities("alias_sampler", "weights", weights)
    threshold, alias = _alias_table(probs)
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    return AliasSampler(jnp.asarray(threshold), jnp.asarray(alias), jnp.asarray(log_probs, jnp.result_type(float)))


class Samples(NamedTuple):
    """Sampled classes and how often each was to be expected, both [samples] for all examples or [..., samples] for each its own.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> everything = xentjax.Samples(jnp.arange(1000), jnp.zeros(1000))  # every class once: no sampling at all
        >>> everything.ids.shape
        (1000,)
    """

    ids: ArrayLike
    """Class indices, integer."""
    log_expected_count: ArrayLike
    """The logarithm of how often the class was to be expected among the samples; +∞ for a sample that does not count."""


def draw_samples(key: Array, sampler: Any, count: int, *, shape: tuple[int, ...] = (), unique: bool = False) -> Samples:
    """`count` sampled classes with the logarithms of their expected counts, both [*shape, count].

    log_expected_count = `log_expected_count(sampler, ids, count, unique=unique)`: log(n·P(k)), or log(1 − (1 − P(k))^n) with `unique`.
    Gradient: none.

    Args:
        key: of `jax.random.key`.
        sampler: `uniform_sampler`, `log_uniform_sampler`, `alias_sampler`, or a pytree with `sample(key, shape)` and `log_prob(ids)`.
        count: n, how many draws, at least 1.
        shape: () for samples that all examples share, or the leading axes [...] of the examples for each its own.
        unique: whether a class counts once however often it was drawn. Draws that repeat an earlier one get the expected count +∞, with
            which every loss leaves them out.

    Returns:
        `Samples`.

    Raises:
        TypeError: a `key` that is none, `count` that is not a Python integer.
        ValueError: several keys, `count` < 1.

    Example:
        >>> import jax, xentjax
        >>> samples = xentjax.draw_samples(jax.random.key(0), xentjax.uniform_sampler(10), 20)
        >>> samples.ids.shape, samples.log_expected_count[0].tolist()  # log(20/10)
        ((20,), 0.69314...)

    Reference:
        Bengio, Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model, 2008.
    """
    name = "draw_samples"
    return _draw(one_key(name, key), sampler, checks.count(name, "count", count), tuple(shape), unique)


def log_expected_count(sampler: Any, ids: ArrayLike, count: int, *, unique: bool = False) -> Array:
    """The logarithm of how often a class is to be expected among `count` draws, [...].

    log(n·P(k)), or with `unique` log(1 − (1 − P(k))^n), the probability that it is drawn at all.
    Gradient: none.

    Args:
        sampler: what `draw_samples` was given.
        ids: [...], class indices, integer; labels, for instance.
        count: n, how many draws.
        unique: what `draw_samples` was given.

    Returns:
        [...], float32 (float64 under `jax_enable_x64`); NaN for what is no class.

    Raises:
        TypeError: `ids` that are not integers, `count` that is not a Python integer.
        ValueError: `count` < 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> counts = [xentjax.log_expected_count(xentjax.uniform_sampler(2), 0, 3, unique=u) for u in (False, True)]
        >>> jnp.exp(jnp.stack(counts)).tolist()  # 3/2, and 1 − (1/2)³
        [1.5, 0.875]

    Reference:
        Bengio, Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model, 2008.
    """
    name = "log_expected_count"
    return _log_expected_count(sampler, checks.integers(name, "ids", ids), checks.count(name, "count", count), unique)


@functools.partial(jax.jit, static_argnames=("shape",))
def _uniform(key, classes, shape):
    return jax.random.randint(key, shape, 0, classes, jnp.int32)


@jax.jit
def _uniform_log_prob(ids, classes):
    dtype = jnp.result_type(float)
    return _of_classes(ids, classes, jnp.broadcast_to(-jnp.log(jnp.asarray(classes, dtype)), ids.shape))


@functools.partial(jax.jit, static_argnames=("shape",))
def _log_uniform(key, classes, shape):
    """⌊x⌋ − 1 of an x that is log-uniform in [1, classes + 1): first its octave, then its place there.

    The exponential of one number for both would be rounded to steps of more than a class above 10⁵ classes.
    """
    first, second = jax.random.split(key)
    octaves = jnp.log2(jnp.asarray(classes, jnp.float32) + 1)
    octave = jnp.floor(jax.random.uniform(first, shape, jnp.float32) * octaves)
    place = jax.random.uniform(second, shape, jnp.float32) * jnp.minimum(octaves - octave, 1)  # the last octave is cut off
    x = jnp.left_shift(1, octave.astype(jnp.int32)).astype(jnp.float32) * jnp.exp2(place)
    return jnp.clip(x.astype(jnp.int32) - 1, 0, jnp.asarray(classes, jnp.int32) - 1)


@jax.jit
def _log_uniform_log_prob(ids, classes):
    dtype = jnp.result_type(float)
    inside = jnp.maximum(ids, 0).astype(dtype)
    return _of_classes(ids, classes, jnp.log(jnp.log1p(1 / (inside + 1))) - jnp.log(jnp.log1p(jnp.asarray(classes, dtype))))


@functools.partial(jax.jit, static_argnames=("shape",))
def _aliased(key, threshold, alias, shape):
    first, second = jax.random.split(key)
    hit = jax.random.randint(first, shape, 0, threshold.shape[0], jnp.int32)
    kept = jax.random.bits(second, shape, jnp.uint32) < threshold[hit]
    return jnp.where(kept, hit, alias[hit])


@jax.jit
def _alias_log_prob(ids, log_probs):
    return _of_classes(ids, log_probs.shape[0], jnp.take(log_probs, ids, mode="clip"))


def _of_classes(ids, classes, log_probs):
    """`log_probs` of ids that are classes, NaN for others."""
    return numerics.nan_unless((ids >= 0) & (ids < jnp.asarray(classes, ids.dtype)), log_probs)


@functools.partial(jax.jit, static_argnames=("count", "shape", "unique"))
def _draw(key, sampler, count, shape, unique):
    ids = sampler.sample(key, (*shape, count))
    expected = _log_expected_count(sampler, ids, count, unique)
    return Samples(ids, jnp.where(_repeated(ids), jnp.inf, expected) if unique else expected)


@functools.partial(jax.jit, static_argnames=("count", "unique"))
def _log_expected_count(sampler, ids, count, unique):
    log_prob = sampler.log_prob(ids)
    if not unique or count == 1:
        return log_prob + np.log(count).astype(log_prob.dtype)
    certain = log_prob == 0
    missed = jnp.log1p(-jnp.exp(numerics.where(certain, -1, log_prob)))  # log(1 − P); of P = 1 nobody may ask
    return numerics.where(certain, 0, jnp.log(-jnp.expm1(count * missed)))


def _repeated(ids):
    """Whether an equal id stands earlier on the last axis."""
    order = jnp.argsort(ids, axis=-1, stable=True)
    ordered = jnp.take_along_axis(ids, order, axis=-1)
    again = jnp.concatenate([jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    return jnp.take_along_axis(again, jnp.argsort(order, axis=-1), axis=-1)


def _alias_table(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds in units of 2⁻³² and aliases: every class fills a cell of size 1/classes, what is too much for one fills up another."""
    fill = (probs * len(probs)).tolist()
    alias = np.full(len(fill), np.argmax(probs), np.int32)
    small = [k for k, share in enumerate(fill) if share < 1]
    large = [k for k, share in enumerate(fill) if share >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        alias[low] = high
        fill[high] -= 1 - fill[low]
        if fill[high] < 1:
            small.append(large.pop())
    for k in small + large:  # 1 but for rounding
        fill[k] = float(probs[k] > 0)
        alias[k] = k if probs[k] > 0 else alias[k]
    return np.minimum(np.rint(np.asarray(fill) * 2.0**32), 2.0**32 - 1).astype(np.uint32), alias


def probabilities(function: str, name: str, weights: ArrayLike) -> np.ndarray:
    """Weights as probabilities, float64."""
    if isinstance(weights, core.Tracer):
        raise TypeError(
            f"{function}: {name} must be known before tracing; got a traced array. Call {function} outside and pass its result in."
        )
    w = np.asarray(weights)
    if not (jnp.issubdtype(w.dtype, jnp.floating) or jnp.issubdtype(w.dtype, jnp.integer)):
        raise TypeError(f"{function}: {name} must be numbers; got {w.dtype}.")
    if w.ndim != 1 or w.size == 0:
        raise ValueError(f"{function}: {name} must have shape (classes,), one per class; got {w.shape}.")
    w = w.astype(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(w) & (w >= 0)))
    if wrong.size:
        raise ValueError(f"{function}: {name} must be finite and at least 0; got {name}[{wrong[0]}] = {w[wrong[0]]:g}.")
    if not w.any():
        raise ValueError(f"{function}: {name} must not all be 0.")
    w = w / w.max()
    return w / w.sum()


def _classes(function: str, classes: int, most: int) -> Array:
    if checks.count(function, "classes", classes) > most:
        raise ValueError(f"{function}: classes must be at most {most}; got {classes}.")
    return jnp.asarray(classes, jnp.int32)


def one_key(function: str, key: Array) -> Array:
    """One key, typed or (older) as its raw bits."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        raise TypeError(
            f"{function}: key must be a key of jax.random; got {type(key).__name__ if dtype is None else dtype}. Use jax.random.key(0)."
        )
    if shape[: len(shape) - (not typed)]:
        raise ValueError(f"{function}: key must be one key; got keys of shape {shape}. Use jax.vmap, or `shape` for more samples.")
    return key
