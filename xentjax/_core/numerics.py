"""Scalar functions that stay accurate at any argument, and the dtype policy.

Infinity: JAX differentiates 0·∞ into NaN, so a logit of −∞ enters every formula as −INFINITE, a finite number
large enough that its exponential is exactly 0. A loss of that size is turned into +∞ at the very end (`statistics.finish`).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from xentjax._core import mesh

INFINITE = 2.0**120  # stands for ∞ inside a formula
_THRESHOLD = 2.0**80  # what exceeds this is INFINITE times a weight: no finite logits of a model come near


def accumulation_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of arithmetic and results: float32, or float64 if any input has it."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def index_dtype(labels: Array) -> jax.typing.DTypeLike:
    """Wide enough that no index wraps: −100 stays negative in every dtype, and 64 bits stay 64."""
    return jax.dtypes.canonicalize_dtype(jnp.int64) if labels.dtype.itemsize == 8 else jnp.int32


def where(condition: Array, x: ArrayLike, y: ArrayLike) -> Array:
    """`jnp.where` for an array and a number, or two arrays of one shape; `condition` may have length 1 on the last axis.

    `jnp.where` is a jitted function, and a dozen of those are half the time of tracing a loss.
    """
    like = x if isinstance(x, Array) else y
    assert isinstance(like, Array)
    if condition.shape != like.shape:
        condition = lax.broadcast_in_dim(condition, like.shape, range(like.ndim))
    x, y = (v if isinstance(v, Array) and v.shape == like.shape else lax.full_like(like, v) for v in (x, y))
    return lax.select(*mesh.split_alike(condition, x, y))


def nan_unless(inside: Array, x: Array) -> Array:
    """`x` where `inside`, elsewhere NaN with a derivative of NaN: so a product, not a selection.

    The NaN is ∞ − ∞ and no constant, which `jax_debug_nans` would report although nothing takes it. It is added too, because XLA
    makes a selection of a product with a number that was a Boolean.
    """
    infinite = where(inside, jnp.zeros_like(x), jnp.inf)
    nothing = infinite - infinite
    return x * (1 + nothing) + nothing


def nan_or_zero(x: Array, valid: Array | None, counts: Array | None) -> Array:
    """The last step of a result: NaN with derivative NaN where it is not `valid`, exactly 0 where it does not count. None means all."""
    if valid is not None:
        x = nan_unless(valid if counts is None else valid | ~counts, x)
    return x if counts is None else where(counts, x, jnp.zeros_like(x))


@jax.custom_jvp
def finite(x: Array) -> Array:
    """`x` with ±∞ replaced by ±INFINITE; the derivative passes unchanged."""
    return lax.clamp(jnp.asarray(-INFINITE, x.dtype), x, jnp.asarray(INFINITE, x.dtype))


finite.defjvp(lambda primals, tangents: (finite(*primals), tangents[0]))


def expand_leading(x: Array, ndim: int) -> Array:
    """`x` with axes of length 1 in front, up to `ndim` axes, so that it broadcasts along the last ones on purpose."""
    return jnp.expand_dims(x, range(ndim - x.ndim))


def is_infinite(x: Array) -> Array:
    """Whether x stands for +∞: INFINITE, or INFINITE times a weight."""
    return lax.stop_gradient(x) > _THRESHOLD


def restore_infinity(loss: Array) -> Array:
    """The inverse of `finite` on a loss: what stands for +∞ becomes +∞ (derivative unchanged)."""
    return where(is_infinite(loss), loss + jnp.inf, loss)


@jax.custom_jvp
def sigmoid(x: Array) -> Array:
    """σ(x) = 1/(1 + e^(−x)), accurate relative to its value on both sides, with dσ = σ(x)·σ(−x)."""
    e = jnp.exp(-jnp.abs(x))
    return where(x >= 0, jnp.ones_like(e), e) / (1 + e)


sigmoid.defjvp(lambda primals, tangents: (sigmoid(*primals), sigmoid(*primals) * sigmoid(-primals[0]) * tangents[0]))


@jax.custom_jvp
def sigmoid_excess(x: Array, clip: Array) -> Array:
    """σ(x) − clip for 0 < clip < σ(x), and 1/4 below, where nobody may look.

    Near σ(x) = clip the difference cancels; with x_c = logit(clip) it is σ(x)·(1 − clip)·(1 − e^(x_c − x)), which does not.
    """
    step = x - (jnp.log(clip) - jnp.log1p(-clip))
    above = step > 0
    excess = sigmoid(x) * (1 - clip) * -jnp.expm1(-where(above, step, jnp.ones_like(step)))
    return where(above, excess, jnp.full_like(excess, 0.25))


@sigmoid_excess.defjvp
def _(primals, tangents):
    x, clip = primals
    return sigmoid_excess(x, clip), sigmoid(x) * sigmoid(-x) * tangents[0] - tangents[1]


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """log(1 + e^x), accurate relative to its value on both sides, with derivative σ(x)."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


softplus.defjvp(lambda primals, tangents: (softplus(*primals), sigmoid(*primals) * tangents[0]))


@jax.custom_jvp
def log_odds_of_surprise(surprise: Array) -> Array:
    """log(p/(1 − p)) = −log(e^u − 1) of a probability given as its surprise u = −log p ≥ 0.

    da/du = −1/(1 − p) = −(1 + e^a), written in a so that second derivatives multiply e^a by something of size e^(−a)
    before anything can overflow; u is kept above the smallest normal number for the same reason.
    """
    u = jnp.maximum(surprise, jnp.finfo(surprise.dtype).tiny)
    small = jnp.minimum(u, 1)  # each branch sees only arguments at which it is finite
    large = jnp.maximum(u, 1)
    return -where(u < 1, jnp.log(jnp.expm1(small)), large + jnp.log1p(-jnp.exp(-large)))


@log_odds_of_surprise.defjvp
def _(primals, tangents):
    a = log_odds_of_surprise(*primals)
    return a, -(1 + jnp.exp(a)) * tangents[0]


def relative_expm1(x: Array) -> Array:
    """(e^x − 1)/x, 1 at 0: its series where |x| < 1, because a quotient loses its derivatives there."""
    small = jnp.abs(x) < 1
    direct, near = where(small, jnp.ones_like(x), x), where(small, x, jnp.zeros_like(x))
    series = jnp.ones_like(x)
    for n in range(20 if x.dtype == jnp.float64 else 12, 0, -1):
        series = 1 + near / (n + 1) * series
    return where(small, series, jnp.expm1(direct) / direct)


@jax.custom_jvp
def tempered(surprise: Array, q: Array) -> Array:
    """(1 − p^q)/q of a probability given as its surprise u = −log p: from u at q = 0 to 1 − p at q = 1.

    Derivatives: e^(−qu) in u, which the quotient would make from terms of the size of 1/(qu); (u·e^(−qu) − value)/q in q.
    """
    return surprise * relative_expm1(-q * surprise)


@tempered.defjvp
def _(primals, tangents):
    u, q = primals
    x = -q * u
    value, power = tempered(u, q), jnp.exp(x)
    small = jnp.abs(x) < 1
    near = where(small, u, jnp.zeros_like(u))
    slope = jax.jvp(relative_expm1, (-q * near,), (jnp.ones_like(u),))[1]
    in_q = where(small, -near * near * slope, (u * power - value) / where(small, jnp.ones_like(q), q))
    return value, power * tangents[0] + in_q * tangents[1]


@jax.custom_jvp
def scaled_log1p(x: Array, scale: Array) -> Array:
    """log(1 + scale·x)/scale, which is x at scale = 0.

    Derivatives: 1/(1 + scale·x) in x; (x/(1 + scale·x) − value)/scale in scale. If that difference cancels, a series replaces it.
    """
    y = scale * x
    none = y == 0
    return x * where(none, jnp.ones_like(y), jnp.log1p(y) / where(none, jnp.ones_like(y), y))


@scaled_log1p.defjvp
def _(primals, tangents):
    x, scale = primals
    y = scale * x
    small = jnp.abs(y) < 0.1
    near, value = where(small, y, jnp.zeros_like(y)), scaled_log1p(x, scale)
    series = jnp.zeros_like(y)  # Σ_n (−1)^n n/(n + 1) y^(n − 1); the derivative in scale is x² times this series
    for n in range(18 if x.dtype == jnp.float64 else 9, 0, -1):
        series = (-1) ** n * n / (n + 1) + near * series
    direct = (x / (1 + y) - value) / where(small, jnp.ones_like(y), jnp.broadcast_to(scale, y.shape))
    in_scale = where(small, where(small, x, jnp.zeros_like(x)) ** 2 * series, direct)
    return value, tangents[0] / (1 + y) + in_scale * tangents[1]


@jax.custom_jvp
def angle(cosine: Array, least: Array) -> Array:
    """The angle arccos c. Its derivative is −1/√max(1 − c², `least`), which is finite at c = ±1."""
    return jnp.arccos(jnp.clip(cosine, -1, 1))


angle.defjvp(lambda primals, tangents: (angle(*primals), -tangents[0] / _bounded_sine(*primals)))


@jax.custom_jvp
def sine(cosine: Array, least: Array) -> Array:
    """The sine √(1 − c²) of an angle in [0, π]. Its derivative is −c/√max(1 − c², `least`), which is finite at c = ±1."""
    inside = jnp.abs(cosine) < 1
    return where(inside, jnp.sqrt(where(inside, (1 - cosine) * (1 + cosine), jnp.ones_like(cosine))), 0)


sine.defjvp(lambda primals, tangents: (sine(*primals), -primals[0] * tangents[0] / _bounded_sine(*primals)))


def _bounded_sine(cosine: Array, least: Array) -> Array:
    return jnp.sqrt(jnp.maximum((1 - cosine) * (1 + cosine), least))


def select_logits(keep: Array, logits: Array) -> Array:
    """`logits` where `keep`, −∞ elsewhere, in their own dtype.

    16-bit floats are selected as integers: XLA on CPUs does floating-point selects of half precision in float32, and
    would store the whole array in that width.
    """
    if logits.dtype.itemsize == 2:
        return _by_bits(_select_bits, lambda z, keep: where(keep, z, 0), logits, keep)
    return where(keep, logits, jnp.array(-jnp.inf, logits.dtype))


def _select_bits(logits, keep):
    fill = _bits(jnp.array(-jnp.inf, logits.dtype))
    return lax.bitcast_convert_type(where(keep, _bits(logits), fill), logits.dtype)


def same(x: Array, y: Array) -> Array:
    """Whether x and y are the same number, by their bits in half precision (see `select_logits`); 0 and −0 are."""
    if x.dtype.itemsize != 2:
        return x == y
    a, b = _bits(x), _bits(y)
    return (a == b) | ((a | b) << 1 == 0)


def take_last(x: Array, index: Array, *, differentiated: bool = False) -> Array:
    """`x[..., index]`, one or several per row; `index` has the leading axes of `x` and lies in range after clipping.

    What is to be differentiated through says so: checkify cannot check the transpose of a lookup that is batched over rows.
    """
    if mesh.is_apart(x):
        return _take_by_comparison(x, index)
    take = _lookup if differentiated else _take
    return _by_bits(_take_bits, take, x, index) if x.dtype.itemsize == 2 else take(x, index)


def _take(x, index):
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")


def _take_bits(x, index):
    return lax.bitcast_convert_type(_take(_bits(x), index), x.dtype)


@jax.jit  # inside jax.checkpoint, checkify only accepts a lookup that is a function of its own
def _lookup(x, index):
    """As jnp.take_along_axis, but with the rows among the indices, where the partitioner sees them only if no clipping comes after."""
    shape, index = (*index.shape, 1), jnp.clip(index, 0, x.shape[-1] - 1)
    places = lax.concatenate([*(lax.broadcasted_iota(index.dtype, shape, i) for i in range(x.ndim - 1)), index[..., None]], x.ndim)
    axes = tuple(range(x.ndim))
    return lax.gather(x, places, lax.GatherDimensionNumbers((), axes, axes), (1,) * x.ndim, mode="promise_in_bounds")


def _take_by_comparison(x, index):
    """The same on a mesh with explicit axes, where JAX looks up nothing along an axis that is split."""
    position = lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1, out_sharding=mesh.split_of(x))
    here = (position == index[..., i : i + 1] for i in range(index.shape[-1]))
    found = [jnp.any(h & x, axis=-1) if x.dtype == jnp.bool_ else jnp.sum(where(h, x, 0), axis=-1) for h in here]  # others are 0: exact
    return jnp.stack(found, axis=-1)


def widen(x: Array) -> Array:
    """`x` in the accumulation dtype, without a conversion that XLA could share with another loop.

    XLA on CPUs stores a conversion that two loops share as a full float32 array. The bits of a bfloat16 are the upper half
    of a float32, so shifting them says the same in other operations.
    """
    if x.dtype == jnp.bfloat16:
        return _by_bits(_widen_bits, lambda x: x.astype(jnp.float32), x)
    return x.astype(accumulation_dtype(x.dtype))


def _widen_bits(x):
    return lax.bitcast_convert_type(lax.shift_left(_bits(x).astype(jnp.uint32), jnp.uint32(16)), jnp.float32)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16)


# A function of the bits of x has no derivative. JAX may drop a `custom_jvp` that gives it one: `lax.scan` drops rules from what a second
# derivative goes through. So it is a primitive. `value` works on the bits; `tangent` is its derivative by x, in plain operations.

_of_bits = Primitive("of_bits")


def _by_bits(value, tangent, x, *others):
    axes = mesh.axes_of(x, others)
    return _of_bits.bind(*(mesh.vary(a, axes) for a in (x, *others)), value=value, tangent=tangent)


@_of_bits.def_abstract_eval
def _(x, *others, value, tangent):
    out = jax.eval_shape(value, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *others)))
    like = x if out.shape == x.shape else others[-1]  # what is looked up lies as the indices do
    return like.update(shape=out.shape, dtype=out.dtype, weak_type=False)


def _jvp(primals, tangents, *, value, tangent):
    return _of_bits.bind(*primals, value=value, tangent=tangent), tangent(ad.instantiate_zeros(tangents[0]), *primals[1:])


def _batch(arrays, dims, *, value, tangent):
    size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
    front = [jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims, strict=True)]
    return _of_bits.bind(*front, value=value, tangent=tangent), 0


_of_bits.def_impl(lambda *arrays, value, tangent: value(*arrays))
ad.primitive_jvps[_of_bits] = _jvp
batching.primitive_batchers[_of_bits] = _batch
mlir.register_lowering(_of_bits, mlir.lower_fun(lambda *arrays, value, tangent: value(*arrays), multiple_results=False))
