"""Preferences and rewards: a small language model is pre-trained, then trained with DPO, or with GRPO.

The strings consist of three kinds of brackets. A prompt is the first 6 brackets of a string, and the answer is the rest. An answer is
balanced if the brackets of the whole string are correctly nested, each opening bracket is closed by a bracket of the same kind, and the
string has at least 16 brackets. In the pre-training, half of the strings have a wrong bracket. DPO and GRPO both start from the pre-trained
model.

    DPO     pairs of a balanced and an unbalanced answer to the same prompt, both sampled from the pre-trained model
    GRPO    8 samples per prompt. The reward is 1/2 for a balanced answer, plus 1/2 times the share of its tokens before the first error.

Run:      pip install "xentjax[examples]" && python examples/preference.py
Takes:    50 s on two CPU cores (measured)
Prints:   a table, and picture in examples/output/preference.png (measured, jax 0.10, CPU, seed 0)
              model         balanced   reward   divergence   tokens   margin   pairs in order
              pre-trained      35.4%    0.525         0.00     14.8     0.00             0.0%
              DPO              79.2%    0.855         1.08     14.4     4.55            95.3%
              GRPO             92.8%    0.946         2.44     13.9     6.37            83.5%
          The first four columns are means over 2,000 samples, one for each unseen prompt. The divergence from the pre-trained model is
          the k3 estimate in nats per answer. The margin is the difference between the implicit rewards of the two answers of a pair. Its
          mean is over pairs that DPO has not seen. A pair is in order if its margin is positive. Before DPO and GRPO, the margin of every
          pair is 0. With β = 0.1 instead of 1, DPO makes only 57.4 % of the answers balanced, at a divergence of 3.96 nats. GRPO makes
          the answers about one token shorter. With the seeds 0 to 2, the shares of balanced answers are 29.6 to 35.4 % (pre-trained),
          75.1 to 79.2 % (DPO) and 90.2 to 92.8 % (GRPO).
Picture:  the figures during both trainings, and answers of the three models to the same prompts
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from preference_data import LENGTH, PROMPT, load_strings, rewards
from preference_model import Parameters, init, log_probs, of_answers, sample
from preference_report import draw, figures_of
from tqdm import tqdm

import xentjax
from xentjax import policy, preference

BATCH, SAMPLES = 128, 8  # strings or pairs per step; answers per prompt
BETA, PENALTY = 1.0, 0.02  # of DPO; the weight of the divergence in GRPO


def imitation(parameters: Parameters, strings: jax.Array) -> jax.Array:
    tokens, where = log_probs(parameters, strings)
    return -xentjax.weighted_mean(tokens, where=where)


def dpo(parameters: Parameters, chosen: jax.Array, rejected: jax.Array, *reference: jax.Array) -> jax.Array:
    return preference.dpo_loss(of_answers(parameters, chosen), of_answers(parameters, rejected), *reference, beta=BETA).mean()


def grpo(parameters: Parameters, strings: jax.Array, old: jax.Array, reference: jax.Array, advantages: jax.Array) -> jax.Array:
    tokens, where = log_probs(parameters, strings)
    loss = policy.policy_gradient_loss(tokens, old, advantages, where=where)
    return xentjax.weighted_mean(loss + PENALTY * policy.kl_estimate(tokens, reference, where=where), where=where)


def train(
    loss: Callable, parameters: Parameters, batch_of: Callable, steps: int, rate: float, watch: Callable, updates: int = 1
) -> Parameters:
    """The parameters after the training. `batch_of(parameters)` makes each batch; `watch(step, parameters)` is called after each step."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps * updates)))

    @jax.jit
    def update(parameters, state, batch):
        changes, state = optimizer.update(jax.grad(loss)(parameters, *batch), state)
        return optax.apply_updates(parameters, changes), state

    state = optimizer.init(parameters)
    for step in range(1, steps + 1):
        batch = batch_of(parameters)
        for _ in range(updates):
            parameters, state = update(parameters, state, batch)
        watch(step, parameters)
    return parameters


def make_pairs(parameters: Parameters, prompts: np.ndarray, key: jax.Array) -> list[np.ndarray]:
    """Balanced strings and unbalanced strings with the same prompts, both [pairs, 25]. A prompt has at most 4 pairs, of 8 samples."""
    strings = np.asarray(sample(parameters, prompts.repeat(SAMPLES, axis=0), key)).reshape(-1, SAMPLES, LENGTH)
    balanced = rewards(strings.reshape(-1, LENGTH))[1].reshape(-1, SAMPLES)
    order = np.argsort(~balanced, axis=-1)  # balanced strings first; the first is paired with the last, the second with the last but one, …
    best, worst = order[:, : SAMPLES // 2], order[:, : SAMPLES // 2 - 1 : -1]
    counts = np.take_along_axis(balanced, best, axis=-1) & ~np.take_along_axis(balanced, worst, axis=-1)
    return [np.take_along_axis(strings, index[..., None], axis=1)[counts] for index in (best, worst)]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints the table and saves the picture; returns the figures of the three models."""
    parser = argparse.ArgumentParser(description="A small language model of brackets, trained by DPO and by GRPO.")
    parser.add_argument("--steps", type=int, default=1000, help="of the pre-training, default 1000; DPO takes 30 %% of them, GRPO 15 %%")
    parser.add_argument("--seed", type=int, default=0, help="of the strings, the initial parameters, the batches and the samples")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "preference.png", help="where the picture goes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    rng = np.random.default_rng(options.seed)
    steps = {"pre-trained": options.steps, "DPO": options.steps * 3 // 10, "GRPO": options.steps * 3 // 20}
    strings = load_strings(20_000, rng, errors=0.5)
    prompts, unseen = (load_strings(2000, rng)[:, :PROMPT] for _ in range(2))

    def new_key() -> jax.Array:
        return jax.random.key(rng.integers(2**31))

    def batches_of(*arrays) -> Callable:
        def batch_of(parameters):
            rows = rng.integers(0, len(arrays[0]), BATCH)
            return [x[rows] for x in arrays]

        return batch_of

    with tqdm(total=sum(steps.values()), unit="batch", disable=options.quiet) as bar:
        base = train(imitation, init(new_key()), batches_of(strings), steps["pre-trained"], 5e-3, lambda *_: bar.update())
        pairs, unseen_pairs, key = make_pairs(base, prompts, new_key()), make_pairs(base, unseen, new_key()), new_key()
        before = figures_of(base, base, unseen, unseen_pairs, key, BETA)
        curves = {"DPO": {0: before}, "GRPO": {0: before}}

        def watch(name: str, step: int, parameters: Parameters) -> None:
            bar.update()
            if step % max(1, steps[name] // 10) == 0 or step == steps[name]:
                figures = curves[name][step] = figures_of(parameters, base, unseen, unseen_pairs, key, BETA)
                bar.set_postfix_str(f"{name}: {figures['balanced']:.0%} balanced")

        def samples_of(parameters: Parameters) -> tuple:
            rows = rng.integers(0, len(prompts), BATCH // 4).repeat(SAMPLES)  # neighbors are a group
            strings = sample(parameters, prompts[rows], new_key())
            advantages = policy.group_advantages(rewards(np.asarray(strings))[0], SAMPLES)
            return strings, log_probs(parameters, strings)[0], log_probs(base, strings)[0], advantages

        batches = batches_of(*pairs, *(of_answers(base, x) for x in pairs))
        preferred = train(dpo, base, batches, steps["DPO"], 1e-3, partial(watch, "DPO"))
        rewarded = train(grpo, base, samples_of, steps["GRPO"], 1e-3, partial(watch, "GRPO"), updates=2)
    figures = {"pre-trained": before} | {name: curve[steps[name]] for name, curve in curves.items()}
    print("model         balanced   reward   divergence   tokens   margin   pairs in order")
    for name, row in figures.items():
        reward, divergence, tokens, right = (row[key] for key in ("reward", "divergence", "tokens", "right"))
        margin = row["chosen"] - row["rejected"]
        print(f"{name:12s} {row['balanced']:9.1%} {reward:8.3f} {divergence:12.2f} {tokens:8.1f} {margin:8.2f} {right:16.1%}")
    draw(options.output, curves, {name: sample(p, unseen, key) for name, p in zip(steps, (base, preferred, rewarded), strict=True)})
    print(f"picture in {options.output}")
    return figures


if __name__ == "__main__":
    main()
