"""The report of `tagging.py`: accuracies and the picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tagging_data import KINDS, TAGS, WORDS, Sentences, spans

COLORS = {"O": "#f2f2f2"} | {
    f"{part}-{kind}": shades[part == "I"]
    for kind, shades in zip(KINDS, (("#4c8fcc", "#a9cdea"), ("#e08b3e", "#f6cfa5"), ("#5aa65a", "#b5dcb0")), strict=True)
    for part in "BI"
}


def figures_of(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of right words, F1 of whole names with their kind, and share of sentences without any mistake."""
    pairs = [(spans(p), spans(y)) for p, y in zip(predicted, labels, strict=True)]
    both, total = sum(len(p & y) for p, y in pairs), sum(len(p) + len(y) for p, y in pairs)
    right = predicted == labels
    return {"words": float(right[labels >= 0].mean()), "names (F1)": 2 * both / total, "whole sentences": float(right.all(axis=-1).mean())}


def draw(path: Path, unseen: Sentences, predicted: dict[str, np.ndarray], transitions: np.ndarray, start: np.ndarray) -> None:
    """Saves the picture: the learned scores of pairs of tags, and a sentence with the tags of each method."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    draw_scores(left, np.vstack([start, transitions]))
    draw_sentence(right, unseen, predicted)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_scores(axes: Axes, scores: np.ndarray) -> None:
    """A row for the start of the sentence and for each tag. Gray: −∞."""
    largest = abs(scores[np.isfinite(scores)]).max()
    axes.set_facecolor("#d5d5d5")
    axes.imshow(np.ma.masked_invalid(scores), cmap="RdBu_r", vmin=-largest, vmax=largest)
    for (row, column), value in np.ndenumerate(scores):
        text = f"{value.round(1) + 0:.1f}".replace("-", "−") if np.isfinite(value) else "−∞"
        dark = np.isfinite(value) and abs(value) > 0.6 * largest
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(TAGS)), TAGS, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(TAGS) + 1), ["start", *TAGS])
    axes.set(title="Learned scores of a tag after another (random field)", xlabel="tag", ylabel="tag before")


def draw_sentence(axes: Axes, unseen: Sentences, predicted: dict[str, np.ndarray]) -> None:
    """The short sentence in which the random field corrects the most words, with a row per word."""
    *others, field = predicted.values()
    corrected = sum((other != unseen.tags).sum(axis=-1) for other in others) * (field == unseen.tags).all(axis=-1)
    corrected *= ((unseen.words >= 0).sum(axis=-1) <= 18) & ((unseen.tags == 0).sum(axis=-1) >= 3)  # fits, and has ordinary words
    row = int(corrected.argmax())
    words = [WORDS[k] for k in unseen.words[row] if k >= 0]
    columns = {"labels": unseen.tags, **predicted}
    for column, tags in enumerate(columns.values()):
        for place, k in enumerate(tags[row][: len(words)]):
            wrong = k != unseen.tags[row, place]
            edge = {"edgecolor": "#d40000", "linewidth": 2.2, "zorder": 2} if wrong else {"edgecolor": "white"}
            axes.add_patch(Rectangle((column - 0.47, place - 0.45), 0.94, 0.9, facecolor=COLORS[TAGS[k]], **edge))
            axes.text(column, place, TAGS[k], ha="center", va="center", fontsize=9, zorder=3)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(words) - 0.5, -0.5), title="A held-out sentence. Red frames: wrong tags.")
    axes.set_yticks(range(len(words)), words)
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(length=0, bottom=False, top=False, labelsize=10)
    axes.spines[:].set_visible(False)
