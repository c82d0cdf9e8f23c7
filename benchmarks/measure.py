"""Interleaved timing of two functions, so that what disturbs one disturbs the other."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax


class Pair(NamedTuple):
    """Median seconds of both, and the ratio of the first to the second."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times as long ours takes."""
        return self.ours / self.theirs

    @property
    def milliseconds(self) -> list[float]:
        """Both medians, to read."""
        return [round(t * 1e3, 2) for t in self]


def temporary_bytes(program) -> int:
    """Memory of a compiled program beside its arguments and results, as the compiler reports it."""
    return program.memory_analysis().temp_size_in_bytes


def seconds(function: Callable, *arguments) -> float:
    """One call, until its results exist; they are freed outside the measured time."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def interleaved(ours: Callable, theirs: Callable, arguments: tuple, rounds: int) -> Pair:
    """Medians over `rounds`; the two alternate, and so does which of them goes first."""
    taken: dict[Callable, list[float]] = {ours: [], theirs: []}
    for function in taken:
        seconds(function, *arguments)
    for i in range(rounds):
        for function in (ours, theirs) if i % 2 else (theirs, ours):
            taken[function].append(seconds(function, *arguments))
    return Pair(statistics.median(taken[ours]), statistics.median(taken[theirs]))


def compile_seconds(function: Callable, arguments: tuple, cold: bool) -> float:
    """Tracing, lowering and compiling; `cold` forgets all that JAX has traced before, its own helper functions included."""
    if cold:
        jax.clear_caches()
    start = time.perf_counter()
    jax.jit(lambda *a: function(*a)).lower(*arguments).compile()  # a new function, never seen by the cache
    return time.perf_counter() - start


def interleaved_compilation(ours: Callable, theirs: Callable, arguments: tuple, rounds: int, cold: bool) -> Pair:
    """Medians of compile times, alternating."""
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            taken[k].append(compile_seconds((ours, theirs)[k], arguments, cold))
    return Pair(statistics.median(taken[0]), statistics.median(taken[1]))
