"""The confusion matrix and what follows from it; the conventions stand in `xentjax.metrics`."""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, sums, values
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts

Average = Literal["micro", "macro", "weighted"]


class _Fields(NamedTuple):
    counts: Array
    """[..., classes, classes], row true, column predicted; int32, or floating sums of weights."""
    invalid: Array
    """[...], how many examples had a label or a prediction out of range; int32."""


class Confusion(sums.RunningSum, _Fields):
    """Counts of (true class, predicted class) [..., classes, classes]; adds over batches, sums over devices, has methods for figures.

    With n the counts, true_k = Σ_j n_kj and predicted_k = Σ_j n_jk. `precision`, `recall` and `f1` give one figure per class, or

    - `average="micro"`: the ratio of the sums over classes;
    - `average="macro"`: the mean over the classes that occur, true or predicted;
    - `average="weighted"`: the mean weighted by true_k.

    All equal scikit-learn's of the same name, with 0/0 = 0 (`zero_division=0`). They are float32 (float64 for float64 counts), with the
    leading axes that `jax.vmap` gave the counts; all are NaN if an example was invalid. Gradient: 0 by the decisions.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([2.0, -1.0, 0.5, -3.0]), jnp.array([True, True, False, False])  # one decision per example
        >>> found = xentjax.metrics.confusion(logits > 0, labels, classes=2)
        >>> found.counts.tolist(), found.recall().tolist(), float(found.accuracy())
        ([[1, 1], [1, 1]], [0.5, 0.5], 0.5)
    """

    def accuracy(self) -> Array:
        """Σ_k n_kk / Σ_kj n_kj, [...]."""
        return _figure(self, "recall", "micro")

    def balanced_accuracy(self) -> Array:
        """The mean of recall over the classes that occur as labels, [...]."""
        return _figure(self, "recall", "balanced")

    def precision(self, average: Average | None = None) -> Array:
        """n_kk / predicted_k per class [..., classes], or its average [...]."""
        return _figure(self, "precision", _average("precision", average))

    def recall(self, average: Average | None = None) -> Array:
        """n_kk / true_k per class [..., classes], or its average [...]."""
        return _figure(self, "recall", _average("recall", average))

    def f1(self, average: Average | None = None) -> Array:
        """2 n_kk / (true_k + predicted_k) per class [..., classes], or its average [...]."""
        return _figure(self, "f1", _average("f1", average))


def confusion(
    predictions: ArrayLike,
    labels: ArrayLike,
    *,
    classes: int,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Confusion:
    """How often each class was predicted for each, `Confusion` with counts [classes, classes] over all examples.

    n_kj = Σ_i w_i [labels_i = k] [predictions_i = j], as scikit-learn's `confusion_matrix`. Gradient: ∂n_kj/∂w_i = 1 on its cell.

    Args:
        predictions: [...], class indices (`logits.argmax(-1)`), or decisions (`logits > 0`) for two classes.
        labels: [...], class indices, or bits for two classes.
        classes: how many classes there are.
        weights: [...], w ≥ 0; None counts each example once.
        where: [...], which examples count.

    Returns:
        `Confusion`, counts int32, or float32 (float64 for float64 weights) with `weights`.

    Raises:
        TypeError: a dtype that does not fit; logits instead of predictions.
        ValueError: a shape that does not fit, `classes` below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> first = xentjax.metrics.confusion(jnp.array([0, 1, 1]), jnp.array([0, 1, 2]), classes=3)
        >>> second = xentjax.metrics.confusion(jnp.array([2]), jnp.array([2]), classes=3)
        >>> (first + second).f1().tolist()
        [1.0, 0.66666..., 0.66666...]

    Reference:
        Pedregosa et al., Scikit-learn: Machine Learning in Python, 2011, arXiv 1201.0490.
    """
    name = "confusion"
    n = checks.count(name, "classes", classes)
    predicted = _counts.classes(name, "predictions", predictions, "Use logits.argmax(-1), or logits > 0 for one logit per decision.")
    y = _counts.classes(name, "labels", labels, "Use labels.argmax(-1) for the likeliest class of a distribution.")
    checks.same_shape(name, "labels", y, predicted.shape, "the shape of predictions")
    w, counts = _counts.per_example(name, weights, where, y.shape, "the shape of labels")
    for argument, x in (("labels", y), ("predictions", predicted)):
        values.indices(name, argument, x, n, _counts.taking_part(w, counts))
    return _confusion(predicted, y, w, counts, n)


def _average(function: str, average: str | None) -> str | None:
    if average not in (None, *get_args(Average)):
        raise ValueError(f"{function}: average must be one of None, 'micro', 'macro', 'weighted'; got {average!r}.")
    return average


@functools.partial(jax.jit, static_argnames="classes")
def _confusion(predictions, labels, weights, where, classes):
    valid = (labels >= 0) & (labels < classes) & (predictions >= 0) & (predictions < classes)
    amount, invalid = _counts.amounts(weights, where, valid)
    return sums.collect(Confusion, _counts.tally(amount, (classes, classes), labels, predictions), sums.parts_of(invalid))


@functools.partial(jax.jit, static_argnames=("figure", "average"))
def _figure(confusion, figure, average):
    counts = sums.split(confusion)[0]
    hits = tuple(jnp.diagonal(x, axis1=-2, axis2=-1) for x in counts)
    margins = zip(sums.total(counts, -1), sums.total(counts, -2), hits, strict=True)
    first, second, third = (jnp.stack(x) for x in margins)
    stacked = first, second, third
    true, predicted, hits = sums.value(sums.total(stacked, -1, keepdims=True) if average == "micro" else stacked)
    doubled = 2 if figure == "f1" else 1
    denominator = {"precision": predicted, "recall": true, "f1": true + predicted}[figure]
    value = WeightedSum(doubled * hits, denominator).mean()
    if average == "micro":
        value = value[..., 0]
    elif average is not None:
        weight = {"macro": true + predicted > 0, "balanced": true > 0, "weighted": true}[average].astype(true.dtype)
        value = WeightedSum((weight * value).sum(-1), weight.sum(-1)).mean()
    return _counts.figure(value, confusion.invalid)
