"""The time of the loss of a large model against that of its training step, on paper: published figures and one formula.

A mesh of `data` x `model` chips; T tokens of each model group in one call, of D features, V classes, P parameters, n = `model`, d = `data`:

    step        = 6·P·T/n / (u·F)
    products    = 6·D·V·T/n / (u·F)                                  three products of 2·D·V operations per token
    numbers     = 12·2(n−1)/n·T / L                                  a maximum and two sums per token, float32
    hidden      = 4·D·2(n−1)/n·T / L                                 its gradient, summed over the classes' devices in float32
    kernel      = 4·D·V/n·2(d−1)/d / N                               its gradient, summed over all tokens in float32
    loss        = products + numbers + hidden + kernel

F: peak operations per second of a chip, u: the share of it that is reached, L: bytes per second that it sends inside its node, N: into
the network. The bytes are those that the compiled programs send (`python -m benchmarks sharded`). Nothing overlaps and no link waits; the
attention's own operations are left out of the step, which makes the loss a larger part of it.

`in a loop`: the kernel's gradient summed over devices for every chunk, as `fuse_linear` does under plain `jit`, which plans chunks of the
global arrays: chunks · kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import xentjax

CHIPS = (8, 64, 512, 4096)
MODEL_AXIS = 8  # one node
BATCH = 2**24  # tokens of a training step
TOKENS = 2**15  # of a model group in one call: the largest mesh needs one call for a step


class Model(NamedTuple):
    """Sizes of a language model."""

    features: int
    classes: int
    parameters: float


class Chip(NamedTuple):
    """What one chip does in a second."""

    operations: float  # bfloat16, dense
    utilisation: float
    node: float  # bytes sent to chips of its node
    network: float  # bytes sent to chips of other nodes


class Times(NamedTuple):
    """Seconds of one call."""

    step: float
    products: float
    numbers: float
    hidden: float
    kernel: float

    @property
    def loss(self) -> float:
        """Nothing overlaps."""
        return self.products + self.numbers + self.hidden + self.kernel


# Llama 3: arXiv 2407.21783, table 3 and section 3.2; Gemma 2: arXiv 2408.00118, tables 1 and 2 (input and output embeddings are one).
MODELS = {"Llama 3 405B": Model(16_384, 128_256, 405e9), "Gemma 2 27B": Model(4_608, 256_128, 27.2e9)}
# H100 SXM: 989 TFLOP/s, NVLink 900 GB/s in both directions together, by NVIDIA's data sheet; 400 Gb/s to the network per GPU and 38 to
# 43 % of the operations: arXiv 2407.21783, sections 3.3.1 and 3.3.2.
H100 = Chip(989e12, 0.4, 450e9, 50e9)


def times(model: Model, chip: Chip, data: int, shards: int, tokens: int) -> Times:
    """The formula above."""
    speed = chip.operations * chip.utilisation
    around = 2 * (shards - 1) / shards
    return Times(
        step=6 * model.parameters * tokens / shards / speed,
        products=6 * model.features * model.classes * tokens / shards / speed,
        numbers=12 * around * tokens / chip.node,
        hidden=4 * model.features * around * tokens / chip.node,
        kernel=4 * model.features * model.classes / shards * 2 * (data - 1) / data / chip.network,
    )


def chunks(model: Model, data: int, tokens: int) -> int:
    """How many chunks `fuse_linear` plans under plain `jit`, where it sees the arrays of all devices."""
    hidden = jax.ShapeDtypeStruct((data * tokens, model.features), jnp.bfloat16)
    return xentjax.plan_linear(hidden, jax.ShapeDtypeStruct((model.features, model.classes), jnp.bfloat16)).chunks


def rows() -> list[dict]:
    """A row for each model and number of chips; milliseconds of one call."""
    found = []
    for name, model in MODELS.items():
        for chips in CHIPS:
            data = chips // MODEL_AXIS
            t = times(model, H100, data, MODEL_AXIS, TOKENS)
            row = {"model": name, "chips": chips, "data x model": f"{data} x {MODEL_AXIS}", "calls": BATCH // (data * TOKENS)}
            row |= {part: round(getattr(t, part) * 1e3, 4 if part == "numbers" else 1) for part in t._fields}
            row["loss, % of step"] = round(100 * t.loss / t.step, 2)
            found.append(row | {"in a loop": round(chunks(model, data, TOKENS) * t.kernel * 1e3)})
    return found


def assumptions() -> dict:
    """What the rows rest on."""
    sizes = {name: model._asdict() for name, model in MODELS.items()}
    return {"models": sizes, "chip": H100._asdict(), "tokens of a step": BATCH, "tokens of a call": TOKENS}
