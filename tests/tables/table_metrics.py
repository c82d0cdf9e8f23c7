"""Rows of the metrics that have one value per example, with their definitions in float64 NumPy; and all sums that add over batches."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import xentjax
from tests.tables.functions import Row
from xentjax import metrics

CLASSES = 7


def draw(rng, leading):
    return rng.normal(size=(*leading, CLASSES)) * 2, rng.integers(0, CLASSES, leading)


def draw_distributions(rng, leading):
    return rng.normal(size=(*leading, CLASSES)) * 2, rng.dirichlet(np.ones(CLASSES), leading)


def draw_ties(rng, leading):
    """Logits 0, 1 and 2 in seven classes: hardly a row without ties."""
    return rng.integers(0, 3, (*leading, CLASSES)).astype(float), rng.integers(0, CLASSES, leading)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def target(z, labels):
    return np.eye(CLASSES)[labels] if np.issubdtype(labels.dtype, np.integer) else labels


def accuracy(z, labels):
    return (z.argmax(-1) == labels).astype(float)


def top_k(k):
    """The last k of a stable ascending order: of tied classes the last comes first, as in scikit-learn."""
    return lambda z, labels: (np.argsort(z, axis=-1, kind="stable")[..., -k:] == labels[..., None]).any(-1).astype(float)


def brier(z, labels):
    return ((softmax(z) - target(z, labels)) ** 2).sum(-1)


def brier_gradient(z, labels):
    p, t = softmax(z), target(z, labels)
    by_logits = 2 * p * (p - t - (p * (p - t)).sum(-1, keepdims=True))
    return (by_logits,) if np.issubdtype(labels.dtype, np.integer) else (by_logits, 2 * (t - p))


def nll(z, labels):
    return -(target(z, labels) * np.log(softmax(z))).sum(-1)


def nll_gradient(z, labels):
    p, t = softmax(z), target(z, labels)
    by_logits = t.sum(-1, keepdims=True) * p - t
    return (by_logits,) if np.issubdtype(labels.dtype, np.integer) else (by_logits, -np.log(p))


ROWS: tuple[Row, ...] = (
    Row("metrics.accuracy", metrics.accuracy, draw, accuracy, smooth=()),
    Row("metrics.accuracy", metrics.accuracy, draw_ties, accuracy, smooth=(), label="ties"),
    Row("metrics.top_k_accuracy", metrics.top_k_accuracy, draw, top_k(3), smooth=(), keywords={"k": 3}),
    Row("metrics.top_k_accuracy", metrics.top_k_accuracy, draw_ties, top_k(2), smooth=(), keywords={"k": 2}, label="ties"),
    Row("metrics.brier_score", metrics.brier_score, draw, brier, gradient=brier_gradient),
    Row("metrics.brier_score", metrics.brier_score, draw_distributions, brier, (0, 1), brier_gradient, label="distributions"),
    Row("metrics.negative_log_likelihood", metrics.negative_log_likelihood, draw, nll, gradient=nll_gradient),
    Row("metrics.negative_log_likelihood", metrics.negative_log_likelihood, draw_distributions, nll, (0, 1), nll_gradient, label="soft"),
)


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """A sum that users add over batches: a part of it, and the figures that follow."""

    label: str
    part: Callable  # () → the sum of a small batch
    figures: Callable  # (sum) → its figures

    def __str__(self) -> str:
        return self.label


LOGITS, LABELS = jnp.array([[2.0, 0.0, 1.0], [0.3, 0.2, 0.1], [0.0, 3.0, 1.0]]), jnp.array([0, 1, 1])
WEIGHTS = jnp.array([0.3, 1.7, 2.3])


def confusion(**keywords):
    return metrics.confusion(LOGITS.argmax(-1), LABELS, classes=3, **keywords)


def calibration(**keywords):
    return metrics.calibration(LOGITS, LABELS, bins=3, **keywords)


def ranking(**keywords):
    return metrics.ranking(LOGITS[:, 0], LABELS == 0, low=0.0, high=2.0, points=5, **keywords)


def of_confusion(found):
    return [found.accuracy(), found.balanced_accuracy(), found.precision(), found.recall("macro"), found.f1("weighted")]


def of_calibration(found):
    return [found.accuracy(), found.confidence(), found.expected_calibration_error(), found.maximum_calibration_error()]


def of_ranking(found):
    return [found.auroc(), found.auroc_error()]


# Every public class that adds has rows here.
ACCUMULATORS = (
    Accumulator("WeightedSum", lambda: xentjax.weighted_sum(jnp.array([2.3, 0.7]), jnp.array([1.1, 0.3])), lambda found: [found.mean()]),
    Accumulator(
        "WeightedSum-pytree",
        lambda: xentjax.WeightedSum({"w": jnp.array([0.1, -2.3]), "b": jnp.array(1e-3)}, jnp.array(3.0)),
        lambda found: jax.tree.leaves(found.mean()),
    ),
    Accumulator("Confusion", confusion, of_confusion),
    Accumulator("Confusion-weights", functools.partial(confusion, weights=WEIGHTS), of_confusion),
    Accumulator("Calibration", calibration, of_calibration),
    Accumulator("Calibration-weights", functools.partial(calibration, weights=WEIGHTS), of_calibration),
    Accumulator("Ranking", ranking, of_ranking),
    Accumulator("Ranking-weights", functools.partial(ranking, weights=WEIGHTS), of_ranking),
)
