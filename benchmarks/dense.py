"""softmax_cross_entropy beside optax on logits in memory: time, compile time, temporary memory.

Value and gradient of the mean over a batch with integer labels, against `optax.softmax_cross_entropy_with_integer_labels`; compiled,
and called outside jit. With --soft, labels are distributions and the peer is `optax.softmax_cross_entropy`. With --smoothing, both smooth
the labels. With --value, only the value is computed, as in an evaluation. With --grid, many numbers of rows and classes are measured,
odd ones too. With --all, every categorical loss is measured beside softmax_cross_entropy instead. With --published, divergences and the
bi-tempered loss are measured beside the formulas of the papers instead.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import xentjax
from benchmarks import families, grid, measure, plots, published, report, shapes

SIZES = ((50_000, 10), (8_000, 1_000), (1_000, 32_000), (250, 128_000))
DEFAULT = tuple(shapes.Shape(tokens, None, classes, dtype) for dtype in ("float32", "bfloat16") for tokens, classes in SIZES)
_ODD = ((3_001, 1_009), (499, 32_003))
SOFT = tuple(shapes.Shape(tokens, None, classes, dtype) for dtype in ("float32", "bfloat16") for tokens, classes in (*SIZES[:3], *_ODD))
EAGER_SHAPE = (8_000, 1_000)


def ours(logits, labels, smoothing=0.0):
    return xentjax.softmax_cross_entropy(logits, labels, label_smoothing=smoothing).mean()


def theirs(logits, labels, smoothing=0.0):
    if smoothing:
        labels = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim < logits.ndim else labels, smoothing)
    if labels.ndim == logits.ndim:
        return optax.softmax_cross_entropy(logits, labels).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def problem(shape, dtype, soft=False):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    if soft:
        return logits, jnp.asarray(rng.dirichlet(np.ones(shape[1]), shape[0]), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, shape[1], shape[0]), jnp.int32)


def compiled(
    shape, dtype, rounds: int, soft: bool = False, smoothing: float = 0.0, derive: Callable[[Callable], Callable] = jax.value_and_grad
) -> dict:
    """One row of the table, inside jit; `derive` makes the function that is measured from a loss."""
    arguments = problem(shape, dtype, soft)
    functions = [derive(partial(f, smoothing=smoothing)) for f in (ours, theirs)]
    programs = tuple(jax.jit(f).lower(*arguments).compile() for f in functions)
    time = measure.interleaved(programs[0], programs[1], arguments, rounds * (5 if shape[1] < 100 else 1))
    compilations = min(rounds, 7)
    warm, cold = (measure.interleaved_compilation(functions[0], functions[1], arguments, compilations, cold) for cold in (False, True))
    memory = [measure.temporary_bytes(program) for program in programs]
    return {
        "shape": f"{shape[0]} x {shape[1]}",
        "dtype": jnp.dtype(dtype).name,
        "milliseconds": time.milliseconds,
        "time ratio": round(time.ratio, 2),
        "compile ratio": round(warm.ratio, 2),
        "first compile ratio": round(cold.ratio, 2),
        "temporary MB": [round(m / 1e6, 1) for m in memory],
    }


def eager(shape, rounds: int, soft: bool = False) -> list[dict]:
    """Calls outside jit, value alone and value with gradient, in float32."""
    arguments = problem(shape, jnp.float32, soft)
    rows = []
    for name, derive in (("value", lambda f: f), ("value and gradient", jax.value_and_grad)):
        time = measure.interleaved(derive(ours), derive(theirs), arguments, rounds)
        rows.append({"call": name, "milliseconds": time.milliseconds, "time ratio": round(time.ratio, 2)})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=31, shape=shapes.parse)
    parser.add_argument("--soft", action="store_true", help="labels that are distributions")
    parser.add_argument("--smoothing", type=float, default=0.0, metavar="ε", help="label smoothing (default 0)")
    parser.add_argument("--value", action="store_true", help="the value without a gradient")
    parser.add_argument("--grid", action="store_true", help="many numbers of rows and classes, as a heat map with --plot")
    parser.add_argument("--all", action="store_true", help="every categorical loss beside softmax_cross_entropy")
    parser.add_argument("--published", action="store_true", help="divergences and the bi-tempered loss beside the formulas of papers")


def run(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        plots.require()
    if arguments.all:
        return run_all(arguments)
    if arguments.grid:
        return run_grid(arguments)
    if arguments.published:
        return run_published(arguments)
    cases = arguments.shapes or (SOFT if arguments.soft else DEFAULT)
    size = (cases[0].tokens, cases[0].classes) if arguments.shapes else EAGER_SHAPE
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}; xentjax / optax")
    derive = (lambda f: f) if arguments.value else jax.value_and_grad
    rows = [
        compiled((case.tokens, case.classes), case.dtype, arguments.rounds, arguments.soft, arguments.smoothing, derive)
        for case in tqdm(cases, desc="dense", unit="shape")
    ]
    outside = eager(size, arguments.rounds, arguments.soft)
    ratios = ("time ratio", "compile ratio", "first compile ratio")
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    medians = {d: {k: round(statistics.median(r[k] for r in rows if r["dtype"] == d), 2) for k in ratios} for d in dtypes}
    print(report.table(rows))
    for dtype, median in medians.items():
        print(f"median {dtype}: " + ", ".join(f"{k} {v:.2f}" for k, v in median.items()))
    print(f"\noutside jit, {size[0]} x {size[1]}, float32\n{report.table(outside)}")
    result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "compiled": rows, "median": medians, "eager": outside}
    report.write(arguments.json, result)
    if arguments.plot:
        groups = {f"{row['shape']}, {row['dtype']}": {k: row[k] for k in ratios} for row in rows}
        plots.save_bars(arguments.plot, "softmax_cross_entropy, value and gradient", "ratio to optax (below 1: faster)", groups)


def run_grid(arguments: argparse.Namespace) -> None:
    """The table of ratios to optax at every size of the grid."""
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}; xentjax / optax")
    rows = grid.rows_of(ours, theirs, problem, arguments.rounds)
    tables = {dtype: grid.table(rows, dtype) for dtype in grid.DTYPES}
    for dtype, table in tables.items():
        print(f"\n{dtype}\n{report.table(table)}")
    print(f"\n{report.table(grid.summary(rows))}")
    report.write(
        arguments.json, {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "grid": rows, "summary": grid.summary(rows)}
    )
    if arguments.plot:
        plots.save_grid(arguments.plot, "softmax_cross_entropy, value and gradient: time relative to optax", tables)


def run_published(arguments: argparse.Namespace) -> None:
    """The table of the losses that papers define by a formula, compared with that formula."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; xentjax / formula")
    rows = published.rows_of(tuple(arguments.shapes or ()), arguments.rounds)
    print(f"{report.table(rows)}\n\n{report.table(published.summary(rows))}")
    result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "losses": rows, "summary": published.summary(rows)}
    report.write(arguments.json, result)
    if arguments.plot:
        groups = {f"{row['loss']}, {row['of']}": {} for row in rows}
        for row in rows:
            groups[f"{row['loss']}, {row['of']}"][f"{row['shape']}, {row['dtype']}"] = row["time ratio"]
        plots.save_bars(arguments.plot, "value and gradient", "ratio to the formula", groups)


def run_all(arguments: argparse.Namespace) -> None:
    """The table of every loss against softmax_cross_entropy."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; loss / softmax_cross_entropy")
    rows = families.rows(tuple(arguments.shapes or families.DEFAULT), problem, arguments.rounds)
    print(report.table(rows))
    report.write(arguments.json, {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "losses": rows})
    if arguments.plot:
        names = dict.fromkeys(row["loss"] for row in rows)
        groups = {name: {row["shape"]: row["time ratio"] for row in rows if row["loss"] == name} for name in names}
        plots.save_bars(arguments.plot, "value and gradient", "ratio to softmax_cross_entropy", groups)
