"""The report of `preference.py`: the figures of a model, and the picture."""

from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Rectangle
from preference_data import END, LENGTH, PROMPT, SYMBOLS, check, length, rewards
from preference_model import Parameters, log_probs, of_answers, sample

import xentjax
from xentjax import policy, preference

ROWS = 8  # of the picture
COLORS = {"DPO": "#0072B2", "GRPO": "#D55E00"}
KINDS = ("#0072B2", "#009E73", "#CC79A7")  # of brackets; colors that color-blind readers can tell apart


def figures_of(parameters: Parameters, base: Parameters, prompts, pairs, key: jax.Array, beta: float) -> dict[str, float]:
    """Means over samples, one for each prompt, and over pairs of answers."""
    strings = sample(parameters, prompts, key)
    (tokens, where), (reference, _) = log_probs(parameters, strings), log_probs(base, strings)
    divergence = xentjax.weighted_sum(policy.kl_estimate(tokens, reference, where=where), axis=-1).total
    chosen, rejected = (preference.implicit_rewards(of_answers(parameters, x), of_answers(base, x), beta=beta) for x in pairs)
    reward, balanced = rewards(np.asarray(strings))
    figures = {"balanced": balanced, "reward": reward, "divergence": divergence, "tokens": where.sum(axis=-1)}
    figures |= {"chosen": chosen, "rejected": rejected, "right": chosen > rejected}
    return {name: float(np.mean(value)) for name, value in figures.items()}


def draw(path: Path, curves: dict[str, dict[int, dict[str, float]]], strings: dict[str, jax.Array]) -> None:
    """Saves the picture: the figures during both trainings, and answers of the models to the same prompts."""
    figure = Figure(figsize=(15, 10), layout="constrained")
    axes = figure.subplot_mosaic([["share", "divergence", "rewards"], list(strings)], height_ratios=(1, 1.7))
    for name, curve in curves.items():
        steps = list(curve)
        columns = {key: np.array([row[key] for row in curve.values()]) for key in curve[0]}
        style = {"color": COLORS[name], "linewidth": 2.2}
        axes["share"].plot(steps, 100 * columns["balanced"], marker="o", markersize=4, label=name, **style)
        axes["divergence"].plot(steps, columns["divergence"], marker="o", markersize=4, label=name, **style)
        axes["rewards"].plot(steps, columns["chosen"], label=f"{name}: balanced", **style)
        axes["rewards"].plot(steps, columns["rejected"], linestyle="--", label=f"{name}: unbalanced", **style)
    axes["share"].set(title="Balanced answers to unseen prompts", ylabel="%", ylim=(0, 100))
    axes["divergence"].set(title="Divergence from the pre-trained model", ylabel="nats per answer", ylim=(0, None))
    axes["rewards"].set(title="Implicit rewards, means over unseen pairs", ylabel="nats")
    for panel in (axes[name] for name in ("share", "divergence", "rewards")):
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="best" if panel is axes["rewards"] else "lower right")
        panel.spines[["top", "right"]].set_visible(False)
    for name, samples in strings.items():
        panel, rows = axes[name], np.asarray(samples)[:ROWS]
        balanced = sum(check(row)[1] for row in rows)
        panel.set_title(f"{name}: {balanced} of these {ROWS} answers are balanced", color=COLORS.get(name, "black"))
        panel.set(xlim=(-1, LENGTH + 1.5), ylim=(-2.2 * ROWS + 1.2, 2.0))
        panel.axis("off")
        for i, row in enumerate(rows):
            draw_string(panel, row, -2.2 * i)
    figure.supxlabel("gray: prompt   ·   arc: pair of brackets   ·   red: first error   ·   ⏎: end", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_string(panel: Axes, string: np.ndarray, y: float) -> None:
    """A string. An arc joins each pair of brackets. The first error is red, and what follows it is gray."""
    right, balanced = check(string)
    panel.add_patch(Rectangle((-0.5, y - 0.42), PROMPT, 0.84, facecolor="#eeeeee"))
    stack = []
    for i, token in enumerate(string[: length(string)].tolist()):
        wrong = i == right and not balanced
        color = "#cc0000" if wrong else "#bbbbbb" if i > right else KINDS[(token - 1) // 2] if token else "black"
        panel.text(i, y, SYMBOLS[token], ha="center", va="center", family="DejaVu Sans Mono", fontsize=12, color=color, weight="bold")
        if i < right and token != END:
            if token % 2:
                stack.append(i)
            else:
                span = i - stack.pop()
                panel.add_patch(Arc((i - span / 2, y + 0.45), span, 0.25 + 0.1 * span, theta2=180, color=color, linewidth=1.4))
    panel.text(LENGTH + 0.6, y, "✓" if balanced else "✗", ha="center", va="center", color="#009E73" if balanced else "#cc0000", fontsize=14)
