"""All measurements and tests for a GPU or TPU, in order of importance, within a time limit.

Each step prints its rows and writes them to the JSON file as soon as they are measured, so a run that is cut short still counts. A row that
would start after the limit is skipped and named. All random inputs are generated on the device. On a CPU, the same steps run at small
shapes.

- `linear`: the mean cross-entropy of a linear layer with both gradients, compared with the three matrix products alone and with optax,
  which stores all logits.
- `chunks`: the same with other chunk sizes; `planned` marks the size that `plan_linear` chooses.
- `dense`: value and gradient of cross-entropy of stored logits, compared with optax and a copy. The copy reads the logits and writes an
  array of their size once. The ratio is the time relative to the copy.
- `distillation`: value and gradient of the mean divergence, compared with the plain formula in float32.
- `accuracy`: errors at growing margins, in float32 with products of the highest precision.
- `tests`: the tests of values, gradients, masks and accuracy, on the device. They get the time that is left.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp

import xentjax
from benchmarks import accuracy, dense, linear, measure, peers, problem, published, report, shapes

LINEAR = ("limit", "xentjax", "optax")
CHUNKS = (256, 512, 1024, 2048, 4096)
MARGINS = (1.0, 10.0, 20.0, 50.0)
TESTS = tuple(f"tests/properties/test_{name}.py" for name in ("values", "gradients", "masks", "accuracy"))
LAYERS = {  # the first is also the shape of the chunk sizes
    False: tuple(shapes.parse(text) for text in ("64x32x512:bfloat16", "48x16x700:bfloat16")),
    True: tuple(shapes.SHAPES[name] for name in ("qwen-3-8b", "llama-3-8b", "gemma-2-2b")),
}
LOGITS = {False: ((64, 512), (32, 700)), True: ((16_384, 131_072), (8_192, 32_000))}


def on_accelerator() -> bool:
    """Whether JAX runs on a GPU or TPU."""
    return jax.default_backend() != "cpu"


def drawn(shape: shapes.Shape) -> problem.Problem:
    """The problem of a linear layer, drawn on the device: the distributions of `problem.draw`, other numbers."""
    assert shape.features is not None
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.features), shape.dtype)
    kernel = jax.random.normal(keys[1], (shape.features, shape.classes), shape.dtype) * jnp.asarray(shape.features**-0.5, shape.dtype)
    labels = jax.random.randint(keys[2], (shape.tokens,), 0, shape.classes)
    return problem.Problem(hidden, kernel, labels)  # type: ignore  # JAX's arrays, which stay on the device, in place of NumPy's


def times_of(functions: dict[str, Callable], arguments: tuple, rounds: int) -> dict[str, dict]:
    """Median milliseconds and temporary memory of compiled functions, which take turns."""
    programs = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    stopwatches = {name: partial(measure.seconds, program, *arguments) for name, program in programs.items()}
    measure.interleaved_times(stopwatches, range(1))
    taken = measure.interleaved_times(stopwatches, range(rounds))
    return {
        name: {
            "milliseconds": round(statistics.median(taken[name]) * 1e3, 3),
            "temporary MB": round(measure.temporary_bytes(program) / 1e6, 1),
        }
        for name, program in programs.items()
    }


def beside(rows: dict[str, dict], first: dict) -> report.Rows:
    """Rows with the ratio of their times to those of the last of them."""
    *_, last = (row["milliseconds"] for row in rows.values())
    return [first | {"contender": name} | row | {"ratio": round(row["milliseconds"] / last, 3)} for name, row in rows.items()]


def linear_rows(rounds: int) -> Iterator[Callable[[], report.Rows]]:
    """Value and both gradients at each shape."""
    for shape in LAYERS[on_accelerator()]:
        yield lambda shape=shape: linear.measured(shape, LINEAR, rounds, {}, judged=False, draw=drawn)


def chunk_rows(rounds: int) -> Iterator[Callable[[], report.Rows]]:
    """The first shape with all chunk sizes in turn, beside the products alone."""

    def rows() -> report.Rows:
        shape = LAYERS[on_accelerator()][0]
        arguments = drawn(shape).on_device
        planned = xentjax.plan_linear(*arguments[:2]).chunk_size
        sizes = sorted({min(size, shape.tokens) for size in (*CHUNKS, planned)})
        losses = {f"chunks of {size}": partial(xentjax.linear_softmax_cross_entropy, chunk_size=size) for size in sizes}
        functions = {name: jax.value_and_grad(loss, (0, 1)) for name, loss in losses.items()} | {"limit": peers.limit().function}
        found = beside(times_of(functions, arguments, rounds), {"shape": str(shape)})
        return [row | {"planned": row["contender"] == f"chunks of {planned}"} for row in found]

    yield rows


def dense_rows(rounds: int) -> Iterator[Callable[[], report.Rows]]:
    """Cross-entropy of stored logits, optax, and a copy."""

    def rows(size: tuple[int, int]) -> report.Rows:
        z = 3 * jax.random.normal(jax.random.key(0), size, jnp.bfloat16)
        y = jax.random.randint(jax.random.key(1), size[:1], 0, size[1])
        functions = {
            "xentjax": jax.value_and_grad(dense.ours),
            "optax": jax.value_and_grad(lambda z, y: dense.theirs(z.astype(jnp.float32), y)),
            "copy": lambda z, y: z * jnp.bfloat16(2) + y.sum().astype(jnp.bfloat16),
        }
        found = beside(times_of(functions, (z, y), rounds), {"shape": f"{size[0]} x {size[1]}", "dtype": "bfloat16"})
        return [row | {"GB/s of a copy": round(2 * z.nbytes / found[-1]["milliseconds"] / 1e6, 1)} for row in found]

    for size in LOGITS[on_accelerator()]:
        yield partial(rows, size)


def distillation_rows(rounds: int) -> Iterator[Callable[[], report.Rows]]:
    """Each divergence of the last shape, with the gradient of the student."""
    size, temperature = LOGITS[on_accelerator()][-1], 2.0

    def rows(divergence: str, plain: Callable) -> report.Rows:
        student, teacher = (jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i in range(2))
        losses = {
            divergence: partial(xentjax.distillation_loss, temperature=temperature, divergence=divergence),
            "plain formula": lambda *logits: plain(*(x.astype(jnp.float32) / temperature for x in logits)),
        }
        functions = {name: jax.value_and_grad(lambda s, t, loss=loss: loss(s, t).mean()) for name, loss in losses.items()}
        return beside(times_of(functions, (student, teacher), rounds), {"shape": f"{size[0]} x {size[1]}", "dtype": "bfloat16"})

    for divergence, plain in published.DIVERGENCES.items():
        yield partial(rows, divergence, plain)


def accuracy_rows(rounds: int) -> Iterator[Callable[[], report.Rows]]:
    """Errors of the loss and of the label's gradient."""
    del rounds

    def rows(margin: float) -> report.Rows:
        with jax.default_matmul_precision("highest"):
            return accuracy.rows_of(margin, ["xentjax", "optax"], {})

    for margin in MARGINS:
        yield partial(rows, margin)


STEPS: dict[str, Callable[[int], Iterator[Callable[[], report.Rows]]]] = {
    "linear": linear_rows,
    "chunks": chunk_rows,
    "dense": dense_rows,
    "distillation": distillation_rows,
    "accuracy": accuracy_rows,
}


def run_tests(seconds: float) -> dict:
    """Runs the tests on the device in a process of its own; their last line, or that the time was over."""
    # pytest-benchmark, where it is installed, warns if tests run in parallel
    options = ["-o", "addopts=", "-p", "no:benchmark", "-q", "-n", "8", "--maxfail", "20", "--device"]
    command = [sys.executable, "-m", "pytest", *options, *TESTS]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    root = pathlib.Path(__file__).parents[1]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"finished": False, "output": printed[-8000:]}
    return {"finished": True, "passed": done.returncode == 0, "output": done.stdout[-8000:]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=9)
    names = (*STEPS, "tests")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit (default 8)")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help=f"of {', '.join(names)} (default all)")


def run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    where = report.machine(LINEAR)
    print(report.heading(where), flush=True)
    result = {"benchmark": "accelerator", **where, "rounds": arguments.rounds, "steps": {}, "skipped": []}

    def left() -> float:
        return arguments.minutes * 60 - (time.perf_counter() - start)

    for name in (name for name in STEPS if name in arguments.steps):
        rows = result["steps"][name] = []
        for measurement in STEPS[name](arguments.rounds):
            if left() <= 0:
                result["skipped"].append(name)
                break
            try:
                found = measurement()
            except Exception as error:  # one shape that does not fit must not end the run
                found = [{"note": peers.reason(error)}]
            rows += found
            print(f"\n{name}, {left():.0f} s left\n{report.table(found)}", flush=True)
            report.write(arguments.json, result)
    if "tests" in arguments.steps:
        result["tests"] = run_tests(left())
        print(f"\ntests\n{result['tests']['output']}", flush=True)
    if result["skipped"]:
        print(f"skipped, because the time was over: {', '.join(result['skipped'])}")
    report.write(arguments.json, result)
