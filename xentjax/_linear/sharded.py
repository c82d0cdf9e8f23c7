"""`fuse_linear` inside `jax.shard_map`, for the common case that mesh axes shard the tokens, the classes, or both."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh, reshard
from jax.typing import ArrayLike

from xentjax._core import checks
from xentjax._core import mesh as axes
from xentjax._linear import fused, layers, programs
from xentjax._linear.inputs import PyTree

_NAME = "fuse_linear_sharded"
_AnyMesh: TypeAlias = Mesh | AbstractMesh
_Axes: TypeAlias = tuple[str, ...]  # mesh axes
_Entry: TypeAlias = str | _Axes | None  # the mesh axes that split one axis of an array


class _Split(NamedTuple):
    """How a linear layer is split over a mesh."""

    mesh: _AnyMesh
    tokens: tuple[_Entry, ...]  # one entry for each leading axis of hidden
    classes: _Axes

    @property
    def token_axes(self) -> _Axes:
        return _flat(self.tokens)

    def per_token(self, trailing: tuple[_Entry, ...] = ()) -> PartitionSpec:
        return PartitionSpec(*self.tokens, *trailing)


def fuse_linear_sharded(
    loss_fn: Callable,
    *,
    mesh: _AnyMesh | None = None,
    tokens: PartitionSpec | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    has_aux: bool = False,
    classes_first: bool = False,
) -> Callable:
    """Turn a loss of logits into a loss of sharded hidden and kernel over a mesh, shape [] or [...].

    The result is a function `fused_loss(hidden, kernel, *args, bias=None, where=None, weights=None, **per_class)` of global arrays. It
    returns the value that `fuse_linear` returns on one device. The value is Σ w·loss / Σ w, shape [] ("mean"), Σ w·loss, shape [] ("sum"),
    or w·loss, shape [...] ("none"). The sums run over the tokens of all devices. The arrays of "none" are sharded like the tokens.

    At any time, each device holds the logits of one chunk of its own tokens, for its own classes. Devices exchange a few numbers per token.
    They also sum two gradients, each of them once. The gradient of `hidden` is summed over the devices that hold different classes. The
    gradient of `kernel` is summed over the devices that hold different tokens.

    Gradient: equal to the gradient of `fuse_linear`, for derivatives of any order. The gradient of each argument is sharded like that
    argument, except over features.

    Args:
        loss_fn: as in `fuse_linear`. If the classes are sharded, `loss_fn` must take `axis_name`, as the losses of this library do.
        mesh: the mesh of devices; None: the mesh of the arguments, or else the mesh that `jax.set_mesh` has set.
        tokens: the mesh axes that shard the leading axes of `hidden`, such as `P("data")` or `P("data", "sequence")`; None: taken from the
            sharding of `hidden`. That sharding is known outside `jit` and on meshes with explicit axes.
        axis_name: the mesh axis that shards the classes of `kernel`, or () if they are not sharded; None: taken from the sharding of
            `kernel`.
        reduction: "mean", "sum" or "none".
        chunk_size: maximum number of examples whose logits are in memory at a time on one device; None: chosen by `plan_linear` for the
            part of one device.
        has_aux: whether `loss_fn` returns a pair (loss, aux). All that `loss_fn` returns must be the same on all devices that hold classes
            of the same token.
        classes_first: whether `kernel` has shape [classes, features].

    Returns:
        `fused_loss`. Arrays in `args` are sharded like the tokens. A floating array [..., classes] in `args`, such as soft labels, is also
        sharded like the classes. The keyword arguments `per_class` are arrays that `loss_fn` gets as keyword arguments, such as
        `class_weights` and `class_mask`. A `per_class` array of shape [classes] is sharded like the classes. Every device gets all other
        `per_class` arrays in full. If features are sharded, as in fully sharded data parallelism, they are gathered at the start.

    Raises:
        TypeError: an argument has the wrong dtype, or `loss_fn` does not take `axis_name`.
        ValueError: an argument has the wrong shape, an axis cannot be split equally over devices, or a sharding is neither given nor known.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> fused_loss = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model")
        >>> hidden, kernel = jnp.ones((4, 8)), jnp.zeros((8, 130))
        >>> with_padding = fused_loss(hidden, kernel, jnp.zeros(4, int), class_mask=jnp.arange(130) < 128)
        >>> round(float(with_padding / jnp.log(2)), 5)  # log₂ 128
        7.0

    Reference:
        Shoeybi et al., Megatron-LM, 2019, arXiv 1909.08053 (section 3: cross-entropy of a vocabulary split over devices).
    """
    fused.check_loss_fn(_NAME, loss_fn, reduction, chunk_size)
    run = programs.compiled(_over_devices, loss_fn, static=("split", "options"))

    def fused_loss(
        hidden: ArrayLike,
        kernel: ArrayLike,
        *args: Any,
        bias: ArrayLike | None = None,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        **per_class: ArrayLike,
    ) -> Any:
        """The loss of `hidden @ kernel + bias`. `xentjax.fuse_linear_sharded` documents the arguments."""
        layer = layers.arguments(_NAME, hidden, kernel, bias, where, weights, classes_first)
        fused.check_weights(_NAME, reduction, *layer[3:])
        split = _split_of(layer[0], layer[1], mesh, tokens, axis_name, classes_first)
        if split.classes:
            _check_axis_name(loss_fn)
        args = layers.per_example(_NAME, args, layer[0].shape[:-1])
        arrays = (*layer, args, {k: checks.asarray(_NAME, k, x) for k, x in per_class.items()})
        if AxisType.Explicit in split.mesh.axis_types:
            arrays = jax.tree.map(functools.partial(_place, split.mesh), arrays, _specs(split, classes_first, *arrays))
        return run(arrays, split=split, options=fused.Options(reduction, chunk_size, has_aux, classes_first, split.token_axes))

    return fused_loss


def _over_devices(loss_fn: Callable, arrays: tuple, *, split: _Split, options: fused.Options) -> Any:
    def on_each_device(
        hidden: Array,
        kernel: Array,
        bias: Array | None,
        where: Array | None,
        weights: Array | None,
        args: PyTree,
        per_class: dict[str, Array],
    ) -> Any:
        keywords = axes.vary(per_class, split.token_axes)  # here their gradients are summed over devices, once
        if split.classes:
            keywords["axis_name"] = split.classes if len(split.classes) > 1 else next(iter(split.classes))
        return fused.reduced_loss(functools.partial(loss_fn, **keywords), options, hidden, kernel, bias, where, weights, args)

    out = split.per_token() if options.reduction == "none" else PartitionSpec()
    outs = (out, split.per_token()) if options.has_aux else out
    specs = _specs(split, options.classes_first, *arrays)
    return jax.shard_map(on_each_device, mesh=split.mesh, in_specs=specs, out_specs=outs)(*arrays)


def _specs(
    split: _Split,
    classes_first: bool,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    where: Array | None,
    weights: Array | None,
    args: PyTree,
    per_class: dict[str, Array],
) -> tuple:
    """How each array is split over the mesh; None if the array is None."""
    classes = kernel.shape[0 if classes_first else 1]
    over_classes = (split.classes,) if split.classes else (None,)

    def of_args(x: Array) -> PartitionSpec:
        has_classes = x.shape == (*hidden.shape[:-1], classes) and jnp.issubdtype(x.dtype, jnp.floating)
        return split.per_token(over_classes if has_classes else ())

    return (
        split.per_token((None,)),
        PartitionSpec(*over_classes, None) if classes_first else PartitionSpec(None, *over_classes),
        None if bias is None else PartitionSpec(*over_classes),
        None if where is None else split.per_token(),
        None if weights is None else split.per_token(),
        jax.tree.map(of_args, args),
        jax.tree.map(lambda x: PartitionSpec(*over_classes) if x.shape == (classes,) else PartitionSpec(), per_class),
    )


def _place(mesh: _AnyMesh, x: Array, spec: PartitionSpec) -> Array:
    """`x`, split over an explicit mesh as `spec` says. The compiler moves an array that is on a mesh; `jax.device_put` moves any other."""
    move = jax.device_put if jax.typeof(x).sharding.mesh.empty else reshard
    return move(x, NamedSharding(mesh, spec))


def _split_of(
    hidden: Array,
    kernel: Array,
    mesh: _AnyMesh | None,
    tokens: PartitionSpec | None,
    axis_name: str | tuple[str, ...] | None,
    classes_first: bool,
) -> _Split:
    """How the layer is split over the mesh: as the options say, and where they are None, as `hidden` and `kernel` are."""
    placed = [_placement(x) for x in (hidden, kernel)]
    if mesh is None:
        mesh = next((p.mesh for p in placed if p is not None and p.mesh is not None), get_abstract_mesh())
    if mesh.empty:
        raise ValueError(
            f"{_NAME}: mesh must be given, set by jax.set_mesh, or known from a sharded hidden or kernel; got None, and no mesh is set or "
            "known."
        )
    if inside := set(get_abstract_mesh().manual_axes) & set(mesh.axis_names):
        raise ValueError(
            f"{_NAME}: must be called outside jax.shard_map; got a call inside a jax.shard_map over {sorted(map(str, inside))}. "
            "Use fuse_linear there."
        )
    leading = hidden.ndim - 1
    if tokens is None:
        entries = _known_spec("tokens", "hidden", placed[0])[:leading]
    else:
        entries = tuple(tokens)
    if len(entries) > leading:
        raise ValueError(f"{_NAME}: tokens must name at most the {leading} leading axes of hidden; got {tokens} for shape {hidden.shape}.")
    entries = (*entries, *(None,) * (leading - len(entries)))
    position = 0 if classes_first else 1
    classes = axes.names(_known_spec("axis_name", "kernel", placed[1])[position] if axis_name is None else axis_name)
    named = [*_flat(entries), *classes]
    for axis in named:
        if axis not in mesh.axis_names or named.count(axis) > 1:
            raise ValueError(
                f"{_NAME}: tokens and axis_name must name axes of the mesh, {mesh.axis_names}, each once; got {entries} and {classes}."
            )
    for size, entry in zip(hidden.shape, entries, strict=False):  # features are the last axis of hidden
        _check_equal_shares("hidden", size, _flat((entry,)), mesh)
    _check_equal_shares("kernel", kernel.shape[position], classes, mesh)
    # A mesh axis of size 1 splits nothing. XLA does not fuse across sums over it, so it is left out.
    return _Split(mesh, entries, tuple(axis for axis in classes if mesh.shape[axis] > 1))


class _Placement(NamedTuple):
    """The mesh that holds an array, and the mesh axes that split each of its axes."""

    mesh: _AnyMesh | None
    spec: tuple[_Entry, ...]


def _placement(x: Array) -> _Placement | None:
    """Where an array is; None if only the compiler will know."""
    if isinstance(x, core.Tracer) and not axes.is_explicit(x):
        return None
    sharding = jax.typeof(x).sharding if isinstance(x, core.Tracer) else x.sharding
    mesh, spec = (sharding.mesh, tuple(sharding.spec)) if isinstance(sharding, NamedSharding) else (None, ())
    return _Placement(mesh, spec + (None,) * (x.ndim - len(spec)))


def _known_spec(argument: str, name: str, placement: _Placement | None) -> tuple[_Entry, ...]:
    """The mesh axes that split each axis of array `name`; ValueError if they are unknown, so that `argument` is required."""
    if placement is None:
        nothing = "P()" if argument == "tokens" else "()"
        raise ValueError(
            f"{_NAME}: {argument} must be given under jit on a mesh without explicit axes, where the sharding of {name} is unknown during "
            f"tracing; got None. Use {argument}={nothing} if it is not sharded."
        )
    return placement.spec


def _check_equal_shares(name: str, size: int, over: _Axes, mesh: _AnyMesh) -> None:
    """ValueError unless all devices get an equal share of an axis."""
    devices = math.prod(mesh.shape[axis] for axis in over)
    if size % devices:
        more = -size % devices
        what, mask = ("classes", f"class_mask=jnp.arange({size + more}) < {size}") if name == "kernel" else ("examples", "where")
        raise ValueError(
            f"{_NAME}: the {devices} devices of mesh axes {over} must get equal shares of the {what} of {name}; got {size}. "
            f"Pad {what} by {more} and pass {mask}."
        )


def _check_axis_name(loss_fn: Callable) -> None:
    """TypeError unless `loss_fn` takes `axis_name`."""
    parameters = inspect.signature(loss_fn).parameters.values()
    if not any(p.name == "axis_name" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(
            f"{_NAME}: loss_fn must take axis_name, the mesh axis over which the classes of its logits are sharded; got {loss_fn} without "
            "axis_name. Pass axis_name on to the loss of this library that it calls."
        )


def _flat(spec: tuple[_Entry, ...]) -> _Axes:
    """The mesh axes of a partition, in order."""
    return tuple(axis for entry in spec if entry is not None for axis in axes.names(entry))
