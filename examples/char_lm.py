"""A small transformer learns to write Python from the standard library's sources: AdamW, warm-up, cosine decay.

Shows a fused loss of hidden states and a kernel, here the embedding. Logits of more than 32 MiB are cut into chunks (characters need less).
The held-out perplexity is exact over batches of unequal size. --no-fuse compares a fused step with all logits, and trains with all logits.
Measured on two CPU cores, jax 0.10, Python 3.11's sources, seed 0 only. The settings are the last of five that were tried on this text.
    python examples/char_lm.py              47 s: a sample, and "held-out perplexity 89.67, after 1000 steps 5.58"
    python examples/char_lm.py --unit word --no-fuse --batch 64 --steps 40       48 s, with 8192 classes:
        fused       183.9 MiB temporary,  376 ms a step (median)
        all logits  525.9 MiB temporary,  505 ms a step (median)        largest relative difference of their losses 1.1e-07
"""

import argparse
import collections
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import xentjax

PIECES = {"char": r"(?s).", "word": r" ?\w+| ?[^\w\s]+|\s+"}  # every character is in a match


def vocabulary(text, unit, size):
    """Names of the tokens: � for all rare characters, the others, and for "word" the most frequent words (the rest are spelled)."""
    characters = sorted(c for c, count in collections.Counter(text).items() if count >= 10)
    words = [w for w, _ in collections.Counter(re.findall(PIECES[unit], text)).most_common() if len(w) > 1]
    return ["�", *characters, *words[: max(0, size - 1 - len(characters))]]


def encode(text, unit, names):
    index = {name: i for i, name in enumerate(names)}
    parts = ([piece] if piece in index else piece for piece in re.findall(PIECES[unit], text))
    return np.array([index.get(name, 0) for part in parts for name in part], np.int32)


class Transformer(nnx.Module):
    """Hidden values [batch, length, features], and the embedding as the kernel [classes, features] of logits hidden @ kernel.T."""

    def __init__(self, classes: int, length: int, features: int, layers: int, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.embed, self.positions = (nnx.Embed(n, features, embedding_init=small, rngs=rngs) for n in (classes, length))
        self.norms = nnx.List(nnx.LayerNorm(features, rngs=rngs) for _ in range(2 * layers + 1))
        self.mixers = nnx.List(nnx.MultiHeadAttention(features // 32, features, decode=False, rngs=rngs) for _ in range(layers))
        self.wide = nnx.List(nnx.Linear(features, 4 * features, rngs=rngs) for _ in range(layers))
        self.narrow = nnx.List(nnx.Linear(4 * features, features, rngs=rngs) for _ in range(layers))

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, mask, norms = self.embed(tokens) + self.positions.embedding[...], nnx.make_causal_mask(tokens), iter(self.norms)
        for mixer, wide, narrow in zip(self.mixers, self.wide, self.narrow, strict=True):
            x = x + mixer(next(norms)(x), mask=mask)
            x = x + narrow(nnx.gelu(wide(next(norms)(x))))
        return next(norms)(x), self.embed.embedding[...]


def make_step(graph, optimizer, fuse):
    def loss(parameters, window):
        hidden, kernel = nnx.merge(graph, parameters)(window[:, :-1])
        if fuse:
            return xentjax.linear_softmax_cross_entropy(hidden, kernel, window[:, 1:], classes_first=True)
        return xentjax.weighted_mean(xentjax.softmax_cross_entropy(hidden @ kernel.T, window[:, 1:]))

    def step(parameters, state, window):
        value, gradient = jax.value_and_grad(loss)(parameters, window)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def compare(graph, optimizer, parameters, windows):
    """Prints memory, time and losses of both steps: from one start, over the same windows, in turn."""
    states = [jax.tree.map(jnp.copy, (parameters, optimizer.init(parameters))) for _ in range(2)]
    steps = [make_step(graph, optimizer, fuse).lower(*states[0], windows[0]).compile() for fuse in (True, False)]
    seconds, losses = np.zeros((2, 2, len(windows)))
    for turn, run in np.ndindex(len(windows), 2):
        start = time.perf_counter()
        *states[run], losses[run, turn] = jax.block_until_ready(steps[run](*states[run], windows[turn]))
        seconds[run, turn] = time.perf_counter() - start
    for name, step, median in zip(("fused", "all logits"), steps, 1e3 * np.median(seconds, axis=1), strict=True):
        print(f"{name:10s} {step.memory_analysis().temp_size_in_bytes / 2**20:6.1f} MiB temporary, {median:4.0f} ms a step (median)")
    print(f"largest relative difference of their losses {max(abs(losses[0] / losses[1] - 1)):.1e}")


def perplexity(graph, parameters, tokens, batch, length):
    """exp of the mean loss of every token but the first; places that the last batch has left count for nothing."""

    @jax.jit
    def part(parameters, x, y):
        hidden, kernel = nnx.merge(graph, parameters)(x)
        losses = xentjax.linear_softmax_cross_entropy(hidden, kernel, y, where=y >= 0, reduction="none", classes_first=True)
        return xentjax.weighted_sum(losses, where=y >= 0)

    missing = -(len(tokens) - 1) % (batch * length)
    inputs = np.pad(tokens[:-1], (0, missing)).reshape(-1, batch, length)
    labels = np.pad(tokens[1:], (0, missing), constant_values=-1).reshape(-1, batch, length)
    return float(jnp.exp(sum(part(parameters, x, y) for x, y in zip(inputs, labels, strict=True)).mean()))


def generate(graph, parameters, window, count, seed):
    """Tokens [count] after a window [length], at temperature 0.7."""

    def draw(window, key):
        hidden, kernel = nnx.merge(graph, parameters)(window[None])
        token = jax.random.categorical(key, kernel @ hidden[0, -1] / 0.7).astype(window.dtype)
        return jnp.append(window[1:], token), token

    return jax.jit(lambda window, keys: jax.lax.scan(draw, window, keys)[1])(window, jax.random.split(jax.random.key(seed), count))


def main(argv: list[str] | None = None) -> dict:
    """Trains, prints perplexities and a sample; returns them and the loss of every step."""
    parser = argparse.ArgumentParser(description="A small transformer learns to write Python from the standard library's sources.")
    parser.add_argument("--unit", choices=tuple(PIECES), default="char")
    parser.add_argument("--no-fuse", action="store_true", help="train on all logits at once, and compare both steps before")
    numbers = {"steps": 1000, "seed": 0, "batch": 16, "length": 64, "features": 128, "layers": 2, "classes": 8192, "characters": 1_000_000}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    options = parser.parse_args(argv)
    text = "".join(path.read_text("utf-8") for path in sorted(Path(argparse.__file__).parent.glob("*.py")))[: options.characters]
    cut = len(text) * 19 // 20
    seed, length, names = options.seed, options.length, vocabulary(text[:cut], options.unit, options.classes)
    tokens, held_out = encode(text[:cut], options.unit, names), encode(text[cut:], options.unit, names)
    print(f"{len(tokens)} tokens to learn from, {len(held_out)} held out, {len(names)} classes")
    graph, parameters = nnx.split(Transformer(len(names), length, options.features, options.layers, nnx.Rngs(seed)))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 4e-3, options.steps // 10, options.steps), weight_decay=0.1)
    starts = np.random.default_rng(seed).integers(len(tokens) - length, size=(options.steps, options.batch, 1))
    windows = tokens[starts + np.arange(length + 1)]
    if options.no_fuse:
        compare(graph, optimizer, parameters, windows[:15])
    before = perplexity(graph, parameters, held_out, options.batch, length)
    step, state, losses = make_step(graph, optimizer, not options.no_fuse), optimizer.init(parameters), []
    for window in (bar := tqdm(windows, unit="step")):
        parameters, state, value = step(parameters, state, window)
        losses.append(float(value))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    after = perplexity(graph, parameters, held_out, options.batch, length)
    sample = "".join(names[token] for token in generate(graph, parameters, held_out[:length], 300, seed).tolist())
    print(f"{sample}\nheld-out perplexity {before:.2f}, after {options.steps} steps {after:.2f}")
    return {"before": before, "after": after, "losses": losses, "sample": sample}


if __name__ == "__main__":
    main()
