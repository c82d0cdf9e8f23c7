"""The confusion matrix and its figures. Shared conventions are documented in `xentjax.metrics`."""

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
    """[..., classes, classes], one row per true class, one column per predicted class; int32, or floating sums of weights."""
    invalid: Array
    """[...], the number of examples with an out-of-range label or prediction; int32."""


class Confusion(sums.RunningSum, _Fields):
    """Counts of pairs (true class, predicted class), shape [..., classes, classes].

    A `Confusion` is added over batches (`+`), is summed over devices (`psum`), and has a method for each figure. With n the counts,
    true_k = Σ_j n_kj and predicted_k = Σ_j n_jk. `precision`, `recall` and `f1` give one figure per class, or an average:

    - `average="micro"`: the ratio of the sums over classes;
    - `average="macro"`: the mean over the classes that occur as a true or a predicted class;
    - `average="weighted"`: the mean over classes, weighted by true_k.

    All figures equal scikit-learn's of the same name, with 0/0 = 0 (`zero_division=0`). They are float32, or float64 for float64 counts.
    They have the leading axes that `jax.vmap` gave the counts. All are NaN if an example was invalid. Gradient: 0 by the predictions.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([2.0, -1.0, 0.5, -3.0]), jnp.array([True, True, False, False])  # one decision per example
        >>> result = xentjax.metrics.confusion(logits > 0, labels, classes=2)
        >>> result.counts.tolist(), result.recall().tolist(), float(result.accuracy())
        ([[1, 1], [1, 1]], [0.5, 0.5], 0.5)
    """

    def accuracy(self) -> Array:
        """Σ_k n_kk / Σ_kj n_kj, [...]."""
        return _figure(self, "recall", "micro")

    def balanced_accuracy(self) -> Array:
        """The mean recall over the classes that occur as labels, [...]."""
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
    if average not in (None, *get_args(Average)):
        raise ValueError(f"{function}: average must be one of None, 'micro', 'macro', 'weighted'; got {average!r}.")
    return average


def confusion(
    predictions: ArrayLike,
    labels: ArrayLike,
    *,
    classes: int,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Confusion:
    """How often each class was predicted for each true class, counts of shape [classes, classes].

    n_kj = Σ_i w_i [labels_i = k] [predictions_i = j] over all examples i, as in scikit-learn's `confusion_matrix`.
    Gradient: ∂n_kj/∂w_i = [labels_i = k] [predictions_i = j].

    Args:
        predictions: [...], class indices (`logits.argmax(-1)`), or decisions (`logits > 0`) for two classes.
        labels: [...], class indices, or booleans for two classes.
        classes: number of classes.
        weights: [...], w ≥ 0; None counts each example once.
        where: [...], True for examples that count.

    Returns:
        `Confusion`. Counts are int32. With `weights`, they are float32, or float64 for float64 weights.

    Raises:
        TypeError: an argument has the wrong dtype, for example logits in place of `predictions`.
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
