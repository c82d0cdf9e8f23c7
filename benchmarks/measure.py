"""Interleaved measurements, so that what disturbs one contender disturbs the others."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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


def rotation(names: Iterable[str], turn: int) -> list[str]:
    """The names in the order of round `turn`: reversed every other round, and every second round another goes first."""
    names = list(names)
    start = turn // 2 % max(1, len(names))
    order = names[start:] + names[:start]
    return order[::-1] if turn % 2 else order


def interleaved_times(stopwatches: Mapping[str, Callable[[], float]], rounds: Iterable[int]) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in the order of the rounds; a stopwatch makes one measurement and returns it."""
    taken: dict[str, list[float]] = {name: [] for name in stopwatches}
    for turn in rounds:
        for name in rotation(stopwatches, turn):
            taken[name].append(stopwatches[name]())
    return taken


def median_ratio(times: list[float], others: list[float]) -> float:
    """Median over the rounds of the ratio within a round, where both met the same disturbances."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def interleaved(ours: Callable, theirs: Callable, arguments: tuple, rounds: int) -> Pair:
    """Medians over `rounds` after one call that is not counted."""
    stopwatches = {"ours": partial(seconds, ours, *arguments), "theirs": partial(seconds, theirs, *arguments)}
    interleaved_times(stopwatches, range(1))
    return Pair(*map(statistics.median, interleaved_times(stopwatches, range(rounds)).values()))


def compile_seconds(function: Callable, arguments: tuple, cold: bool) -> float:
    """Tracing, lowering and compiling; `cold` forgets all that JAX has traced before, its own helper functions included."""
    if cold:
        jax.clear_caches()
    start = time.perf_counter()
    jax.jit(lambda *a: function(*a)).lower(*arguments).compile()  # a new function, never seen by the cache
    return time.perf_counter() - start


def interleaved_compilation(ours: Callable, theirs: Callable, arguments: tuple, rounds: int, cold: bool) -> Pair:
    """Medians of compile times, alternating."""
    stopwatches = {name: partial(compile_seconds, f, arguments, cold) for name, f in (("ours", ours), ("theirs", theirs))}
    return Pair(*map(statistics.median, interleaved_times(stopwatches, range(rounds)).values()))


def peak_bytes(run: Callable) -> int | None:
    """Largest memory in use on JAX's device during a call beyond what was in use before it; None where it is not known.

    The device keeps one peak for the whole process: a call that stays below an earlier peak has no figure.
    """
    device = jax.devices()[0]
    before = device.memory_stats() or {}
    jax.block_until_ready(run())
    after = device.memory_stats() or {}
    if after.get("peak_bytes_in_use", 0) <= before.get("peak_bytes_in_use", 0):
        return None
    return after["peak_bytes_in_use"] - before["bytes_in_use"]
