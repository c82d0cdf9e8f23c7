"""Element-wise functions that are accurate at every argument, and the dtype policy.

Infinity: if a derivative contains 0·∞, JAX computes NaN. So a logit of −∞ enters every formula as −INFINITE, a finite number whose
exponential is exactly 0. Numbers above INFINITE/2 in size represent ±∞, and products with weights are computed by `weighted`, which keeps
them that large. The last step of a loss turns them into +∞ (`statistics.finish`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from xentjax._core import mesh

INFINITE = 2.0**120  # represents ∞ inside a formula
MOST = 0.51  # only one class can have a larger probability; rounding may bring two probabilities of 1/2 above 0.5, but not above this
_LARGEST = INFINITE / 2  # a larger number represents ∞; rounding may bring ∞ below INFINITE, but not below this


def accumulation_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of arithmetic and results: float64 if any of the dtypes is float64, otherwise float32."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def index_dtype(labels: Array) -> jax.typing.DTypeLike:
    """The dtype for class indices: int64 for 64-bit labels if JAX allows it, otherwise int32. So indices do not overflow."""
    return jax.dtypes.canonicalize_dtype(jnp.int64) if labels.dtype.itemsize == 8 else jnp.int32


def where(condition: Array, x: ArrayLike, y: ArrayLike) -> Array:
    """`x` where `condition` is True, and `y` elsewhere.

    `x` or `y` may be a number. The last axis of `condition` may have length 1. This function replaces `jnp.where`, which is a jitted
    function. Tracing a dozen calls of `jnp.where` takes half as long as tracing a whole loss.
    """
    like = x if isinstance(x, Array) else y
    assert isinstance(like, Array)
    if condition.shape != like.shape:
        condition = lax.broadcast_in_dim(condition, like.shape, range(like.ndim))
    x, y = (v if isinstance(v, Array) and v.shape == like.shape else lax.full_like(like, v) for v in (x, y))
    return lax.select(*mesh.split_alike(condition, x, y))


def nan_unless(inside: Array, x: Array) -> Array:
    """`x` where `inside` is True, and NaN with derivative NaN elsewhere.

    A selection would have derivative 0 there, so the result is a product. The NaN is computed as ∞ − ∞, because `jax_debug_nans` would
    report a constant NaN even if no element takes it. The NaN is also added, because XLA turns a product with a converted Boolean into a
    selection.
    """
    infinite = where(inside, jnp.zeros_like(x), jnp.inf)
    zero_or_nan = infinite - infinite
    return x * (1 + zero_or_nan) + zero_or_nan


def nan_or_zero(x: Array, valid: Array | None, counts: Array | None) -> Array:
    """`x`, but 0 where `counts` is False, and NaN where `counts` is True and `valid` is False.

    The zeros are exact. The derivative of the NaN is NaN too. A mask of None is True everywhere.
    """
    if valid is not None:
        x = nan_unless(valid if counts is None else valid | ~counts, x)
    return x if counts is None else where(counts, x, jnp.zeros_like(x))


@jax.custom_jvp
def finite(x: Array) -> Array:
    """`x` with ±∞ replaced by ±INFINITE. The derivative is 1 everywhere."""
    return lax.clamp(jnp.asarray(-INFINITE, x.dtype), x, jnp.asarray(INFINITE, x.dtype))


finite.defjvp(lambda primals, tangents: (finite(*primals), tangents[0]))


@jax.custom_jvp
def finite_difference(x: Array, m: Array) -> Array:
    """`x` − `m` as a finite number, where `m` is finite: −INFINITE if `x` is −∞. The derivatives are 1 and −1 everywhere.

    The difference is computed before infinities are replaced, so that finite numbers above INFINITE in size keep their difference. If `x`
    is a product, XLA would round the product and the difference only once. Then x − x would not be 0. The clamp prevents this.
    """
    most = jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)
    return finite(where(x == -jnp.inf, x, lax.clamp(-most, x, most) - m))


@finite_difference.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return finite_difference(*primals), tangents[0] - tangents[1]


# XLA would merge two barriers with the same operand. So each barrier also has the operand `after`, which differs between barriers.
_fresh = Primitive("fresh")
_fresh.def_impl(lambda x, after: x)
_fresh.def_abstract_eval(lambda x, after: x)
mlir.register_lowering(_fresh, mlir.lower_fun(lambda *both: lax.optimization_barrier(both)[0], multiple_results=False))
mlir.register_lowering(_fresh, lambda _, x, after: [x], platform="cpu")
ad.primitive_jvps[_fresh] = lambda primals, tangents: (_fresh.bind(*primals), tangents[0])
batching.primitive_batchers[_fresh] = lambda arrays, axes: (_fresh.bind(*arrays), axes[0])


def fresh(x: Array, after: Array) -> Array:
    """`x`, as a new array that is available after `after` has been computed. On CPUs, it is `x` itself.

    Several sums need the same array, which is computed from `x`. If XLA on GPUs and TPUs recognizes this, it stores the array in float32.
    With a new `x` for each sum, each sum computes the array again and does not store it. Reading the logits again takes less time than
    storing and loading the array. On CPUs, XLA does equal computations only once.
    """
    return _fresh.bind(x, after)


def expand_leading(x: Array, ndim: int) -> Array:
    """`x` with leading axes of length 1 added until it has `ndim` axes, so that broadcasting is explicit."""
    return jnp.expand_dims(x, range(ndim - x.ndim))


def underflows(x: Array) -> Array:
    """Whether x, a number ≥ 0, is smaller than the smallest normal number.

    XLA on CPUs replaces such a number by 0. GPUs keep such a number, and its reciprocal may overflow. So callers treat it as 0 on every
    device.
    """
    return x < jnp.finfo(x.dtype).tiny


def is_infinite(x: Array) -> Array:
    """Whether `x` represents +∞ (see `finite`)."""
    return lax.stop_gradient(x) > _LARGEST


def restore_infinity(loss: Array) -> Array:
    """The loss, with +∞ where a finite number represents +∞ (see `finite`). The derivative is unchanged."""
    return where(is_infinite(loss), loss + jnp.inf, loss)


def weighted(weight: Array | float, x: Array) -> Array:
    """`weight`·`x` as a finite number. If `x` represents ±∞, so does the product, unless the weight is 0.

    The product of INFINITE and a small weight could not be told from a large finite number. So a larger number is added to it. It is
    computed by rounding, because XLA on CPUs would store a selection. The derivatives are those of the product.
    """
    x = finite(x)
    infinite = weight * (lax.round(x / INFINITE, lax.RoundingMethod.TO_NEAREST_EVEN) * INFINITE)  # 0 unless x represents ±∞
    sign = lax.clamp(jnp.asarray(-(2.0**-6), x.dtype), infinite, jnp.asarray(2.0**-6, x.dtype)) * 2.0**6  # of a weight above 2⁻¹²⁶
    return finite(weight * x + lax.stop_gradient(sign) * INFINITE)


@jax.custom_jvp
def sigmoid(x: Array) -> Array:
    """σ(x) = 1/(1 + e^(−x)), with a small relative error for x of either sign. The derivative is σ(x)·σ(−x)."""
    e = jnp.exp(-jnp.abs(x))
    return where(x >= 0, jnp.ones_like(e), e) / (1 + e)


sigmoid.defjvp(lambda primals, tangents: (sigmoid(*primals), sigmoid(*primals) * sigmoid(-primals[0]) * tangents[0]))


@jax.custom_jvp
def sigmoid_excess(x: Array, clip: Array) -> Array:
    """σ(x) − clip where 0 < clip < σ(x). Elsewhere the result is 1/4, a placeholder that callers must not use.

    The difference cancels where σ(x) is close to clip. Let x_c = logit(clip). The difference then equals σ(x)·(1 − clip)·(1 − e^(x_c − x)),
    which does not cancel.
    """
    step = x - (jnp.log(clip) - jnp.log1p(-clip))
    above = step > 0
    excess = sigmoid(x) * (1 - clip) * -jnp.expm1(-where(above, step, jnp.ones_like(step)))
    return where(above, excess, jnp.full_like(excess, 0.25))


@sigmoid_excess.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, clip = primals
    return sigmoid_excess(x, clip), sigmoid(x) * sigmoid(-x) * tangents[0] - tangents[1]


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """log(1 + e^x), with a small relative error for x of either sign. The derivative is σ(x)."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


softplus.defjvp(lambda primals, tangents: (softplus(*primals), sigmoid(*primals) * tangents[0]))


@jax.custom_jvp
def log_odds_of_surprise(surprise: Array) -> Array:
    """The log-odds a = log(p/(1 − p)) = −log(e^u − 1) for the surprise u = −log p ≥ 0.

    The derivative da/du = −1/(1 − p) = −(1 + e^a) is written in terms of a. So in second derivatives, e^a is multiplied by a factor of size
    e^(−a) before anything can overflow. For the same reason, u is raised to at least the smallest normal number.
    """
    u = jnp.maximum(surprise, jnp.finfo(surprise.dtype).tiny)
    small = jnp.minimum(u, 1)  # each branch gets only arguments at which it is finite
    large = jnp.maximum(u, 1)
    return -where(u < 1, jnp.log(jnp.expm1(small)), large + jnp.log1p(-jnp.exp(-large)))


@log_odds_of_surprise.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    a = log_odds_of_surprise(*primals)
    return a, -(1 + jnp.exp(a)) * tangents[0]


def relative_expm1(x: Array) -> Array:
    """(e^x − 1)/x, and 1 at x = 0.

    For |x| < 1, it is computed as a power series, because derivatives of the quotient are inaccurate there.
    """
    small = jnp.abs(x) < 1
    direct, near = where(small, jnp.ones_like(x), x), where(small, x, jnp.zeros_like(x))
    series = jnp.ones_like(x)
    for n in range(20 if x.dtype == jnp.float64 else 12, 0, -1):
        series = 1 + near / (n + 1) * series
    return where(small, series, jnp.expm1(direct) / direct)


@jax.custom_jvp
def tempered(surprise: Array, q: Array) -> Array:
    """(1 − p^q)/q for the surprise u = −log p. It is u at q = 0 and 1 − p at q = 1.

    The derivative with respect to u is e^(−qu). It comes from a rule, because the derivative of the quotient is a difference of terms of
    size 1/(qu). The derivative with respect to q is (u·e^(−qu) − value)/q.
    """
    return surprise * relative_expm1(-q * surprise)


@tempered.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
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

    The derivative with respect to x is 1/(1 + scale·x). The derivative with respect to scale is (x/(1 + scale·x) − value)/scale. Where this
    difference would cancel, a series replaces it.
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
    """`logits` where `keep` is True, and −∞ elsewhere, in the dtype of `logits`.

    In half precision, the selection works on the bits of the numbers, as integers. Otherwise, XLA on CPUs would convert the numbers to
    float32 for the selection and store the whole array in float32.
    """
    if logits.dtype.itemsize == 2:
        return _by_bits(_select_bits, lambda z, keep: where(keep, z, 0), logits, keep)
    return where(keep, logits, jnp.array(-jnp.inf, logits.dtype))


def _select_bits(logits: Array, keep: Array) -> Array:
    fill = _bits(jnp.array(-jnp.inf, logits.dtype))
    return lax.bitcast_convert_type(where(keep, _bits(logits), fill), logits.dtype)


def equal(x: Array, y: Array) -> Array:
    """Whether x = y. Half-precision numbers are compared by their bits (see `select_logits`). 0 equals −0."""
    if x.dtype.itemsize != 2:
        return x == y
    a, b = _bits(x), _bits(y)
    return (a == b) | ((a | b) << 1 == 0)


def take_last(x: Array, index: Array, *, differentiated: bool = False) -> Array:
    """The entries of `x` [..., n] at the positions `index` [..., k] of every row. The index is clipped to [0, n).

    Pass `differentiated=True` if the result is differentiated with respect to `x`. The default lookup is batched over rows, and checkify
    cannot check its transpose.
    """
    if mesh.is_last_axis_split(x) or (differentiated and mesh.is_explicit(x)):  # the rows of `_lookup` are indices, which are not split
        return _take_by_comparison(x, index)
    take = _lookup if differentiated else _take
    return _by_bits(_take_bits, take, x, index) if x.dtype.itemsize == 2 else take(x, index)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")


def _take_bits(x: Array, index: Array) -> Array:
    return lax.bitcast_convert_type(_take(_bits(x), index), x.dtype)


@jax.jit  # inside jax.checkpoint, checkify accepts a lookup only in a jitted function of its own
def _lookup(x: Array, index: Array) -> Array:
    """`jnp.take_along_axis` with the row numbers among the indices.

    The partitioner recognizes row numbers only if they are not clipped afterwards. So the index is clipped first.
    """
    if 0 in index.shape:  # the oldest supported JAX refuses a gather from an empty array
        return jnp.take_along_axis(x, index, axis=-1, mode="fill")
    shape, index = (*index.shape, 1), jnp.clip(index, 0, x.shape[-1] - 1)
    places = lax.concatenate([*(lax.broadcasted_iota(index.dtype, shape, i) for i in range(x.ndim - 1)), index[..., None]], x.ndim)
    axes = tuple(range(x.ndim))
    return lax.gather(x, places, lax.GatherDimensionNumbers((), axes, axes), (1,) * x.ndim, mode="promise_in_bounds")


def _take_by_comparison(x: Array, index: Array) -> Array:
    """`_take` for a mesh with explicit axes, where JAX cannot look up values along an axis that is split."""
    position = lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1, out_sharding=mesh.split_of(x))
    places = (position == index[..., i : i + 1] for i in range(index.shape[-1]))
    if x.dtype == jnp.bool_:
        return jnp.stack([jnp.any(here & x, axis=-1) for here in places], axis=-1)
    return jnp.stack([jnp.sum(where(here, x, 0), axis=-1) for here in places], axis=-1)  # all other terms are 0, so the sum is exact


def remove_last(x: Array, index: Array) -> Array:
    """`x` [..., n], with −∞ at the positions `index` [..., k] of every row. A position of n or more removes nothing.

    The derivative is 1 everywhere: a function of logits has derivative 0 at a logit of −∞. Half-precision numbers are removed as integers
    (see `select_logits`).
    """
    return _by_bits(_remove, lambda x, index: x, x, index)


def _remove(x: Array, index: Array) -> Array:
    if x.dtype.itemsize == 2:
        return lax.bitcast_convert_type(_put(_bits(x), index, _bits(jnp.array(-jnp.inf, x.dtype))), x.dtype)
    return _put(x, index, jnp.array(-jnp.inf, x.dtype))


def _put(x: Array, index: Array, value: Array) -> Array:
    if mesh.is_explicit(x):  # JAX cannot put values at positions of an axis that is split
        position = lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1, out_sharding=mesh.split_of(x))
        for i in range(index.shape[-1]):
            x = where(position != index[..., i : i + 1], x, value)
        return x
    leading = tuple(lax.broadcasted_iota(index.dtype, index.shape, i) for i in range(x.ndim - 1))
    return x.at[(*leading, index)].set(value, mode="drop")


def widen(x: Array) -> Array:
    """`x` in the accumulation dtype. bfloat16 is converted in a way that XLA cannot share with another loop.

    If two loops share a conversion, XLA on CPUs stores its result as a full float32 array. The bits of a bfloat16 number are the upper half
    of the bits of a float32 number. So a shift of the bits gives the same float32 numbers by other operations.
    """
    if x.dtype == jnp.bfloat16:
        return _by_bits(_widen_bits, lambda x: x.astype(jnp.float32), x)
    return x.astype(accumulation_dtype(x.dtype))


def _widen_bits(x: Array) -> Array:
    return lax.bitcast_convert_type(lax.shift_left(_bits(x).astype(jnp.uint32), jnp.uint32(16)), jnp.float32)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16)


# JAX cannot differentiate a function of the bits of x. A `custom_jvp` rule would give it a derivative, but JAX may drop the rule:
# `lax.scan` drops the rules of computations that are differentiated twice. So the function is a primitive, whose derivative is always
# used.
# `value` works on the bits. `tangent` maps the tangent of x to the tangent of the result, in operations that JAX can differentiate.

_of_bits = Primitive("of_bits")


def _by_bits(value: Callable[..., Array], tangent: Callable[..., Array], x: Array, *others: Array) -> Array:
    axes = mesh.axes_of(x, others)
    return _of_bits.bind(*(mesh.vary(a, axes) for a in (x, *others)), value=value, tangent=tangent)


@_of_bits.def_abstract_eval
def _(x: ShapedArray, *others: ShapedArray, value: Callable[..., Array], tangent: Callable[..., Array]) -> ShapedArray:
    out = jax.eval_shape(value, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *others)))
    like = x if out.shape == x.shape else others[-1]  # the result of a lookup is split as its indices are
    return like.update(shape=out.shape, dtype=out.dtype, weak_type=False)


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, value: Callable[..., Array], tangent: Callable[..., Array]
) -> tuple[Array, Array]:
    return _of_bits.bind(*primals, value=value, tangent=tangent), tangent(ad.instantiate_zeros(tangents[0]), *primals[1:])


def _batch(
    arrays: Sequence[Array], dims: Sequence[int | None], *, value: Callable[..., Array], tangent: Callable[..., Array]
) -> tuple[Array, int]:
    size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
    front = [jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims, strict=True)]
    return _of_bits.bind(*front, value=value, tangent=tangent), 0


_of_bits.def_impl(lambda *arrays, value, tangent: value(*arrays))
ad.primitive_jvps[_of_bits] = _jvp
batching.primitive_batchers[_of_bits] = _batch
mlir.register_lowering(_of_bits, mlir.lower_fun(lambda *arrays, value, tangent: value(*arrays), multiple_results=False))
