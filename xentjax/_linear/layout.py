"""How the examples of a batch are cut into chunks and joined again.

Chunks have at most two sizes. The first chunk takes the remainder. A loop takes the other chunks, which have equal sizes. If the remainder
is nearly as large as the other chunks, the first chunk also repeats the next few examples. Then all chunks have the same size, and `stack`
makes one array of them, for one loop. Padding is needed only if the number of examples is symbolic.
"""

import dataclasses
import math
import numbers
from typing import Any

import jax.numpy as jnp
from jax import Array, core

_TILE = 128  # matrix products of GPUs compute blocks of so many rows: 1,639 rows take longer than 2,048
_REPEATED = 0.02  # the largest share of the examples that may be computed twice, so that all chunks have one size
_SYMBOLIC_CHUNKS = 4  # for an unknown number of examples: `plan_linear` takes a quarter of the examples as well


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes of the chunks.

    The examples form `outer` sequences of `inner` examples each. Each chunk holds a part of every sequence. The sizes may be symbols of
    `jax.export`.
    """

    leading: tuple[int, ...]
    """The leading axes of `hidden`. They have outer·inner examples."""
    outer: int
    """Number of sequences."""
    inner: int
    """Number of examples per sequence."""
    first: int
    """Number of examples of each sequence in the first chunk."""
    chunk: int
    """Number of examples of each sequence in every other chunk."""
    others: int
    """Number of chunks after the first."""

    @property
    def padding(self) -> int:
        """Number of padding examples per sequence; 0 unless sizes are symbolic."""
        return self.first + self.others * self.chunk - self.inner

    @property
    def examples(self) -> int:
        """Number of examples in the largest chunk."""
        return self.outer * (core.max_dim(self.first, self.chunk) if self.loops else self.first)

    @property
    def loops(self) -> bool:
        """Whether there may be chunks after the first."""
        return is_symbolic(self.others) or self.others > 0

    @property
    def one_loop(self) -> bool:
        """Whether `stack` can cut the examples: there may be several chunks, and few examples must be repeated."""
        return self.loops and (self.first == self.chunk or self.chunk - self.first <= _REPEATED * self.inner)

    def stack(self, x: Array, repeat: bool = True) -> Array:
        """Cut `x` [*leading, ...] into chunks of equal size [chunks, examples, ...].

        Examples after the first `first` of each sequence fill up the first chunk, and are also in the second chunk. If `repeat` is False,
        the first chunk has 0 in their place. Padding is filled with 0.
        """
        trailing = x.shape[len(self.leading) :]
        if is_symbolic(self.padding):
            x = jnp.concatenate([x.reshape(self.inner, *trailing), jnp.zeros((self.padding, *trailing), x.dtype)])
            return x.reshape(self.others + 1, self.chunk, *trailing)
        x = x.reshape(self.outer, self.inner, *trailing)
        if self.first != self.chunk:
            again = x[:, self.first : self.chunk]
            x = jnp.concatenate([x[:, : self.first], again if repeat else jnp.zeros_like(again), x[:, self.first :]], axis=1)
        return self._stacked(x, self.others + 1)

    def unstack(self, x: Array) -> Array:
        """The inverse of `stack`. The results of repeated examples are those of the second chunk."""
        trailing = x.shape[2:]
        if is_symbolic(self.padding):
            return x.reshape((self.others + 1) * self.chunk, *trailing)[: self.inner].reshape(*self.leading, *trailing)
        x = self._unstacked(x, self.others + 1)
        if self.first != self.chunk:
            x = jnp.concatenate([x[:, : self.first], x[:, self.chunk :]], axis=1)
        return x.reshape(*self.leading, *trailing)

    def split(self, x: Array) -> tuple[Array, Array | None]:
        """Cut `x` [*leading, ...] into the first chunk [examples, ...] and the others [others, examples, ...]. Padding is filled with 0."""
        if is_symbolic(self.padding):
            x = self.stack(x)
            return x[0], x[1:]
        trailing = x.shape[len(self.leading) :]
        x = x.reshape(self.outer, self.inner, *trailing)
        first = x[:, : self.first].reshape(self.outer * self.first, *trailing)
        if not self.loops:
            return first, None
        return first, self._stacked(x[:, self.first :], self.others)

    def join(self, first: Array, rest: Array | None = None) -> Array:
        """The inverse of `split`."""
        trailing = first.shape[1:]
        if is_symbolic(self.padding):
            assert rest is not None
            return self.unstack(jnp.concatenate([first[None], rest]))
        x = first.reshape(self.outer, self.first, *trailing)
        if rest is not None:
            x = jnp.concatenate([x, self._unstacked(rest, self.others)], axis=1)
        return x.reshape(*self.leading, *trailing)

    def _stacked(self, x: Array, chunks: int) -> Array:
        """Sequences [outer, chunks·chunk, ...] as chunks [chunks, outer·chunk, ...]."""
        trailing = x.shape[2:]
        x = x.reshape(self.outer, chunks, self.chunk, *trailing)
        return jnp.moveaxis(x, 1, 0).reshape(chunks, self.outer * self.chunk, *trailing)

    def _unstacked(self, x: Array, chunks: int) -> Array:
        """The inverse of `_stacked`."""
        trailing = x.shape[2:]
        x = jnp.moveaxis(x.reshape(chunks, self.outer, self.chunk, *trailing), 0, 1)
        return x.reshape(self.outer, chunks * self.chunk, *trailing)


def even(leading: tuple[int, ...], chunk_size: int) -> Layout:
    """Chunks of at most `chunk_size` examples, as equal in size as possible. Large chunks are rounded up to a multiple of 128.

    Only the last leading axis is cut, because devices often hold parts of the earlier axes. If the earlier axes alone have more than
    `chunk_size` examples, all leading axes are flattened into one axis, which is then cut. Two chunks are split into three, because XLA
    unrolls a loop of one iteration and would then keep the logits of both chunks alive.
    """
    outer, inner = (math.prod(leading[:-1]), leading[-1]) if leading else (1, 1)
    if outer > chunk_size:
        outer, inner = 1, outer * inner
    chunks = max(1, -(-inner // max(1, chunk_size // max(1, outer))))
    chunk = max(1, -(-inner // (3 if chunks == 2 else chunks)))
    if (rounded := -(-chunk // _TILE) * _TILE) * outer <= min(chunk_size, 2 * chunk * outer):
        chunk = rounded
    others = max(1, -(-inner // chunk)) - 1
    return Layout(leading, outer, inner, inner - others * chunk, chunk, others)


def symbolic(leading: tuple[int, ...], chunk_size: int | None) -> Layout:
    """Chunks of n ≥ 1 examples, where n is a symbol of `jax.export`.

    The examples are cut into k equal chunks of ⌈n/k⌉ examples. k is 4, or the number of chunks that `chunk_size` requires. k is at least 3,
    because JAX must be able to tell that no chunk and no loop is empty. Up to k − 1 examples are padding.
    """
    examples = math.prod(leading)
    chunks = _SYMBOLIC_CHUNKS if chunk_size is None else core.max_dim((examples - 1) // chunk_size + 1, 3)
    chunk = (examples - 1) // chunks + 1
    return Layout(leading, 1, examples, chunk, chunk, chunks - 1)


def is_symbolic(*sizes: Any) -> bool:
    """Whether any of these sizes becomes known only when a program of `jax.export` is called."""
    return not all(isinstance(size, numbers.Integral) for size in sizes)
