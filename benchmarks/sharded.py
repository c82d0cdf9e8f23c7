"""A linear layer and its loss over a mesh of 8 devices: what they send to each other, and their memory, from the compiled programs.

Mean cross-entropy, its value and the gradients of hidden and kernel, float32 unless a shape says otherwise, tokens split over mesh axis
"data", classes over "model". Nothing is executed: the devices are virtual ones of the CPU, sizes cost nothing. A device that takes
part in a ring of n sends 2(n−1)/n of the bytes of an all-reduce and (n−1)/n of those of an all-gather; loops are counted.

- `loss B/token`: what a device sends for the numbers per token of the loss (maximum and sums over classes, labels), per token of its share.
- `hidden B/token`, `logits B/token`: the same for hidden and its gradient, and for logits.
- `kernel MB`: what a device sends for the kernel's gradient in one call, which is that of every parameter under data parallelism.
- `in loops`: collectives that run for every chunk, by what they carry, each counted as often as it runs.
- `gathers`: all-gathers and what else moves arrays without adding them up, each counted as often as it runs.
- `temporary MB`: of a device, what the compiler reports beside arguments and results.

Contenders: `fuse_linear_sharded`; `logits-shard-map`, `softmax_cross_entropy(axis_name="model")` of logits in memory; and `fuse_linear`
under plain `jit` on sharded arrays: `jit-batch` and `jit-length` of hidden [batch, length, features], named for what is split, and
`jit-tokens` of [tokens, features]. On CPUs `fuse_linear` adds up the kernel's gradient in blocks of classes; `jit-batch-no-blocks` does
not, as elsewhere. What an array is part of is told by its sizes: those of a shape should differ.

`--paper` prints instead, from published figures of models and hardware, the time of the loss against that of a training step.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import xentjax
from benchmarks import collectives, measure, paper, plots, report, shapes
from xentjax._linear import products

DEVICES = 8
SHARDS = (1, 2, 4, 8)
BATCH = 8  # sequences, where hidden is [batch, length, features]
DEFAULT = shapes.Shape(16_384, 768, 32_000)
ALONE = ("fuse_linear_sharded", "logits-shard-map", "jit-batch", "jit-batch-no-blocks")
CARRIED = ("loss", "hidden", "kernel", "logits")


class Contender(NamedTuple):
    """A loss of (hidden, kernel, labels), and how the leading axes of hidden are split."""

    loss: Callable
    tokens: P


def sharded(mesh: Mesh) -> Contender:
    loss = xentjax.softmax_cross_entropy
    return Contender(xentjax.fuse_linear_sharded(loss, mesh=mesh, tokens=P("data"), axis_name="model"), P("data"))


def materialised(mesh: Mesh) -> Contender:
    def local(hidden, kernel, labels):
        losses = xentjax.softmax_cross_entropy(hidden @ kernel, labels, axis_name="model")
        return lax.pmean(losses.mean(), "data")

    specs = (P("data"), P(None, "model"), P("data"))
    return Contender(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()), P("data"))


def plain(tokens: P, mesh: Mesh) -> Contender:
    return Contender(xentjax.fuse_linear(xentjax.softmax_cross_entropy), tokens)


def without_blocks(tokens: P, mesh: Mesh) -> Contender:
    def cross_entropy(logits, labels):  # a function of its own: programs are cached by function, and the one of `plain` has blocks
        return xentjax.softmax_cross_entropy(logits, labels)

    fused = xentjax.fuse_linear(cross_entropy)

    def loss(*arguments):
        with mock.patch.object(products, "_number_of_blocks", lambda size: 1):
            return fused(*arguments)

    return Contender(loss, tokens)


CONTENDERS: dict[str, Callable[[Mesh], Contender]] = {
    "fuse_linear_sharded": sharded,
    "logits-shard-map": materialised,
    "jit-batch": partial(plain, P("data", None)),
    "jit-batch-no-blocks": partial(without_blocks, P("data", None)),
    "jit-length": partial(plain, P(None, "data")),
    "jit-tokens": partial(plain, P("data")),
}


def devices() -> list:
    """Virtual devices of the CPU, as many as the largest mesh has; a backend that exists already must have them."""
    try:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:  # a backend exists
        pass
    found = jax.devices("cpu")
    if len(found) < DEVICES:
        remedy = f"XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}"
        raise SystemExit(f"sharded needs {DEVICES} CPU devices; got {len(found)}. Set {remedy}.")
    return found


def compiled(name: str, shape: shapes.Shape, mesh: Mesh):
    """The program of a contender's value and gradients."""
    contender = CONTENDERS[name](mesh)
    leading = (BATCH, shape.tokens // BATCH) if len(contender.tokens) == 2 else (shape.tokens,)
    arguments = (
        jax.ShapeDtypeStruct((*leading, shape.features), shape.dtype, sharding=NamedSharding(mesh, contender.tokens)),
        jax.ShapeDtypeStruct((shape.features, shape.classes), shape.dtype, sharding=NamedSharding(mesh, P(None, "model"))),
        jax.ShapeDtypeStruct(leading, jnp.int32, sharding=NamedSharding(mesh, contender.tokens)),
    )
    return jax.jit(jax.value_and_grad(contender.loss, (0, 1))).lower(*arguments).compile()


def carried(result: collectives.Result, shape: shapes.Shape, model: int, split: int) -> str:
    """What an array between devices is part of; its features may be `split`."""
    sizes = [size for size in result.shape if size > 1]
    if len(sizes) < 2 or result.dtype[0] in "sup":  # labels and selections among integers and booleans
        return "loss"
    classes = {shape.classes, shape.classes // model} & set(sizes)
    if shape.features in sizes:
        return "kernel" if classes or sizes[-1] != shape.features else "hidden"
    if sizes[-1] * split == shape.features:
        return "hidden"
    return "logits" if classes or math.prod(sizes) > shape.tokens else "loss"


def figures(found: Iterable[collectives.Collective], shape: shapes.Shape, data: int, model: int) -> dict:
    """The columns of a row that its collectives decide."""
    sent: dict[str, float] = dict.fromkeys(CARRIED, 0.0)
    loops, gathers = Counter[str](), 0
    for collective in found:
        split = collective.devices if collective.kind == "all-to-all" else 1
        names = [carried(result, shape, model, split) for result in collective.results]
        for name, result in zip(names, collective.results, strict=True):
            sent[name] += collective.sent_for(result.bytes)
        if collective.in_loop:
            for name in set(names):
                loops[name] += collective.times
        gathers += collective.times * (collective.kind not in ("all-reduce", "reduce-scatter"))
    return {
        **{f"{name} B/token": round(sent[name] / (shape.tokens // data), 1) for name in ("loss", "hidden", "logits")},
        "kernel MB": report.digits(sent["kernel"] / 1e6, 4),
        "in loops": ", ".join(f"{loops[name]} {name}" for name in CARRIED if loops[name]) or "none",
        "gathers": gathers,
    }


def rows_of(shape: shapes.Shape, meshes: Iterable[tuple[int, int]], names: Iterable[str] = tuple(CONTENDERS)) -> report.Rows:
    """A row for each contender on each mesh (data, model)."""
    rows: report.Rows = []
    for data, model in tqdm(list(meshes), desc=str(shape), unit="mesh", leave=False):
        mesh = Mesh(np.array(devices()[: data * model]).reshape(data, model), ("data", "model"))
        for name in names:
            program = compiled(name, shape, mesh)
            row = {"shape": str(shape), "dtype": shape.dtype, "contender": name, "data x model": f"{data} x {model}", "model": model}
            row |= figures(collectives.collectives(str(program.as_text())), shape, data, model)
            rows.append(row | {"temporary MB": report.digits(measure.temporary_bytes(program) / 1e6, 4)})
    return rows


def fitting(text: str) -> shapes.Shape:
    """A shape from the command line that all meshes can share equally."""
    shape = shapes.parse_layer(text)
    if shape.tokens % (BATCH * DEVICES) or shape.classes % DEVICES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: tokens must be a multiple of {BATCH * DEVICES} ({BATCH} sequences, {DEVICES} devices), classes of {DEVICES}."
        )
    return shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=0, names=CONTENDERS, shape=fitting)
    parser.add_argument("--paper", action="store_true", help="the time of the loss against the step, computed, for large models")


def run(arguments: argparse.Namespace) -> None:
    if arguments.paper:
        rows = paper.rows()
        print(report.table(rows))
        report.write(arguments.json, {"benchmark": "sharded --paper", **paper.assumptions(), "rows": rows})
        return
    if arguments.plot:
        plots.require()
    devices()  # before anything else asks for one
    rows, alone = [], []
    for shape in tqdm(arguments.shapes or [DEFAULT], desc="sharded", unit="shape"):
        rows += rows_of(shape, [(DEVICES // n, n) for n in SHARDS], arguments.peers)
        alone += rows_of(shape, [(1, n) for n in SHARDS], [name for name in arguments.peers if name in ALONE])
    where = report.machine([])
    print(report.heading(where))
    print(f"\n{DEVICES} devices:\n\n{report.table(rows)}\n\nclasses split only, all tokens on each device:\n\n{report.table(alone)}\n")
    report.write(arguments.json, {"benchmark": "sharded", **where, "rows": rows, "classes only": alone})
    if arguments.plot:
        kinds = (("kernel's gradient", rows, "kernel MB"), ("classes split only", alone, "temporary MB"))
        panels = [
            plots.Panel(title, "shards of the classes", f"{key} of a device", plots.lines(chosen, "contender", "model", key))
            for title, chosen, key in kinds
        ]
        plots.save(arguments.plot, "A linear layer and its loss over 8 devices", panels)
