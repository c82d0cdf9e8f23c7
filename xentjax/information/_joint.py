"""Conditional entropy and mutual information of joint distributions [..., x, y].

Shared conventions are documented in `xentjax.information`.

Both quantities have the form Σ p(x, y)·v(x, y). For conditional entropy, v = −log p(y|x). For mutual information,
v = log(p(x, y)/(p(x) p(y))), which is called d below. A dot denotes a derivative. For both quantities Σ p·v̇ = 0, so the derivative is
Σ v·ṗ.

Mutual information is the KL divergence Σ G(p(x, y), p(x) p(y), −d), with G as in `_distributions.kl_term`. Among all products of a
distribution of X and a distribution of Y, p(x) p(y) is the closest to p(x, y). At this minimum, an error of d that depends on x
alone or on y alone has no first-order effect on the result, only a second-order effect. For this reason, rounding errors of the marginals
do little harm. An error of d that depends on both x and y changes the result to first order. The code avoids such errors:

    probabilities   p(x, y) − p(x) p(y) uses the product of the leading digits of p(x) and p(y); this product is exact
    logits          z − (lse_x + lse_y − lse) rounds the terms in the bracket to a grid on which sums are exact
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import differences, numerics, rows, statistics
from xentjax.information import _distributions


def conditional_entropy(joint: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """Conditional entropy H(Y|X) of a joint distribution per example, shape [...].

    H(Y|X) = −Σ_xy p(x, y) log p(y|x) = H(X, Y) − H(X), where p(y|x) = p(x, y)/Σ_y p(x, y).
    Gradient: ∂H/∂p(x, y) = −log p(y|x), or 0 at p(x, y) = 0.

    To compute H(X|Y), pass `jnp.swapaxes(joint, -1, -2)`.

    Args:
        joint: [..., x, y], probabilities, which need not sum to 1.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `joint` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> equal, independent = jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.full((2, 2), 0.25)
        >>> [float(xentjax.information.conditional_entropy(joint, base=2)) for joint in (equal, independent)]
        [0.0, 1.0]

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.2.
    """
    x, counts, _ = _distributions.check_distributions("conditional_entropy", where, None, joint=joint)
    return _conditional_entropy(x, _distributions.check_base("conditional_entropy", base), counts, False)


@functools.partial(jax.jit, static_argnames="from_logits")
def _conditional_entropy(joint: Array, base: ArrayLike | None, where: Array | None, from_logits: bool) -> Array:
    z = _prepared(joint, where)
    p, zero = _probabilities(z, from_logits)
    v = -_distributions.distribution(z, None, -1, True).log if from_logits else _conditional_surprise(p, zero)
    terms = _distributions.with_slope(p * v, p, numerics.where(zero, 0, v))
    return _distributions.finish(_flat(terms), None, base, where)


def _conditional_surprise(p: Array, zero: Array) -> Array:
    """−log p(y|x). For the most likely y, it comes from the sum over the others, so that nothing cancels."""
    px = jnp.sum(p, axis=-1)
    top = lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1) == _spread(jnp.argmax(p, axis=-1).astype(jnp.int32), -1, p)
    rest = _spread(jnp.sum(numerics.where(top, 0, p), axis=-1), -1, p)
    x, y = numerics.where(zero, 1, _spread(px, -1, p)), numerics.where(zero, 1, p)
    v = numerics.where(top & ~zero, jnp.log1p(numerics.where(top, rest / y, 0)), _distributions.log_quotient(x, y))
    return differences.with_slope_of(v, jnp.log(x) - jnp.log(y))


def conditional_entropy_from_logits(joint_logits: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """`conditional_entropy` H(Y|X) of a softmax over pairs (x, y), one value per example, shape [...].

    H(Y|X) = Σ_xy p(x, y)·v(x, y) with v = −log p(y|x) = lse_y(z) − z. Here z are the logits, p is their softmax, and lse_y is the
    log-sum-exp over y.
    Gradient: ∂H/∂z(x, y) = p(x, y)(v(x, y) − H).

    Args:
        joint_logits: [..., x, y], unnormalized log-probabilities of the pairs (x, y).
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `joint_logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.information.conditional_entropy_from_logits(jnp.zeros((2, 8))))  # log 8: X and Y are independent
        2.07944...

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.2.
    """
    name = "conditional_entropy_from_logits"
    z, counts, _ = _distributions.check_distributions(name, where, None, joint_logits=joint_logits)
    return _conditional_entropy(z, _distributions.check_base(name, base), counts, True)


def mutual_information(joint: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """Mutual information I(X; Y) of a joint distribution per example, shape [...].

    I(X; Y) = Σ_xy p(x, y) log(p(x, y)·s/(p(x)·p(y))) = D(p(x, y)‖p(x)·p(y)/s) ≥ 0, where s = Σ p.
    Gradient: ∂I/∂p(x, y) = log(p(x, y)·s/(p(x)·p(y))), or 0 at p(x, y) = 0.

    Args:
        joint: [..., x, y], probabilities, which need not sum to 1.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `joint` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> equal, independent = jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.full((2, 2), 0.25)
        >>> [float(xentjax.information.mutual_information(joint, base=2)) for joint in (equal, independent)]
        [1.0, 0.0]

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.3.
    """
    x, counts, _ = _distributions.check_distributions("mutual_information", where, None, joint=joint)
    return _mutual_information(x, _distributions.check_base("mutual_information", base), counts, False)


@functools.partial(jax.jit, static_argnames="from_logits")
def _mutual_information(joint: Array, base: ArrayLike | None, where: Array | None, from_logits: bool) -> Array:
    z = _prepared(joint, where)
    p, zero = _probabilities(z, from_logits)
    product, d = _dependence_of_logits(z, zero) if from_logits else _dependence(p, zero)
    d = differences.with_slope_of(_corrected(numerics.where(zero, -_distributions.FAR, d), p, product), d)
    terms = _distributions.kl_term(p, product, -numerics.where(zero, -_distributions.FAR, d))
    terms = _distributions.with_slope(terms, p, numerics.where(zero, 0, d))
    return _distributions.finish(_flat(terms), None, base, where)


def _dependence(p: Array, zero: Array) -> tuple[Array, Array]:
    """The product p(x)·p(y)/s with s = Σ p, and log(p(x, y)·s/(p(x)·p(y))), of probabilities."""
    px, py = jnp.sum(p, axis=-1), jnp.sum(p, axis=-2)
    s = jnp.sum(px, axis=-1)
    share = py / numerics.where(s == 0, 1, s)[..., None]
    x, y, j = (numerics.where(zero, 1, v) for v in (_spread(px, -1, p), _spread(share, -2, p), p))
    product, rest = x * y, _minus_product(j, x, y)
    near = (jnp.abs(rest) <= product / 2) & (product > jnp.finfo(p.dtype).tiny)
    d = _distributions.log_quotient(j / x, y)
    d = numerics.where(near, jnp.log1p(numerics.where(near, rest, 0) / numerics.where(near, product, 1)), d)
    return _spread(px, -1, p) * _spread(share, -2, p), differences.with_slope_of(d, jnp.log(j) - jnp.log(x) - jnp.log(y))


def _minus_product(j: Array, x: Array, y: Array) -> Array:
    """The difference j − x·y, accurate relative to itself where it is small: the product of the leading halves of x and y is exact."""
    exponent, mantissa = (11, 25) if j.dtype == jnp.float64 else (8, 11)
    a, b = (lax.reduce_precision(v, exponent_bits=exponent, mantissa_bits=mantissa) for v in (x, y))
    return (j - a * b) - (a * (y - b) + (x - a) * y)


def _dependence_of_logits(z: Array, zero: Array) -> tuple[Array, Array]:
    """The product p(x)·p(y), and z − lse_x − lse_y + lse, of logits."""
    whole, of_x, of_y = (_statistics(v) for v in (_flat(z), z, jnp.swapaxes(z, -1, -2)))
    origin = _on_grid(lax.stop_gradient(whole.reference))
    total = (whole.reference - origin) + whole.log_sum
    a = (of_x.reference - origin[..., None]) + of_x.log_sum
    b = (of_y.reference - origin[..., None]) + of_y.log_sum - total[..., None]
    px, py = numerics.where(of_x.all_impossible, 0, jnp.exp(a - total[..., None])), numerics.where(of_y.all_impossible, 0, jnp.exp(b))
    finite = numerics.where(zero, 0, z)
    grid = origin[..., None, None] + (_spread(_on_grid(a), -1, z) + _spread(_on_grid(b), -2, z))
    d = ((finite - grid) - _spread(a - _on_grid(a), -1, z)) - _spread(b - _on_grid(b), -2, z)
    formula = finite - _spread(a, -1, z) - _spread(b, -2, z)  # d, up to a constant
    return _spread(px, -1, z) * _spread(py, -2, z), differences.with_slope_of(d, formula)


def _on_grid(x: Array) -> Array:
    """A multiple of 1/256 near x. Sums of such numbers are exact in float32 below 2^15."""
    return jnp.round(lax.stop_gradient(x) * 256) / 256


def _corrected(d: Array, p: Array, product: Array) -> Array:
    """`d` without the rounding errors of the marginals. They shift whole rows and columns, where Σ(p − product) then differs from 0."""
    for axis in (-1, -2):
        size = jnp.sum(p, axis, keepdims=True)
        excess = jnp.sum(_distributions.difference(p, product, d), axis, keepdims=True) / numerics.where(size == 0, 1, size)
        d = d - jnp.log1p(jnp.clip(excess, -0.5, 0.5))
    return d


def mutual_information_from_logits(joint_logits: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """`mutual_information` I(X; Y) of the joint distribution softmax(joint_logits), shape [...].

    The softmax of an example is over all pairs (x, y).
    I(X; Y) = Σ_xy p(x, y)·d(x, y) with d = log(p(x, y)/(p(x)·p(y))).
    Gradient: ∂I/∂z(x, y) = p(x, y)(d(x, y) − I), where z are the logits.

    Args:
        joint_logits: [..., x, y], unnormalized log-probabilities of the pairs (x, y).
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `joint_logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.information.mutual_information_from_logits(30.0 * jnp.eye(4), base=2))  # X determines Y
        2.0

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.3.
    """
    name = "mutual_information_from_logits"
    z, counts, _ = _distributions.check_distributions(name, where, None, joint_logits=joint_logits)
    return _mutual_information(z, _distributions.check_base(name, base), counts, True)


# Arrays of pairs (x, y) ----------------------------------------------------------------------------------------------------


def _prepared(joint: Array, where: Array | None) -> Array:
    """Probabilities or logits in the accumulation dtype. An example that does not count becomes ones."""
    x = joint if where is None else jnp.where(where[..., None, None], joint, jnp.ones_like(joint))
    return x.astype(numerics.accumulation_dtype(x.dtype))


def _probabilities(z: Array, from_logits: bool) -> tuple[Array, Array]:
    """p(x, y), and whether it is 0."""
    pairs = _distributions.distribution(_flat(z), None, -1, from_logits)
    return pairs.p.reshape(z.shape), pairs.zero.reshape(z.shape)


def _statistics(z: Array) -> statistics.WithoutLabel:
    return statistics.of_row(rows.of(rows.Examples(z, None, None, None, z.ndim - 1, None)))


def _flat(x: Array) -> Array:
    """The axes x and y as one."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _spread(x: Array, axis: int, like: Array) -> Array:
    """`x` repeated along a new axis, with the shape of `like`."""
    return jnp.broadcast_to(jnp.expand_dims(x, axis), like.shape)
