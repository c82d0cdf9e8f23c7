"""Losses of a linear layer without its logits: any loss on logits, taken over chunks of examples.

What every function here shares:

- `hidden` [..., features], whose dtype is that of the matrix products; `kernel` [features, classes] (flax), or [classes, features]
  (torch, tied embeddings) with `classes_first=True`, never transposed in memory. A kernel in another dtype is converted once and
  its gradient comes back in its own: float32 master weights under bfloat16 activations get float32 gradients.
- `bias` [classes]; `where` [...], which examples count (the others may hold NaN or any label); `weights` [...], one per example,
  ≥ 0 for a mean.
- `reduction`: "mean" is Σ w·loss / Σ w, "sum" is Σ w·loss, "none" gives w·loss per example [...]. Examples outside `where` cost
  exactly 0 and weigh 0; the mean of nothing is 0.
- `chunk_size`: the most examples whose logits exist at a time; None lets `plan_linear` choose. Under `vmap` that many per instance.
- Symbolic numbers of examples (`jax.export`): `chunk_size=None` makes four chunks, and a given `chunk_size` at least three, whatever the
  number of examples turns out to be. Leading axes are flattened into one. Up to one example per chunk is padding. Then only a given
  `chunk_size` bounds the memory of logits.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, values
from xentjax._linear import chunks, layers, programs
from xentjax._losses import softmax
from xentjax._reduction import WeightedSum


class Options(NamedTuple):
    """What of a fused loss is known before tracing."""

    reduction: str
    chunk_size: int | None
    has_aux: bool = False
    classes_first: bool = False
    token_axes: tuple[str, ...] = ()  # mesh axes whose devices hold parts of the examples, for "mean" and "sum"


_SMALL_BYTES = 2**25  # full logits of this size are left whole
_FEW_EXAMPLES = 192  # smaller chunks wait for the kernel's gradient, which each of them rereads, rather than for their products
_LARGE_BYTES = 2**30  # no chunk's logits take more, however few examples that is


def fuse_linear(
    loss_fn: Callable,
    *,
    reduction: str = "mean",
    chunk_size: int | None = None,
    has_aux: bool = False,
    classes_first: bool = False,
) -> Callable:
    """A function `fused(hidden, kernel, *args, bias=None, where=None, weights=None)` = `loss_fn(hidden @ kernel + bias, *args)`, reduced.

    value = Σ w·loss / Σ w [] ("mean"), Σ w·loss [] ("sum") or w·loss [...] ("none"), as if all logits existed, but no more than
    those of one chunk ever do. `jax.grad`, `jvp`, `vjp`, Hessian-vector products, `vmap`, `jit`, `scan` and `jax.checkpoint` work on it.

    Gradient: that of the dense computation, with respect to `hidden`, `kernel`, `bias`, `weights`, floating `args` and whatever
    floating arrays `loss_fn` closes over (a temperature, class weights, a teacher's kernel). For "mean" and "sum" it is made in the
    forward sweep, three matrix products in all; "none" makes the logits twice. Inputs that are not
    differentiated cost nothing.

    Compilation: the compiled programs of `loss_fn` are kept as long as `loss_fn` exists. So calling `fuse_linear(loss_fn)` again in a loop
    does not compile again, and neither does `fuse_linear` of a `functools.partial` of `loss_fn` with numbers and strings. A new function in
    every step, such as a lambda, is compiled in every step, unless the step is under `jax.jit`. Values that `loss_fn` reads besides its
    arguments must not change.

    Args:
        loss_fn: `loss_fn(logits [chunk, classes], *args_of_the_chunk)` → one loss per example [chunk]; any loss of this library or a
            pure function of your own. The logits are float32 (float64 for float64 hidden).
        reduction: "mean", "sum" or "none".
        chunk_size: the most examples whose logits exist at a time; None: planned by `plan_linear`.
        has_aux: whether `loss_fn` returns (loss, aux), aux a pytree of arrays [chunk, ...]; `fused` then returns (value, aux) with
            arrays [..., ...] that are not differentiated, zero outside `where`.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        `fused`. Its `args` are pytrees of arrays [..., ...] with the leading axes of `hidden`; its value is float32 (float64 for
        float64 hidden).

    Raises:
        TypeError: a dtype that does not fit, here or in `fused`.
        ValueError: an unknown `reduction`, `chunk_size` < 1; in `fused`, shapes that do not fit, a loss that is not one per example.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> fused = xentjax.fuse_linear(xentjax.softmax_focal_loss, chunk_size=2)
        >>> hidden, kernel, labels = jnp.ones((5, 4)), jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0, -100])
        >>> value, slope = jax.value_and_grad(fused, 1)(hidden, kernel, labels, where=labels != -100)
        >>> float(value), slope.shape  # (2/3)²·log 3
        (0.48827..., (4, 3))

    Reference:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, arXiv 2411.09009 (the problem); Hsu et al., Liger
        Kernel, 2024, arXiv 2410.10989 (gradients in the forward sweep over chunks).
    """
    name = "fuse_linear"
    check_fused(name, loss_fn, reduction, chunk_size)
    run = programs.compiled(reduced, loss_fn, Options(reduction, chunk_size, has_aux, classes_first))

    def fused(
        hidden: ArrayLike,
        kernel: ArrayLike,
        *args: Any,
        bias: ArrayLike | None = None,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Any:
        """The loss of `hidden @ kernel + bias`; shapes and meaning as `xentjax.fuse_linear` says."""
        checked = layers.arguments(name, hidden, kernel, bias, where, weights, classes_first)
        mesh.check_chunk_axes(name, checked[0], checked[1], 0 if classes_first else 1)
        check_weights(name, reduction, *checked[3:])
        return run(*checked, layers.per_example(name, args, checked[0].shape[:-1]))

    return fused


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
    """Cross-entropy of a linear layer whose logits never exist at once, [] or, for reduction "none", [...].

    value = Σ w·loss / Σ w with loss = `softmax_cross_entropy(z, labels)`, z = softcap·tanh((hidden·kernel + bias)/softcap).
    Gradient: with G = w/Σw·∂loss/∂z, ∂/∂hidden = G·kernelᵀ, ∂/∂kernel = hiddenᵀ·G, ∂/∂bias = Σ G (times 1 − tanh² under a softcap).

    Args:
        hidden: [..., features], activations; the matrix products take their dtype.
        kernel: [features, classes], or [classes, features] with `classes_first`.
        labels: [...] class indices, or [..., classes] distributions.
        bias: [classes], added to the logits.
        where: [...], which examples count.
        weights: [...], one weight per example; w ≥ 0 for "mean".
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1], the share of the label spread evenly over the classes that exist.
        class_weights: [classes], w ≥ 0, multiplies each class's term.
        z_loss: ζ ≥ 0, weight of the penalty on lse(z)².
        softcap: > 0, bound that the logits approach smoothly; None for none.
        axis_name: mesh axis that splits the classes of `kernel`, inside `jax.shard_map`; indices are global.
        class_mask: [classes], which classes exist (padding of the vocabulary does not).
        chunk_size: the most examples whose logits exist at a time; None: planned by `plan_linear`.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        [] or [...], nats, float32 (float64 for float64 hidden).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a Python number out of range, an unknown `reduction`.

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
    mesh.check_chunk_axes(name, h, k, 0 if classes_first else 1)
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
    return _cross_entropy(*layer, y, settings, options, axis_name)


class LinearPlan(NamedTuple):
    """How a fused loss cuts its examples, and the bytes that takes beside inputs; each field is a number []."""

    chunk_size: int
    """Examples in the largest chunk."""
    chunks: int
    """How many chunks."""
    logits_bytes: int
    """The logits of one chunk, whose place their gradient takes."""
    gradient_bytes: int
    """Their gradient once more in the dtype of the products, if that is not the dtype of the logits."""
    accumulator_bytes: int
    """The gradients of hidden and kernel in the dtype of accumulation, which are the results if that is their dtype."""

    @property
    def peak_bytes(self) -> int:
        """All of it together."""
        return self.logits_bytes + self.gradient_bytes + self.accumulator_bytes


def plan_linear(hidden: Any, kernel: Any, *, chunk_size: int | None = None, classes_first: bool = False) -> LinearPlan:
    """The chunks that `fuse_linear` takes for arguments of these shapes and dtypes, and their memory.

    chunk_size = all examples if their logits take at most 32 MiB, or else a quarter of them, but at least 192, and no more than 1 GiB
    of logits allows. Each further chunk rereads the gradient of the kernel; each larger one takes memory. Nothing is computed.

    Gradient: none; the plan is made of shapes.

    Args:
        hidden: [..., features], an array or a `jax.ShapeDtypeStruct`.
        kernel: [features, classes], likewise, or [classes, features] with `classes_first`.
        chunk_size: a size to judge instead of the planned one.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        `LinearPlan`, numbers [].

    Raises:
        ValueError: shapes that do not fit, `chunk_size` < 1.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8192, 4096), (4096, 128256)))
        >>> plan = xentjax.plan_linear(hidden, kernel)
        >>> plan.chunk_size, plan.chunks, round(plan.peak_bytes / 1e9, 1)  # all logits alone would be 4.2 GB
        (2048, 4, 3.8)

    Reference:
        The figures behind the rule: benchmarks/README.md.
    """
    name = "plan_linear"
    _check_options(name, "none", chunk_size)
    classes = layers.classes(name, hidden.shape, kernel.shape, classes_first)
    cut = _layout(hidden, kernel, chunk_size, classes_first)
    wide, narrow = numerics.accumulation_dtype(hidden.dtype).itemsize, jnp.dtype(hidden.dtype).itemsize
    logits = cut.examples * classes
    return LinearPlan(
        chunk_size=cut.examples,
        chunks=cut.others + 1,
        logits_bytes=logits * wide,
        gradient_bytes=0 if narrow == wide else logits * narrow,
        accumulator_bytes=(hidden.size + kernel.size) * wide,
    )


def _layout(hidden, kernel, chunk_size, classes_first) -> chunks.Layout:
    leading, classes = hidden.shape[:-1], kernel.shape[0 if classes_first else 1]
    if chunks.is_symbolic(*leading):
        return chunks.symbolic_layout(leading, chunk_size)
    if chunk_size is None:
        examples = hidden.size // max(1, hidden.shape[-1])
        row = classes * numerics.accumulation_dtype(hidden.dtype).itemsize
        quarter = max(-(-examples // 4), _FEW_EXAMPLES)
        if chunks.is_symbolic(classes):
            chunk_size = quarter
        else:
            chunk_size = examples if examples * row <= _SMALL_BYTES else min(quarter, _LARGE_BYTES // row)
    return chunks.layout(leading, max(1, chunk_size))


def check_fused(function: str, loss_fn: Callable, reduction: str, chunk_size: int | None) -> None:
    """What can be known of a fused loss before its arrays come."""
    if not callable(loss_fn):
        raise TypeError(f"{function}: loss_fn must be a function of (logits, *args); got {type(loss_fn).__name__}.")
    _check_options(function, reduction, chunk_size)


def check_weights(function: str, reduction: str, where: Array | None, weights: Array | None) -> None:
    """Inside `xentjax.checked`, an error unless the weights of a mean are ≥ 0; sums take signed ones, but not NaN."""
    if weights is not None:
        (values.weights if reduction == "mean" else values.not_nan)(function, "weights", weights, where)


def _check_options(function: str, reduction: str, chunk_size: int | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{function}: reduction must be "mean", "sum" or "none"; got {reduction!r}.')
    if chunk_size is not None:
        checks.count(function, "chunk_size", chunk_size)


@functools.partial(jax.jit, static_argnames=("options", "axis_name"))
def _cross_entropy(hidden, kernel, bias, where, weights, labels, settings, options, axis_name):
    settings = {k: v for k, v in settings.items() if v is not None}
    softcap = settings.pop("softcap", None)

    def loss_fn(logits, labels):
        if softcap is not None:
            cap = jnp.asarray(softcap, logits.dtype)
            logits = cap * jnp.tanh(logits / cap)
        return values.unchecked(softmax.softmax_cross_entropy)(logits, labels, axis_name=axis_name, **settings)

    return reduced(loss_fn, options, hidden, kernel, bias, where, weights, (labels,))


def reduced(
    loss_fn: Callable,
    options: Options,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    where: Array | None,
    weights: Array | None,
    args: tuple,
) -> Any:
    """The fused loss of checked arguments."""
    dtype = numerics.accumulation_dtype(hidden.dtype)
    w = _ones(hidden, dtype) if weights is None else weights.astype(dtype)
    w = w if where is None else jnp.where(where, w, jnp.zeros_like(w))
    layer, cut = chunks.Layer(kernel, bias), _layout(hidden, kernel, options.chunk_size, options.classes_first)
    if where is None and chunks.is_symbolic(cut.padding):
        where = jnp.ones(hidden.shape[:-1], bool)  # padding does not count

    def losses(logits, *args):
        return layers.loss_per_example(loss_fn(logits, *args), logits, options.has_aux)

    def total(w):
        value, aux = chunks.total(losses, chunks.Batch(hidden, w, where, args), layer, cut, options.classes_first)
        return mesh.psum(value, options.token_axes), aux

    if options.reduction == "none":
        value, aux = chunks.per_example(losses, chunks.Batch(hidden, w, where, args), layer, cut, options.classes_first)
    elif options.reduction == "sum":
        value, aux = total(w)
    else:
        weight = mesh.psum(jnp.sum(w), options.token_axes)
        if hidden.dtype.itemsize == 2:
            # Gradients of 16 bits are made before the division: 1/Σw would push those of float16 below its smallest number.
            value, aux = total(w)
            value = WeightedSum(value, weight).mean()
        else:
            value, aux = total(w * WeightedSum(jnp.ones((), dtype), weight).mean())
    return (value, aux) if options.has_aux else value


def _ones(hidden, dtype):
    """A weight of 1 per example: split over an explicit mesh as `hidden` is, but never different over axes that split the classes."""
    return jnp.ones(hidden.shape[:-1], dtype) if mesh.axes_of(hidden) else jnp.ones_like(hidden[..., 0], dtype)
