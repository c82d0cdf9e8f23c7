"""The size of the chunks of a fused loss, and the memory that they take."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from xentjax._core import checks, numerics
from xentjax._linear import layers, layout

_SMALL_BYTES = 2**25  # logits up to this size are not cut
_FEW_EXAMPLES = 192  # smaller chunks are slower: each chunk rereads the gradient of the kernel, which then takes longer than the products
_LARGE_BYTES = 2**30  # the logits of a chunk never take more, whatever the number of examples


class LinearPlan(NamedTuple):
    """The chunks of a fused loss, and the bytes that it takes in addition to its inputs; each field is a number []."""

    chunk_size: int
    """Number of examples in the largest chunk."""
    chunks: int
    """Number of chunks."""
    logits_bytes: int
    """Bytes of the logits of one chunk. Their gradient overwrites them."""
    gradient_bytes: int
    """Bytes of a copy of that gradient in the dtype of the products; 0 if the logits have the same dtype."""
    accumulator_bytes: int
    """Bytes of the gradients of hidden and kernel in the accumulation dtype. If the inputs have this dtype, these are the results."""

    @property
    def peak_bytes(self) -> int:
        """The sum of all bytes."""
        return self.logits_bytes + self.gradient_bytes + self.accumulator_bytes


def plan_linear(hidden: Any, kernel: Any, *, chunk_size: int | None = None, classes_first: bool = False) -> LinearPlan:
    """The chunks that `fuse_linear` takes for these shapes and dtypes, and their memory; numbers [].

    chunk_size = all examples, if all logits take at most 32 MiB;
    otherwise max(⌈examples / 4⌉, 192), reduced if necessary so that the logits of one chunk take at most 1 GiB.

    Each additional chunk rereads the gradient of the kernel. Larger chunks take more memory. Nothing is computed on devices.

    Gradient: none. The plan depends on shapes and dtypes only.

    Args:
        hidden: [..., features], an array or a `jax.ShapeDtypeStruct`.
        kernel: [features, classes], or [classes, features] with `classes_first`; an array or a `jax.ShapeDtypeStruct`.
        chunk_size: a size to use instead of the planned one.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        `LinearPlan`, whose fields are numbers [].

    Raises:
        ValueError: the shapes do not fit each other, or `chunk_size` < 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8192, 4096), (4096, 128256)))
        >>> plan = xentjax.plan_linear(hidden, kernel)
        >>> plan.chunk_size, plan.chunks, round(plan.peak_bytes / 1e9, 1)  # all logits alone would take 4.2 GB
        (2048, 4, 3.8)

    Reference:
        The measurements behind this rule: benchmarks/NOTES.md.
    """
    name = "plan_linear"
    check_chunk_size(name, chunk_size)
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
    """The layout of the chunks for these shapes and dtypes: at most `chunk_size` examples each, or the planned number."""
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
    """TypeError unless `chunk_size` is an integer or None; ValueError if it is less than 1."""
    if chunk_size is not None:
        checks.count(function, "chunk_size", chunk_size)
