"""The numbers that the contenders of a linear loss get, the result in float64, and how far from it a result is.

Hidden and kernel are normal, scaled so that the logits have a standard deviation of about 1, as in an untrained network, where no
gradient is small enough to be left out; labels are uniform.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import Shape

_BLOCK = 2**24  # numbers of the kernel that exist in float64 at a time


class Result(NamedTuple):
    """Mean loss [] and its gradients, of hidden [tokens, features] and of the kernel [features, classes]."""

    value: np.ndarray
    hidden: np.ndarray
    kernel: np.ndarray


class Problem:
    """hidden [tokens, features], kernel [features, classes] and labels [tokens], as NumPy arrays and, made when asked for, as JAX's."""

    def __init__(self, hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray):
        """Keeps the arrays as they are."""
        self.hidden, self.kernel, self.labels = hidden, kernel, labels

    def first(self, tokens: int) -> "Problem":
        """The same layer on its first examples."""
        return Problem(self.hidden[:tokens], self.kernel, self.labels[:tokens])

    @functools.cached_property
    def kernel_classes_first(self) -> np.ndarray:
        """The kernel as [classes, features], in memory."""
        return np.ascontiguousarray(self.kernel.T)

    @functools.cached_property
    def on_device(self) -> tuple:
        """JAX arrays: hidden, kernel, labels."""
        return jnp.asarray(self.hidden), jnp.asarray(self.kernel), jnp.asarray(self.labels)

    @functools.cached_property
    def on_device_classes_first(self) -> tuple:
        """JAX arrays: hidden, kernel [classes, features], labels."""
        return self.on_device[0], jnp.asarray(self.kernel_classes_first), self.on_device[2]


def draw(shape: Shape) -> Problem:
    """The problem of a shape, the same in every process."""
    tokens, features, classes, dtype = shape
    assert features is not None
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, features), np.float32).astype(jnp.dtype(dtype))
    kernel = (rng.standard_normal((features, classes), np.float32) * np.float32(features**-0.5)).astype(jnp.dtype(dtype))
    return Problem(hidden, kernel, rng.integers(0, classes, tokens, np.int32))


def _blocks(length: int, width: int) -> list[slice]:
    step = max(1, _BLOCK // width)
    return [slice(start, start + step) for start in range(0, length, step)]


def truth(problem: Problem) -> Result:
    """The result in float64; the kernel is widened a block of classes at a time, its gradient exists whole."""
    hidden, labels = problem.hidden.astype(np.float64), problem.labels
    (tokens, features), classes = hidden.shape, problem.kernel.shape[1]
    rows, blocks = np.arange(tokens), _blocks(classes, features)
    logits = np.concatenate([hidden @ problem.kernel[:, b].astype(np.float64) for b in blocks], axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    label_logits = logits[rows, labels]
    slope = np.exp(logits, out=logits)
    totals = slope.sum(axis=1)
    slope /= totals[:, None]
    slope[rows, labels] -= 1
    slope /= tokens
    hidden_gradient = sum(slope[:, b] @ problem.kernel[:, b].astype(np.float64).T for b in blocks)
    return Result(np.mean(np.log(totals) - label_logits), np.asarray(hidden_gradient), hidden.T @ slope)


def errors(result: Result, exact: Result) -> tuple[float, float]:
    """Relative error of the value; largest absolute error of a gradient over its largest true component, the worse of the two."""
    value = abs(float(result.value) - float(exact.value)) / abs(float(exact.value))
    gradients = []
    for ours, theirs in zip(result[1:], exact[1:], strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"a gradient has shape {ours.shape} and not {theirs.shape}.")
        differences = [np.abs(ours[b].astype(np.float64) - theirs[b]).max() for b in _blocks(*theirs.shape)]
        gradients.append(float(np.max(differences) / np.abs(theirs).max()))  # np.max keeps NaN
    return value, float(np.max(gradients))
