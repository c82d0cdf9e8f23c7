"""Losses of a linear layer, computed chunk by chunk. The logits of all examples are never in memory at the same time.

The module has two derivative rules. One rule is for a sum over examples, and the other is for one value per example. Let H [examples,
features] be the hidden states, K the kernel, b the bias, and w the weights, one per example. Each chunk computes its logits Z = H·K + b and
one loss per example.

`total` returns Σ w·loss. If any input is differentiated, each chunk also computes G = w·∂loss/∂Z. The gradients follow from G and the
losses:

    ∂/∂H = G·Kᵀ for its examples        ∂/∂K = Σ_chunks Hᵀ·G        ∂/∂b = Σ_examples G        ∂/∂w = loss

The cotangent of a sum is a single number. So the forward pass can compute these gradients before the cotangent is known. The tangent of the
sum is Σ ⟨gradient, tangent⟩ over the inputs that have a tangent. JAX transposes this formula into multiplications of the gradients by the
cotangent. The loss and all its gradients take three matrix products. They take fewer if fewer gradients are wanted. The rule is a
`custom_jvp`, so it can be differentiated again.

`per_example` returns one or several numbers for every example. Each number then has its own cotangent, which the forward pass does not
know. So JAX derives the backward pass, which computes the logits of each chunk again. All numbers and all gradients together take four
matrix products. The forward pass stores the sums over classes of every example, so the backward pass does not compute these sums again.

Dtypes: Matrix products take operands in the dtype of `hidden`. They accumulate in float32, or in float64 if `hidden` is float64. G is cast
to the dtype of `hidden` before its two products. For inputs that all chunks share, the gradients of the chunks are added up in float32 or
wider. The sum is cast once, to the dtype of the input.

Devices: `xentjax._linear.devices` prepares the inputs before the loop over chunks. Inside the loop, devices exchange only the numbers that
the loss itself sums over devices.

Memory: Besides inputs and results, three things are in memory. The first is the float32 logits of one chunk, which are overwritten by their
gradient. The second is a copy of G in the dtype of `hidden`. If that dtype is float32, there is no copy. The third is the accumulators. The
first chunk initializes the accumulators of kernel and bias, unless one loop computes all chunks. The backward pass
of `per_example` has one accumulator for the kernel too, because the chunks are a chain of products (`products.chained_product`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, core, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import ClosedJaxpr, Primitive

from xentjax._core import mesh, numerics
from xentjax._linear import devices, products
from xentjax._linear.inputs import Batch, Gradient, Inputs, Layer, PyTree, masked, weighted, zero_outside
from xentjax._linear.layout import Layout

LossFn: TypeAlias = Callable[..., tuple[Array, PyTree]]  # (logits, *args) → losses, aux
_ExplicitLossFn: TypeAlias = Callable[[Array, tuple[Array, ...], tuple[Array, ...]], tuple[Array, PyTree]]  # (logits, args, closed_over)
_F = TypeVar("_F", bound=Callable)
_ONE_LOOP_BYTES = 2**27  # if the gradient of the kernel is larger, one more write takes longer than the compilation of two sizes of chunk


def total(loss_fn: LossFn, batch: Batch[Array], layer: Layer[Array], layout: Layout, classes_first: bool) -> tuple[Array, PyTree]:
    """The sum Σ w·loss over all examples, shape [], and aux, shape [...].

    `loss_fn(logits, *args)` returns aux in addition to the losses. aux is not differentiated.
    """
    batch = _vary_as_losses(loss_fn, batch, layer, layout, classes_first)
    pairs = [_closure_as_argument(loss_fn, chunk, layer, classes_first) for chunk in _one_of_each_size(batch, layer, layout)]
    loss_fns, closed_over = zip(*pairs, strict=True)

    def sweep(inputs: Inputs[Array], wanted: Inputs[bool]) -> _Swept:
        return _sweep(loss_fns, _ready_for_products(inputs), wanted, layout, classes_first)

    @jax.custom_jvp
    def value(inputs: Inputs[Array]) -> tuple[Array, PyTree]:
        swept = sweep(inputs, jax.tree.map(lambda _: False, inputs))
        return swept.value, swept.aux

    @functools.partial(value.defjvp, symbolic_zeros=True)
    def _(primals: tuple[Inputs[Array]], tangents: tuple[Inputs[Array | SymbolicZero]]) -> tuple:
        wanted = jax.tree.map(lambda t: not isinstance(t, SymbolicZero), tangents[0])
        swept = _keep_derivative_rules(functools.partial(sweep, wanted=wanted))(*primals)
        devices.check_closed_over(swept.value, swept.gradients.closed_over)
        pairs = zip(_leaves_and_none(swept.gradients), _leaves_and_none(tangents), strict=True)
        parts = [devices.sum_over_devices(_inner_product(g, t).astype(swept.value.dtype), swept.value) for g, t in pairs if g is not None]
        aux_tangent = jax.tree.map(lambda x: zero_from_primal(x, symbolic_zeros=True), swept.aux)
        return (swept.value, swept.aux), (sum(parts, start=jnp.zeros_like(swept.value)), aux_tangent)

    return value(Inputs(batch, layer, closed_over))


def per_example(
    loss_fn: Callable[..., tuple[PyTree, PyTree]], batch: Batch[Array], layer: Layer[Array], layout: Layout, classes_first: bool
) -> tuple[PyTree, PyTree]:
    """The weighted results of every example, a pytree of arrays [..., ...], and aux as in `total`.

    `loss_fn(logits, *args)` returns a pytree of arrays [examples, ...] and aux. Floating arrays are multiplied by w and differentiated. The
    backward pass computes the logits of each chunk again.
    """
    batch = _vary_as_losses(loss_fn, batch, layer, layout, classes_first)
    accumulator = layer.kernel.astype(numerics.accumulation_dtype(batch.hidden.dtype))
    hidden, kernel, accumulator, bias = devices.vary_alike(batch.hidden, layer.kernel.astype(batch.hidden.dtype), accumulator, layer.bias)

    # Checkpointed twice. The first derivative removes the outer checkpoint. The inner one keeps a second derivative from storing logits.
    @functools.partial(jax.checkpoint, prevent_cse=False, policy=_is_stored)  # in a loop, XLA cannot merge both computations of the logits
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def results_of(
        link: Array, chunk: Batch[Array], kernel: Array, accumulator: Array, bias: Array | None
    ) -> tuple[Array, tuple[PyTree, PyTree]]:
        chunk = masked(chunk)
        logits, link = products.chained_product(chunk.hidden, kernel, accumulator, link, 0 if classes_first else 1)
        results, aux = loss_fn(_add_bias(logits, bias), *chunk.args)
        return link, (weighted(chunk, results), zero_outside(chunk.where, lax.stop_gradient(aux)))

    # The first chunk comes last. So in the backward pass it comes first, and makes the gradient of the kernel, to which the loop adds.
    first, others = _split(batch._replace(hidden=hidden), layout)
    link, other_results = accumulator, None
    if others is not None:

        def step(carry: tuple[Array, Array], chunk: Batch[Array]) -> tuple[tuple[Array, Array], tuple[PyTree, PyTree]]:
            link, done = carry
            link, results = results_of(link, chunk, kernel, accumulator, bias)
            return (link, lax.optimization_barrier(done + 1)), results

        (link, done), other_results = lax.scan(step, (link, jnp.zeros((), jnp.int32)), others)
        # XLA keeps the logits of the first chunk for the backward pass. It would also compute them before the loop, if they did not depend
        # on it. Without the barrier, XLA knows the number of chunks done.
        first = first._replace(hidden=jnp.where(done > 0, first.hidden, jnp.zeros_like(first.hidden)))
    _, results = results_of(link, first, kernel, accumulator, bias)
    return _join(results, other_results, layout)


# The sweep over chunks ------------------------------------------------------------------------------------------------------


class _Swept(NamedTuple):
    """The results of one sweep over all chunks."""

    value: Array
    """Σ w·loss, shape []."""
    gradients: Inputs[Gradient]
    """The gradient of the value with respect to each input whose gradient is wanted."""
    aux: PyTree
    """[...]."""


class _Sums(NamedTuple):
    """Sums over chunks: the value, and the gradients of the inputs that all chunks share."""

    value: Array
    layer: Layer[Gradient]
    closed_over: tuple[Gradient, ...]


class _PerExample(NamedTuple):
    """Results of a chunk for its own examples: the gradients of their inputs, and aux."""

    batch: Batch[Gradient]
    aux: PyTree


def _sweep(
    loss_fns: tuple[_ExplicitLossFn, ...], inputs: Inputs[Array], wanted: Inputs[bool], layout: Layout, classes_first: bool
) -> _Swept:
    """The value and the wanted gradients, from all chunks. `loss_fns` has one function per size of chunk.

    If there is one size, one loop computes all chunks, and the program compiles in two thirds of the time. Repeated examples have weight 0
    in the first chunk. The loop adds to zeros, so the gradient of the kernel is written once more. If there are two sizes, the first chunk
    initializes the sums, which takes 4 % less time on a GPU at 4,096 x 151,936.
    """
    # A derivative of the sweep in reverse mode stores only the inputs of each chunk, and computes its logits again.
    steps = [
        jax.checkpoint(functools.partial(_add_chunk, loss_fn, classes_first, wanted._replace(closed_over=(flags,))), prevent_cse=False)
        for loss_fn, flags in zip(loss_fns, wanted.closed_over, strict=True)
    ]
    if len(steps) == 1 and layout.loops:
        zeros = _Sums(
            value=jnp.zeros_like(inputs.batch.weights, shape=()),
            layer=jax.tree.map(_zeros_of_gradient, inputs.layer, wanted.layer),
            closed_over=jax.tree.map(_zeros_of_gradient, inputs.closed_over[0], wanted.closed_over[0]),
        )
        chunks = jax.tree.map(layout.stack, inputs.batch)._replace(weights=layout.stack(inputs.batch.weights, repeat=False))
        sums, per_example = lax.scan(lambda before, chunk: steps[0](before, chunk, inputs.layer, inputs.closed_over[0]), zeros, chunks)
        batch, aux = jax.tree.map(layout.unstack, per_example)
        return _Swept(sums.value, Inputs(batch, sums.layer, (sums.closed_over,)), aux)
    first, others = _split(inputs.batch, layout)
    sums, per_example = steps[0](None, first, inputs.layer, inputs.closed_over[0])
    if others is None:
        batch, aux = _join(per_example, None, layout)
        return _Swept(sums.value, Inputs(batch, sums.layer, (sums.closed_over,)), aux)
    values = inputs.closed_over[1]
    start = sums._replace(closed_over=jax.tree.map(_zeros_of_gradient, values, wanted.closed_over[1]))
    end, other_per_example = lax.scan(lambda before, chunk: steps[1](before, chunk, inputs.layer, values), start, others)
    batch, aux = _join(per_example, other_per_example, layout)
    return _Swept(end.value, Inputs(batch, end.layer, (sums.closed_over, end.closed_over)), aux)


def _add_chunk(
    loss_fn: _ExplicitLossFn,
    classes_first: bool,
    wanted: Inputs[bool],
    before: _Sums | None,
    chunk: Batch[Array],
    layer: Layer[Array],
    closed_over: tuple[Array, ...],
) -> tuple[_Sums, _PerExample]:
    """The sums `before` with one chunk added, and the chunk's results per example. `before` is None for the first chunk."""
    classes = 0 if classes_first else 1
    chunk = masked(chunk)

    # Z, the losses, and G. `wanted.closed_over` has one entry here: the flags for this size of chunk.
    values = _logits(chunk, layer, classes_first), chunk.args, closed_over
    flags = wanted.batch.hidden or any(jax.tree.leaves(wanted.layer)), wanted.batch.args, wanted.closed_over[0]
    loss, aux, (logits_bar, args_bar, closed_over_bar) = _losses_and_gradients(loss_fn, chunk.weights, values, flags)
    logits_bar, args_bar = zero_outside(chunk.where, (logits_bar, args_bar))
    narrow = jax.tree.map(lambda g: g.astype(chunk.hidden.dtype), logits_bar)  # None stays None

    # Σ w·loss, ∂/∂b, and the gradients of what the loss closes over
    sums = _Sums(
        value=jnp.sum(weighted(chunk, loss)),
        layer=Layer(None, None if logits_bar is None or not wanted.layer.bias else jnp.sum(logits_bar, axis=0)),
        closed_over=jax.tree.map(lambda g: g.astype(numerics.accumulation_dtype(g.dtype)), closed_over_bar),
    )
    if before is not None:
        sums = jax.tree.map(jnp.add, before._replace(layer=before.layer._replace(kernel=None)), sums)

    # ∂/∂K
    if wanted.layer.kernel:
        factors = (narrow, chunk.hidden) if classes_first else (chunk.hidden, narrow)
        if before is None:
            kernel_bar = products.dot(*factors, 0, 0, layer.kernel)
        else:
            kernel_bar = products.add_product(before.layer.kernel, *factors, classes)
        sums = sums._replace(layer=sums.layer._replace(kernel=kernel_bar))

    # ∂/∂H and ∂/∂w
    batch_bar = Batch(
        hidden=products.dot(narrow, layer.kernel, 1, classes) if wanted.batch.hidden else None,
        weights=zero_outside(chunk.where, loss) if wanted.batch.weights else None,
        where=None,
        args=args_bar,
    )
    return sums, _PerExample(batch_bar, zero_outside(chunk.where, lax.stop_gradient(aux)))


def _losses_and_gradients(loss_fn: _ExplicitLossFn, weights: Array, values: PyTree, wanted: PyTree) -> tuple[Array, PyTree, PyTree]:
    """The losses and aux of `loss_fn(*values)`, and the gradient of Σ w·loss for each value; None if its flag in `wanted` is False."""
    leaves, structure = jax.tree.flatten(values)
    flags = jax.tree.leaves(wanted)

    def losses(*differentiated: Array) -> tuple[Array, PyTree]:
        rest = iter(differentiated)
        return loss_fn(*jax.tree.unflatten(structure, [next(rest) if flag else x for x, flag in zip(leaves, flags, strict=True)]))

    loss, pull_back, aux = jax.vjp(losses, *(x for x, flag in zip(leaves, flags, strict=True) if flag), has_aux=True)
    gradients = iter(pull_back(weights))
    return loss, aux, jax.tree.unflatten(structure, [next(gradients) if flag else None for flag in flags])


def _zeros_of_gradient(x: Array, wanted: bool) -> Gradient:
    """Zeros to which the gradients of `x` in each chunk are added."""
    return jnp.zeros_like(x, numerics.accumulation_dtype(x.dtype)) if wanted else None


# Before the sweep ------------------------------------------------------------------------------------------------------------


def _vary_as_losses(loss_fn: LossFn, batch: Batch[Array], layer: Layer[Array], layout: Layout, classes_first: bool) -> Batch[Array]:
    """The batch, varying over the mesh axes over which the losses vary."""
    return devices.vary_as_losses(
        batch, layer, lambda: _trace(loss_fn, _one_of_each_size(batch, layer, layout)[0], layer, classes_first)[0]
    )


def _closure_as_argument(
    loss_fn: LossFn, chunk: Batch[Array], layer: Layer[Array], classes_first: bool
) -> tuple[_ExplicitLossFn, tuple[Array, ...]]:
    """`loss_fn` as a function that also takes the arrays it closes over, and these arrays."""
    closed, shapes = _trace(loss_fn, chunk, layer, classes_first)
    devices.check_collectives(closed)
    # The derivative rule keeps this function after the trace. So the function holds the program only, not the arrays, which may be tracers.
    program, structure = closed.jaxpr, jax.tree.structure(shapes)

    def explicit(logits: Array, args: tuple[Array, ...], closed_over: tuple[Array, ...]) -> tuple[Array, PyTree]:
        return jax.tree.unflatten(structure, core.eval_jaxpr(program, closed_over, *jax.tree.leaves((logits, args))))

    return explicit, tuple(closed.consts)


def _trace(loss_fn: LossFn, chunk: Batch[Array], layer: Layer[Array], classes_first: bool) -> tuple[ClosedJaxpr, PyTree]:
    """The program of the losses of one chunk, and the shapes of its results."""
    layer = layer._replace(kernel=layer.kernel.astype(chunk.hidden.dtype))
    logits = _logits(chunk, layer, classes_first)  # only the type is used: XLA removes this product as dead code
    return jax.make_jaxpr(lambda *args: loss_fn(*args), return_shape=True)(logits, *chunk.args)


def _ready_for_products(inputs: Inputs[Array]) -> Inputs[Array]:
    """The inputs with the kernel in the dtype of `hidden`, and with hidden, kernel and bias varying over the same mesh axes."""
    batch, layer, closed_over = inputs
    hidden, kernel, bias = devices.vary_alike(batch.hidden, layer.kernel.astype(batch.hidden.dtype), layer.bias)
    return Inputs(batch._replace(hidden=hidden), Layer(kernel, bias), closed_over)


def _keep_derivative_rules(function: _F) -> _F:
    """`function`, in which JAX keeps the derivative rules of the losses.

    When JAX 0.10 splits a derivative into a known part and a linear part, it drops every `custom_jvp` inside a `lax.scan` of the known
    part, even if that part is differentiated later. It keeps them if the scan is inside a `custom_jvp` itself.
    """
    kept = jax.custom_jvp(function)
    kept.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return kept  # type: ignore[return-value]  # custom_jvp keeps the signature, which its type does not say


# Shared ----------------------------------------------------------------------------------------------------------------------


def _logits(chunk: Batch[Array], layer: Layer[Array], classes_first: bool) -> Array:
    """Z = H·K + b, shape [examples, classes]."""
    return _add_bias(products.dot(chunk.hidden, layer.kernel, 1, 1 if classes_first else 0), layer.bias)


def _add_bias(logits: Array, bias: Array | None) -> Array:
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def _is_stored(primitive: Primitive, *operands: core.ShapedArray, **parameters: Any) -> bool:
    """Whether the forward pass of `per_example` stores the results of this operation for the backward pass.

    It stores sums over classes, and the results of functions with a rule if they are numbers per example. So the backward pass computes the
    logits and turns them into their gradient in one pass over the classes. Maxima are not stored: the derivative of a maximum compares it
    with the logits, and XLA may round the logits differently when it computes them again.
    """
    if primitive.name == "reduce_sum":
        axes = operands[0].ndim - len(parameters["axes"])
    elif primitive.name == "custom_jvp_call":
        axes = max((x.ndim for x in parameters["call_jaxpr"].out_avals), default=0)
    else:
        return False
    return axes <= 1 < max((x.ndim for x in operands), default=0)


def _split(batch: Batch[Array], layout: Layout) -> tuple[Batch[Array], Batch[Array] | None]:
    """The first chunk, and the other chunks, stacked (None if there are none)."""
    leaves, structure = jax.tree.flatten(batch)
    first, others = zip(*map(layout.split, leaves), strict=True)
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, others) if layout.loops else None


def _one_of_each_size(batch: Batch[Array], layer: Layer[Array], layout: Layout) -> tuple[Batch[Array], ...]:
    """One chunk of each size.

    Inside `jax.shard_map`, the first chunk always counts as a size of its own. A sum that starts from zeros would not vary over mesh axes.
    The same holds if the gradient of the kernel is large, because one loop writes it once more.
    """
    first, others = _split(batch, layout)
    if others is None:
        return (first,)
    other = jax.tree.map(lambda x: x[0], others)
    size = layer.kernel.size * numerics.accumulation_dtype(batch.hidden.dtype).itemsize
    small = not isinstance(size, int) or size <= _ONE_LOOP_BYTES  # a symbolic number of classes is not an int
    return (other,) if layout.one_loop and small and not mesh.axes_of(batch, layer) else (first, other)


def _join(first: PyTree, others: PyTree, layout: Layout) -> PyTree:
    """The results [*leading, ...] of all examples, from the results of the first chunk and of the others (None if there are none)."""
    return jax.tree.map(lambda *parts: layout.join(*parts), *((first,) if others is None else (first, others)))


def _leaves_and_none(tree: PyTree) -> list:
    """The leaves of a pytree, including None."""
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _inner_product(gradient: Array, tangent: Array) -> Array:
    """⟨gradient, tangent⟩ in float32 or wider. So its transpose is cast to the dtype of the tangent only once."""
    dtype = numerics.accumulation_dtype(gradient.dtype, tangent.dtype)
    return jnp.sum(gradient.astype(dtype) * tangent.astype(dtype))
