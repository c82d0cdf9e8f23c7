"""Helpers for losses over many classes: checks of arguments, masks, and look-up of the parameters of selected classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core
from jax.typing import ArrayLike

from xentjax._core import checks, numerics
from xentjax._linear import layers


def class_indices(function: str, labels: ArrayLike, leading: tuple[int, ...], classes: int, where: Array | None) -> Array:
    """The checked labels, one class index per example. `leading` is the shape of the examples. Soft labels raise TypeError."""
    y = checks.integers(function, "labels", labels)
    checks.same_shape(function, "labels", y, leading, "the shape of hidden without its feature axis")
    return layers.labels(function, y, leading, classes, where)


def check_fields(function: str, name: str, x: Any, fields: tuple[str, ...], expected: str) -> None:
    """Raise TypeError unless `x` has all `fields`, attributes or methods. `expected` says what `x` must be, and how to make it."""
    if not all(hasattr(x, field) for field in fields):
        raise TypeError(f"{function}: {name} must be {expected}; got {type(x).__name__}.")


def random_key(function: str, key: Array) -> Array:
    """The checked random key. It must be a single key, either a typed key or an older uint32 key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        raise TypeError(
            f"{function}: key must be a JAX random key; got {type(key).__name__ if dtype is None else dtype}. Use jax.random.key(0)."
        )
    if shape[: len(shape) - (not typed)]:
        raise ValueError(f"{function}: key must be one key; got keys of shape {shape}. Use jax.vmap, or `shape` for more samples.")
    return key


def probabilities(function: str, name: str, weights: ArrayLike) -> np.ndarray:
    """The checked weights [classes], divided by their sum so that they are probabilities, in float64."""
    if isinstance(weights, core.Tracer):
        raise TypeError(
            f"{function}: {name} must be known before tracing; got a traced array. "
            f"Call {function} outside jax.jit and pass its result as an argument."
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


def masked(x: Array, where: Array | None) -> Array:
    """`x` [...] or [..., n], with 0 in examples that do not count."""
    if where is None:
        return x
    return numerics.where(where if x.ndim == where.ndim else where[..., None], x, 0)


def take_classes(parameters: Array, index: Array, axis: int, dtype: jnp.dtype) -> Array:
    """The parameters of the classes `index`, with the class axis first.

    `axis` is the position of the class axis in `parameters`. If a class occurs several times, its gradients accumulate in `dtype`. The sum
    is cast once, to the dtype of `parameters`.
    """
    return jnp.moveaxis(jnp.take(parameters.astype(dtype), index, axis=axis, mode="clip"), axis, 0)
