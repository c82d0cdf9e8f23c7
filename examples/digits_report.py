"""The report of `digits_cnn.py` on a trained network: a picture and gradient norms."""

from pathlib import Path

import numpy as np
from digits_data import Data
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import confusion_matrix


def draw(path: Path, data: Data, history: list[tuple[float, float]], losses: np.ndarray, predicted: np.ndarray) -> None:
    """Saves the picture: loss curves, confusion matrix, hardest held-out images."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(5, 4))
    curves, matrix = upper.subplots(1, 2)
    for values, name in zip(np.transpose(history), ("training batches (shifted images)", "held-out images"), strict=True):
        curves.semilogy(range(1, len(values) + 1), values, marker=".", label=name)
    curves.set(title="Loss", xlabel="epoch", ylabel="mean loss per example (nats)")
    curves.grid(alpha=0.3)
    curves.legend()
    names, counts = np.union1d(data.test_labels, predicted), confusion_matrix(data.test_labels, predicted)
    matrix.imshow(np.log1p(counts), cmap="Blues")
    matrix.set(title="Held-out images by class", xlabel="predicted", ylabel="true")
    matrix.set_xticks(range(len(names)), names)
    matrix.set_yticks(range(len(names)), names)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            matrix.text(column, row, count, ha="center", va="center", fontsize=8, color="white" if row == column else "black")
    lower.suptitle("Hardest held-out images: true → predicted, loss in nats")
    for axes, index in zip(lower.subplots(2, 8).flat, np.argsort(-losses), strict=False):
        axes.imshow(data.test_images[index, ..., 0], cmap="gray_r")
        wrong = data.test_labels[index] != predicted[index]
        axes.set_title(
            f"{data.test_labels[index]} → {predicted[index]}   {losses[index]:.2f}", fontsize=9, color="C3" if wrong else "black"
        )
    for axes in lower.axes:
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report_gradient_norms(norms: np.ndarray, losses: np.ndarray) -> None:
    """Prints how unequally the held-out examples would pull on the parameters."""
    largest = np.argsort(-norms)[: max(1, len(norms) // 100)]
    print(f"gradient norm per example: median {np.median(norms):.2e}, largest {norms.max():.2e}")
    print(f"  rank correlation with the loss {spearmanr(norms, losses).statistic:.3f}")
    print(f"  the largest 1 % of examples hold {norms[largest].sum() / norms.sum():.0%} of the sum of norms")
