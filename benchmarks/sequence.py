"""CTC, transducers and conditional random field beside the programs that people use: time and temporary memory.

Value and gradient of the mean over a batch. The peer of `ctc_loss` is `optax.ctc_loss`, and `torch.nn.functional.ctc_loss` if torch is
installed. The peers of the other losses are the textbook's recursions, written as a `lax.scan` with `jnp.logaddexp` and differentiated by
JAX. `confident` batches have a sequence whose labels hold more than half of the probability, which costs `ctc_loss` more work.
"""

import argparse
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

import xentjax
from benchmarks import measure, plots, report

CTC = ((16, 500, 64, 60), (8, 1000, 5000, 100))  # batch, time, classes, labels
TRANSDUCER = ((4, 200, 50, 128),)  # batch, time, labels, classes
TDT = ((4, 200, 50, 128, 5),)  # batch, time, labels, classes, durations 0, 1, …
CRF = ((64, 200, 40),)  # batch, time, tags
TINY = {"ctc": ((2, 9, 5, 3),), "transducer": ((2, 5, 3, 4),), "tdt": ((2, 5, 3, 4, 3),), "crf": ((2, 6, 3),)}


class Case(NamedTuple):
    """A loss, its shape, its program and those of its peers, and the arrays that both get; the first `differentiated` have gradients."""

    loss: str
    shape: tuple[int, ...]
    ours: Callable
    peers: dict[str, Callable]
    arguments: tuple[Array, ...]
    differentiated: int


def ctc(shape: tuple[int, ...], confident: bool = False) -> Case:
    """CTC; in a confident batch, one sequence has large logits on an alignment of its labels."""
    batch, time, classes, labels = shape
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(batch, time, classes)), rng.integers(1, classes, (batch, labels))
    if confident:
        place = np.arange(time) * (2 * labels + 1) // time  # blank, label, blank, label, …, blank
        path = np.where(place % 2, y[0, np.minimum(place // 2, labels - 1)], 0)
        logits[0, np.arange(time), path] += 30
    arguments = jnp.asarray(logits, jnp.float32), jnp.asarray(y, jnp.int32)
    name = "ctc, one confident" if confident else "ctc"
    return Case(name, shape, lambda z, y: xentjax.ctc_loss(z, y).mean(), {"optax": optax_ctc}, arguments, 1)


def optax_ctc(logits: Array, labels: Array) -> Array:
    """The loss of optax, without padding."""
    return optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, jnp.zeros(labels.shape)).mean()


def transducer(shape: tuple[int, ...]) -> Case:
    """The transducer."""
    batch, time, labels, classes = shape
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(batch, time, labels + 1, classes)), jnp.float32)
    y = jnp.asarray(rng.integers(1, classes, (batch, labels)), jnp.int32)
    return Case("transducer", shape, lambda z, y: xentjax.transducer_loss(z, y).mean(), {"scan": plain_transducer}, (logits, y), 1)


def plain_transducer(logits: Array, labels: Array) -> Array:
    """Graves 2012: α over frames, with an inner scan over labels."""
    log_p = jax.nn.log_softmax(logits)
    blanks = log_p[..., 0]
    of_labels = jnp.take_along_axis(log_p[:, :, :-1], labels[:, None, :, None], axis=-1).squeeze(-1)

    def frame(alpha: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        arriving, emitting = inputs  # from the frame before; within this frame

        def label(left: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            below, emits = inputs
            here = jnp.logaddexp(below, left + emits)
            return here, here

        below = alpha + arriving
        rest = lax.scan(label, below[:, 0], (below[:, 1:].T, emitting.T))[1].T
        return jnp.concatenate([below[:, :1], rest], axis=-1), None

    first = jnp.concatenate([jnp.zeros_like(blanks[:, 0, :1]), jnp.cumsum(of_labels[:, 0], axis=-1)], axis=-1)
    moves = (jnp.moveaxis(blanks[:, :-1], 1, 0), jnp.moveaxis(of_labels[:, 1:], 1, 0))
    alpha = lax.scan(frame, first, moves)[0]
    return -jnp.mean(alpha[:, -1] + blanks[:, -1, -1])


def tdt(shape: tuple[int, ...]) -> Case:
    """The token-and-duration transducer."""
    batch, time, labels, classes, durations = shape
    rng = np.random.default_rng(0)
    nodes = (batch, time, labels + 1)
    logits, of_durations = (jnp.asarray(rng.normal(size=(*nodes, n)), jnp.float32) for n in (classes, durations))
    y = jnp.asarray(rng.integers(1, classes, (batch, labels)), jnp.int32)

    def ours(logits: Array, of_durations: Array, y: Array) -> Array:
        return xentjax.tdt_loss(logits, of_durations, y, durations=range(durations)).mean()

    return Case("tdt", shape, ours, {"scan": plain_tdt}, (logits, of_durations, y), 2)


def plain_tdt(logits: Array, duration_logits: Array, labels: Array) -> Array:
    """Xu et al. 2023: α over frames, with an inner scan over labels; α of the last frames is carried, one for each duration above 0."""
    log_p, log_q = jax.nn.log_softmax(logits), jnp.moveaxis(jax.nn.log_softmax(duration_logits), -1, 0)  # durations first
    blanks = log_p[..., 0] + log_q
    of_labels = jnp.take_along_axis(log_p[:, :, :-1], labels[:, None, :, None], axis=-1).squeeze(-1) + log_q[..., :-1]
    longest, none = len(log_q) - 1, -1e30

    def left(moves: Array) -> Array:
        """`moves` [durations, batch, time, n] of the frame d frames earlier, for d = 1, 2, …: [time + 1, longest, batch, n]."""
        later = [jnp.pad(x, ((0, 0), (d, longest), (0, 0)), constant_values=none) for d, x in enumerate(moves)][1:]
        return jnp.moveaxis(jnp.stack([x[:, : moves.shape[2] + 1] for x in later]), 2, 0)

    def frame(earlier: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        by_blank, by_label, emitting = inputs  # α of the last frames [longest, batch, labels + 1], the latest first
        waited = jnp.logaddexp.reduce(earlier + by_blank, axis=0)
        arriving = jnp.logaddexp(waited[:, 1:], jnp.logaddexp.reduce(earlier[..., :-1] + by_label, axis=0))

        def label(before: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            below, emits = inputs
            here = jnp.logaddexp(below, before + emits)
            return here, here

        rest = lax.scan(label, waited[:, 0], (arriving.T, emitting.T))[1].T
        return jnp.concatenate([jnp.concatenate([waited[:, :1], rest], axis=-1)[None], earlier[:-1]]), None

    at_once = jnp.moveaxis(jnp.pad(of_labels[0], ((0, 0), (0, 1), (0, 0)), constant_values=none), 1, 0)
    first = jnp.concatenate([jnp.zeros_like(blanks[0, :, 0, :1]), jnp.cumsum(at_once[0], axis=-1)], axis=-1)
    earlier = jnp.full((longest, *first.shape), none).at[0].set(first)
    by_blank, by_label = left(blanks), left(of_labels)
    alpha = lax.scan(frame, earlier, (by_blank[1:-1], by_label[1:-1], at_once[1:-1]))[0]
    return -jnp.mean(jnp.logaddexp.reduce(alpha[..., -1] + by_blank[-1, ..., -1], axis=0))  # the last move is a blank


def crf(shape: tuple[int, ...]) -> Case:
    """The conditional random field."""
    batch, time, tags = shape
    rng = np.random.default_rng(0)
    unary, transitions = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, (tags, tags)))
    y = jnp.asarray(rng.integers(0, tags, (batch, time)), jnp.int32)
    return Case("crf", shape, lambda u, w, y: xentjax.crf_loss(u, y, w).mean(), {"scan": plain_crf}, (unary, transitions, y), 2)


def plain_crf(unary: Array, transitions: Array, labels: Array) -> Array:
    """The forward algorithm in log space, minus the score of the labels."""

    def position(alpha: Array, u: Array) -> tuple[Array, None]:
        return jnp.logaddexp.reduce(alpha[:, :, None] + transitions, axis=1) + u, None

    alpha = lax.scan(position, unary[:, 0], jnp.moveaxis(unary[:, 1:], 1, 0))[0]
    score = jnp.take_along_axis(unary, labels[..., None], axis=-1).sum((-2, -1)) + transitions[labels[:, :-1], labels[:, 1:]].sum(-1)
    return jnp.mean(jnp.logaddexp.reduce(alpha, axis=-1) - score)


def cases(tiny: bool = False) -> list[Case]:
    """All cases; `tiny` ones for tests."""
    sizes = TINY if tiny else {"ctc": CTC, "transducer": TRANSDUCER, "tdt": TDT, "crf": CRF}
    found = [ctc(shape) for shape in sizes["ctc"]] + [ctc(sizes["ctc"][0], confident=True)]
    return [*found, *map(transducer, sizes["transducer"]), *map(tdt, sizes["tdt"]), *map(crf, sizes["crf"])]


def rows_of(case: Case, rounds: int) -> list[dict]:
    """One row for each peer; all programs of a case alternate."""
    of = tuple(range(case.differentiated))
    functions = {"xentjax": case.ours, **case.peers}
    programs = {n: jax.jit(jax.value_and_grad(f, of)).lower(*case.arguments).compile() for n, f in functions.items()}
    values = {name: float(program(*case.arguments)[0]) for name, program in programs.items()}
    stopwatches: dict[str, Callable[[], float]]
    stopwatches = {name: partial(measure.seconds, program, *case.arguments) for name, program in programs.items()}
    if case.loss.startswith("ctc") and importlib.util.find_spec("torch"):
        stopwatches["torch"], values["torch"] = torch_ctc(case)
    measure.interleaved_times(stopwatches, range(1))
    times = measure.interleaved_times(stopwatches, range(rounds))
    middle = {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()}
    memory = {name: measure.temporary_bytes(program) for name, program in programs.items()}
    return [
        {
            "loss": case.loss,
            "shape": " x ".join(map(str, case.shape)),
            "peer": peer,
            "milliseconds": [middle["xentjax"], middle[peer]],
            "time ratio": round(measure.median_ratio(times["xentjax"], times[peer]), 2),
            "temporary MB": [round(memory[n] / 1e6, 3) if n in memory else None for n in ("xentjax", peer)],
            "memory ratio": round(memory["xentjax"] / memory[peer], 2) if peer in memory else None,
            "difference of values": report.digits(abs(values["xentjax"] / values[peer] - 1), 2),
        }
        for peer in stopwatches
        if peer != "xentjax"
    ]


def torch_ctc(case: Case) -> tuple[Callable[[], float], float]:
    """A stopwatch of torch's loss with its gradient, and its value."""
    torch = importlib.import_module("torch")
    batch, time, _, labels = case.shape
    logits = torch.tensor(np.asarray(case.arguments[0])).requires_grad_()
    y = torch.tensor(np.asarray(case.arguments[1]), dtype=torch.long)
    lengths = torch.full((batch,), time), torch.full((batch,), labels)

    def value() -> Any:
        log_p = torch.log_softmax(logits, -1).transpose(0, 1)
        return torch.nn.functional.ctc_loss(log_p, y, *lengths, reduction="none").mean()

    return partial(measure.seconds, lambda: torch.autograd.grad(value(), logits)[0].numpy()), value().item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=15)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that everything runs")


def run(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        plots.require()
    where = report.machine(("optax",))
    print(report.heading(where))
    rows = [row for case in tqdm(cases(arguments.tiny), desc="sequence", unit="case") for row in rows_of(case, arguments.rounds)]
    print(report.table(rows))
    report.write(arguments.json, {"benchmark": "sequence", **where, "rounds": arguments.rounds, "rows": rows})
    if arguments.plot:
        groups = {f"{row['loss']}, {row['shape']}": {row["peer"]: row["time ratio"]} for row in rows}
        plots.save_bars(arguments.plot, "losses of sequences, value and gradient", "ratio to the peer (below 1: faster)", groups)
