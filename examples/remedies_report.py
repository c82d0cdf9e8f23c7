"""The training sets of `remedies.py`, and its report: scores, a table and a picture."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

CLASSES, BATCH = 10, 32
RARE, WRONG = SETTINGS = ("rare classes, 100:1", "40 % wrong labels")
LARGEST = {RARE: 100, WRONG: 50}  # training images of the most frequent class; all classes of wrong labels are as frequent
RATIO, NOISE, HELD_OUT = 100, 0.4, 50  # largest to smallest class; share of wrong labels; held-out images per class


class Run(NamedTuple):
    """A training set and its minibatches. Images are rows of all the digits."""

    seed: np.ndarray  # []
    labels: np.ndarray  # [digits], as the training sees them
    trained: np.ndarray  # [digits], whether the training sees them
    held_out: np.ndarray  # [10 · HELD_OUT], rows
    batches: np.ndarray  # [steps, BATCH], rows
    counts: np.ndarray  # [classes], training images per label
    noise: np.ndarray  # [classes, classes], the true P(label | class)


class Scores(NamedTuple):
    """What the losses reached in one setting, each [losses, seeds] in per cent."""

    accuracy: np.ndarray
    detail: np.ndarray


DETAIL = {RARE: "rarest 3", WRONG: "learned"}  # accuracy on the three rarest classes; share of the wrong training labels given as answer


def draw_run(setting: str, digits: np.ndarray, steps: int, seed: int) -> Run:
    """A setting's run of a seed; both settings hold out the same images, as many of each class."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits))
    rows = [order[digits[order] == k] for k in range(CLASSES)]
    rank = random.permutation(CLASSES) if setting == RARE else np.zeros(CLASSES)
    sizes = np.round(LARGEST[setting] * RATIO ** (-rank / (CLASSES - 1))).astype(int)
    training = np.concatenate([of_class[HELD_OUT:][:size] for of_class, size in zip(rows, sizes, strict=True)])

    noise = NOISE if setting == WRONG else 0.0
    other = (digits + random.integers(1, CLASSES, len(digits))) % CLASSES
    labels = np.where(random.random(len(digits)) < noise, other, digits)
    epochs = -(-steps * BATCH // len(training))
    batches = np.concatenate([random.permutation(training) for _ in range(epochs)])[: steps * BATCH]
    return Run(
        seed=np.uint32(seed),
        labels=np.int32(labels),
        trained=np.isin(np.arange(len(digits)), training),
        held_out=np.int32(np.concatenate([of_class[:HELD_OUT] for of_class in rows])),
        batches=np.int32(batches.reshape(steps, BATCH)),
        counts=np.float32(np.bincount(labels[training], minlength=CLASSES)),
        noise=np.float32(np.where(np.eye(CLASSES, dtype=bool), 1 - noise, noise / (CLASSES - 1))),
    )


def judge(setting: str, answers: np.ndarray, runs: list[Run], digits: np.ndarray) -> Scores:
    """Scores from the answers [losses, seeds, digits] to all images."""
    right = answers == digits
    accuracy = np.stack([right[:, i, run.held_out].mean(axis=-1) for i, run in enumerate(runs)], axis=-1)
    detail = []
    for i, run in enumerate(runs):
        if setting == RARE:
            rarest = np.isin(digits[run.held_out], np.argsort(run.counts)[:3])
            detail.append(right[:, i, run.held_out[rarest]].mean(axis=-1))
        else:
            wrong = run.trained & (run.labels != digits)
            detail.append((answers[:, i, wrong] == run.labels[wrong]).mean(axis=-1))
    return Scores(100 * accuracy, 100 * np.stack(detail, axis=-1))


def best_first(accuracy: np.ndarray) -> np.ndarray:
    return np.argsort(-np.median(accuracy, axis=-1), kind="stable")


def marked(names: list[str], index: int) -> str:
    return names[index] if index else f"▸ {names[index]}"


def table(names: list[str], scores: dict[str, Scores]) -> str:
    """The settings side by side, each sorted by the median; gains are medians of the differences by seed from the first loss, marked."""
    columns = []
    for setting, (accuracy, detail) in scores.items():
        lines = [f"{setting:19s} median  lowest–highest    gain better {DETAIL[setting]:>8s}"]
        for index in best_first(accuracy):
            gains = accuracy[index] - accuracy[0]
            gain, better = (f"{np.median(gains):+.1f}", f"{np.sum(gains > 0)}/{len(gains)}") if index else ("", "")
            spread = f"{np.median(accuracy[index]):6.1f} {accuracy[index].min():7.1f}–{accuracy[index].max():4.1f}"
            lines.append(f"{marked(names, index):19s} {spread}  {gain:>8s} {better:>6s} {np.median(detail[index]):8.1f}")
        columns.append(lines)
    return "\n".join(" │ ".join(line) for line in zip(*columns, strict=True))


def draw(path: Path, names: list[str], scores: dict[str, Scores]) -> None:
    """Saves the picture: every seed a dot, the median a bar, the first loss's median a line across."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle("Held-out balanced accuracy by loss; green and red: by seed, a point or more above and below cross-entropy (median)")
    for axes, (setting, (accuracy, _)) in zip(figure.subplots(1, len(scores)), scores.items(), strict=True):
        order = best_first(accuracy)
        axes.axvline(np.median(accuracy[0]), color="black", linewidth=1, linestyle="--")
        for height, index in enumerate(reversed(order)):
            gain = np.median(accuracy[index] - accuracy[0])
            color = "black" if index == 0 else "C2" if gain >= 1 else "C3" if gain <= -1 else "C7"
            axes.scatter(accuracy[index], np.full(accuracy.shape[1], height), s=14, color=color, alpha=0.5)
            axes.plot([np.median(accuracy[index])] * 2, [height - 0.35, height + 0.35], color=color, linewidth=3)
        axes.set_yticks(range(len(order)), [marked(names, index) for index in reversed(order)])
        axes.set(title=setting, xlabel="accuracy (%): dots for seeds, bars for medians")
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
