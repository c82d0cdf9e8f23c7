"""The scenes of `scenes.py`: digits of scikit-learn in pictures of 24 × 24 pixels, and what a detector should find there."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

SIZE, GRID = 24, 12


class Scenes(NamedTuple):
    """`pictures` and `labels` are [n, 24, 24]; the boxes [n, 4, 4] are left, top, right, bottom; `kinds` [n, 4] is −1 without a digit."""

    pictures: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    kinds: np.ndarray


def compose(images: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator) -> Scenes:
    """Scenes with at most one digit in each quarter."""
    scenes = Scenes(np.zeros((count, SIZE, SIZE)), np.zeros((count, SIZE, SIZE), int), np.zeros((count, 4, 4)), np.full((count, 4), -1))
    for n, quarter in np.argwhere(rng.uniform(size=(count, 4)) < 0.6):
        i, (top, left) = rng.integers(len(images)), rng.integers(0, 5, 2) + 12 * np.array(divmod(quarter, 2))
        ink, place = images[i] > 0.3, (n, slice(top, top + 8), slice(left, left + 8))
        scenes.pictures[place], scenes.labels[place] = images[i] * rng.uniform(0.5, 1), np.where(ink, digits[i] + 1, 0)
        (first_row, first_column), (last_row, last_column) = np.argwhere(ink).min(0), np.argwhere(ink).max(0) + 1
        scenes.boxes[n, quarter] = left + first_column, top + first_row, left + last_column, top + last_row
        scenes.kinds[n, quarter] = digits[i]
    return scenes._replace(pictures=scenes.pictures + 0.1 * rng.normal(size=scenes.pictures.shape))


def load_scenes(training: int, held_out: int, seed: int) -> tuple[Scenes, Scenes]:
    """Scenes for the training, and scenes with other digits for the report."""
    images, digits = load_digits(return_X_y=True)
    images, rng = images.reshape(-1, 8, 8) / 16, np.random.default_rng(seed)
    return compose(images[:1400], digits[:1400], training, rng), compose(images[1400:], digits[1400:], held_out, rng)


def grid_targets(scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """The class [n, 12, 12] of the digit whose middle is near a point, or −1, and the distances [n, 12, 12, 4] to its sides."""
    y, x = np.meshgrid(2.0 * np.arange(GRID) + 1, 2.0 * np.arange(GRID) + 1, indexing="ij")
    kinds, sides = np.full((len(scenes.kinds), GRID, GRID), -1), np.zeros((len(scenes.kinds), GRID, GRID, 4))
    for n, i in np.argwhere(scenes.kinds >= 0):
        left, top, right, bottom = scenes.boxes[n, i]
        near = (abs(x - (left + right) / 2) <= 1.5) & (abs(y - (top + bottom) / 2) <= 1.5)
        kinds[n][near], sides[n][near] = scenes.kinds[n, i], np.stack([x - left, y - top, right - x, bottom - y], -1)[near]
    return kinds, sides
