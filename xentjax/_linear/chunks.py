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

Devices. Inside `jax.shard_map` a loss may be that of several devices together (its classes split). Each makes the gradient of its own
part, and the rule adds up the numbers ⟨gradient, tangent⟩ over them: transposed, the gradient of `hidden` is summed over devices once,
after the loop. What meets in a product of every chunk varies over the same axes before the loop, so that no derivative of it sums inside.

Memory. Beside inputs and results: the logits of one chunk in float32, whose place their gradient takes, G in the dtype of `hidden`
if that is another, and the accumulators, of which the first chunk makes the first value so that nothing is filled with zeros.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, core, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from xentjax._core import mesh, numerics
from xentjax._linear import products

_SYMBOLIC_CHUNKS = 4  # of a number of examples that is not known: the planner's quarter


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
    """How examples are cut into chunks: each of `outer` sequences along its `inner` examples, the ragged chunk first.

    The numbers may be symbols of `jax.export`.
    """

    leading: tuple[int, ...]
    outer: int
    inner: int
    first: int  # examples of each sequence in the first chunk
    chunk: int  # and in each of the others
    others: int

    @property
    def padding(self) -> int:
        """The number of examples that each sequence lacks to fill its chunks; 0 unless sizes are symbolic."""
        return self.first + self.others * self.chunk - self.inner

    @property
    def examples(self) -> int:
        """The number of examples in the largest chunk."""
        return self.outer * (core.max_dim(self.first, self.chunk) if self.loops else self.first)

    @property
    def loops(self) -> bool:
        """Whether there may be others than the first chunk."""
        return is_symbolic(self.others) or self.others > 0

    def split(self, x: Array) -> tuple[Array, Array | None]:
        """`x` [*leading, ...] as the first chunk [examples, ...] and the others [others, examples, ...]; padding is zeros."""
        trailing = x.shape[len(self.leading) :]
        if is_symbolic(self.padding):
            x = jnp.concatenate([x.reshape(self.inner, *trailing), jnp.zeros((self.padding, *trailing), x.dtype)])
            x = x.reshape(self.others + 1, self.chunk, *trailing)
            return x[0], x[1:]
        x = x.reshape(self.outer, self.inner, *trailing)
        first = x[:, : self.first].reshape(self.outer * self.first, *trailing)
        if not self.loops:
            return first, None
        rest = x[:, self.first :].reshape(self.outer, self.others, self.chunk, *trailing)
        return first, jnp.moveaxis(rest, 1, 0).reshape(self.others, self.outer * self.chunk, *trailing)

    def join(self, first: Array, rest: Array | None = None) -> Array:
        """The inverse of `split`."""
        trailing = first.shape[1:]
        if is_symbolic(self.padding):
            assert rest is not None
            x = jnp.concatenate([first[None], rest]).reshape((self.others + 1) * self.chunk, *trailing)
            return x[: self.inner].reshape(*self.leading, *trailing)
        x = first.reshape(self.outer, self.first, *trailing)
        if rest is not None:
            rest = jnp.moveaxis(rest.reshape(self.others, self.outer, self.chunk, *trailing), 0, 1)
            x = jnp.concatenate([x, rest.reshape(self.outer, self.others * self.chunk, *trailing)], axis=1)
        return x.reshape(*self.leading, *trailing)


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of these sizes is known only when a program of `jax.export` is called."""
    return not all(isinstance(size, numbers.Integral) for size in sizes)


def symbolic_layout(leading: tuple[int, ...], chunk_size: int | None) -> Layout:
    """Chunks of a number of examples n ≥ 1 that `jax.export` does not know yet: k equal ones, k = 4, or as many as `chunk_size` asks for.

    JAX must see that no chunk and no loop is empty. So k ≥ 3, each chunk has ⌈n/k⌉ examples, and up to k − 1 examples are padding.
    """
    examples = math.prod(leading)
    chunks = _SYMBOLIC_CHUNKS if chunk_size is None else core.max_dim((examples - 1) // chunk_size + 1, 3)
    chunk = (examples - 1) // chunks + 1
    return Layout(leading, 1, examples, chunk, chunk, chunks - 1)


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
    batch = _spread(loss_fn, batch, layer, cut, classes_first)
    # What the loss closes over becomes an argument of it, for each size of chunks.
    functions, hoisted = zip(*(_hoist(loss_fn, chunk, layer, classes_first) for chunk in _sizes(batch, cut)), strict=True)

    def sweep(batch, layer, hoisted, wanted):
        converted = layer._replace(kernel=layer.kernel.astype(batch.hidden.dtype))
        hidden, kernel, bias = _meet(batch.hidden, *converted)
        first, rest = _split(batch._replace(hidden=hidden), cut)
        converted = Layer(kernel, bias)
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
        mesh.check_closed_over("fuse_linear", mesh.axes_of(sums.value), sums.hoisted)
        pairs = zip(_leaves((each.batch, sums.layer, sums.hoisted)), _leaves(tangents), strict=True)
        parts = [_over_devices(_inner(g, t).astype(sums.value.dtype), sums.value) for g, t in pairs if g is not None]
        aux_tangent = jax.tree.map(lambda x: zero_from_primal(x, symbolic_zeros=True), each.aux)
        return (sums.value, each.aux), (sum(parts, start=jnp.zeros_like(sums.value)), aux_tangent)

    return value(batch, layer, hoisted)


def per_example(loss_fn: Callable, batch: Batch, layer: Layer, cut: Layout, classes_first: bool) -> tuple[Array, Any]:
    """w·loss [...], and what else `loss_fn` returns [...]; a backward pass makes each chunk's logits again."""
    batch = _spread(loss_fn, batch, layer, cut, classes_first)
    accumulator = layer.kernel.astype(numerics.accumulation_dtype(batch.hidden.dtype))
    hidden, kernel, accumulator, bias = _meet(batch.hidden, layer.kernel.astype(batch.hidden.dtype), accumulator, layer.bias)
    batch = batch._replace(hidden=hidden)

    # Twice: a derivative leaves the outer one behind, and the inner one keeps a second derivative from storing logits.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # in a loop nothing can be shared anyway
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def losses(chunk, kernel, accumulator, bias):
        chunk = _masked(chunk)
        logits = _add_bias(products.product(chunk.hidden, kernel, accumulator, 1 if classes_first else 0), bias)
        loss, aux = loss_fn(logits, *chunk.args)
        return _weighted(chunk, loss), _mask(chunk.where, lax.stop_gradient(aux))

    first, rest = _split(batch, cut)
    found = losses(first, kernel, accumulator, bias)
    if rest is None:
        return _join(found, None, cut)
    _, others = lax.scan(lambda _, chunk: (None, losses(chunk, kernel, accumulator, bias)), None, rest)
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
        if before is None:
            kernel_bar = products.dot(*factors, 0, 0, layer.kernel)
        else:
            kernel_bar = products.add_product(before.layer.kernel, *factors, classes)
        sums = sums._replace(layer=sums.layer._replace(kernel=kernel_bar))
    batch_bar = Batch(
        hidden=products.dot(narrow, layer.kernel, 1, classes) if of_batch.hidden else None,
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
    closed, shapes = _trace(loss_fn, chunk, layer, classes_first)
    mesh.check_collectives("fuse_linear", closed.effects, mesh.axes_of(closed.out_avals[0]))
    # The function outlives this trace in the derivative rule. So it holds the program alone, and not the constants, which may be tracers.
    program, structure = closed.jaxpr, jax.tree.structure(shapes)

    def function(logits, args, hoisted):
        return jax.tree.unflatten(structure, core.eval_jaxpr(program, hoisted, *jax.tree.leaves((logits, args))))

    return function, tuple(closed.consts)


def _trace(loss_fn, chunk, layer, classes_first):
    """The program of the losses of a chunk, the types of its results."""
    layer = layer._replace(kernel=layer.kernel.astype(chunk.hidden.dtype))
    logits = _logits(chunk, layer, classes_first)  # for its type: the product itself is dead code
    return jax.make_jaxpr(lambda *args: loss_fn(*args), return_shape=True)(logits, *chunk.args)


def _spread(loss_fn, batch, layer, cut, classes_first):
    """The batch, all of which may vary over the mesh axes over which its losses do: then no loop adds up gradients over devices."""
    together = mesh.axes_of(batch.hidden, layer)
    if not together:
        return batch
    closed, _ = _trace(loss_fn, _sizes(batch, cut)[0], layer, classes_first)
    axes = mesh.axes_of(closed.out_avals[0]) - mesh.axes_used(closed.effects)
    for name, x in (("where", batch.where), ("weights", batch.weights)):
        mesh.check_shared("fuse_linear", name, x, together - axes)
    return mesh.vary(batch._replace(hidden=None), axes | mesh.axes_of(batch.weights))._replace(hidden=batch.hidden)


def _meet(*arrays):
    """Arrays that meet in a product in every chunk, made to vary alike before the loop; None stays None.

    There their gradients are summed over devices: in float32 or wider, and rounded once.
    """
    axes = mesh.axes_of(arrays)
    if not axes:
        return arrays
    return [None if x is None else mesh.vary(x.astype(numerics.accumulation_dtype(x.dtype)), axes).astype(x.dtype) for x in arrays]


def _over_devices(tangent, value):
    """The sum of a tangent over the devices that made one value together."""
    return mesh.psum(tangent, mesh.axes_of(tangent) - mesh.axes_of(value))


def _logits(chunk, layer, classes_first):
    """Z = H·K + b of a chunk [examples, classes]."""
    return _add_bias(products.dot(chunk.hidden, layer.kernel, 1, 1 if classes_first else 0), layer.bias)


def _add_bias(logits, bias):
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def _split(batch, cut):
    """The first chunk, and the others stacked (None if there are none)."""
    leaves, structure = jax.tree.flatten(batch)
    first, rest = zip(*map(cut.split, leaves), strict=True)
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, rest) if cut.loops else None


def _sizes(batch, cut):
    """One chunk of each size."""
    first, rest = _split(batch, cut)
    return (first,) if rest is None else (first, jax.tree.map(lambda x: x[0], rest))


def _join(first, rest, cut):
    return jax.tree.map(lambda *parts: cut.join(*parts), *((first,) if rest is None else (first, rest)))


def _leaves(tree):
    """The leaves, None among them."""
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _wanted_zeros(values, wanted):
    return jax.tree.map(lambda x, w: jnp.zeros_like(x, numerics.accumulation_dtype(x.dtype)) if w else None, values, wanted)


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
