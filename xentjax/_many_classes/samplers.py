"""Samplers of classes, and the samples drawn from them. `xentjax.samplers` documents the conventions."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics
from xentjax._many_classes import arguments

_MOST_CLASSES = 2**31 - 1  # ids are int32
_MOST_ORDERED_CLASSES = 2**24  # a log-uniform id is computed in float32, which represents every integer only up to 2²⁴


class Sampler(Protocol):
    """A distribution over classes from which class ids can be drawn. A sampler is a pytree."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent random class ids, shape [*shape], int32."""
        ...

    def log_prob(self, ids: ArrayLike) -> Array:
        """Log P(id) for every id, shape [...]; NaN for ids outside [0, classes)."""
        ...


class Uniform(NamedTuple):
    """Uniform distribution over classes. Sampled class ids have shape [...].

    P(k) = 1/classes. `samplers.uniform` makes this sampler.
    """

    classes: Array
    """The number of classes []."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent random class ids, shape [*shape], int32."""
        return _uniform(arguments.random_key("samplers.Uniform.sample", key), self.classes, tuple(shape))

    def log_prob(self, ids: ArrayLike) -> Array:
        """−log classes for every id, shape [...]; NaN for ids outside [0, classes)."""
        return _uniform_log_prob(checks.integers("samplers.Uniform.log_prob", "ids", ids), self.classes)


@functools.partial(jax.jit, static_argnames=("shape",))
def _uniform(key: Array, classes: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.randint(key, shape, 0, classes, jnp.int32)


@jax.jit
def _uniform_log_prob(ids: Array, classes: Array) -> Array:
    dtype = jnp.result_type(float)
    return _nan_outside(ids, classes, jnp.broadcast_to(-jnp.log(jnp.asarray(classes, dtype)), ids.shape))


def uniform(classes: int) -> Uniform:
    """Sampler that draws all classes with the same probability. Sampled ids have shape [...].

    P(k) = 1/classes.
    Gradient: none.

    Args:
        classes: number of classes, at least 1.

    Returns:
        `samplers.Uniform`.

    Raises:
        TypeError: `classes` is not a Python integer.
        ValueError: `classes` is below 1 or above 2³¹ − 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> jnp.exp(xentjax.samplers.uniform(4).log_prob(jnp.array([0, 3, 4]))).tolist()  # class 4 does not exist
        [0.25, 0.25, nan]

    Reference:
        Jean et al., On Using Very Large Target Vocabulary for Neural Machine Translation, 2014, arXiv 1412.2007.
    """
    return Uniform(_class_count("samplers.uniform", classes, _MOST_CLASSES))


class LogUniform(NamedTuple):
    """Zipf distribution over classes. Sampled class ids have shape [...].

    P(k) ≈ 1/((k + 1)·log(classes + 1)). `samplers.log_uniform` makes this sampler and documents the exact formula. Classes must be numbered
    in descending order of frequency.
    """

    classes: Array
    """The number of classes []."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent random class ids, shape [*shape], int32."""
        return _log_uniform(arguments.random_key("samplers.LogUniform.sample", key), self.classes, tuple(shape))

    def log_prob(self, ids: ArrayLike) -> Array:
        """Log P(id) for every id, shape [...]; NaN for ids outside [0, classes)."""
        return _log_uniform_log_prob(checks.integers("samplers.LogUniform.log_prob", "ids", ids), self.classes)


@functools.partial(jax.jit, static_argnames=("shape",))
def _log_uniform(key: Array, classes: Array, shape: tuple[int, ...]) -> Array:
    """⌊x⌋ − 1, where x is log-uniform in [1, classes + 1): first the octave of x is drawn, then the position in the octave.

    A single exponential e^u would be rounded too coarsely: with more than 10⁵ classes, float32 steps are wider than a class.
    """
    first, second = jax.random.split(key)
    octaves = jnp.log2(jnp.asarray(classes, jnp.float32) + 1)
    octave = jnp.floor(jax.random.uniform(first, shape, jnp.float32) * octaves)
    position = jax.random.uniform(second, shape, jnp.float32) * jnp.minimum(octaves - octave, 1)  # the last octave is incomplete
    x = jnp.left_shift(1, octave.astype(jnp.int32)).astype(jnp.float32) * jnp.exp2(position)
    return jnp.clip(x.astype(jnp.int32) - 1, 0, jnp.asarray(classes, jnp.int32) - 1)


@jax.jit
def _log_uniform_log_prob(ids: Array, classes: Array) -> Array:
    dtype = jnp.result_type(float)
    inside = jnp.maximum(ids, 0).astype(dtype)
    return _nan_outside(ids, classes, jnp.log(jnp.log1p(1 / (inside + 1))) - jnp.log(jnp.log1p(jnp.asarray(classes, dtype))))


def log_uniform(classes: int) -> LogUniform:
    """Sampler that follows Zipf's law. Sampled ids have shape [...].

    Classes must be numbered in descending order of frequency.

    P(k) = log((k + 2)/(k + 1)) / log(classes + 1).
    Gradient: none.

    The sampler needs no table. Draws are computed in float32. With more than about 10⁶ classes, rounding in float32 distributes probability
    unevenly among neighbouring rare classes. The relative error of P(k) is about k·2⁻²².

    Args:
        classes: number of classes, at least 1.

    Returns:
        `samplers.LogUniform`.

    Raises:
        TypeError: `classes` is not a Python integer.
        ValueError: `classes` is below 1 or above 2²⁴.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> ids = xentjax.samplers.log_uniform(2**20 - 1).sample(jax.random.key(0), (10_000,))
        >>> round(float((ids < 2**10 - 1).mean()), 1)  # half of the draws are among the 1,023 most frequent classes
        0.5

    Reference:
        Zipf, Human Behavior and the Principle of Least Effort, 1949.
    """
    return LogUniform(_class_count("samplers.log_uniform", classes, _MOST_ORDERED_CLASSES))


class Alias(NamedTuple):
    """Any distribution over classes, stored as an alias table. Sampled class ids have shape [...].

    `samplers.alias` makes this sampler. The table has one cell for each class. A draw selects a random cell. It returns either the class of
    the cell or the alias of the cell.
    """

    threshold: Array
    """[classes] uint32, the probability that a draw returns the class of the cell, in units of 2⁻³²."""
    alias: Array
    """[classes] int32, the alias of each cell. A draw that does not return the class of the cell returns the alias."""
    log_probs: Array
    """[classes], log P(k); −∞ for weight 0."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent random class ids, shape [*shape], int32."""
        return _aliased(arguments.random_key("samplers.Alias.sample", key), self.threshold, self.alias, tuple(shape))

    def log_prob(self, ids: ArrayLike) -> Array:
        """Log P(id) for every id, shape [...]; −∞ for weight 0, NaN for ids outside [0, classes)."""
        return _alias_log_prob(checks.integers("samplers.Alias.log_prob", "ids", ids), self.log_probs)


@functools.partial(jax.jit, static_argnames=("shape",))
def _aliased(key: Array, threshold: Array, alias: Array, shape: tuple[int, ...]) -> Array:
    first, second = jax.random.split(key)
    hit = jax.random.randint(first, shape, 0, threshold.shape[0], jnp.int32)
    kept = jax.random.bits(second, shape, jnp.uint32) < threshold[hit]
    return jnp.where(kept, hit, alias[hit])


@jax.jit
def _alias_log_prob(ids: Array, log_probs: Array) -> Array:
    return _nan_outside(ids, log_probs.shape[0], jnp.take(log_probs, ids, mode="clip"))


def alias(weights: ArrayLike) -> Alias:
    """Sampler that draws classes in proportion to given weights. Sampled ids have shape [...].

    P(k) = weights_k / Σ weights.
    Gradient: none.

    Call `alias` once, outside `jax.jit`. It builds a table in time proportional to the number of classes. Each draw then takes two look-ups
    and no search.

    Args:
        weights: [classes], ≥ 0, not all 0; counts can be used as weights. For `negative_sampling_loss`, use word counts to the power 3/4.

    Returns:
        `samplers.Alias`.

    Raises:
        TypeError: `weights` are traced or not numbers.
        ValueError: `weights` do not have shape [classes], are all 0, or have a negative or non-finite entry.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> sampler = xentjax.samplers.alias(jnp.array([16.0, 1.0, 0.0]) ** 0.75)
        >>> jnp.exp(sampler.log_prob(jnp.arange(3))).tolist()
        [0.88888..., 0.11111..., 0.0]
        >>> ids = jax.jit(lambda sampler, key: sampler.sample(key, (1000,)))(sampler, jax.random.key(0))  # the table is an argument
        >>> jnp.bincount(ids, length=3)[2].tolist()
        0

    Reference:
        Walker, An Efficient Method for Generating Discrete Random Variables with General Distributions, 1977; Vose, A Linear Algorithm
        for Generating Random Numbers with a Given Distribution, 1991.
    """
    probs = arguments.probabilities("samplers.alias", "weights", weights)
    threshold, alias = _alias_table(probs)
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    return Alias(jnp.asarray(threshold), jnp.asarray(alias), jnp.asarray(log_probs, jnp.result_type(float)))


def _alias_table(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The thresholds in units of 2⁻³², and the aliases.

    Each class has a cell of size 1/classes. A class with a larger probability fills the rest of the cells of rarer classes.
    """
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
    for k in small + large:  # 1, except for rounding errors
        fill[k] = float(probs[k] > 0)
        alias[k] = k if probs[k] > 0 else alias[k]
    return np.minimum(np.rint(np.asarray(fill) * 2.0**32), 2.0**32 - 1).astype(np.uint32), alias


class Samples(NamedTuple):
    """Sampled classes and their log expected counts, shape [samples] or [..., samples].

    The shape is [samples] if all examples share the samples, and [..., samples] if each example has its own.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> everything = xentjax.samplers.Samples(jnp.arange(1000), jnp.zeros(1000))  # every class exactly once
        >>> everything.ids.shape
        (1000,)
    """

    ids: ArrayLike
    """Integer class indices."""
    log_expected_count: ArrayLike
    """The log of the expected count of each sampled class among all samples; +∞ for samples that do not count."""


def draw(key: Array, sampler: Sampler, count: int, *, shape: tuple[int, ...] = (), unique: bool = False) -> Samples:
    """Sampled classes and their log expected counts, both of shape [*shape, count].

    The log expected count of class k is log(n·P(k)). With `unique`, it is log(1 − (1 − P(k))^n). `samplers.log_expected_count` computes it
    for other classes.
    Gradient: none.

    Args:
        key: a random key from `jax.random.key`.
        sampler: made by `samplers.uniform`, `samplers.log_uniform` or `samplers.alias`. It may also be any pytree with the methods
            `sample(key, shape)` and `log_prob(ids)`.
        count: n ≥ 1, number of draws.
        shape: () if all examples share the samples. If each example has its own samples, pass the leading axes [...] of the examples.
        unique: whether a class counts only once, no matter how often it is drawn. The second and later draws of a class get a log expected
            count of +∞, and every loss leaves them out.

    Returns:
        `samplers.Samples`.

    Raises:
        TypeError: `key` is not a JAX random key, `sampler` is not a sampler, or `count` is not a Python integer.
        ValueError: `key` holds several keys, or `count` is below 1.

    Example:
        >>> import jax, xentjax
        >>> samples = xentjax.samplers.draw(jax.random.key(0), xentjax.samplers.uniform(10), 20)
        >>> samples.ids.shape, samples.log_expected_count[0].tolist()  # log(20/10)
        ((20,), 0.69314...)

    Reference:
        Bengio, Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model, 2008.
    """
    name = "samplers.draw"
    _check_sampler(name, sampler)
    return _draw(arguments.random_key(name, key), sampler, checks.count(name, "count", count), tuple(shape), unique)


@functools.partial(jax.jit, static_argnames=("count", "shape", "unique"))
def _draw(key: Array, sampler: Sampler, count: int, shape: tuple[int, ...], unique: bool) -> Samples:
    ids = sampler.sample(key, (*shape, count))
    expected = _log_expected_count(sampler, ids, count, unique)
    return Samples(ids, jnp.where(_repeated(ids), jnp.inf, expected) if unique else expected)


def log_expected_count(sampler: Sampler, ids: ArrayLike, count: int, *, unique: bool = False) -> Array:
    """Logarithm of the expected count of each class among `count` draws, shape [...].

    The result is log(n·P(k)). With `unique`, it is log(1 − (1 − P(k))^n), the log of the probability that class k is drawn at least once.
    Gradient: none.

    Args:
        sampler: the sampler that was passed to `samplers.draw`.
        ids: [...], integer class indices, such as labels.
        count: n ≥ 1, number of draws.
        unique: the value of `unique` that was passed to `samplers.draw`.

    Returns:
        [...], float32, or float64 under `jax_enable_x64`; NaN for ids outside [0, classes).

    Raises:
        TypeError: `sampler` is not a sampler, `ids` are not integers, or `count` is not a Python integer.
        ValueError: `count` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> coin = xentjax.samplers.uniform(2)
        >>> counts = [xentjax.samplers.log_expected_count(coin, 0, 3, unique=u) for u in (False, True)]
        >>> jnp.exp(jnp.stack(counts)).tolist()  # 3/2, and 1 − (1/2)³
        [1.5, 0.875]

    Reference:
        Bengio, Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model, 2008.
    """
    name = "samplers.log_expected_count"
    _check_sampler(name, sampler)
    return _log_expected_count(sampler, checks.integers(name, "ids", ids), checks.count(name, "count", count), unique)


@functools.partial(jax.jit, static_argnames=("count", "unique"))
def _log_expected_count(sampler: Sampler, ids: Array, count: int, unique: bool) -> Array:
    log_prob = sampler.log_prob(ids)
    if not unique or count == 1:
        return log_prob + np.log(count).astype(log_prob.dtype)
    certain = log_prob == 0  # P = 1: log(1 − P) is −∞, so −1 replaces log P there and the result is set to log 1 = 0
    log_missed = jnp.log1p(-jnp.exp(numerics.where(certain, -1, log_prob)))
    return numerics.where(certain, 0, jnp.log(-jnp.expm1(count * log_missed)))


def _nan_outside(ids: Array, classes: Array | int, log_probs: Array) -> Array:
    """`log_probs` where ids are in [0, classes), NaN elsewhere."""
    return numerics.nan_unless((ids >= 0) & (ids < jnp.asarray(classes, ids.dtype)), log_probs)


def _repeated(ids: Array) -> Array:
    """Whether the same id occurs earlier on the last axis."""
    order = jnp.argsort(ids, axis=-1, stable=True)
    ordered = jnp.take_along_axis(ids, order, axis=-1)
    again = jnp.concatenate([jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    return jnp.take_along_axis(again, jnp.argsort(order, axis=-1), axis=-1)


def _check_sampler(function: str, sampler: Sampler) -> None:
    arguments.check_fields(function, "sampler", sampler, ("sample", "log_prob"), "a sampler, such as samplers.uniform(classes)")


def _class_count(function: str, classes: int, most: int) -> Array:
    """The number of classes as an int32 array, if it is in [1, most]."""
    if checks.count(function, "classes", classes) > most:
        raise ValueError(f"{function}: classes must be at most {most}; got {classes}.")
    return jnp.asarray(classes, jnp.int32)
