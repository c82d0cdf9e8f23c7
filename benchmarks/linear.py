"""Mean cross-entropy of a linear layer, its value and both gradients: time, memory and error of xentjax and its peers.

Integer labels, no bias. All contenders run in one process on the same numbers, one after another in every round, in an order that
changes with the round; results are freed between calls, and one call of each before the first round is not counted. Threads, precisions
and chunk sizes are every package's defaults; JAX and torch keep a pool of threads each. A kernel lies in memory as its contender wants
it, [features, classes] or [classes, features].

- `milliseconds`: median. `ratio`: median over the rounds of the time relative to the limit in the same round. `ratio of medians`: of the
  two medians. The limit is the three matrix products alone, whose results are no loss and no gradient.
- `temporary MB`: what the compiler reports beside arguments and results; torch has no such figure on a CPU.
- `peak MB`: on a GPU, the most memory in use during a call beyond the arguments, results included. JAX keeps one peak per
  process, so contenders first run in the order of their temporary memory, and one that does not exceed the peak so far has no figure;
  give one shape per process to have the most.
- `error of value`, `error of gradients`: against float64 on the first 128 examples of the problem, with the whole kernel, by the
  same function compiled for that size. Relative for the value; for the gradients the largest absolute error over the largest
  true component, of hidden or kernel, whichever is worse.

`--plot` and `--sweep` measure two sweeps more: classes at fixed examples, and examples at fixed classes.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from benchmarks import measure, peers, plots, problem, report, shapes

ERROR_TOKENS = 128
SWEPT = ("limit", "xentjax", "optax")
FRACTIONS = (16, 8, 4, 2, 1)
KEYS = ("milliseconds", "ratio", "ratio of medians", "temporary MB", "peak MB", "error of value", "error of gradients")


class Ready(NamedTuple):
    """Programs that have run once, and the peak of that run in bytes, where it is known."""

    programs: dict[str, peers.Program]
    peaks: dict[str, int | None]


def prepare(names: Iterable[str], numbers: problem.Problem, failed: dict[str, str], absent: dict[str, str]) -> Ready:
    """Compiles and runs the contenders on these numbers; why some did not goes to `failed` and `absent`."""
    programs, peaks = {}, {}
    for name in tqdm(names, desc="compile", unit="contender", leave=False):
        try:
            programs[name] = peers.program(name, numbers)
        except ImportError as error:
            absent[name] = str(error)
        except Exception as error:  # whatever a peer raises is its row of the table
            failed[name] = peers.reason(error)
    for name in sorted(programs, key=lambda name: programs[name].temporary_bytes or 0):
        try:
            peaks[name] = programs[name].first_run()
        except ImportError as error:  # of what a peer imports only when it is called
            absent[name] = str(error)
        except Exception as error:
            failed[name] = peers.reason(error)
    return Ready({name: program for name, program in programs.items() if name in peaks}, peaks)


def add_errors(rows: dict[str, dict], programs: dict[str, peers.Program], exact: problem.Result, failed: dict[str, str]) -> None:
    """Runs the programs and fills in their errors."""
    for name, program in programs.items():
        try:
            found = problem.errors(program.result(program.run()), exact)
        except Exception as error:
            failed[name] = peers.reason(error)
            continue
        rows[name]["error of value"], rows[name]["error of gradients"] = (report.digits(x, 2) for x in found)


def add_figures(rows: dict[str, dict], ready: Ready, rounds: int) -> None:
    """Memory and times."""
    programs = ready.programs
    for name, peak in ready.peaks.items():
        temporary = programs[name].temporary_bytes
        rows[name]["temporary MB"] = None if temporary is None else round(temporary / 1e6, 1)
        rows[name]["peak MB"] = None if peak is None else round(peak / 1e6, 1)
    stopwatches = {name: partial(measure.seconds, program.run) for name, program in programs.items()}
    times = measure.interleaved_times(stopwatches, tqdm(range(rounds), desc="time", unit="round", leave=False))
    for name, taken in times.items():
        rows[name]["milliseconds"] = round(statistics.median(taken) * 1e3, 3)
        if "limit" in times:
            rows[name]["ratio"] = round(measure.median_ratio(taken, times["limit"]), 3)
            rows[name]["ratio of medians"] = round(statistics.median(taken) / statistics.median(times["limit"]), 3)


def measured(
    shape: shapes.Shape,
    names: Iterable[str],
    rounds: int,
    absent: dict[str, str],
    judged: bool = True,
    draw: Callable[[shapes.Shape], problem.Problem] = problem.draw,
) -> report.Rows:
    """A row for every contender that is not absent; `judged` says whether the errors are wanted."""
    names = [name for name in names if name not in absent]
    rows = {name: {"shape": str(shape), "dtype": shape.dtype, "contender": name, **dict.fromkeys(KEYS), "note": None} for name in names}
    failed: dict[str, str] = {}
    numbers = draw(shape)
    if judged:
        few = numbers.first(ERROR_TOKENS)
        losses = [name for name in names if name != "limit"]
        add_errors(rows, prepare(losses, few, failed, absent).programs, problem.truth(few), failed)
        names = [name for name in names if name not in failed and name not in absent]
        del few
    add_figures(rows, prepare(names, numbers, failed, absent), rounds)
    for name, why in failed.items():
        rows[name]["note"] = why
    return [row for name, row in rows.items() if name not in absent]


def sweeps(largest: shapes.Shape, names: Iterable[str], rounds: int, absent: dict[str, str]) -> dict[str, report.Rows]:
    """Rows over growing classes, and over growing tokens."""
    found: dict[str, report.Rows] = {}
    for axis in ("classes", "tokens"):
        sizes = dict.fromkeys(max(1, getattr(largest, axis) // fraction) for fraction in FRACTIONS)
        found[axis] = []
        for size in tqdm(sizes, desc=f"sweep over {axis}", unit="shape"):
            rows = measured(largest._replace(**{axis: size}), names, rounds, absent, judged=False)
            found[axis] += [{axis: size, **row} for row in rows]
    return found


def draw(path, found: dict[str, report.Rows], largest: shapes.Shape) -> None:
    """Time and temporary memory against both sizes."""
    fixed = {"classes": f"{largest.tokens:,} tokens", "tokens": f"{largest.classes:,} classes"}
    panels = [
        plots.Panel(
            title=f"{name}, {fixed[axis]}",
            x_label=axis,
            y_label=label,
            lines=plots.lines(found[axis], "contender", axis, key),
        )
        for name, key, label in (("time", "milliseconds", "milliseconds"), ("memory", "temporary MB", "temporary memory, MB"))
        for axis in ("classes", "tokens")
    ]
    title = f"Cross-entropy of a linear layer, value and gradients: {largest.features:,} features, {largest.dtype}"
    plots.save(path, title, panels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=11, names=peers.NAMES, shape=shapes.parse_layer)
    text = f"largest sizes of the sweeps, which {', '.join(SWEPT)} take part in (default: the first shape)"
    parser.add_argument("--sweep", type=shapes.parse_layer, metavar="SHAPE", help=text)


def run(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        plots.require()
    absent: dict[str, str] = {}
    rows: report.Rows = []
    chosen = arguments.shapes or shapes.defaults()
    for shape in tqdm(chosen, desc="linear", unit="shape"):
        rows += measured(shape, arguments.peers, arguments.rounds, absent)
    largest = arguments.sweep or chosen[0]
    names = [name for name in arguments.peers if name in SWEPT] or SWEPT
    swept = sweeps(largest, names, arguments.rounds, absent) if arguments.plot or arguments.sweep else {}
    where = report.machine(arguments.peers)
    print(report.heading(where))
    print(f"{report.table(rows)}\n{report.named_absent(absent)}")
    report.write(
        arguments.json, {"benchmark": "linear", **where, "rounds": arguments.rounds, "rows": rows, "absent": absent, "sweeps": swept}
    )
    if arguments.plot:
        draw(arguments.plot, swept, largest)
