"""Draws `docs/_static/why.svg`, the picture of the home page: error against margin, memory against vocabulary. `python docs/picture.py`."""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import xentjax

OURS, OTHERS, INK = "#0072b2", "#d55e00", "#808080"  # told apart by colour-blind readers, readable on white and on black
TOKENS, FEATURES = 2048, 512


def errors(margins):
    """Relative errors of the gradient of the label's logit, whose exact value is −K'e^(−m)/(1 + K'e^(−m)) with K' = 9 other classes."""
    exact = -9 * np.exp(-margins) / (1 + 9 * np.exp(-margins))
    logits, labels = jnp.zeros((margins.size, 10)).at[:, 0].set(jnp.asarray(margins, jnp.float32)), jnp.zeros(margins.size, jnp.int32)
    losses = xentjax.softmax_cross_entropy, optax.losses.softmax_cross_entropy_with_integer_labels
    found = [jax.grad(lambda z, loss=loss: loss(z, labels).sum())(logits)[:, 0] for loss in losses]
    return [np.abs(np.asarray(slope, np.float64) / exact - 1) for slope in found]


def memory(classes):
    """Temporary bytes of the compiled gradient with respect to hidden and kernel, fused and by optax."""
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((TOKENS, FEATURES), "float32"), ((FEATURES, classes), "float32"), ((TOKENS,), "int32"))
    ]

    def dense(hidden, kernel, labels):
        return optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()

    programs = [jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile() for loss in (xentjax.linear_softmax_cross_entropy, dense)]
    return [program.memory_analysis().temp_size_in_bytes for program in programs]


if __name__ == "__main__":
    style = {
        "svg.fonttype": "path",
        "svg.hashsalt": "xentjax",
        "font.size": 12,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
    }
    plt.rcParams.update(style | {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    margins = np.arange(0, 80.5, 0.5)
    for error, colour, name, height in zip(errors(margins), (OURS, OTHERS), ("xentjax", "optax, PyTorch, Keras"), (2e-7, 3), strict=True):
        left.semilogy(margins, np.maximum(error, 1e-9), color=colour, linewidth=2.5)
        left.text(80, height, name, color=colour, ha="right", va="bottom", fontweight="bold")
    left.set(
        xlabel="margin of the label's logit (nats)", ylabel="relative error of the gradient", ylim=(1e-9, 40), title="Error in float32"
    )
    sizes = 2 ** np.arange(13, 19)
    fused, dense = np.array([memory(int(n)) for n in sizes]).T / 2**20
    for values, colour, name, shift in ((fused, OURS, "xentjax, fused", 0.12), (dense, OTHERS, "all logits in memory", 1.25)):
        right.loglog(sizes, values, "o-", color=colour, linewidth=2.5)
        right.text(sizes[-1], values[-1] * shift, name, color=colour, ha="right", va="bottom", fontweight="bold")
    right.set(xlabel="classes", ylabel="temporary memory (MiB)", title=f"Memory, {TOKENS:,} tokens", ylim=(20, 10000))
    right.set_xticks(sizes, [f"{n // 1000}k" for n in sizes], minor=False)
    right.minorticks_off()
    for axes in (left, right):
        axes.title.set_color(INK)
    fig.savefig(pathlib.Path(__file__).parent / "_static" / "why.svg", transparent=True, metadata={"Date": None})
    print(dict(zip(sizes.tolist(), zip(fused.round(), dense.round(), strict=True), strict=True)))
