"""softmax_cross_entropy beside optax on logits in memory: time, compile time, temporary memory.

Value and gradient of the mean over a batch with integer labels, against `optax.softmax_cross_entropy_with_integer_labels`; compiled,
and called outside jit.
"""

import argparse
import json
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import xentjax
from benchmarks import measure

SHAPES = ((50_000, 10), (8_000, 1_000), (1_000, 32_000), (250, 128_000))
EAGER_SHAPE = (8_000, 1_000)


def ours(logits, labels):
    return xentjax.softmax_cross_entropy(logits, labels).mean()


def theirs(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def problem(shape, dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    return logits, jnp.asarray(rng.integers(0, shape[1], shape[0]), jnp.int32)


def compiled(shape, dtype, rounds: int) -> dict:
    """One row of the table: value and gradient inside jit."""
    arguments = problem(shape, dtype)
    functions = jax.value_and_grad(ours), jax.value_and_grad(theirs)
    programs = tuple(jax.jit(f).lower(*arguments).compile() for f in functions)
    time = measure.interleaved(programs[0], programs[1], arguments, rounds * (5 if shape[1] < 100 else 1))
    warm, cold = (measure.interleaved_compilation(functions[0], functions[1], arguments, 7, cold) for cold in (False, True))
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


def eager(rounds: int) -> list[dict]:
    """Calls outside jit, value alone and value with gradient."""
    arguments = problem(EAGER_SHAPE, jnp.float32)
    rows = []
    for name, derive in (("value", lambda f: f), ("value and gradient", jax.value_and_grad)):
        time = measure.interleaved(derive(ours), derive(theirs), arguments, rounds)
        rows.append({"call": name, "milliseconds": time.milliseconds, "time ratio": round(time.ratio, 2)})
    return rows


def table(rows: list[dict]) -> str:
    """Rows with equal keys as a Markdown table."""
    cells = [[" / ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=31, help="calls of each per shape (default 31)")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")


def run(arguments: argparse.Namespace) -> None:
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}; xentjax / optax")
    cases = [(shape, dtype) for dtype in (jnp.float32, jnp.bfloat16) for shape in SHAPES]
    rows = [compiled(*case, arguments.rounds) for case in tqdm(cases, desc="dense", unit="shape")]
    outside = eager(arguments.rounds)
    ratios = ("time ratio", "compile ratio", "first compile ratio")
    medians = {d: {k: round(statistics.median(r[k] for r in rows if r["dtype"] == d), 2) for k in ratios} for d in ("float32", "bfloat16")}
    print(table(rows))
    for dtype, median in medians.items():
        print(f"median {dtype}: " + ", ".join(f"{k} {v:.2f}" for k, v in median.items()))
    print(f"\noutside jit, {EAGER_SHAPE[0]} x {EAGER_SHAPE[1]}, float32\n{table(outside)}")
    if arguments.json:
        result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "compiled": rows, "median": medians, "eager": outside}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
