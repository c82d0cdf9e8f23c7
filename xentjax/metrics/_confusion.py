"""The confusion matrix and its metrics. Shared conventions are documented in `xentjax.metrics`."""

from __future__ import annotations

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
    """[..., classes, classes], one row per true class and one column per predicted class; int32, or floating sums of weights."""
    invalid: Array
    """[...], the number of examples with an out-of-range label or prediction; int32."""


class Confusion(sums.RunningSum, _Fields):
    """Counts of pairs (true class, predicted class), shape [..., classes, classes].

    Use `+` to add `Confusion`s of different batches, and `psum` to add them over devices. In the formulas, n_kj is the count of
    examples of true class k that were predicted as class j. The sums are true_k = Σ_j n_kj and predicted_k = Σ_j n_jk.

    Each method returns a metric. `precision`, `recall` and `f1` return one value per class, or one of three averages:

    - `average="micro"`: numerator and denominator are first summed over all classes.
    - `average="macro"`: the mean over all classes that occur as a true class or as a predicted class.
    - `average="weighted"`: the mean over all classes, weighted by true_k.

    Each metric equals the metric of the same name in scikit-learn, with 0/0 = 0 (`zero_division=0`). Metrics are float32, or float64 for
    float64 counts. If the counts have leading axes from `jax.vmap`, the metrics have the same leading axes. If an example was invalid, all
    metrics are NaN.
    Gradient: 0 with respect to the predictions.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([2.0, -1.0, 0.5, -3.0]), jnp.array([True, True, False, False])  # one decision per example
        >>> result = xentjax.metrics.confusion(logits > 0, labels, classes=2)
        >>> result.counts.tolist(), result.recall().tolist(), float(result.accuracy())
        ([[1, 1], [1, 1]], [0.5, 0.5], 0.5)
    """

    def accuracy(self) -> Array:
        """Accuracy, Σ_k n_kk / Σ_kj n_kj, shape [...]."""
        return _figure(self, "recall", "micro")

    def balanced_accuracy(self) -> Array:
        """Mean recall over all classes that occur as labels, shape [...]."""
        return _figure(self, "recall", "balanced")

    def precision(self, average: Average | None = None) -> Array:
        """Precision n_kk / predicted_k of each class, shape [..., classes], or an average, shape [...]."""
        return _figure(self, "precision", _average("precision", average))

    def recall(self, average: Average | None = None) -> Array:
        """Recall n_kk / true_k of each class, shape [..., classes], or an average, shape [...]."""
        return _figure(self, "recall", _average("recall", average))

    def f1(self, average: Average | None = None) -> Array:
        """F1 score 2 n_kk / (true_k + predicted_k) of each class, shape [..., classes], or an average, shape [...]."""
        return _figure(self, "f1", _average("f1", average))


@functools.partial(jax.jit, static_argnames=("figure", "average"))
def _figure(confusion: Confusion, figure: str, average: str | None) -> Array:
    counts = sums.split(confusion)[0]
    hits = tuple(jnp.diagonal(each, axis1=-2, axis2=-1) for each in counts)
    # true_k, predicted_k and n_kk in one running sum
    x, first, second = (jnp.stack(each) for each in zip(sums.total(counts, -1), sums.total(counts, -2), hits, strict=True))
    stacked = x, first, second
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


def _average(function: str, average: str | None) -> str | None:
    checks.option(function, "average", average, (None, *get_args(Average)))
    return average


def confusion(
    predictions: ArrayLike,
    labels: ArrayLike,
    *,
    classes: int,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Confusion:
    """Confusion matrix: counts of pairs (true class, predicted class), shape [classes, classes].

    n_kj = Σ_i w_i [labels_i = k] [predictions_i = j]. The sum is over all examples i, as in scikit-learn's `confusion_matrix`.
    Gradient: ∂n_kj/∂w_i = [labels_i = k] [predictions_i = j].

    Args:
        predictions: [...] class indices, such as `logits.argmax(-1)`. For two classes, they may be booleans, such as `logits > 0`.
        labels: [...] class indices. For two classes, they may be booleans.
        classes: number of classes, at least 1.
        weights: [...], w ≥ 0; None gives each example the weight 1.
        where: [...], True for examples that count.

    Returns:
        `Confusion`. Its counts are int32. With `weights`, they are float32, or float64 for float64 weights.

    Raises:
        TypeError: an argument has the wrong dtype, for example because `predictions` are logits.
        ValueError: an argument has the wrong shape, or `classes` is below 1.

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
    y = _counts.classes(name, "labels", labels, "Use labels.argmax(-1) for the most likely class of soft labels.")
    checks.same_shape(name, "labels", y, predicted.shape, "the shape of predictions")
    w, counts = checks.example_weights(name, weights, where, y.shape, "the shape of labels")
    for argument, x in (("labels", y), ("predictions", predicted)):
        values.indices(name, argument, x, n, _counts.must_be_valid(w, counts))
    return _confusion(predicted, y, w, counts, n)


@functools.partial(jax.jit, static_argnames="classes")
def _confusion(predictions: Array, labels: Array, weights: Array | None, where: Array | None, classes: int) -> Confusion:
    valid = (labels >= 0) & (labels < classes) & (predictions >= 0) & (predictions < classes)
    amount, invalid = _counts.amounts(weights, where, valid)
    return sums.collect(Confusion, _counts.tally(amount, (classes, classes), labels, predictions), sums.parts_of(invalid))
