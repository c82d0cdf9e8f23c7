"""Joint distributions [..., x, y]: conditional entropy and mutual information.

Both are Σ p(x, y)·v(x, y) with v = −log p(y|x), or v = d = log(p(x, y)/(p(x) p(y))), and in both Σ p·v̇ = 0, so that v·ṗ is all there
is of the derivative. Mutual information is the KL divergence Σ G(p(x, y), p(x) p(y), −d). There an error of d that depends on x
alone, or on y alone, does nothing in the first order, because the marginals are the best product. So marginals may be rounded;
what belongs to one pair (x, y) may not:

    probabilities   p(x, y) − p(x) p(y) by a product whose leading half is exact
    logits          z − (lse_x + lse_y − lse), with numbers on a grid, whose sum is exact, in place of the bracket
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import numerics, rows, statistics
from xentjax.information import _formulas

_compiled = functools.partial(jax.jit, static_argnames=("from_logits",))


@_compiled
def conditional_entropy(joint, base, where, from_logits):
    z = _prepared(joint, where)
    p, zero = _joint(z, from_logits)
    v = -_formulas.distribution(z, None, -1, True).log if from_logits else _surprise(p, zero)
    return _close(_formulas.declared(p * v, p, numerics.where(zero, 0, v)), base, where)


@_compiled
def mutual_information(joint, base, where, from_logits):
    z = _prepared(joint, where)
    p, zero = _joint(z, from_logits)
    product, d = _dependence_of_logits(z, zero) if from_logits else _dependence(p, zero)
    d = _formulas.valued(_settled(numerics.where(zero, -_formulas.FAR, d), p, product), d)
    terms = _formulas.gap(p, product, -numerics.where(zero, -_formulas.FAR, d))
    return _close(_formulas.declared(terms, p, numerics.where(zero, 0, d)), base, where)


def _prepared(joint, where):
    """Probabilities or logits in the accumulation dtype; an example that does not count becomes one of ones."""
    x = joint if where is None else jnp.where(where[..., None, None], joint, jnp.ones_like(joint))
    return x.astype(numerics.accumulation_dtype(x.dtype))


def _joint(z, from_logits):
    """p(x, y), and where it is 0."""
    found = _formulas.distribution(_flat(z), None, -1, from_logits)
    return found.p.reshape(z.shape), found.zero.reshape(z.shape)


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _close(terms, base, where):
    return _formulas.close(_flat(terms), None, base, where)


def _spread(x: Array, axis: int, like: Array) -> Array:
    return jnp.broadcast_to(jnp.expand_dims(x, axis), like.shape)


def _surprise(p, zero):
    """−log p(y|x); of the likeliest y by the sum over the others, so that nothing cancels."""
    px = jnp.sum(p, axis=-1)
    top = lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1) == _spread(jnp.argmax(p, axis=-1).astype(jnp.int32), -1, p)
    rest = _spread(jnp.sum(numerics.where(top, 0, p), axis=-1), -1, p)
    x, y = numerics.where(zero, 1, _spread(px, -1, p)), numerics.where(zero, 1, p)
    v = numerics.where(top & ~zero, jnp.log1p(numerics.where(top, rest / y, 0)), _formulas.log_quotient(x, y))
    return _formulas.valued(v, jnp.log(x) - jnp.log(y))


def _settled(d, p, product):
    """`d` without what the marginals' roundings put into whole rows and columns, which shows as Σ(p − product) ≠ 0 over them."""
    for axis in (-1, -2):
        size = jnp.sum(p, axis, keepdims=True)
        excess = jnp.sum(_formulas.difference(p, product, d), axis, keepdims=True) / numerics.where(size == 0, 1, size)
        d = d - jnp.log1p(jnp.clip(excess, -0.5, 0.5))
    return d


def _dependence(p, zero):
    """p(x)·p(y) and log(p(x, y)/(p(x) p(y))) of probabilities; of measures of sum s, p(x)·p(y)/s."""
    px, py = jnp.sum(p, axis=-1), jnp.sum(p, axis=-2)
    s = jnp.sum(px, axis=-1)
    share = py / numerics.where(s == 0, 1, s)[..., None]
    x, y, j = (numerics.where(zero, 1, v) for v in (_spread(px, -1, p), _spread(share, -2, p), p))
    product, rest = x * y, _minus_product(j, x, y)
    near = (jnp.abs(rest) <= product / 2) & (product > jnp.finfo(p.dtype).tiny)
    d = _formulas.log_quotient(j / x, y)
    d = numerics.where(near, jnp.log1p(numerics.where(near, rest, 0) / numerics.where(near, product, 1)), d)
    return _spread(px, -1, p) * _spread(share, -2, p), _formulas.valued(d, jnp.log(j) - jnp.log(x) - jnp.log(y))


def _minus_product(j, x, y):
    """The difference j − x·y, relative to itself where it is small: the product of the leading halves of x and y has no rounding."""
    exponent, mantissa = (11, 25) if j.dtype == jnp.float64 else (8, 11)
    a, b = (lax.reduce_precision(v, exponent_bits=exponent, mantissa_bits=mantissa) for v in (x, y))
    return (j - a * b) - (a * (y - b) + (x - a) * y)


def _dependence_of_logits(z, zero):
    """p(x)·p(y) and z − lse_x − lse_y + lse."""
    whole, of_x, of_y = (_normalizer(v) for v in (_flat(z), z, jnp.swapaxes(z, -1, -2)))
    origin = _on_grid(lax.stop_gradient(whole[0]))

    def above_origin(found, ndim):
        reference, log_sum, dead = found
        return (reference - jnp.expand_dims(origin, range(-ndim, 0))) + log_sum, dead

    total, _ = above_origin(whole, 0)
    (a, dead_x), (b, dead_y) = above_origin(of_x, 1), above_origin(of_y, 1)
    b = b - total[..., None]
    px, py = numerics.where(dead_x, 0, jnp.exp(a - total[..., None])), numerics.where(dead_y, 0, jnp.exp(b))
    finite = numerics.where(zero, 0, z)
    grid = origin[..., None, None] + (_spread(_on_grid(a), -1, z) + _spread(_on_grid(b), -2, z))
    d = ((finite - grid) - _spread(a - _on_grid(a), -1, z)) - _spread(b - _on_grid(b), -2, z)
    formula = finite - _spread(a, -1, z) - _spread(b, -2, z)  # but for constants
    return _spread(px, -1, z) * _spread(py, -2, z), _formulas.valued(d, formula)


def _on_grid(x):
    """A multiple of 1/256 near x: sums of such numbers below 2^15 are exact in float32."""
    return jnp.round(lax.stop_gradient(x) * 256) / 256


def _normalizer(z):
    r = rows.of(rows.Examples(z, None, None, None, z.ndim - 1, None))
    found = statistics.of_row(r)
    return found.reference, found.log_sum, found.dead
