"""Speech recognition without alignments: the same encoder trained with CTC and with a transducer.

The speech is synthetic. Each letter is a sound with two resonances that is held for a random time. There is noise, and pauses separate the
words. The labels are the letters of an utterance, without their times. Both losses sum over all alignments. Greedy decoding finds the
letters of held-out utterances. The label error rate counts the labels to insert, remove or replace, relative to the number of right labels.
It exceeds 100 % before the training, because the models then find too many labels.

Run:      pip install "xentjax[examples]" && python examples/speech.py
Takes:    18 s on two CPU cores (measured)
Prints:   a table, and picture in examples/output/speech.png (measured, jax 0.10, CPU, seed 0)
              label error rate    before     after
              CTC                 188.4%     1.79%
              transducer          202.1%     1.56%
          After the training with the seeds 0 to 4: 0.96 to 1.79 % (CTC), 1.17 to 1.78 % (transducer).
Picture:  an utterance with its best alignment, and the posterior probabilities of both models before and after the training
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from speech_data import BANDS, COUNT, LETTERS, Speech, load_speech
from speech_report import draw, error_rate
from tqdm import tqdm

import xentjax
from xentjax import sequence

BATCH, WIDTH, CLASSES = 32, 64, len(LETTERS)  # class 0 is the blank


class Encoder(nnx.Module):
    """Three convolutions over time, each normalized. The first halves the number of frames."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        sizes = ((BANDS, 2), (WIDTH, 1), (WIDTH, 1))
        self.layers = nnx.List(nnx.Conv(a, WIDTH, (5,), strides=s, rngs=rngs) for a, s in sizes)
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in sizes)
        self.output = nnx.Linear(WIDTH, outputs, rngs=rngs)

    def __call__(self, sounds: jax.Array) -> jax.Array:
        """Outputs [n, time/2, outputs] of spectrograms [n, time, bands]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            sounds = nnx.relu(norm(layer(sounds)))
        return self.output(sounds)


class CTC(nnx.Module):
    """A distribution per frame."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = Encoder(CLASSES, rngs)

    def loss(self, sounds: jax.Array, labels: jax.Array, frames: jax.Array, counts: jax.Array) -> jax.Array:
        """[n], without an alignment."""
        return xentjax.ctc_loss(self.encoder(sounds), labels, logit_lengths=frames // 2, label_lengths=counts)

    def decode(self, sounds: jax.Array, frames: jax.Array) -> jax.Array:
        return sequence.ctc_greedy_decode(self.encoder(sounds), logit_lengths=frames // 2)[0]


class Transducer(nnx.Module):
    """A distribution per frame and last two labels: the predictor embeds them, the joint network adds frame and prediction."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = Encoder(WIDTH, rngs)
        self.last, self.previous = nnx.Embed(CLASSES, WIDTH, rngs=rngs), nnx.Embed(CLASSES, WIDTH, rngs=rngs)
        self.output = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def predict(self, last: jax.Array, previous: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The prediction [..., width], and `last` as the next state."""
        return self.last(last) + self.previous(previous), last

    def join(self, encoded: jax.Array, prediction: jax.Array) -> jax.Array:
        return self.output(nnx.tanh(encoded + prediction))

    def logits(self, sounds: jax.Array, labels: jax.Array) -> jax.Array:
        """[n, frames, labels + 1, classes]."""
        last = jnp.pad(jnp.maximum(labels, 0), ((0, 0), (1, 0)))  # blank, first label, second label, …
        prediction, _ = self.predict(last, jnp.pad(last, ((0, 0), (1, 0)))[:, :-1])
        return self.join(self.encoder(sounds)[:, :, None], prediction[:, None])

    def loss(self, sounds: jax.Array, labels: jax.Array, frames: jax.Array, counts: jax.Array) -> jax.Array:
        return xentjax.transducer_loss(self.logits(sounds, labels), labels, logit_lengths=frames // 2, label_lengths=counts)

    def decode(self, sounds: jax.Array, frames: jax.Array) -> jax.Array:
        encoded, state = self.encoder(sounds), jnp.zeros(len(sounds), int)  # before the first label, the last two are blanks
        limits = {"max_labels": COUNT + 4, "max_labels_per_frame": 3}
        return sequence.transducer_greedy_decode(self.join, self.predict, encoded, state, logit_lengths=frames // 2, **limits)[0]


def train(kind: type, data: Speech, steps: int, seed: int, bar: tqdm) -> tuple[nnx.Module, nnx.Module]:
    """The model before and after the training."""
    graph, initial = nnx.split(kind(nnx.Rngs(seed)))
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps)))

    @jax.jit
    def step(parameters, state, batch):
        value, gradient = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(*batch).mean())(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    parameters, state, rng = initial, optimizer.init(initial), np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(data.sounds), BATCH)
        parameters, state, value = step(parameters, state, [x[rows] for x in data])
        bar.update()
    bar.set_postfix(loss=f"{value:.3f}")
    return nnx.merge(graph, initial), nnx.merge(graph, parameters)


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Trains, prints the table and saves the picture; returns the label error rates before and after the training."""
    parser = argparse.ArgumentParser(description="Recognition of synthetic speech, trained with CTC and with a transducer.")
    parser.add_argument("--steps", type=int, default=600, help="of each of the two networks, default 600")
    parser.add_argument("--seed", type=int, default=0, help="of the speech, the initial parameters and the batches")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "speech.png", help="where the picture goes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    seen, unseen = (load_speech(n, 2 * options.seed + i) for i, n in enumerate((3000, 300)))
    models, figures = {}, {}
    with tqdm(total=2 * options.steps, unit="batch", disable=options.quiet) as bar:
        for name, kind in (("CTC", CTC), ("transducer", Transducer)):
            models[name] = train(kind, seen, options.steps, options.seed, bar)
            figures[name] = tuple(error_rate(model.decode(unseen.sounds, unseen.frames), unseen.labels) for model in models[name])
    print("label error rate    before     after")
    for name, (before, after) in figures.items():
        print(f"{name:16s} {before:9.1%} {after:9.2%}")
    draw(options.output, unseen, models)
    print(f"picture in {options.output}")
    return figures


if __name__ == "__main__":
    main()
