"""Noisy labels of which it is known how often one class is taken for another: losses corrected by the noise matrix.

Arguments and conventions are those of `softmax_cross_entropy`: `logits` [..., classes]; `labels` [...] class indices or [..., classes]
distributions; `axis`, `axis_name`, `class_mask`, `where`. `noise_matrix` [classes, classes] over all classes, the same on every device:
row i holds the probabilities with which an example of true class i is labelled j, T_ij = P(label j | class i), and sums to 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, odds, rows, statistics, values


def forward_corrected_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    noise_matrix: ArrayLike,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of the noisy label under the prediction passed through the noise, one value per example [...].

    loss = −log Σ_i p_i T_iy:  its best p is the distribution of the true classes.
    Gradient: with the posterior r_i = p_i T_iy/Σ_j p_j T_jy of the true class, ∂loss/∂z = p − r.

    A distribution costs Σ_k t_k·loss(k), one class after another.

    Args:
        logits: [..., classes], unnormalised log-probabilities of the true classes in nats.
        labels: [...] class indices as observed, or [..., classes] distributions.
        noise_matrix: [classes, classes], T_ij = P(label j | class i), in [0, 1].
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which true classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> noise = jnp.array([[0.8, 0.2], [0.0, 1.0]])  # a fifth of class 0 is labelled 1
        >>> sure_of_0 = jnp.array([50.0, 0.0])
        >>> float(xentjax.forward_corrected_cross_entropy(sure_of_0, jnp.array(1), noise_matrix=noise))  # −log 0.2, not 50
        1.60943...

    Reference:
        Patrini et al., Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach, 2016, arXiv 1609.03683.
    """
    name = "forward_corrected_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _forward(batch, _noise(name, noise_matrix, batch))


def backward_corrected_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    noise_matrix: ArrayLike,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Unbiased estimate of the cross-entropy of the true label from the noisy one, one value per example [...].

    loss = −Σ_j (T⁻¹)_yj log p_j:  its mean over the noise is −log p of the true class. It may be negative, and is not bounded below.
    Gradient: ∂loss/∂z = p − (T⁻¹)_y,  because the rows of T⁻¹ sum to 1.

    Args:
        logits: [..., classes], unnormalised log-probabilities of the true classes in nats.
        labels: [...] class indices as observed, or [..., classes] distributions.
        noise_matrix: [classes, classes], T_ij = P(label j | class i), invertible.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which true classes exist; the noise must not mix them with the others.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits); ±∞ where an impossible class has weight.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> noise, logits = jnp.array([[0.8, 0.2], [0.0, 1.0]]), jnp.array([[1.0, 0.0]] * 2)
        >>> observed = xentjax.backward_corrected_cross_entropy(logits, jnp.array([0, 1]), noise_matrix=noise)
        >>> float(noise[0] @ observed), float(xentjax.softmax_cross_entropy(logits, jnp.array([0, 0]))[0])  # mean over the noise
        (0.31326..., 0.31326...)

    Reference:
        Patrini et al., Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach, 2016, arXiv 1609.03683.
    """
    name = "backward_corrected_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _backward(batch, _noise(name, noise_matrix, batch))


def _noise(function: str, noise_matrix: ArrayLike, batch: rows.Examples) -> Array:
    classes = batch.classes
    matrix = checks.real(function, "noise_matrix", noise_matrix)
    values.probabilities(function, "noise_matrix", matrix)
    return checks.shape(function, "noise_matrix", matrix, (classes, classes), "one row per true class, one column per label")


def _of_this_device(r: rows.Rows, per_class: Array) -> Array:
    """The part of [..., all classes] that belongs to the classes held here."""
    if r.axis_name is None:
        return per_class
    size = r.values.shape[-1]
    return lax.dynamic_slice_in_dim(per_class, lax.axis_index(r.axis_name) * size, size, per_class.ndim - 1)


@jax.jit
def _forward(batch, noise_matrix):
    r = rows.of(batch)
    noise = noise_matrix.astype(r.values.dtype)
    to_label, to_others = (_of_this_device(r, _log(x).T) for x in (noise, 1 - noise))  # [labels, true classes]

    def log_sum(r, weights):
        """The logarithm of Σ_i e^(z_i) T_iy, −INFINITE where nothing leads to the label."""
        some = rows.adjusted(r, offset=_at_label(r, weights))
        stats = statistics.of_row(some)
        return numerics.where(stats.dead, -numerics.INFINITE, stats.reference + stats.log_sum)

    def loss_of_index(r):
        loss = odds.surprise(log_sum(r, to_label) - log_sum(r, to_others))
        return numerics.nan_unless(rows.in_range(r), loss)  # a maximum over devices may lose a NaN

    stats = statistics.of_row(r)
    loss = odds.by_label(r, loss_of_index)
    return statistics.finish(r, stats, numerics.where(stats.dead, numerics.INFINITE, loss))


@jax.jit
def _backward(batch, noise_matrix):
    r = rows.of(batch)
    inverse = jnp.linalg.inv(noise_matrix.astype(r.values.dtype))
    if r.labels_are_indices:
        shares = _at_label(r, _of_this_device(r, inverse))
    else:
        assert r.labels is not None
        shares = jnp.tensordot(r.labels, _of_this_device(r, inverse.T).T, 1, precision="highest")
        if r.axis_name is not None:
            shares = lax.psum_scatter(shares, r.axis_name, scatter_dimension=shares.ndim - 1, tiled=True)
    r = r._replace(labels=shares)
    stats = statistics.of(r)
    loss = odds.expected(r, stats, odds.surprise)
    loss = statistics.finish(r, stats, loss)
    return numerics.where(numerics.is_infinite(-loss), -jnp.inf, loss)


def _at_label(r: rows.Rows, table: Array) -> Array:
    """Row y of a table [labels, classes] for every example; NaN for a label out of range, 0 where an example does not count."""
    assert r.labels is not None
    chosen = _rows(table, r.labels, out_sharding=mesh.split_of(r.values))
    return rows.masked(numerics.nan_unless(rows.in_range(r)[..., None], chosen), r.where)


@functools.partial(jax.jit, static_argnames="out_sharding")  # as in `numerics.take_last`
def _rows(table, index, out_sharding):
    return table.at[index].get(mode="clip", out_sharding=out_sharding)


def _log(x: Array) -> Array:
    """The logarithm, −∞ at 0 with derivative 0."""
    some = x > 0
    return numerics.where(some, jnp.log(numerics.where(some, x, 1)), -jnp.inf)
