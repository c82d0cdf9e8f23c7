"""The data of `digits_cnn.py`: scikit-learn's 1,797 digits of 8 × 8 pixels, or MNIST from its IDX files."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from idx import load_mnist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Data(NamedTuple):
    """Images [n, height, width, 1] in [0, 1] and labels [n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_data(folder: str | None, seed: int) -> Data:
    """MNIST from its IDX files in the folder; without one, scikit-learn's digits, of which each seed holds out another fifth."""
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        images = np.float32(images.reshape(-1, 8, 8, 1) / 16)
        parts = train_test_split(images, np.int32(labels), test_size=0.2, stratify=labels, random_state=seed)
        return Data(parts[0], parts[2], parts[1], parts[3])
    images, labels, test_images, test_labels = load_mnist(folder)
    return Data(np.float32(images[..., None] / 255), np.int32(labels), np.float32(test_images[..., None] / 255), np.int32(test_labels))


def in_parts(function: Callable, size: int, *arrays: np.ndarray) -> np.ndarray:
    """The function of the arrays' rows, so many at a time, so that activations stay small."""
    return np.concatenate([function(*(array[start : start + size] for array in arrays)) for start in range(0, len(arrays[0]), size)])
