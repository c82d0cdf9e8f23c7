"""Losses of a linear layer, computed in chunks of examples. The logits of all examples are never in memory at the same time.

All functions share these conventions:

- `hidden` has shape [..., features]. Matrix products are computed in its dtype and accumulate in float32 or wider.
- `kernel` has shape [features, classes], as in flax. With `classes_first=True`, it has shape [classes, features], as in torch and for tied
  embeddings. The kernel is never transposed in memory. If its dtype differs from the dtype of `hidden`, it is converted once. The gradient
  has the dtype of the given kernel. So float32 master weights get float32 gradients, even if the activations are bfloat16.
- `bias` has shape [classes].
- `where` [...] is True for examples that count. All other examples have loss exactly 0 and weight 0. They may contain NaN or any label.
- `weights` [...] holds one weight per example. With `reduction="mean"`, weights must be ≥ 0. With "none", weights multiply every floating
  array that the loss function returns, except those in aux. They do not change integers and booleans.
- `reduction` selects the result. "mean" returns Σ w·loss / Σ w, "sum" returns Σ w·loss, and "none" returns w·loss per example, shape [...].
  If no example counts, the mean is 0.
- `chunk_size` is the maximum number of examples whose logits are in memory at a time. If it is None, `plan_linear` chooses it. Under
  `jax.vmap`, it applies to each element of the mapped axis separately.
- The number of examples may be symbolic (`jax.export`). The examples are then cut into four chunks, whatever their number turns out to be.
  If `chunk_size` is given, there are as many chunks as it requires, but at least three. Leading axes are flattened into one. Padding adds
  at most one example per chunk. The memory of the logits is bounded only if `chunk_size` is given.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, values
from xentjax._linear import chunks, devices, layers, layout, plan, programs
from xentjax._linear.inputs import Batch, Layer, PyTree
from xentjax._losses import softmax
from xentjax._reduction import WeightedSum


class Options(NamedTuple):
    """Options of a fused loss. They must be known before tracing."""

    reduction: str
    chunk_size: int | None
    has_aux: bool = False
    classes_first: bool = False
    token_axes: tuple[Hashable, ...] = ()  # mesh axes whose devices hold different examples: "mean" and "sum" add over them


def fuse_linear(
    loss_fn: Callable,
    *,
    reduction: str = "mean",
    chunk_size: int | None = None,
    has_aux: bool = False,
    classes_first: bool = False,
) -> Callable:
    """Turn a loss of logits into a loss of hidden and kernel, computed in chunks, shape [] or [...].

    The result is a function `fused_loss(hidden, kernel, *args, bias=None, where=None, weights=None)`. Let
    loss = `loss_fn(hidden @ kernel + bias, *args)`, and let w be the `weights`. `fused_loss` returns Σ w·loss / Σ w, shape [] ("mean"),
    Σ w·loss, shape [] ("sum"), or w·loss, shape [...] ("none"). With "none", `loss_fn` may also return several arrays per example, and
    `fused_loss` returns all of them. The value equals the value of the dense computation, but only the logits of one chunk are in memory at
    a time.
    `jax.grad`, `jvp`, `vjp`, Hessian-vector products, `vmap`, `jit`, `scan` and `jax.checkpoint` work on `fused_loss`.

    Gradient: equal to the gradient of the dense computation. With G = ∂value/∂logits, the gradients are ∂/∂hidden = G·kernelᵀ,
    ∂/∂kernel = hiddenᵀ·G and ∂/∂bias = Σ G. `weights` and floating `args` are differentiated too. So are floating arrays that `loss_fn`
    closes over, such as a temperature, class weights or a teacher's kernel. With "mean" and "sum", the forward pass computes the gradients.
    The value and the gradients then take three matrix products. With "none", the forward pass and the backward pass both compute the
    logits, however many arrays `loss_fn` returns. The gradients of inputs that are not differentiated are not computed.

    Compilation: the compiled programs of `loss_fn` are kept as long as `loss_fn` exists. So a loop may call `fuse_linear(loss_fn)` in every
    step without compiling again. The same holds for a `functools.partial` of `loss_fn` with the same numbers and strings. If a step creates
    a new function, such as a lambda, that function is compiled in every step, unless the step is under `jax.jit`. If `loss_fn` reads values
    other than its arguments, these values must not change.

    Args:
        loss_fn: a function `loss_fn(logits, *args)` that returns one loss per example, shape [chunk]. It is a loss of this library or a
            pure function of your own. It is called with `logits` [chunk, classes] and the `args` of the examples in one chunk. The logits
            are float32, or float64 if `hidden` is float64. Set its keyword arguments with `functools.partial`. With "none", `loss_fn` may
            return any pytree of arrays [chunk, ...]. Floating arrays are multiplied by the weights, and can be differentiated with any
            cotangent. Integers and booleans are not multiplied and not differentiated. In examples that do not count, all entries are 0 or
            False.
        reduction: "mean", "sum" or "none".
        chunk_size: maximum number of examples whose logits are in memory at a time; None: chosen by `plan_linear`.
        has_aux: whether `loss_fn` returns a pair (loss, aux), where aux is a pytree of arrays [chunk, ...]. `fused_loss` then returns
            (value, aux), where aux has arrays [..., ...]. aux is neither multiplied by the weights nor differentiated. It is 0 in examples
            that do not count.
        classes_first: whether `kernel` has shape [classes, features].

    Returns:
        `fused_loss`. Its `args` are pytrees of arrays [..., ...], which begin with the leading axes of `hidden`. Its value is float32, or
        float64 if `hidden` is float64. With "none", its value has the structure of the pytree that `loss_fn` returns, with arrays
        [..., ...]. Integers and booleans keep their dtypes.

    Raises:
        TypeError: an argument of `fuse_linear` or of `fused_loss` has the wrong type or dtype.
        ValueError: `reduction` is unknown, `chunk_size` is below 1, an argument of `fused_loss` has the wrong shape, or `loss_fn` does not
            return one entry per example.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> fused_loss = xentjax.fuse_linear(xentjax.softmax_focal_loss, chunk_size=2)
        >>> hidden, kernel, labels = jnp.ones((5, 4)), jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0, -100])
        >>> value, slope = jax.value_and_grad(fused_loss, 1)(hidden, kernel, labels, where=labels != -100)
        >>> float(value), slope.shape  # (2/3)²·log 3
        (0.48827..., (4, 3))
        >>> every = xentjax.fuse_linear(xentjax.row_statistics, reduction="none")(hidden, kernel, labels, where=labels != -100)
        >>> every.entropy.tolist(), every.correct.tolist()  # log 3; all classes are tied, and the last example does not count
        ([1.09861..., 1.09861..., 1.09861..., 1.09861..., 0.0], [True, True, True, True, False])

    Reference:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, arXiv 2411.09009 (the problem); Hsu et al., Liger
        Kernel, 2024, arXiv 2410.10989 (gradients in the forward pass over chunks).
    """
    name = "fuse_linear"
    check_loss_fn(name, loss_fn, reduction, chunk_size)
    run = programs.compiled(reduced_loss, loss_fn, Options(reduction, chunk_size, has_aux, classes_first))

    def fused_loss(
        hidden: ArrayLike,
        kernel: ArrayLike,
        *args: Any,
        bias: ArrayLike | None = None,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Any:
        """The loss of `hidden @ kernel + bias`. `xentjax.fuse_linear` documents the arguments."""
        checked = layers.arguments(name, hidden, kernel, bias, where, weights, classes_first)
        devices.check_chunk_axes(name, checked[0], checked[1], 0 if classes_first else 1)
        check_weights(name, reduction, *checked[3:])
        return run(*checked, layers.per_example(name, args, checked[0].shape[:-1]))

    return fused_loss


def reduced_loss(
    loss_fn: Callable,
    options: Options,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    where: Array | None,
    weights: Array | None,
    args: PyTree,
) -> Any:
    """The reduced loss of checked arguments; a pair with aux if `options.has_aux`.

    The reduced loss is Σ w·loss / Σ w, Σ w·loss or w·loss.
    """
    dtype = numerics.accumulation_dtype(hidden.dtype)
    w = _ones(hidden, dtype) if weights is None else weights.astype(dtype)
    w = w if where is None else jnp.where(where, w, jnp.zeros_like(w))
    cut = plan.chunks_of(hidden, kernel, options.chunk_size, options.classes_first)
    if where is None and layout.is_symbolic(cut.padding):
        where = jnp.ones(hidden.shape[:-1], bool)  # padding does not count
    leaves, structure = jax.tree.flatten(args)

    def losses(logits: Array, *leaves: Array) -> tuple[PyTree, PyTree]:
        return layers.results_of(loss_fn(logits, *jax.tree.unflatten(structure, leaves)), logits, options.reduction, options.has_aux)

    def computed(rule: Callable, w: Array) -> tuple[PyTree, PyTree]:
        return rule(losses, Batch(hidden, w, where, tuple(leaves)), Layer(kernel, bias), cut, options.classes_first)

    def total(w: Array) -> tuple[Array, PyTree]:
        value, aux = computed(chunks.total, w)
        return mesh.psum(value, options.token_axes), aux

    if options.reduction == "none":
        value, aux = computed(chunks.per_example, w)
    elif options.reduction == "sum":
        value, aux = total(w)
    else:
        weight = mesh.psum(jnp.sum(w), options.token_axes)
        if hidden.dtype.itemsize == 2:
            # In half precision, gradients are computed before the division by Σ w. It would make gradients in float16 underflow.
            value, aux = total(w)
            value = WeightedSum(value, weight).mean()
        else:
            value, aux = total(w * WeightedSum(jnp.ones((), dtype), weight).mean())
    return (value, aux) if options.has_aux else value


def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    chunk_size: int | None = None,
    classes_first: bool = False,
) -> Array:
    """Softmax cross-entropy of a linear layer, computed in chunks of examples, shape [] or [...].

    value = Σ w·loss / Σ w ("mean"), where loss = `softmax_cross_entropy(z, labels)` and z = softcap·tanh((hidden·kernel + bias)/softcap).
    Without a softcap, z = hidden·kernel + bias.
    Gradient: ∂/∂hidden = G·kernelᵀ, ∂/∂kernel = hiddenᵀ·G and ∂/∂bias = Σ G, where G = w/Σw·∂loss/∂z. With a softcap, G has the additional
    factor 1 − (z/softcap)².

    Args:
        hidden: [..., features], activations. Matrix products are computed in the dtype of `hidden`.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices, or [..., classes] soft labels.
        bias: [classes], added to the logits.
        where: [...], True for examples that count.
        weights: [...], one weight per example; with "mean", weights must be ≥ 0.
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1], the share of each label that is spread evenly over the classes that exist.
        class_weights: [classes], ≥ 0. The weight of class k multiplies term k of the sum over classes in `softmax_cross_entropy`. A mean
            is not divided by class weights. For a weighted mean as in PyTorch, pass `weights=class_weights[labels]` instead.
        z_loss: ζ ≥ 0, weight of the penalty lse(z)², which keeps the logits nearly normalized.
        softcap: > 0, a smooth bound on the absolute value of the logits; None: no bound.
        axis_name: mesh axis over which the classes of `kernel` are sharded, inside `jax.shard_map`. Class indices are global.
        class_mask: [classes], True for classes that exist, False for padding of the vocabulary.
        chunk_size: maximum number of examples whose logits are in memory at a time; None: chosen by `plan_linear`.
        classes_first: whether `kernel` has shape [classes, features].

    Returns:
        [], or [...] with "none"; in nats, float32, or float64 if `hidden` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, a Python number is out of range, or `reduction` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> hidden, kernel = jnp.ones((2, 3, 8)), jnp.zeros((8, 131))
        >>> xentjax.linear_softmax_cross_entropy(hidden, kernel, jnp.zeros((2, 3), int)).tolist()  # log 131
        4.87519...

    Reference:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, arXiv 2411.09009; softcap: Gemma Team, Gemma 2, 2024,
        arXiv 2408.00118.
    """
    name = "linear_softmax_cross_entropy"
    _check_options(name, reduction, chunk_size)
    layer = layers.arguments(name, hidden, kernel, bias, where, weights, classes_first)
    h, k, _, counts, _ = layer
    devices.check_chunk_axes(name, h, k, 0 if classes_first else 1)
    mesh.check_class_split(name, axis_name, {"kernel": k}, {"where": counts, "weights": layer[-1]})
    check_weights(name, reduction, *layer[3:])
    classes = k.shape[0 if classes_first else 1]
    w = None if class_weights is None else checks.real(name, "class_weights", class_weights)
    mask = None if class_mask is None else checks.boolean(name, "class_mask", class_mask)
    for argument, x in (("class_weights", w), ("class_mask", mask)):
        if x is not None:
            checks.shape(name, argument, x, (classes,), "one per class")
    if w is not None:
        values.weights(name, "class_weights", w)
    settings = {
        "label_smoothing": checks.number(name, "label_smoothing", label_smoothing, high=1.0),
        "class_weights": w,
        "z_loss": checks.number(name, "z_loss", z_loss),
        "softcap": None if softcap is None else checks.positive(name, "softcap", softcap),
        "class_mask": mask,
    }
    layers.check_values(name, k, layer[2], classes_first, mask)
    y = layers.labels(name, labels, h.shape[:-1], classes, counts, axis_name)
    options = Options(reduction, chunk_size, classes_first=classes_first)
    return _linear_cross_entropy(*layer, y, settings, options, axis_name)


@functools.partial(jax.jit, static_argnames=("options", "axis_name"))
def _linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    where: Array | None,
    weights: Array | None,
    labels: Array,
    settings: dict[str, ArrayLike | None],
    options: Options,
    axis_name: str | tuple[str, ...] | None,
) -> Array:
    settings = {k: v for k, v in settings.items() if v is not None}
    softcap = settings.pop("softcap", None)

    def loss_fn(logits: Array, labels: Array) -> Array:
        if softcap is not None:
            cap = jnp.asarray(softcap, logits.dtype)
            logits = cap * jnp.tanh(logits / cap)
        return values.unchecked(softmax.softmax_cross_entropy)(logits, labels, axis_name=axis_name, **settings)

    return reduced_loss(loss_fn, options, hidden, kernel, bias, where, weights, (labels,))


def _ones(hidden: Array, dtype: jnp.dtype) -> Array:
    """A weight of 1 per example, split over an explicit mesh like `hidden`.

    Inside `jax.shard_map` the ones are made from the shape. Ones made from `hidden` would vary over the same axes as `hidden`, and these
    may include axes that split the classes, over which weights must not vary.
    """
    return jnp.ones(hidden.shape[:-1], dtype) if mesh.axes_of(hidden) else jnp.ones_like(hidden[..., 0], dtype)


def check_loss_fn(function: str, loss_fn: Callable, reduction: str, chunk_size: int | None) -> None:
    """Raise TypeError unless `loss_fn` is callable, and check the options."""
    if not callable(loss_fn):
        raise TypeError(f"{function}: loss_fn must be a function of (logits, *args); got {type(loss_fn).__name__}.")
    _check_options(function, reduction, chunk_size)


def check_weights(function: str, reduction: str, where: Array | None, weights: Array | None) -> None:
    """Inside `xentjax.checked`, report weights that are NaN, and with "mean" also weights that are negative."""
    if weights is not None:
        (values.weights if reduction == "mean" else values.not_nan)(function, "weights", weights, where)


def _check_options(function: str, reduction: str, chunk_size: int | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{function}: reduction must be "mean", "sum" or "none"; got {reduction!r}.')
    plan.check_chunk_size(function, chunk_size)
