"""Time to trace, lower and compile value and gradient of a loss, beside optax.

Dense losses on logits [tokens, classes] against optax's function of the same meaning; the mean cross-entropy of a linear layer against
optax on materialised logits, with every JAX contender of `linear`. Nothing is executed, so the sizes cost nothing, but XLA unrolls
and fuses by size. `warm`: a new function in a process that has traced such functions before. `cold`: JAX's caches are cleared first, so
that jax.numpy's helpers are traced anew. Medians; `ratio`: median over the rounds of the time relative to optax in the same round.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import xentjax
from benchmarks import measure, peers, plots, report, shapes

DEFAULT = ("cpu-32k",)

# name: ours, theirs, whether the labels are arrays like the logits
DENSE: dict[str, tuple[Callable, Callable, bool]] = {
    "cross-entropy, indices": (xentjax.softmax_cross_entropy, optax.softmax_cross_entropy_with_integer_labels, False),
    "cross-entropy, distributions": (xentjax.softmax_cross_entropy, optax.softmax_cross_entropy, True),
    "cross-entropy, smoothed": (
        lambda z, t: xentjax.softmax_cross_entropy(z, t, label_smoothing=0.1),
        lambda z, t: optax.softmax_cross_entropy(z, optax.smooth_labels(t, 0.1)),
        True,
    ),
    "binary cross-entropy": (xentjax.sigmoid_cross_entropy, optax.sigmoid_binary_cross_entropy, True),
    "binary focal loss": (
        lambda z, t: xentjax.sigmoid_focal_loss(z, t, alpha=0.25),
        lambda z, t: optax.sigmoid_focal_loss(z, t, alpha=0.25),
        True,
    ),
}


def rows_of(loss: str, shape: str, dtype: str, functions: Mapping[str, tuple[Callable, tuple]], rounds: int) -> report.Rows:
    """A row for each of the functions with their arguments; one that does not compile has its reason."""
    rows = {
        name: {"loss": loss, "shape": shape, "dtype": dtype, "contender": name}
        | dict.fromkeys(("warm milliseconds", "warm ratio", "cold milliseconds", "cold ratio", "note"))
        for name in functions
    }
    working = {}
    for name, (function, arguments) in functions.items():
        try:
            measure.compile_seconds(function, arguments, cold=False)
            working[name] = function, arguments
        except Exception as error:
            rows[name]["note"] = peers.reason(error)
    for kind, cold in (("warm", False), ("cold", True)):
        stopwatches = {name: partial(measure.compile_seconds, *both, cold) for name, both in working.items()}
        times = measure.interleaved_times(stopwatches, tqdm(range(rounds), desc=f"{loss}, {kind}", unit="round", leave=False))
        for name, taken in times.items():
            rows[name][f"{kind} milliseconds"] = round(statistics.median(taken) * 1e3, 1)
            if "optax" in times:
                rows[name][f"{kind} ratio"] = round(measure.median_ratio(taken, times["optax"]), 2)
    return list(rows.values())


def dense(shape: shapes.Shape, names: list[str], rounds: int) -> report.Rows:
    """Rows of the dense losses."""
    found: report.Rows = []
    size = (shape.tokens, shape.classes)
    logits = jax.ShapeDtypeStruct(size, shape.dtype)
    for loss, (ours, theirs, like_logits) in tqdm(DENSE.items(), desc="dense losses", unit="loss"):
        labels = logits if like_logits else jax.ShapeDtypeStruct(size[:1], jnp.int32)
        functions = {
            name: (jax.value_and_grad(lambda z, t, f=f: f(z, t).mean()), (logits, labels))
            for name, f in (("xentjax", ours), ("optax", theirs))
            if name in names
        }
        found += rows_of(loss, f"{shape.tokens} x {shape.classes}", shape.dtype, functions, rounds)
    return found


def linear(shape: shapes.Shape, names: list[str], rounds: int, absent: dict[str, str]) -> report.Rows:
    """Rows of the linear layer; contenders that are not installed go to `absent`."""
    functions = {}
    hidden = jax.ShapeDtypeStruct((shape.tokens, shape.features), shape.dtype)
    labels = jax.ShapeDtypeStruct((shape.tokens,), jnp.int32)
    for name in names:
        try:
            contender = peers.JAX[name]()
        except ImportError as error:
            absent[name] = str(error)
            continue
        size = (shape.classes, shape.features) if contender.classes_first else (shape.features, shape.classes)
        functions[name] = contender.function, (hidden, jax.ShapeDtypeStruct(size, shape.dtype), labels)
    return rows_of("linear cross-entropy", str(shape), shape.dtype, functions, rounds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=7, names=peers.JAX, shape=shapes.parse_layer)


def run(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        plots.require()
    absent: dict[str, str] = {}
    rows: report.Rows = []
    for shape in arguments.shapes or [shapes.SHAPES[name] for name in DEFAULT]:
        rows += dense(shape, arguments.peers, arguments.rounds) + linear(shape, arguments.peers, arguments.rounds, absent)
    where = report.machine(arguments.peers)
    print(report.heading(where))
    print(f"{report.table(rows)}\n{report.named_absent(absent)}")
    report.write(arguments.json, {"benchmark": "compile", **where, "rounds": arguments.rounds, "rows": rows, "absent": absent})
    if arguments.plot:
        groups = {
            f"{row['loss']}\n{row['contender']}, {row['shape']}": {kind: row[f"{kind} ratio"] for kind in ("warm", "cold")}
            for row in rows
            if row["contender"] != "optax" and row["warm ratio"] is not None
        }
        plots.save_bars(arguments.plot, "Time to compile a loss and its gradient", "ratio to optax (below 1: faster)", groups)
