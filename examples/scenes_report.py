"""The report of `scenes.py`: what the detector found, overlap of regions, matching of boxes, and the picture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scenes_data import GRID

BINS = 10


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [..., 4] (left, top, right, bottom)."""
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    both = np.prod(np.clip(high - low, 0, None), -1)
    area = [np.prod(box[..., 2:] - box[..., :2], -1) for box in (first, second)]
    return both / (area[0] + area[1] - both)


def region_overlap(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Intersection over union of every class [classes], over all pixels of all scenes."""
    pairs = [((predicted == k) & (labels == k)).sum() / ((predicted == k) | (labels == k)).sum() for k in range(classes)]
    return np.array(pairs)


def strongest(boxes: np.ndarray, scores: np.ndarray, least: float = 0.05) -> list[tuple[float, int, np.ndarray]]:
    """Score, class and box of the detections in one scene, strongest first, without those that overlap a stronger one by half."""
    kept: list[tuple[float, int, np.ndarray]] = []
    kinds, best = scores.argmax(-1), scores.max(-1)
    for i in np.argsort(-best):
        if best[i] >= least and all(overlap(boxes[i], box) < 0.5 for _, _, box in kept):
            kept.append((float(best[i]), int(kinds[i]), boxes[i]))
    return kept


def read(outputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of the scores [..., 10] and of the distances [..., 4, bins], and the mean distances [..., 4].

    The logits of the scores begin near −4, because few points have a digit.
    """
    sides = outputs[..., 10:].reshape(*outputs.shape[:-1], 4, BINS)
    return outputs[..., :10] - 4, sides, jax.nn.softmax(sides) @ jnp.arange(float(BINS))


def detections(outputs: jax.Array) -> list:
    """The strongest boxes of every scene."""
    scores, _, sides = (np.asarray(x) for x in read(outputs))
    points = np.stack(np.meshgrid(2.0 * np.arange(GRID) + 1, 2.0 * np.arange(GRID) + 1), -1)
    boxes = np.concatenate([points - sides[..., :2], points + sides[..., 2:]], -1).reshape(len(scores), -1, 4)
    return [
        strongest(box, score) for box, score in zip(boxes, np.asarray(jax.nn.sigmoid(scores)).reshape(len(scores), -1, 10), strict=True)
    ]


def precision_and_recall(found: list, boxes: np.ndarray, kinds: np.ndarray, needed: float) -> tuple[float, float, float]:
    """Precision and recall at the score with the best F1, and the average precision. A match needs the class and this overlap."""
    matches = []
    for detections, scene_boxes, scene_kinds in zip(found, boxes, kinds, strict=True):
        free = set(np.flatnonzero(scene_kinds >= 0))
        for score, kind, box in detections:
            fits = [i for i in free if scene_kinds[i] == kind and overlap(box, scene_boxes[i]) >= needed]
            free -= set(fits[:1])
            matches.append((score, bool(fits)))
    right = np.array([match for _, match in sorted(matches, reverse=True)])
    precision, recall = right.cumsum() / np.arange(1, len(right) + 1), right.cumsum() / (kinds >= 0).sum()
    best = np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-9))
    average = np.sum(np.diff(recall, prepend=0) * np.maximum.accumulate(precision[::-1])[::-1])
    return float(precision[best]), float(recall[best]), float(average)


def draw(path: Path, pictures: np.ndarray, masks: dict[str, np.ndarray], detections: dict[str, list], shown: int = 4) -> None:
    """Saves the picture: for each scene, the scene, the masks, and the boxes of each detector."""
    columns = 1 + len(masks) + len(detections)
    figure = Figure(figsize=(1.9 * columns, 2.05 * shown), layout="constrained")
    for row, axes in enumerate(figure.subplots(shown, columns)):
        for place in axes:
            place.imshow(pictures[row], cmap="gray_r")
            place.set_axis_off()
        for place, (name, mask) in zip(axes[1:], masks.items(), strict=False):
            place.imshow(np.ma.masked_equal(mask[row], 0), cmap="tab10", vmin=1, vmax=10, interpolation="nearest")
            place.set_title(name if row == 0 else "", fontsize=9)
        for place, (name, found) in zip(axes[1 + len(masks) :], detections.items(), strict=True):
            for score, kind, (left, top, right, bottom) in (d for d in found[row] if d[0] >= 0.3):
                corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
                place.add_patch(Rectangle(corner, *size, fill=False, color=f"C{kind}", linewidth=2))
                place.text(left, top - 0.8, f"{kind}: {score:.2f}", fontsize=7, color=f"C{kind}")
            place.set_title(name if row == 0 else "", fontsize=9)
        axes[0].set_title("scene" if row == 0 else "", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
