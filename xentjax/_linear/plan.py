"""The size of the chunks of a fused loss, and the memory that the chunks take."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from xentjax._core import checks, numerics
from xentjax._linear import layers, layout

_SMALL_BYTES = 2**25  # logits up to this size are not cut
_FEW_EXAMPLES = 192  # smaller chunks are slower: each chunk rereads the gradient of the kernel, which then takes longer than the products
_LARGE_BYTES = 3 * 2**29  # the logits of a chunk never take more, whatever the number of examples


class LinearPlan(NamedTuple):
    """The chunks of a fused loss, and the memory that the loss takes. Each field is a scalar, shape [].

    The bytes of the inputs are not included.
    """

    chunk_size: int
    """Number of examples in the largest chunk."""
    chunks: int
    """Number of chunks."""
    logits_bytes: int
    """Bytes of the logits of the largest chunk. The gradient of the logits overwrites them."""
    gradient_bytes: int
    """Bytes of a copy of the gradient of the logits, in the dtype of the products; 0 if the logits already have that dtype."""
    accumulator_bytes: int
    """Bytes of the gradients of hidden and kernel in the accumulation dtype. If the inputs have this dtype, these
    gradients are the results."""

    @property
    def peak_bytes(self) -> int:
        """The sum of `logits_bytes`, `gradient_bytes` and `accumulator_bytes`."""
        return self.logits_bytes + self.gradient_bytes + self.accumulator_bytes


def plan_linear(hidden: Any, kernel: Any, *, chunk_size: int | None = None, classes_first: bool = False) -> LinearPlan:
    """The chunks of `fuse_linear` for these shapes and dtypes, and the memory that they take. Each field of the plan is a scalar, shape [].

    If all logits take at most 32 MiB, chunk_size = the number of examples. Otherwise chunk_size = max(⌈examples / 4⌉, 192). It is reduced
    further if the logits of one chunk would take more than 1.5 GiB.

    The chunk size is a compromise. Each additional chunk reads the gradient of the kernel again, and larger chunks take more memory.
    Planning computes nothing on devices.

    Gradient: none. The plan depends on shapes and dtypes only.

    Args:
        hidden: [..., features], an array or a `jax.ShapeDtypeStruct`.
        kernel: [features, classes], or [classes, features] with `classes_first`; an array or a `jax.ShapeDtypeStruct`.
        chunk_size: a size to use instead of the planned one.
        classes_first: whether `kernel` has shape [classes, features].

    Returns:
        `LinearPlan`, whose fields are scalars, shape [].

    Raises:
        TypeError: `hidden` or `kernel` has no shape or no dtype, or `chunk_size` is not an integer.
        ValueError: the shapes of `hidden` and `kernel` do not fit each other, or `chunk_size` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8192, 4096), (4096, 128256)))
        >>> plan = xentjax.plan_linear(hidden, kernel)
        >>> plan.chunk_size, plan.chunks, round(plan.peak_bytes / 1e9, 1)  # all logits alone would take 4.2 GB
        (2048, 4, 3.8)

    Reference:
        benchmarks/NOTES.md has the measurements behind this rule.
    """
    name = "plan_linear"
    check_chunk_size(name, chunk_size)
    for argument, x in (("hidden", hidden), ("kernel", kernel)):
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise TypeError(f"{name}: {argument} must be an array or a jax.ShapeDtypeStruct(shape, dtype); got {type(x).__name__}.")
    classes = layers.classes(name, hidden.shape, kernel.shape, classes_first)
    cut = chunks_of(hidden, kernel, chunk_size, classes_first)
    wide, narrow = numerics.accumulation_dtype(hidden.dtype).itemsize, jnp.dtype(hidden.dtype).itemsize
    logits = cut.examples * classes
    return LinearPlan(
        chunk_size=cut.examples,
        chunks=cut.others + 1,
        logits_bytes=logits * wide,
        gradient_bytes=0 if narrow == wide else logits * narrow,
        accumulator_bytes=(hidden.size + kernel.size) * wide,
    )


def chunks_of(hidden: Any, kernel: Any, chunk_size: int | None, classes_first: bool) -> layout.Layout:
    """The layout of the chunks for these shapes and dtypes.

    Each chunk has at most `chunk_size` examples. If `chunk_size` is None, the planned size is the maximum.
    """
    leading, classes = hidden.shape[:-1], kernel.shape[0 if classes_first else 1]
    if layout.is_symbolic(*leading):
        return layout.symbolic(leading, chunk_size)
    return layout.even(leading, max(1, _planned_size(hidden, classes) if chunk_size is None else chunk_size))


def _planned_size(hidden: Any, classes: int) -> int:
    """The number of examples per chunk, by the rule of `plan_linear`."""
    examples = hidden.size // max(1, hidden.shape[-1])
    quarter = max(-(-examples // 4), _FEW_EXAMPLES)
    if layout.is_symbolic(classes):
        return quarter
    row_bytes = classes * numerics.accumulation_dtype(hidden.dtype).itemsize
    return examples if examples * row_bytes <= _SMALL_BYTES else min(quarter, _LARGE_BYTES // row_bytes)


def check_chunk_size(function: str, chunk_size: int | None) -> None:
    """Raise TypeError unless `chunk_size` is an integer or None, and ValueError if it is below 1."""
    if chunk_size is not None:
        checks.count(function, "chunk_size", chunk_size)
