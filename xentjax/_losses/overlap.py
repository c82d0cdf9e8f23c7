"""Region losses, for segmentation: they compare the predicted region of each class with the labelled region.

All functions here except `lovasz_hinge_loss` share these conventions:

- `logits` [..., *spatial, classes] hold one row of logits per pixel, or per voxel. `spatial` is the number of spatial axes: 2 for images, 3
  for volumes, 1 for sequences. All axes before the spatial axes are batch axes. In the following, an image is one element of the batch.
- `axis` is the class axis of `logits`. For logits [..., classes, height, width], pass `axis=-3`.
- `labels` [..., *spatial] of an integer dtype are class indices. Labels of a floating dtype are soft labels, with the shape of `logits`.
  `boundary_loss` takes distances instead of labels. If the index of a pixel that counts is outside [0, classes), the value and the gradient
  of its whole image are NaN.
- The result [..., classes] has one value per image and class. The classes are on its last axis, whatever `axis` is. Arithmetic and results
  are float32, or float64 if `logits` are float64. The gradient with respect to `logits` has the dtype of `logits`.
- `class_mask`, [classes] or the shape of `logits`, is True for classes that exist. The loss and the gradient of every other class are
  exactly 0. The softmax leaves these classes out. So do not use `class_mask` to leave the background out of a mean, because the model must
  be able to predict the background. Use `loss[..., 1:]` instead.
- `where` [..., *spatial] is True for pixels that count. All other pixels are left out of every sum, and their gradient is exactly 0,
  whatever they contain. If no pixel of an image counts, its loss is 0.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.

The formulas are for one image and one class. p_n is the probability of the class at pixel n, and t_n is the label: 1, 0 or a number in
between. The sums run over the pixels that count:

    TP = Σ_n min(p_n, t_n)        FP = Σ_n max(p_n − t_n, 0)        FN = Σ_n max(t_n − p_n, 0)

For class indices, these are Σ p t, Σ p(1 − t) and Σ (1 − p)t. A perfect prediction has FP = FN = 0, for soft labels too.

Accuracy: no loss is computed as 1 minus an index. The Dice, Jaccard and Tversky losses are quotients of sums of numbers ≥ 0, and the Lovász
losses are sums of numbers ≥ 0. So the loss and the gradient of a nearly perfect prediction have a small relative error.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, probabilities, rows, statistics, values


def dice_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    smooth: ArrayLike = 0.0,
    squared: bool = False,
    spatial: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Dice loss, one value per image and class, shape [..., classes].

    loss = (FP + FN)/(2 TP + FP + FN + s) with s = `smooth`. For class indices, it equals 1 − (2 Σ p t + s)/(Σ p + Σ t + s).
    With `squared`, loss = Σ (p − t)²/(2 Σ p t + Σ (p − t)² + s), which equals 1 − (2 Σ p t + s)/(Σ p² + Σ t² + s).
    Gradient: with E = FP + FN and D = 2 TP + E + s, ∂loss/∂p_n = ((D − E) sign(p_n − t_n) − 2E [p_n < t_n])/D². With `squared`,
    ∂loss/∂p_n = 2((p_n − t_n)(D − E) − E t_n)/D², where E is the numerator and D is the denominator.

    The loss is 1 minus the Dice coefficient, which is the F1 score of the pixels. If a class is absent from an image and `smooth` is 0, its
    loss is 1 with gradient 0, or 0 if its probability (with `squared`, the square of it) is 0 everywhere. `present_classes` returns which
    classes are present.

    Args:
        logits: [..., *spatial, classes], unnormalized log-probabilities.
        labels: [..., *spatial] class indices, or [..., *spatial, classes] soft labels.
        smooth: s ≥ 0, added to the numerator and the denominator of the Dice coefficient, in pixels.
        squared: whether the denominator has squares, as in V-Net.
        spatial: number of spatial axes.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes], or the shape of `logits`; True for classes that exist.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [..., classes], in [0, 1]; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `smooth` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> labels = jnp.array([[0, 1], [1, 1]])
        >>> sure = 30.0 * jnp.array([[[1, -1], [-1, 1]], [[-1, 1], [-1, 1]]])  # all pixels right, with a margin of 60
        >>> xentjax.dice_loss(sure, labels).tolist()  # 1 − 2 Σ p t/(Σ p + Σ t) would be 0 in float32
        [1.75130...e-26, 5.83767...e-27]

    Reference:
        Milletari, Navab and Ahmadi, V-Net, 2016, arXiv 1606.04797. For soft labels: Wang et al., Dice Semimetric Losses, 2023,
        arXiv 2303.16296.
    """
    name = "dice_loss"
    batch = _pixels(name, logits, labels, spatial, axis, axis_name, class_mask, where)
    return _dice(batch, spatial, squared, _scalar(name, "smooth", smooth))


@functools.partial(jax.jit, static_argnames=("spatial", "squared"))
def _dice(batch: rows.Examples, spatial: int, squared: bool, smooth: ArrayLike) -> Array:
    s = _sums(batch, spatial, squared)
    return _finish(batch, spatial, _share(s.wrong, 2 * s.both + jnp.asarray(smooth, s.both.dtype)))


def tversky_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.5,
    beta: ArrayLike = 0.5,
    gamma: ArrayLike = 1.0,
    smooth: ArrayLike = 0.0,
    spatial: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Tversky loss or focal Tversky loss, one value per image and class, shape [..., classes].

    loss = T^γ with T = (α FP + β FN)/(TP + α FP + β FN + s) and s = `smooth`. So T equals 1 − (TP + s)/(TP + α FP + β FN + s).
    Gradient: with E = α FP + β FN and D = TP + E + s, ∂T/∂p_n = α (D − E)/D² for p_n > t_n, and −(β (D − E) + E)/D² for p_n < t_n.
    ∂loss/∂p_n = γ T^(γ − 1)·∂T/∂p_n.

    α = β = 1/2 gives the Dice loss, and α = β = 1 gives the Jaccard loss. If β is larger than α, a missed pixel costs more than a false
    alarm.

    Args:
        logits: [..., *spatial, classes], unnormalized log-probabilities.
        labels: [..., *spatial] class indices, or [..., *spatial, classes] soft labels.
        alpha: α ≥ 0, weight of false positives.
        beta: β ≥ 0, weight of false negatives.
        gamma: γ > 0. γ < 1 gives more weight to classes with a small loss, and γ > 1 to classes with a large loss. The paper of the focal
            Tversky loss writes the exponent as 1/γ, and exchanges α and β.
        smooth: s ≥ 0, added to the numerator and the denominator of the Tversky index, in pixels.
        spatial: number of spatial axes.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes], or the shape of `logits`; True for classes that exist.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [..., classes], in [0, 1]; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `alpha`, `beta` or `smooth` is negative, or `gamma` is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]))  # one row of two pixels
        >>> xentjax.tversky_loss(logits, jnp.array([[0, 1]]), alpha=0.3, beta=0.7).tolist()
        [0.30232..., 0.45945...]

    Reference:
        Salehi, Erdogmus and Gholipour, Tversky Loss Function for Image Segmentation, 2017, arXiv 1706.05721. Abraham and Khan, A Novel
        Focal Tversky Loss Function, 2018, arXiv 1810.07842.
    """
    name = "tversky_loss"
    batch = _pixels(name, logits, labels, spatial, axis, axis_name, class_mask, where)
    numbers = (_scalar(name, n, x) for n, x in (("alpha", alpha), ("beta", beta), ("smooth", smooth)))
    exponent = checks.positive(name, "gamma", gamma)
    return _tversky(batch, spatial, *numbers, None if isinstance(exponent, float) and exponent == 1 else exponent)


@functools.partial(jax.jit, static_argnames=("spatial",))
def _tversky(batch: rows.Examples, spatial: int, alpha: ArrayLike, beta: ArrayLike, smooth: ArrayLike, gamma: ArrayLike | None) -> Array:
    dtype = numerics.accumulation_dtype(batch.logits.dtype)
    s = _sums(batch, spatial, False, jnp.asarray(alpha, dtype), jnp.asarray(beta, dtype))
    loss = _share(s.wrong, s.both + jnp.asarray(smooth, dtype))
    return _finish(batch, spatial, loss if gamma is None else _power(loss, jnp.asarray(gamma, loss.dtype)))


def jaccard_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    smooth: ArrayLike = 0.0,
    squared: bool = False,
    spatial: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Jaccard loss, one value per image and class, shape [..., classes].

    loss = (FP + FN)/(TP + FP + FN + s) with s = `smooth`. For class indices, it equals 1 − (Σ p t + s)/(Σ p + Σ t − Σ p t + s).
    With `squared`, loss = Σ (p − t)²/(Σ p t + Σ (p − t)² + s), which equals 1 − (Σ p t + s)/(Σ p² + Σ t² − Σ p t + s).
    Gradient: with E = FP + FN and D = TP + E + s, ∂loss/∂p_n = ((D − E) sign(p_n − t_n) − E [p_n < t_n])/D². With `squared`,
    ∂loss/∂p_n = (2(p_n − t_n)(D − E) − E t_n)/D², where E is the numerator and D is the denominator.

    The loss is 1 minus the intersection over union. If a class is absent from an image and `smooth` is 0, its loss is 1 with gradient 0, or
    0 if its probability is 0 everywhere. `present_classes` returns which classes are present.

    Args:
        logits: [..., *spatial, classes], unnormalized log-probabilities.
        labels: [..., *spatial] class indices, or [..., *spatial, classes] soft labels.
        smooth: s ≥ 0, added to the numerator and the denominator of the intersection over union, in pixels.
        squared: whether the denominator has squares.
        spatial: number of spatial axes.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes], or the shape of `logits`; True for classes that exist.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [..., classes], in [0, 1]; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `smooth` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> soft_labels = jnp.array([[[0.75, 0.25], [0.5, 0.5]]])  # one row of two pixels
        >>> float(xentjax.jaccard_loss(jnp.log(soft_labels), soft_labels).max().round(6))  # a perfect prediction of soft labels
        0.0

    Reference:
        Wang, Ning and Blaschko, Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels, 2023, arXiv 2302.05666.
    """
    name = "jaccard_loss"
    batch = _pixels(name, logits, labels, spatial, axis, axis_name, class_mask, where)
    return _jaccard(batch, spatial, squared, _scalar(name, "smooth", smooth))


@functools.partial(jax.jit, static_argnames=("spatial", "squared"))
def _jaccard(batch: rows.Examples, spatial: int, squared: bool, smooth: ArrayLike) -> Array:
    s = _sums(batch, spatial, squared)
    return _finish(batch, spatial, _share(s.wrong, s.both + jnp.asarray(smooth, s.both.dtype)))


def lovasz_softmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    spatial: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Lovász-softmax loss, one value per image and class, shape [..., classes].

    loss = Σ_i m_i (Δ_i − Δ_{i−1}). Here m_1 ≥ m_2 ≥ … are the errors |p_n − t_n| of all pixels in descending order, and Δ_i is the Jaccard
    loss of a prediction that is wrong exactly at the first i pixels: Δ_i = i/(T + F_i), where T is the number of pixels of the class, and
    F_i is the number of pixels among the first i that are not of the class. Δ_0 is 0.
    Gradient: ∂loss/∂p_n = ±(Δ_i − Δ_{i−1}) for the pixel at position i. The sign is the sign of p_n − t_n.

    The loss is the Lovász extension of the Jaccard loss: if all errors are 0 or 1, it equals the Jaccard loss. As long as the order of the
    errors does not change, it is linear in the errors. If a class is absent from an image, its loss is the largest probability of the
    class. For soft labels, each pixel counts as t_n pixels of the class and 1 − t_n other pixels: T = Σ t_n, F_i is the sum of 1 − t_n over
    the first i pixels, and Δ_i = i/(T + F_i) as before.

    Args:
        logits: [..., *spatial, classes], unnormalized log-probabilities.
        labels: [..., *spatial] class indices, or [..., *spatial, classes] soft labels.
        spatial: number of spatial axes.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes], or the shape of `logits`; True for classes that exist.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [..., classes], in [0, 1]; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]])), jnp.array([[0, 1]])  # errors 0.25, 0.5 in both classes
        >>> loss = xentjax.lovasz_softmax_loss(logits, labels)
        >>> [round(x, 4) for x in loss.tolist()]  # 0.5·(1/2) + 0.25·(1/2) for class 0, 0.5·1 + 0.25·0 for class 1
        [0.375, 0.5]

    Reference:
        Berman, Triki and Blaschko, The Lovász-Softmax Loss, 2017, arXiv 1705.08790.
    """
    return _lovasz_softmax(_pixels("lovasz_softmax_loss", logits, labels, spatial, axis, axis_name, class_mask, where), spatial)


@functools.partial(jax.jit, static_argnames=("spatial",))
def _lovasz_softmax(batch: rows.Examples, spatial: int) -> Array:
    r = rows.of(batch)
    e = _per_pixel(r)
    return _finish(batch, spatial, _lovasz(e.wrong, e.target, spatial))


def lovasz_hinge_loss(logits: ArrayLike, labels: ArrayLike, *, spatial: int = 2, where: ArrayLike | None = None) -> Array:
    """Lovász hinge loss of binary segmentation, one value per image, shape [...].

    loss = Σ_i m_i (Δ_i − Δ_{i−1}). Here m_1 ≥ m_2 ≥ … are the hinge errors max(1 − s_n z_n, 0) of all pixels in descending order, with the
    sign s_n = 1 for label 1 and −1 for label 0. Δ_i is the Jaccard loss of class 1 for a prediction that is wrong exactly at the first i
    pixels, as in `lovasz_softmax_loss`.
    Gradient: ∂loss/∂z_n = −s_n (Δ_i − Δ_{i−1}) for the pixel at position i if its error is above 0, otherwise 0.

    Args:
        logits: [..., *spatial], one score per pixel. The prediction is 1 where the score is above 0.
        labels: [..., *spatial], booleans, or the integers 0 and 1. If the label of a pixel that counts is another integer, the value and
            the gradient of its image are NaN.
        spatial: number of spatial axes.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.lovasz_hinge_loss(jnp.array([[3.0, -0.5], [-2.0, 0.5]]), jnp.array([[1, 1], [0, 1]])).tolist()  # 1.5/3 + 0.5/3
        0.66666...

    Reference:
        Yu and Blaschko, The Lovász Hinge: A Novel Convex Surrogate for Submodular Losses, 2015, arXiv 1512.07797.
    """
    name = "lovasz_hinge_loss"
    z, y = checks.floating(name, "logits", logits), checks.asarray(name, "labels", labels)
    y = y if y.dtype == jnp.bool_ else checks.integers(name, "labels", y)
    if z.ndim > y.ndim:
        checks.same_shape(name, "logits", z, y.shape, "one score per pixel of labels")
    checks.same_shape(name, "labels", y, z.shape, "the shape of logits")
    counts = checks.where_mask(name, where, z.shape, "the shape of logits")
    if z.ndim < checks.count(name, "spatial", spatial):
        raise ValueError(f"{name}: logits must have {spatial} spatial axes; got shape {z.shape}. Use spatial={z.ndim}.")
    values.logits(name, "logits", z, counts)
    if y.dtype != jnp.bool_:
        values.indices(name, "labels", y, 2, counts)
    return _lovasz_hinge(z, y, counts, spatial)


@functools.partial(jax.jit, static_argnames=("spatial",))
def _lovasz_hinge(logits: Array, labels: Array, where: Array | None, spatial: int) -> Array:
    dtype = numerics.accumulation_dtype(logits.dtype)
    z, y = numerics.finite(logits.astype(dtype)), labels.astype(jnp.int32) if labels.dtype == jnp.bool_ else labels
    if where is not None:
        z, y = numerics.where(where, z, 0), numerics.where(where, y, 0)
    error = 1 - numerics.where(y == 1, z, -z)
    error = numerics.where(error > 0, error, 0) if where is None else numerics.where((error > 0) & where, error, 0)
    loss = _lovasz(error[..., None], (y == 1).astype(dtype)[..., None], spatial)[..., 0]
    return numerics.nan_unless(jnp.all((y == 0) | (y == 1), axis=_pixel_axes(y.ndim, spatial)), numerics.restore_infinity(loss))


def boundary_loss(
    logits: ArrayLike,
    distances: ArrayLike,
    *,
    spatial: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Boundary loss, one value per image and class, shape [..., classes].

    loss = Σ_n φ_n p_n/N, where φ_n is the signed distance from pixel n to the boundary of the labelled region, and N is the number of
    pixels that count.
    Gradient: ∂loss/∂p_n = φ_n/N, so ∂loss_k/∂z_j = Σ_n φ_n p_k([j = k] − p_j)/N with the probabilities p_k and p_j of pixel n.

    The distance is negative inside the region, and positive outside. So the loss is smallest if the prediction equals the region. A false
    pixel costs more if it is farther from the region. The loss may be negative. It is meant to be added to another region loss.

    Args:
        logits: [..., *spatial, classes], unnormalized log-probabilities.
        distances: the shape of `logits`, the signed distances φ. With `edt = scipy.ndimage.distance_transform_edt`, the distances from a
            region are `edt(~region) - edt(region)`, in pixels. If the region is empty or covers the whole image, it has no boundary, and
            the result of `edt` is meaningless. Pass 0 for such a class.
        spatial: number of spatial axes.
        axis: class axis of `logits` and `distances`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes], or the shape of `logits`; True for classes that exist.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [..., classes], in the unit of `distances`; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> distance = jnp.array([-1.0, 1.0, 2.0, 3.0])  # class 1 is the first of four pixels in a row
        >>> distances = jnp.stack([-distance, distance], axis=-1)
        >>> near, far = (jnp.zeros((4, 2)).at[n, 1].set(9.0) for n in (1, 3))  # pixel n is wrongly predicted as class 1
        >>> [float(xentjax.boundary_loss(x, distances, spatial=1)[1].round(2)) for x in (near, far)]
        [0.75, 1.0]

    Reference:
        Kervadec et al., Boundary loss for highly unbalanced segmentation, 2018, arXiv 1812.07032.
    """
    name = "boundary_loss"
    batch = _pixels(name, logits, None, spatial, axis, axis_name, class_mask, where, labelled=False)
    d = checks.same_shape(name, "distances", checks.real(name, "distances", distances), batch.logits.shape, "the shape of logits")
    values.finite(name, "distances", d, batch.where, batch.axis)
    return _boundary(batch, d, spatial)


@functools.partial(jax.jit, static_argnames=("spatial",))
def _boundary(batch: rows.Examples, distances: Array, spatial: int) -> Array:
    r = rows.of(batch)
    distance = rows.masked(jnp.moveaxis(distances, batch.axis, -1).astype(r.values.dtype), r.where, r.class_mask)
    axes = _pixel_axes(r.values.ndim - 1, spatial)
    counted = jnp.ones(r.values.shape[:-1], bool) if r.where is None else r.where
    number = jnp.maximum(jnp.sum(counted, axis=axes, dtype=r.values.dtype), 1)
    return _pixel_sum(rows.masked(statistics.softmax(r) * distance, r.where, r.class_mask), spatial) / number[..., None]


def present_classes(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    spatial: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Whether a class is present in the labels of an image, shape [..., classes].

    present = (Σ_n t_n > 0), where the sum runs over the pixels that count. Classes that do not exist are not present.
    Gradient: none, because the result is boolean.

    The arguments are those of the region losses. Only the shape of `logits` is used, not the values. To compute a mean over the classes
    that are present, pass the result to `weighted_mean` as `where`.

    Args:
        logits: [..., *spatial, classes], unnormalized log-probabilities.
        labels: [..., *spatial] class indices, or [..., *spatial, classes] soft labels. An index out of range is ignored.
        spatial: number of spatial axes.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes], or the shape of `logits`; True for classes that exist.
        where: [..., *spatial], True for pixels that count.

    Returns:
        [..., classes], bool.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.zeros((2, 2, 3)), jnp.array([[0, 1], [1, 1]])
        >>> present = xentjax.present_classes(logits, labels)
        >>> present.tolist()
        [True, True, False]
        >>> xentjax.weighted_mean(xentjax.dice_loss(logits, labels), where=present).tolist()  # (5/7 + 7/13)/2, without class 2
        0.62637...

    Reference:
        Berman, Triki and Blaschko, The Lovász-Softmax Loss, 2017, arXiv 1705.08790 (the mean over the classes that are present).
    """
    return _present(_pixels("present_classes", logits, labels, spatial, axis, axis_name, class_mask, where), spatial)


@functools.partial(jax.jit, static_argnames=("spatial",))
def _present(batch: rows.Examples, spatial: int) -> Array:
    r = rows.of(batch)
    target = rows.on_label(r) if r.labels_are_indices else r.given_labels > 0
    keep = rows.full_mask(r)
    return jnp.any(target if keep is None else target & keep, axis=_pixel_axes(target.ndim - 1, spatial))


# Errors of pixels ----------------------------------------------------------------------------------------------------------


class _Errors(NamedTuple):
    """How the prediction and the label of a class differ, per pixel [..., *spatial, classes] or summed over pixels [..., classes]."""

    wrong: Array  # α·max(p − t, 0) + β·max(t − p, 0), or (p − t)²
    both: Array  # min(p, t), or p·t
    target: Array  # t


def _per_pixel(r: rows.Rows, squared: bool = False, alpha: Array | float = 1.0, beta: Array | float = 1.0) -> _Errors:
    """The errors of every pixel and class. They are 0 in pixels that do not count and in classes that do not exist.

    Both p and 1 − p have a small relative error. The difference p − t is computed from the smaller of the two.
    """
    p, rest = probabilities.with_complements(r)
    if r.labels_are_indices:
        label = rows.on_label(r)
        t, both = label.astype(p.dtype), numerics.where(label, p, 0)
        wrong = numerics.where(label, rest * rest, p * p) if squared else numerics.where(label, beta * rest, alpha * p)
    else:
        t = r.given_labels
        difference = numerics.where(p > numerics.MOST, (1 - t) - rest, p - t)
        above, below = difference > 0, difference < 0  # at p = t, the gradient is 0
        both = p * t if squared else numerics.where(above, t, p)
        signed = numerics.where(above, alpha * difference, numerics.where(below, -beta * difference, 0))
        wrong = difference * difference if squared else signed
    return _Errors(*(rows.masked(x, r.where, r.class_mask) for x in (wrong, both, t)))


def _sums(batch: rows.Examples, spatial: int, squared: bool, alpha: Array | float = 1.0, beta: Array | float = 1.0) -> _Errors:
    """The sums of the errors over the pixels, each [..., classes]."""
    return _Errors(*(_pixel_sum(x, spatial) for x in _per_pixel(rows.of(batch), squared, alpha, beta)))


def _lovasz(error: Array, target: Array, spatial: int) -> Array:
    """Σ_i m_i (Δ_i − Δ_{i−1}) over the pixels, shape [..., classes], from errors and labels [..., *spatial, classes].

    Let I be the number of pixels of the class without the first i − 1 pixels, U the number of pixels in the union of the class and the
    first i − 1 pixels, and t the label of pixel i. Then

        Δ_i − Δ_{i−1} = I/U − (I − t)/(U + 1 − t) = (I (1 − t) + U t)/(U (U + 1 − t)),

    in which nothing cancels. If the class is absent, Δ_1 is 1. These factors depend only on the order of the errors, so they are treated as
    constants. Errors are at least 0. A pixel that does not count has error 0 and label 0. It changes the factors only of pixels with
    error 0, whose terms and derivatives are 0. So its place in the order does not matter.
    """
    if error.size == 0:
        return _pixel_sum(error, spatial)

    def last(x: Array) -> Array:  # [..., classes, pixels]
        return jnp.moveaxis(x.reshape(*x.shape[: x.ndim - 1 - spatial], -1, x.shape[-1]), -1, -2)

    m = last(error)
    negative, axis = -lax.stop_gradient(m), m.ndim - 1
    place = lax.broadcasted_iota(jnp.int32, m.shape, axis, out_sharding=mesh.split_of(m))
    _, place, t = lax.sort((negative, place, last(lax.stop_gradient(target))), dimension=axis, num_keys=1, is_stable=False)
    left, others = lax.cumsum(t, axis, reverse=True), lax.cumsum(1 - t, axis)
    total = left[..., :1]
    before, after = total + (others - (1 - t)), total + others
    first = before == 0
    factor = numerics.where(first, 1, (left * (1 - t) + before * t) / (numerics.where(first, 1, before) * after))
    if mesh.is_explicit(m):  # JAX cannot look up values in an array that is split over devices
        return jnp.sum(numerics.weighted(lax.sort((place, factor), dimension=axis, num_keys=1)[1], m), axis=axis)
    return jnp.sum(numerics.weighted(factor, numerics.take_last(m, place, differentiated=True)), axis=axis)


# Quotients -----------------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def _share(part: Array, rest: Array) -> Array:
    """part/(part + rest) for numbers ≥ 0, and 0 with derivative 0 where both are 0.

    The derivatives rest/(part + rest)² and −part/(part + rest)² contain no difference. They are computed from shares, without the square of
    a sum, which could underflow.
    """
    total = part + rest
    return part / numerics.where(numerics.underflows(total), 1, total)


@_share.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    part, rest = primals
    share = _share(part, rest)
    return share, (_share(rest, part) * tangents[0] - share * tangents[1]) * _reciprocal(part + rest)


@jax.custom_jvp
def _reciprocal(x: Array) -> Array:
    """1/x, and 1 at x = 0.

    The derivative −dx/x² is computed as −(1/x)·((1/x)·dx). It does not overflow if |dx| is at most of the size of x, but 1/x² may overflow.
    """
    return 1 / numerics.where(numerics.underflows(x), 1, x)


@_reciprocal.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _reciprocal(*primals)
    return inverse, -inverse * (inverse * tangents[0])


@jax.custom_jvp
def _log(x: Array) -> Array:
    """The logarithm of x, and 0 at x = 0. The derivative is `_reciprocal(x)`."""
    return jnp.log(numerics.where(numerics.underflows(x), 1, x))


_log.defjvp(lambda primals, tangents: (_log(*primals), _reciprocal(*primals) * tangents[0]))


def _power(x: Array, exponent: Array) -> Array:
    """x^exponent for x ≥ 0 and an exponent above 0; at x = 0, it is 0 with derivative 0."""
    return numerics.where(numerics.underflows(x), 0, jnp.exp(exponent * _log(x)))


# Arguments and results -----------------------------------------------------------------------------------------------------


def _pixels(
    function: str,
    logits: ArrayLike,
    labels: ArrayLike | None,
    spatial: int,
    axis: int,
    axis_name: str | tuple[str, ...] | None,
    class_mask: ArrayLike | None,
    where: ArrayLike | None,
    labelled: bool = True,
) -> rows.Examples:
    """The checked arguments of a region loss; each pixel is an example."""
    batch = checks.examples(function, logits, labels, axis, axis_name, class_mask, where, labelled=labelled)
    if batch.logits.ndim <= checks.count(function, "spatial", spatial):
        shape = batch.logits.shape
        remedy = f" Use spatial={len(shape) - 1}." if len(shape) > 1 else ""
        raise ValueError(f"{function}: logits must have spatial axes ({spatial} of them) and a class axis; got shape {shape}.{remedy}")
    return batch


def _scalar(function: str, name: str, x: ArrayLike) -> ArrayLike:
    """A number of at least 0."""
    checked = checks.number(function, name, x)
    return 0.0 if checked is None else checked


def _pixel_axes(ndim: int, spatial: int) -> tuple[int, ...]:
    """The last `spatial` of `ndim` axes."""
    return tuple(range(ndim - spatial, ndim))


def _pixel_sum(x: Array, spatial: int) -> Array:
    """The sum of `x` [..., *spatial, classes] over the pixels, shape [..., classes]."""
    return jnp.sum(x, axis=_pixel_axes(x.ndim - 1, spatial))


def _finish(batch: rows.Examples, spatial: int, loss: Array) -> Array:
    """`loss` [..., classes] with NaN in images that have a label out of range, and 0 in classes that do not exist."""
    r = rows.of(batch)
    axes = _pixel_axes(r.values.ndim - 1, spatial)
    if r.labels_are_indices:
        loss = numerics.nan_unless(jnp.broadcast_to(jnp.all(rows.in_range(r), axis=axes)[..., None], loss.shape), loss)
    return loss if r.class_mask is None else numerics.where(jnp.any(r.class_mask, axis=axes), loss, 0)
