"""Times of softmax_cross_entropy relative to optax, for a grid of numbers of rows and classes: `python -m benchmarks dense --grid`.

Value and gradient of the mean, with integer labels. Some numbers of rows cannot be divided by two, so two cores get unequal parts.
"""

import functools
import statistics

import jax
from tqdm import tqdm

from benchmarks import measure, report

ROWS = (1, 7, 64, 1_000, 4_097, 49_999, 50_000, 50_001)
CLASSES = (2, 3, 10, 17, 100, 1_000)
DTYPES = ("float32", "bfloat16")


def rows_of(ours, theirs, problem, rounds: int, sizes=(ROWS, CLASSES)) -> report.Rows:
    """One row for each dtype, number of rows and number of classes."""
    cells = [(dtype, tokens, classes) for dtype in DTYPES for tokens in sizes[0] for classes in sizes[1]]
    found = []
    for dtype, tokens, classes in tqdm(cells, desc="grid", unit="shape"):
        arguments = problem((tokens, classes), dtype)
        programs = [jax.jit(jax.value_and_grad(f)).lower(*arguments).compile() for f in (ours, theirs)]
        stopwatches = {
            name: functools.partial(measure.seconds, p, *arguments) for name, p in zip(("ours", "theirs"), programs, strict=True)
        }
        measure.interleaved_times(stopwatches, range(2))
        times = measure.interleaved_times(stopwatches, range(rounds))
        pair = measure.Pair(*map(statistics.median, times.values()))
        ratio = round(measure.median_ratio(times["ours"], times["theirs"]), 2)
        found.append({"dtype": dtype, "rows": tokens, "classes": classes, "milliseconds": pair.milliseconds, "time ratio": ratio})
    return found


def summary(rows: report.Rows) -> report.Rows:
    """Median and largest ratio of each dtype, and the largest where a call takes more than 0.2 ms."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ratios = [row["time ratio"] for row in rows if row["dtype"] == dtype]
        long = [row["time ratio"] for row in rows if row["dtype"] == dtype and max(row["milliseconds"]) > 0.2]
        above = {"median above 0.2 ms": round(statistics.median(long), 3), "largest above 0.2 ms": max(long)} if long else {}
        found.append({"dtype": dtype, "median": round(statistics.median(ratios), 3), "largest": max(ratios), **above})
    return found


def table(rows: report.Rows, dtype: str) -> report.Rows:
    """The ratios of one dtype: a row for each number of rows, a column for each number of classes."""
    wide: dict[int, dict] = {}
    for row in rows:
        if row["dtype"] == dtype:
            wide.setdefault(row["rows"], {"rows": f"{row['rows']:,}"})[f"{row['classes']:,} classes"] = row["time ratio"]
    return list(wide.values())
