"""Losses of a linear layer over chunks of examples: the logits of all examples never exist at once. Two derivative rules.

For hidden H [examples, features], kernel K and a weight w and loss per example, each chunk makes its logits Z = H·K + b, its losses
and, if anything is differentiated, at once their gradient G = w·∂loss/∂Z and from it

    ∂/∂H = G·Kᵀ, of the chunk's examples        ∂/∂K = Σ_chunks Hᵀ·G        ∂/∂b = Σ G        ∂/∂w = loss

The cotangent of a sum is a number, so all this can be made before it is known: the rule's tangent is Σ ⟨gradient, tangent⟩ over the
inputs that have a tangent, which JAX transposes into multiplications. Three products in all, fewer if fewer gradients are asked
for, and as a `custom_jvp` the rule differentiates again. Values per example have a cotangent each: they are left to JAX, which
makes the logits of each chunk anew in the backward pass (four products).

Dtypes. Products take the dtype of `hidden` and accumulate in float32 (float64 for float64); G is cast to that dtype before its two
products; gradients of what all chunks share are added up in float32 and cast once, to the dtype of what they belong to.

Memory. Beside inputs and results: the logits of one chunk in float32, whose place their gradient takes, G in the dtype of `hidden`
if that is another, and the accumulators, of which the first chunk makes the first value so that nothing is filled with zeros.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, core, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.sharding import AxisType

from xentjax._core import numerics

_BLOCK_BYTES = 2**24  # of a sum of products on CPUs, where XLA cannot add a product in place


class Batch(NamedTuple):
    """What a fused loss knows of each example, or of those of one chunk (then [...] is [examples]); also gradients, None if not wanted."""

    hidden: Any  # [..., features]
    weights: Any  # [...], the accumulation dtype, 0 where an example does not count
    where: Any  # [...], or None
    args: Any  # pytrees with the leading axes of `hidden`


class Layer(NamedTuple):
    """The linear layer that all examples share; also its gradients, None if not wanted."""

    kernel: Any  # [features, classes], or [classes, features]
    bias: Any  # [classes], or None


class _Sums(NamedTuple):
    """What is added up over chunks: the value, and gradients of what all chunks share."""

    value: Array
    layer: Layer
    hoisted: Any


class _Each(NamedTuple):
    """What a chunk gives per example: gradients, and what else the loss returns."""

    batch: Batch
    aux: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """How examples are cut into chunks: each of `outer` sequences along its `inner` examples, the ragged chunk first."""

    leading: tuple[int, ...]
    outer: int
    inner: int
    first: int  # examples of each sequence in the first chunk
    chunk: int  # and in each of the others
    others: int

    @property
    def examples(self) -> int:
        """The number of examples in the largest chunk."""
        return self.outer * max(self.first, self.chunk if self.others else 0)

    def split(self, x: Array) -> tuple[Array, Array | None]:
        """`x` [*leading, ...] as the first chunk [examples, ...] and the others [others, examples, ...]."""
        trailing = x.shape[len(self.leading) :]
        x = x.reshape(self.outer, self.inner, *trailing)
        first = x[:, : self.first].reshape(self.outer * self.first, *trailing)
        if not self.others:
            return first, None
        rest = x[:, self.first :].reshape(self.outer, self.others, self.chunk, *trailing)
        return first, jnp.moveaxis(rest, 1, 0).reshape(self.others, self.outer * self.chunk, *trailing)

    def join(self, first: Array, rest: Array | None = None) -> Array:
        """The inverse of `split`."""
        trailing = first.shape[1:]
        x = first.reshape(self.outer, self.first, *trailing)
        if rest is not None:
            rest = jnp.moveaxis(rest.reshape(self.others, self.outer, self.chunk, *trailing), 0, 1)
            x = jnp.concatenate([x, rest.reshape(self.outer, self.others * self.chunk, *trailing)], axis=1)
        return x.reshape(*self.leading, *trailing)


def layout(leading: tuple[int, ...], chunk_size: int) -> Layout:
    """Chunks of at most `chunk_size` examples, as even as they come.

    Only the last leading axis is cut, so that a batch split over devices stays where it is, unless the others alone are too many.
    Never two chunks: XLA writes out a loop of one step, and would hold the logits of both.
    """
    outer, inner = (math.prod(leading[:-1]), leading[-1]) if leading else (1, 1)
    if outer > chunk_size:
        outer, inner = 1, outer * inner
    chunks = max(1, -(-inner // max(1, chunk_size // max(1, outer))))
    chunk = max(1, -(-inner // (3 if chunks == 2 else chunks)))
    others = max(1, -(-inner // chunk)) - 1
    return Layout(leading, outer, inner, inner - others * chunk, chunk, others)


def total(loss_fn: Callable, batch: Batch, layer: Layer, cut: Layout, classes_first: bool) -> tuple[Array, Any]:
    """Σ w·loss [], and what else `loss_fn(logits, *args)` returns beside the losses, [...], without derivative."""
    first, rest = _split(batch, cut)
    sizes = (first,) if rest is None else (first, jax.tree.map(lambda x: x[0], rest))
    # What the loss closes over becomes an argument of it, for each size of chunks.
    functions, hoisted = zip(*(_hoist(loss_fn, chunk, layer, classes_first) for chunk in sizes), strict=True)

    def sweep(batch, layer, hoisted, wanted):
        first, rest = _split(batch, cut)
        converted = layer._replace(kernel=layer.kernel.astype(batch.hidden.dtype))
        of_batch, of_layer, of_hoisted = wanted
        # Differentiated once more in reverse, a chunk keeps its inputs alone and makes its logits again.
        steps = [
            jax.checkpoint(functools.partial(_step, f, classes_first, (of_batch, of_layer, h)), prevent_cse=False)
            for f, h in zip(functions, of_hoisted, strict=True)
        ]
        sums, each = steps[0](None, first, converted, hoisted[0])
        if rest is None:
            return sums._replace(hoisted=(sums.hoisted,)), _join(each, None, cut)
        start = sums._replace(hoisted=_wanted_zeros(hoisted[1], of_hoisted[1]))
        end, others = lax.scan(lambda before, chunk: steps[1](before, chunk, converted, hoisted[1]), start, rest)
        return end._replace(hoisted=(sums.hoisted, end.hoisted)), _join(each, others, cut)

    @jax.custom_jvp
    def value(batch, layer, hoisted):
        nothing = jax.tree.map(lambda _: False, (batch, layer, hoisted))
        sums, each = sweep(batch, layer, hoisted, nothing)
        return sums.value, each.aux

    @functools.partial(value.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        wanted = jax.tree.map(lambda t: not isinstance(t, SymbolicZero), tangents)
        sums, each = _kept(functools.partial(sweep, wanted=wanted))(*primals)
        pairs = zip(_leaves((each.batch, sums.layer, sums.hoisted)), _leaves(tangents), strict=True)
        products = [_inner(g, t).astype(sums.value.dtype) for g, t in pairs if g is not None]
        aux_tangent = jax.tree.map(lambda x: zero_from_primal(x, symbolic_zeros=True), each.aux)
        return (sums.value, each.aux), (sum(products, start=jnp.zeros_like(sums.value)), aux_tangent)

    return value(batch, layer, hoisted)


def per_example(loss_fn: Callable, batch: Batch, layer: Layer, cut: Layout, classes_first: bool) -> tuple[Array, Any]:
    """w·loss [...], and what else `loss_fn` returns [...]; a backward pass makes each chunk's logits again."""
    kernel = layer.kernel.astype(batch.hidden.dtype)
    accumulator = layer.kernel.astype(numerics.accumulation_dtype(batch.hidden.dtype))

    # Twice: a derivative leaves the outer one behind, and the inner one keeps a second derivative from storing logits.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # in a loop nothing can be shared anyway
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def losses(chunk, kernel, accumulator, bias):
        chunk = _masked(chunk)
        logits = _add_bias(_product(chunk.hidden, kernel, accumulator, 1 if classes_first else 0), bias)
        loss, aux = loss_fn(logits, *chunk.args)
        return _weighted(chunk, loss), _mask(chunk.where, lax.stop_gradient(aux))

    first, rest = _split(batch, cut)
    found = losses(first, kernel, accumulator, layer.bias)
    if rest is None:
        return _join(found, None, cut)
    _, others = lax.scan(lambda _, chunk: (None, losses(chunk, kernel, accumulator, layer.bias)), None, rest)
    return _join(found, others, cut)


def _kept(function):
    """`function`, in which JAX keeps the derivative rules of losses when it splits a derivative into what is known and what is linear.

    JAX 0.10 drops every `custom_jvp` inside a `lax.scan` there, known and differentiated later as it may be; not those behind a rule.
    """
    kept = jax.custom_jvp(function)
    kept.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return kept


def _step(loss_fn, classes_first, wanted, before, chunk, layer, hoisted):
    """One chunk of a sum: the sums so far (None at first) become the sums with it; and what it gives per example."""
    of_batch, of_layer, of_hoisted = wanted
    classes = 0 if classes_first else 1
    chunk = _masked(chunk)
    inputs = _logits(chunk, layer, classes_first), chunk.args, hoisted
    asked = of_batch.hidden or any(jax.tree.leaves(of_layer)), of_batch.args, of_hoisted
    loss, aux, (logits_bar, args_bar, hoisted_bar) = _pull(loss_fn, chunk.weights, inputs, asked)
    logits_bar, args_bar = _mask(chunk.where, (logits_bar, args_bar))
    narrow = None if logits_bar is None else logits_bar.astype(chunk.hidden.dtype)
    sums = _Sums(
        value=jnp.sum(_weighted(chunk, loss)),
        layer=Layer(None, None if logits_bar is None or not of_layer.bias else jnp.sum(logits_bar, axis=0)),
        hoisted=jax.tree.map(lambda g: g.astype(numerics.accumulation_dtype(g.dtype)), hoisted_bar),
    )
    if before is not None:
        sums = jax.tree.map(jnp.add, before._replace(layer=before.layer._replace(kernel=None)), sums)
    if of_layer.kernel:
        factors = (narrow, chunk.hidden) if classes_first else (chunk.hidden, narrow)
        kernel_bar = _dot(*factors, 0, 0, layer.kernel) if before is None else _add_product(before.layer.kernel, *factors, classes)
        sums = sums._replace(layer=sums.layer._replace(kernel=kernel_bar))
    batch_bar = Batch(
        hidden=_dot(narrow, layer.kernel, 1, classes) if of_batch.hidden else None,
        weights=_mask(chunk.where, loss) if of_batch.weights else None,
        where=None,
        args=args_bar,
    )
    return sums, _Each(batch_bar, _mask(chunk.where, lax.stop_gradient(aux)))


def _pull(loss_fn, weights, inputs, asked):
    """The losses, what else comes with them, and the gradient of Σ w·loss for the inputs that are asked for (None for the others)."""
    leaves, structure = jax.tree.flatten(inputs)
    moving = jax.tree.leaves(asked)

    def losses(*moved):
        moved = iter(moved)
        return loss_fn(*jax.tree.unflatten(structure, [next(moved) if m else x for x, m in zip(leaves, moving, strict=True)]))

    loss, pull, aux = jax.vjp(losses, *(x for x, m in zip(leaves, moving, strict=True) if m), has_aux=True)
    gradients = iter(pull(weights))
    return loss, aux, jax.tree.unflatten(structure, [next(gradients) if m else None for m in moving])


def _hoist(loss_fn, chunk, layer, classes_first):
    """`loss_fn` as a function of what it closes over as well, and those values."""
    layer = layer._replace(kernel=layer.kernel.astype(chunk.hidden.dtype))
    logits = _logits(chunk, layer, classes_first)  # for its type: the product itself is dead code
    closed, shapes = jax.make_jaxpr(lambda *args: loss_fn(*args), return_shape=True)(logits, *chunk.args)
    structure = jax.tree.structure(shapes)

    def function(logits, args, hoisted):
        return jax.tree.unflatten(structure, core.eval_jaxpr(closed.jaxpr, hoisted, *jax.tree.leaves((logits, args))))

    return function, tuple(closed.consts)


def _logits(chunk, layer, classes_first):
    """Z = H·K + b of a chunk [examples, classes]."""
    return _add_bias(_dot(chunk.hidden, layer.kernel, 1, 1 if classes_first else 0), layer.bias)


def _add_bias(logits, bias):
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def _split(batch, cut):
    """The first chunk, and the others stacked (None if there are none)."""
    leaves, structure = jax.tree.flatten(batch)
    first, rest = zip(*map(cut.split, leaves), strict=True)
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, rest) if cut.others else None


def _join(first, rest, cut):
    return jax.tree.map(lambda *parts: cut.join(*parts), *((first,) if rest is None else (first, rest)))


def _leaves(tree):
    """The leaves, None among them."""
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _wanted_zeros(values, wanted):
    return jax.tree.map(lambda x, w: jnp.zeros(x.shape, numerics.accumulation_dtype(x.dtype)) if w else None, values, wanted)


def _inner(gradient, tangent):
    """⟨gradient, tangent⟩ in float32 or wider: its transpose is cast to the dtype of the tangent, once."""
    dtype = numerics.accumulation_dtype(gradient.dtype, tangent.dtype)
    return jnp.sum(gradient.astype(dtype) * tangent.astype(dtype))


def _mask(where, tree):
    """Every array of a pytree [examples, ...], zero in examples that do not count."""
    if where is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), tree)


def _masked(chunk):
    """A chunk in which examples that do not count hold zeros, labels and whatever else included."""
    return chunk._replace(hidden=_mask(chunk.where, chunk.hidden), args=_mask(chunk.where, chunk.args))


def _weighted(chunk, loss):
    """w·loss per example; a weight of 0 makes 0 of an infinite loss."""
    w, loss = chunk.weights, _mask(chunk.where, loss)
    return w * jnp.where((w == 0) & ~jnp.isfinite(loss), jnp.zeros_like(loss), loss)


# Matrix products -----------------------------------------------------------------------------------------------------------


def _dot(x, y, x_axis, y_axis, like=None):
    """The product over one axis of each, accumulated and returned in float32 or wider; split over an explicit mesh as `like` is."""
    dtype = numerics.accumulation_dtype(x.dtype, y.dtype)
    sharding = None if like is None else jax.typeof(like).sharding
    explicit = sharding is not None and AxisType.Explicit in (sharding.mesh.axis_types or ())
    return lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=dtype, out_sharding=sharding if explicit else None
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _product(hidden, kernel, accumulator, features):
    """H·K whose derivative with respect to K goes to `accumulator`, K in float32: there the chunks' gradients are added up."""
    return _dot(hidden, kernel, 1, features)


@_product.defjvp
def _(features, primals, tangents):
    hidden, kernel, accumulator = primals
    hidden_dot, _, kernel_dot = tangents
    # JAX transposes a product into one that has the dtype of its result. So the first is rounded to that of `hidden`, in which its
    # transpose ends; the second, whose transpose is added up, is a product in float32 at any dtype.
    first = lax.dot_general(hidden_dot, kernel, (((1,), (features,)), ((), ())))
    second = _dot(hidden.astype(kernel_dot.dtype), kernel_dot, 1, features)
    return _product(hidden, kernel, accumulator, features), first.astype(second.dtype) + second


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _add_product(total, left, right, classes):
    """The sum total + leftᵀ·right, in place; `classes` is the axis of the result that holds classes."""
    return lax.platform_dependent(total, left, right, cpu=functools.partial(_add_in_blocks, classes), default=_add_at_once)


@_add_product.defjvp
def _(classes, primals, tangents):
    (_, left, right), (total_dot, left_dot, right_dot) = primals, tangents
    tangent = total_dot + _dot(left_dot, right, 0, 0, total_dot) + _dot(left, right_dot, 0, 0, total_dot)
    return _add_product(*primals, classes), tangent


def _add_at_once(total, left, right):
    return total + _dot(left, right, 0, 0, total)


def _add_in_blocks(classes, total, left, right):
    """XLA on CPUs stores a product before it adds it, and a store of that size costs as much time as the sum: so by blocks of classes."""
    size = total.shape[classes]
    width = max(1, -(-size // max(1, -(-total.nbytes // _BLOCK_BYTES))))
    if width >= size:
        return _add_at_once(total, left, right)

    def add(start, width, total):
        block = lax.dynamic_slice_in_dim(total, start, width, classes)
        factor = lax.dynamic_slice_in_dim((left, right)[classes], start, width, 1)
        block += _dot(factor, right, 0, 0, block) if classes == 0 else _dot(left, factor, 0, 0, block)
        return lax.dynamic_update_slice_in_dim(total, block, start, classes)

    whole = size // width
    total = lax.fori_loop(0, whole, lambda i, total: add(i * width, width, total), total)
    return add(whole * width, size % width, total) if size % width else total
