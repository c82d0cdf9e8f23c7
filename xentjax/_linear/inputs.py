"""The inputs of a fused loss, and masks over their examples.

The same structures hold values (`Inputs[Array]`), gradients of the values (`Inputs[Gradient]`), and flags that tell which gradients are
wanted (`Inputs[bool]`).
"""

from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")
Gradient: TypeAlias = Array | None  # None if it is not wanted
PyTree: TypeAlias = Any  # of arrays, in a structure that the user chooses


class Batch(NamedTuple, Generic[T]):
    """Inputs per example. In the whole batch, [...] are the leading axes of `hidden`. In a chunk, [...] is [examples]."""

    hidden: T
    """[..., features]."""
    weights: T
    """[...], in the accumulation dtype; 0 for examples that do not count."""
    where: T | None
    """[...], True for examples that count; None if all examples count."""
    args: tuple[T, ...]
    """[..., ...], all other arguments of the loss."""


class Layer(NamedTuple, Generic[T]):
    """The linear layer, which all examples share."""

    kernel: T
    """[features, classes], or [classes, features]."""
    bias: T | None
    """[classes], or None."""


class Inputs(NamedTuple, Generic[T]):
    """Everything that the value of a fused loss depends on."""

    batch: Batch[T]
    layer: Layer[T]
    closed_over: tuple[tuple[T, ...], ...]
    """The arrays that the loss closes over. The loss is traced once for each size of chunk, so there is one tuple per size."""


def zero_outside(where: Array | None, tree: PyTree) -> PyTree:
    """The arrays [examples, ...] of a pytree, with 0 in examples that do not count."""
    if where is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), tree)


def masked(chunk: Batch[Array]) -> Batch[Array]:
    """The chunk, with `hidden`, labels and all other arguments set to 0 in examples that do not count."""
    return chunk._replace(hidden=zero_outside(chunk.where, chunk.hidden), args=zero_outside(chunk.where, chunk.args))


def weighted(chunk: Batch[Array], results: PyTree) -> PyTree:
    """The arrays [examples, ...] of a pytree, with 0 in examples that do not count. Floating arrays are multiplied by the weights.

    The product is 0 if the weight is 0, even if the number is infinite or NaN.
    """

    def weigh(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        w = chunk.weights.reshape(-1, *(1,) * (x.ndim - 1))
        return w * jnp.where((w == 0) & ~jnp.isfinite(x), jnp.zeros_like(x), x)

    return jax.tree.map(weigh, zero_outside(chunk.where, results))
