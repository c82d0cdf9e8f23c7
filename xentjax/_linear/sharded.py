"""The losses of a linear layer over a mesh of devices: `jax.shard_map` around `fuse_linear`, for the common case."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh, reshard
from jax.typing import ArrayLike

from xentjax._core import checks
from xentjax._core import mesh as axes
from xentjax._linear import layers, programs
from xentjax._linear.fused import Options, check_fused, check_weights, reduced

_NAME = "fuse_linear_sharded"


class _Split(NamedTuple):
    """How a layer lies on a mesh."""

    mesh: Mesh | AbstractMesh
    tokens: tuple  # of every leading axis of hidden: None, a mesh axis, or several
    classes: tuple  # mesh axes

    @property
    def token_axes(self) -> tuple:
        return _flat(self.tokens)

    def per_token(self, trailing: tuple = ()) -> PartitionSpec:
        return PartitionSpec(*self.tokens, *trailing)


def fuse_linear_sharded(
    loss_fn: Callable,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    tokens: PartitionSpec | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    has_aux: bool = False,
    classes_first: bool = False,
) -> Callable:
    """`fuse_linear` over a mesh: `fused(hidden, kernel, *args, bias=None, where=None, weights=None, **per_class)` of whole, sharded arrays.

    value = that of `fuse_linear` on one device: Σ w·loss / Σ w [] ("mean") and Σ w·loss [] ("sum") over all tokens of all devices, or
    w·loss [...] ("none"), split as the tokens are. Each device holds the logits of one chunk of its tokens and its classes; what
    crosses devices is a few numbers per token and, once, the sums of the gradients of hidden (over classes) and kernel (over tokens).

    Gradient: that of `fuse_linear`, to any order; it comes back split as its argument is, features aside.

    Args:
        loss_fn: as for `fuse_linear`; if classes are split it must take `axis_name`, as the losses of this library do.
        mesh: the mesh; None: that of the arguments, or else of `jax.set_mesh`.
        tokens: which mesh axes split the leading axes of `hidden`, such as `P("data")` or `P("data", "sequence")`; None: read off
            `hidden`, which is possible outside `jit` and on meshes with explicit axes.
        axis_name: which mesh axis splits the classes of `kernel`, or () for none; None: read off `kernel`.
        reduction: "mean", "sum" or "none".
        chunk_size: the most examples whose logits exist at a time on a device; None: planned by `plan_linear` for its share.
        has_aux: whether `loss_fn` returns (loss, aux); aux must be the same on all devices that share the classes of a token.
        classes_first: whether `kernel` is [classes, features].

    Returns:
        `fused`. `args` are split along their tokens; a floating array [..., classes] among them, like a distribution, along its classes
        too. Keywords `per_class` are arrays for `loss_fn`, such as `class_weights` and `class_mask`: those of shape [classes] are
        split, others go to all devices. Features that are split (as for fully sharded parameters) are gathered at entry.

    Raises:
        TypeError: a dtype that does not fit; a `loss_fn` without `axis_name`.
        ValueError: shapes that do not fit or cannot be shared equally; a placement that is neither given nor known.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model")
        >>> hidden, kernel = jnp.ones((4, 8)), jnp.zeros((8, 130))
        >>> with_padding = fused(hidden, kernel, jnp.zeros(4, int), class_mask=jnp.arange(130) < 128)
        >>> round(float(with_padding / jnp.log(2)), 5)  # log₂ 128
        7.0

    Reference:
        Shoeybi et al., Megatron-LM, 2019, arXiv 1909.08053 (section 3: cross-entropy of a vocabulary split over devices).
    """
    check_fused(_NAME, loss_fn, reduction, chunk_size)
    run = programs.compiled(_run, loss_fn, static=("split", "options"))

    def fused(
        hidden: ArrayLike,
        kernel: ArrayLike,
        *args: Any,
        bias: ArrayLike | None = None,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        **per_class: ArrayLike,
    ) -> Any:
        """The loss of `hidden @ kernel + bias`; shapes and meaning as `xentjax.fuse_linear_sharded` says."""
        layer = layers.arguments(_NAME, hidden, kernel, bias, where, weights, classes_first)
        check_weights(_NAME, reduction, *layer[3:])
        split = _split(layer[0], layer[1], mesh, tokens, axis_name, classes_first)
        if split.classes:
            _takes_axis_name(loss_fn)
        args = layers.per_example(_NAME, args, layer[0].shape[:-1])
        arrays = (*layer, args, {k: checks.asarray(_NAME, k, x) for k, x in per_class.items()})
        if AxisType.Explicit in split.mesh.axis_types:
            arrays = jax.tree.map(functools.partial(_place, split.mesh), arrays, _specs(split, classes_first, *arrays))
        return run(arrays, split=split, options=Options(reduction, chunk_size, has_aux, classes_first, split.token_axes))

    return fused


def _specs(split, classes_first, hidden, kernel, bias, where, weights, args, per_class):
    """How each array is split; None for one that is None."""
    classes = kernel.shape[0 if classes_first else 1]
    over_classes = (split.classes,) if split.classes else (None,)

    def of_args(x):
        whole = x.shape == (*hidden.shape[:-1], classes) and jnp.issubdtype(x.dtype, jnp.floating)
        return split.per_token(over_classes if whole else ())

    return (
        split.per_token((None,)),
        PartitionSpec(*over_classes, None) if classes_first else PartitionSpec(None, *over_classes),
        None if bias is None else PartitionSpec(*over_classes),
        None if where is None else split.per_token(),
        None if weights is None else split.per_token(),
        jax.tree.map(of_args, args),
        jax.tree.map(lambda x: PartitionSpec(*over_classes) if x.shape == (classes,) else PartitionSpec(), per_class),
    )


def _place(mesh, x, spec):
    """An array on an explicit mesh, split so: what is on a mesh already is moved by the compiler, what is on one device by hand."""
    move = jax.device_put if jax.typeof(x).sharding.mesh.empty else reshard
    return move(x, NamedSharding(mesh, spec))


def _run(loss_fn, arrays, *, split, options):
    def local(hidden, kernel, bias, where, weights, args, per_class):
        more = axes.vary(per_class, split.token_axes)  # their gradients are summed over devices once, at entry
        if split.classes:
            more["axis_name"] = split.classes if len(split.classes) > 1 else split.classes[0]
        return reduced(functools.partial(loss_fn, **more), options, hidden, kernel, bias, where, weights, args)

    out = split.per_token() if options.reduction == "none" else PartitionSpec()
    outs = (out, split.per_token()) if options.has_aux else out
    specs = _specs(split, options.classes_first, *arrays)
    return jax.shard_map(local, mesh=split.mesh, in_specs=specs, out_specs=outs)(*arrays)


def _split(hidden: Array, kernel: Array, mesh: Any, tokens: Any, axis_name: Any, classes_first: bool) -> _Split:
    """How the layer lies on the mesh: as is said, or else as its arrays do."""
    placed = [_placement(x) for x in (hidden, kernel)]
    if mesh is None:
        found = [p.mesh for p in placed if p is not None and p.mesh is not None] + [get_abstract_mesh()]
        mesh = found[0]
    if mesh.empty:
        raise ValueError(f"{_NAME}: mesh must be given, or set by jax.set_mesh, or known from a sharded hidden or kernel; got none of it.")
    if inside := set(get_abstract_mesh().manual_axes) & set(mesh.axis_names):
        raise ValueError(f"{_NAME}: use fuse_linear inside jax.shard_map; got called inside one over {sorted(map(str, inside))}.")
    leading = hidden.ndim - 1
    if tokens is None:
        tokens = _known("tokens", "hidden", placed[0])[:leading]
    if len(tokens) > leading:
        raise ValueError(f"{_NAME}: tokens must name at most the {leading} leading axes of hidden; got {tokens} for shape {hidden.shape}.")
    tokens = (*tokens, *(None,) * (leading - len(tokens)))
    position = 0 if classes_first else 1
    classes = axes.names(_known("axis_name", "kernel", placed[1])[position] if axis_name is None else axis_name)
    named = [*_flat(tokens), *classes]
    for axis in named:
        if axis not in mesh.axis_names or named.count(axis) > 1:
            raise ValueError(
                f"{_NAME}: tokens and axis_name must name axes of the mesh, {mesh.axis_names}, each once; got {tokens} and {classes}."
            )
    for size, entry in zip(hidden.shape, tokens, strict=False):  # features come last
        _shares("hidden", size, _flat((entry,)), mesh)
    _shares("kernel", kernel.shape[position], classes, mesh)
    # an axis of one device splits nothing, and sums over it would keep XLA from fusing what they part
    return _Split(mesh, tokens, tuple(axis for axis in classes if mesh.shape[axis] > 1))


class _Placement(NamedTuple):
    mesh: Mesh | AbstractMesh | None
    spec: tuple


def _placement(x: Array) -> _Placement | None:
    """The mesh and axes that hold an array; None if only the compiler will know."""
    if isinstance(x, core.Tracer) and not axes.is_explicit(x):
        return None
    sharding = jax.typeof(x).sharding if isinstance(x, core.Tracer) else x.sharding
    mesh, spec = (sharding.mesh, tuple(sharding.spec)) if isinstance(sharding, NamedSharding) else (None, ())
    return _Placement(mesh, spec + (None,) * (x.ndim - len(spec)))


def _known(argument: str, name: str, placement: _Placement | None) -> tuple:
    if placement is None:
        none = "P()" if argument == "tokens" else "()"
        raise ValueError(
            f"{_NAME}: {argument} must be given where the sharding of {name} is not known while tracing, under jit on a mesh without "
            f"explicit axes; got None. Use {argument}={none} if it is not split."
        )
    return placement.spec


def _shares(name: str, size: int, over: tuple, mesh: Any) -> None:
    """ValueError unless the devices get equal shares of an axis."""
    devices = math.prod(mesh.shape[axis] for axis in over)
    if size % devices:
        more = -size % devices
        what, mask = ("classes", f"class_mask=jnp.arange({size + more}) < {size}") if name == "kernel" else ("examples", "where")
        raise ValueError(
            f"{_NAME}: the {devices} devices of mesh axes {over} must get equal shares of the {what} of {name}; got {size}. "
            f"Pad {what} by {more} and pass {mask}."
        )


def _takes_axis_name(loss_fn: Callable) -> None:
    parameters = inspect.signature(loss_fn).parameters.values()
    if not any(p.name == "axis_name" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(
            f"{_NAME}: loss_fn must take axis_name, the mesh axis that splits the classes of its logits; got {loss_fn} without. "
            "Give it to the loss of this library that it calls."
        )


def _flat(spec: tuple) -> tuple:
    """The mesh axes of a partition, in order."""
    return tuple(axis for entry in spec if entry is not None for axis in axes.names(entry))
