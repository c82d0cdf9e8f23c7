"""Losses of a linear layer, computed over chunks of examples. The logits of all examples never exist at the same time.

Shared conventions:

- `hidden` is [..., features]. The matrix products take its dtype.
- `kernel` is [features, classes], as in flax, or [classes, features] with `classes_first=True`, as in torch and for tied embeddings. It is
  never transposed in memory. If its dtype is not the dtype of `hidden`, it is converted once. The gradient has the dtype of the given
  kernel. So float32 master weights get float32 gradients under bfloat16 activations.
- `bias` is [classes].
- `where` [...] is True for examples that count. The others may hold NaN or any label. They cost exactly 0 and have weight 0.
- `weights` [...] has one weight per example. For the mean, weights must be ≥ 0.
- `reduction`: "mean" is Σ w·loss / Σ w, "sum" is Σ w·loss, and "none" is w·loss per example, shape [...]. The mean of no examples is 0.
- `chunk_size` is the largest number of examples whose logits exist at the same time. If it is None, `plan_linear` chooses it. Under
  `jax.vmap`, it applies to each element of the mapped axis separately.
- The number of examples may be symbolic (`jax.export`). Then there are four chunks, whatever the number of examples turns out to be. With a
  given `chunk_size`, there are as many chunks as it requires, but at least three. Leading axes are flattened into one. Padding adds at most
  one example per chunk. The memory of the logits is bounded only if `chunk_size` is given.
- TypeError is raised for wrong dtypes. ValueError is raised for wrong shapes and for Python numbers out of range.
"""

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
    """Options of a fused loss. They are known before tracing."""

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
    """Turn a loss on logits into a loss on (hidden, kernel), computed in chunks; [] or [...].

    `fused_loss(hidden, kernel, *args, bias=None, where=None, weights=None)` = Σ w·loss / Σ w [] ("mean"), Σ w·loss [] ("sum") or
    w·loss [...] ("none"), with loss = `loss_fn(hidden @ kernel + bias, *args)`. The values are those of the dense computation, but only the
    logits of one chunk are in memory at a time. `jax.grad`, `jvp`, `vjp`, Hessian-vector products, `vmap`, `jit`, `scan` and
    `jax.checkpoint` work on `fused_loss`.

    Gradient: that of the dense computation, ∂/∂hidden = G·kernelᵀ, ∂/∂kernel = hiddenᵀ·G and ∂/∂bias = Σ G with G = ∂value/∂logits.
    `weights`, floating `args` and floating arrays that `loss_fn` closes over (a temperature, class weights, a teacher's kernel) are
    differentiated too. For "mean" and "sum", gradients are computed in the forward pass, with three matrix products in all. "none" computes
    the logits twice. Undifferentiated inputs cost nothing.

    Compilation: the compiled programs of `loss_fn` are kept as long as `loss_fn` exists. So calling `fuse_linear(loss_fn)` again in a loop
    does not compile again, and neither does `fuse_linear` of a `functools.partial` of `loss_fn` with numbers and strings. A new function in
    every step, such as a lambda, is compiled in every step, unless the step is under `jax.jit`. Values that `loss_fn` reads besides its
    arguments must not change.

    Args:
        loss_fn: `loss_fn(logits [chunk, classes], *args_of_the_chunk)` returns one loss per example [chunk]. Any loss of this library, or a
            pure function of your own. The logits are float32 (float64 for float64 hidden).
        reduction: "mean", "sum" or "none".
        chunk_size: the largest number of examples whose logits exist at the same time; None: chosen by `plan_linear`.
        has_aux: whether `loss_fn` returns (loss, aux), where aux is a pytree of arrays [chunk, ...]. `fused_loss` then returns (value, aux)
            with arrays [..., ...]. They are not differentiated and are zero outside `where`.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        `fused_loss`. Its `args` are pytrees of arrays [..., ...] with the leading axes of `hidden`. Its value is float32 (float64 for
        float64 hidden).

    Raises:
        TypeError: an argument has the wrong dtype, here or in `fused_loss`.
        ValueError: `reduction` is unknown, or `chunk_size` < 1. In `fused_loss`: shapes do not fit, or `loss_fn` does not return one loss
            per example.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> fused_loss = xentjax.fuse_linear(xentjax.softmax_focal_loss, chunk_size=2)
        >>> hidden, kernel, labels = jnp.ones((5, 4)), jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0, -100])
        >>> value, slope = jax.value_and_grad(fused_loss, 1)(hidden, kernel, labels, where=labels != -100)
        >>> float(value), slope.shape  # (2/3)²·log 3
        (0.48827..., (4, 3))

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
    """Σ w·loss / Σ w, Σ w·loss or w·loss of checked arguments; with aux if `options.has_aux`."""
    dtype = numerics.accumulation_dtype(hidden.dtype)
    w = _ones(hidden, dtype) if weights is None else weights.astype(dtype)
    w = w if where is None else jnp.where(where, w, jnp.zeros_like(w))
    cut = plan.chunks_of(hidden, kernel, options.chunk_size, options.classes_first)
    if where is None and layout.is_symbolic(cut.padding):
        where = jnp.ones(hidden.shape[:-1], bool)  # padding does not count
    leaves, structure = jax.tree.flatten(args)

    def losses(logits: Array, *leaves: Array) -> tuple[Array, PyTree]:
        return layers.loss_per_example(loss_fn(logits, *jax.tree.unflatten(structure, leaves)), logits, options.has_aux)

    def computed(rule: Callable, w: Array) -> tuple[Array, PyTree]:
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
    """Cross-entropy of a linear layer, computed in chunks of examples, [] or [...].

    value = Σ w·loss / Σ w with loss = `softmax_cross_entropy(z, labels)`, z = softcap·tanh((hidden·kernel + bias)/softcap).
    Gradient: with G = w/Σw·∂loss/∂z, ∂/∂hidden = G·kernelᵀ, ∂/∂kernel = hiddenᵀ·G, ∂/∂bias = Σ G. With a softcap, G is also multiplied by
    1 − (z/softcap)².

    Args:
        hidden: [..., features], activations. The matrix products take their dtype.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices, or [..., classes] soft labels.
        bias: [classes], added to the logits.
        where: [...], True for examples that count.
        weights: [...], one weight per example, ≥ 0 for "mean".
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1], the share of the label that is spread evenly over the classes that exist.
        class_weights: [classes], ≥ 0, multiplies the term of each class.
        z_loss: ζ ≥ 0, weight of the penalty on lse(z)².
        softcap: > 0, a smooth bound on the absolute value of the logits; None for none.
        axis_name: mesh axis over which the classes of `kernel` are sharded, inside `jax.shard_map`. Class indices are global.
        class_mask: [classes], True for classes that exist; False for padding of the vocabulary.
        chunk_size: the largest number of examples whose logits exist at the same time; None: chosen by `plan_linear`.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        [] or, for "none", [...]; nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, a Python number is out of range, or `reduction` is unknown.

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
    """TypeError unless `loss_fn` is callable; errors about the options."""
    if not callable(loss_fn):
        raise TypeError(f"{function}: loss_fn must be a function of (logits, *args); got {type(loss_fn).__name__}.")
    _check_options(function, reduction, chunk_size)


def check_weights(function: str, reduction: str, where: Array | None, weights: Array | None) -> None:
    """Inside `xentjax.checked`, an error if the weights of a mean are negative or NaN, or other weights are NaN."""
    if weights is not None:
        (values.weights if reduction == "mean" else values.not_nan)(function, "weights", weights, where)


def _check_options(function: str, reduction: str, chunk_size: int | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{function}: reduction must be "mean", "sum" or "none"; got {reduction!r}.')
    plan.check_chunk_size(function, chunk_size)
