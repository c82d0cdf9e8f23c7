"""The report of `speech.py`: the label error rate and the picture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from speech_data import LETTERS, Speech, mel

import xentjax
from xentjax import sequence

SECONDS = 0.01  # of a frame of the spectrogram; a frame of the encoder is twice as long


def distance(first: np.ndarray, second: np.ndarray) -> int:
    """How many labels must be inserted, removed or replaced to turn one sequence into the other (Levenshtein)."""
    steps = np.arange(len(second) + 1)
    row = steps
    for i, label in enumerate(first, 1):
        best = np.concatenate([[i], np.minimum(row[:-1] + (second != label), row[1:] + 1)])  # replaced, removed
        row = np.minimum.accumulate(best - steps) + steps  # inserted
    return int(row[-1])


def error_rate(found: jax.Array, labels: np.ndarray) -> float:
    """Distances of all sequences, divided by the number of labels; −1 is padding. It exceeds 1 if too many labels are found."""
    pairs = [(f[f >= 0], y[y >= 0]) for f, y in zip(np.asarray(found), labels, strict=True)]
    return sum(distance(f, y) for f, y in pairs) / sum(len(y) for _, y in pairs)


def text(labels: np.ndarray | jax.Array) -> str:
    return "".join(LETTERS[k] for k in np.asarray(labels) if k >= 0)


def emissions(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Posterior probability [frames, labels] that a transducer emits a label at a frame: minus the gradient of the loss."""
    log_p = jax.nn.log_softmax(logits)
    of_labels = jnp.take_along_axis(log_p[:, :-1], labels[None, :, None], axis=-1).squeeze(-1)
    return -jax.grad(xentjax.transducer_loss_from_log_probs, argnums=1)(log_p[..., 0], of_labels)


def draw(path: Path, unseen: Speech, models: dict) -> None:
    """Saves the picture: an utterance with its best alignment, and the posteriors of both models before and after the training."""
    row = int(unseen.counts.argmax())
    frames, labels = unseen.frames[row] // 2, jnp.asarray(unseen.labels[row, : unseen.counts[row]])
    sound = unseen.sounds[row : row + 1]
    figure = Figure(figsize=(12, 10), layout="constrained")
    axes = figure.subplot_mosaic([["sound"] * 2, ["CTC 0", "CTC 1"], ["transducer 0", "transducer 1"]])
    logits = models["CTC"][1].encoder(sound)[0, :frames]
    draw_sound(axes["sound"], sound[0, : 2 * frames], sequence.ctc_alignment(logits, labels)[0], labels)
    for trained, title in enumerate(("before the training", "after the training")):
        ctc, transducer = (models[name][trained] for name in ("CTC", "transducer"))
        logits = ctc.encoder(sound)[0, :frames]
        found = text(sequence.ctc_greedy_decode(logits)[0])
        draw_posteriors(axes[f"CTC {trained}"], sequence.ctc_posteriors(logits, labels)[:, 1:], labels, f"CTC {title}: “{found}”")
        found = text(transducer.decode(sound, unseen.frames[row : row + 1])[0])
        posteriors = emissions(transducer.logits(sound, labels[None])[0, :frames], labels)
        draw_posteriors(axes[f"transducer {trained}"], posteriors, labels, f"transducer {title}: “{found}”")
    axes["CTC 0"].set_ylabel("probability that a frame belongs to a label")
    axes["transducer 0"].set_ylabel("probability that a label is emitted")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_sound(axes: Axes, sound: np.ndarray, path: jax.Array, labels: jax.Array) -> None:
    """The spectrogram, and each letter of the alignment above its frames."""
    axes.imshow(sound.T, origin="lower", aspect="auto", cmap="magma", extent=(0, len(sound) * SECONDS, 0, 1))
    kinds = np.asarray(path)
    starts = np.flatnonzero((kinds > 0) & (kinds != np.concatenate([[0], kinds[:-1]])))
    for start in starts:
        length = np.argmax(np.append(kinds[start:], 0) != kinds[start])
        left, right = 2 * start * SECONDS, 2 * (start + length) * SECONDS
        axes.axvline(left, ymax=1 / 1.13, color="white", linewidth=0.6, linestyle=":")
        axes.axvline(right, ymax=1 / 1.13, color="white", linewidth=0.6, linestyle=":")
        axes.add_patch(Rectangle((left, 1.01), right - left, 0.11, facecolor="#dbe8f5", edgecolor="white"))
        axes.text((left + right) / 2, 1.06, LETTERS[kinds[start]], ha="center", va="center", fontsize=13, weight="bold")
    hertz = np.array([250, 500, 1000, 2000, 4000, 8000])
    axes.set_yticks(mel(hertz), [f"{x / 1000:g}" for x in hertz])
    axes.set_ylim(0, 1.13)
    axes.set(title=f"A held-out utterance, “{text(labels)}”, and the best alignment by CTC", ylabel="frequency (kHz)", xlabel="time (s)")


def draw_posteriors(axes: Axes, posteriors: jax.Array, labels: jax.Array, title: str) -> None:
    """Probability of each label at each frame, given all labels."""
    frames, count = posteriors.shape
    axes.imshow(np.asarray(posteriors).T, aspect="auto", cmap="Blues", vmin=0, extent=(0, 2 * frames * SECONDS, count - 0.5, -0.5))
    axes.set_yticks(range(count), list(text(labels)))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("time (s)")
