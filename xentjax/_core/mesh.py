"""How values are distributed over a mesh of devices.

Inside `jax.shard_map`, the type of a value lists the mesh axes over which the value may vary. On a mesh with explicit axes, the type of an
array also tells how the array is split.

Before an operation on two values, JAX makes both values vary over every axis over which either value varies. The transpose of this step is
a sum over devices. So the place of the step decides how often a gradient is summed over devices, and how large the summed array is.

Functions whose names begin with `check_` raise ValueError if the distribution of the arguments would give wrong results.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NoReturn

import jax
from jax import Array, core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

AxisName = str | tuple[str, ...] | None  # the mesh axes that split the classes or the examples; None if they are not split


def axes_of(*trees: Any) -> frozenset[Hashable]:
    """The mesh axes over which at least one array in the pytrees varies.

    The pytrees may also hold types of arrays. Outside `jax.shard_map`, no array varies over a mesh axis.
    """
    return frozenset().union(*map(_varying, jax.tree.leaves(trees)))


def vary(tree: Any, axes: Iterable[Hashable]) -> Any:
    """The same arrays, typed as varying over `axes`. Their gradients are summed over these axes here and nowhere else."""
    return jax.tree.map(lambda x: _vary(x, tuple(a for a in axes if a not in axes_of(x))), tree)


def is_explicit(x: Array | core.ShapedArray) -> bool:
    """Whether the type of an array tells how the array is split over devices."""
    return AxisType.Explicit in (_type(x).sharding.mesh.axis_types or ())


def is_last_axis_split(x: Array) -> bool:
    """Whether the type of an array tells that its last axis is split."""
    return is_explicit(x) and jax.typeof(x).sharding.spec[-1] is not None


def split_of(x: Array | core.ShapedArray) -> NamedSharding | None:
    """The sharding of an array on an explicit mesh, to be passed as `out_sharding`.

    On other meshes the result is None, and the compiler decides.
    """
    return _type(x).sharding if is_explicit(x) else None


def split_as(like: Array, x: Array) -> Array:
    """`x`, split over an explicit mesh in the same way as `like`. Both arrays have the same shape."""
    return x if not is_explicit(like) or jax.typeof(x).sharding == jax.typeof(like).sharding else reshard(x, jax.typeof(like).sharding)


def split_alike(*arrays: Array) -> list[Array]:
    """Arrays of one shape, all split in the same way over an explicit mesh.

    They are split like the array that is split along most axes. No array is gathered.
    """
    like = max(arrays, key=lambda x: sum(axis is not None for axis in jax.typeof(x).sharding.spec))
    return [split_as(like, x) for x in arrays]


def gather_last_axis(x: Array) -> Array:
    """`x`, with its whole last axis on every device of an explicit mesh that splits it."""
    if not is_last_axis_split(x):
        return x
    split = jax.typeof(x).sharding
    return reshard(x, NamedSharding(split.mesh, PartitionSpec(*split.spec[:-1], None)))


def names(axis_name: AxisName) -> tuple[str, ...]:
    """The mesh axes in `axis_name`, as a tuple; empty for None."""
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def size(axis_name: AxisName) -> int:
    """The number of devices along the mesh axes in `axis_name`; 1 for None."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def typed(axis: Hashable) -> bool:
    """Whether the types of values list this axis. They do not list it with `check_vma=False` or inside `jax.vmap(axis_name=…)`."""
    return axis in axes_of(lax.axis_index(axis))


def psum(tree: Any, axes: Iterable[Hashable]) -> Any:
    """The sum over devices of every array in a pytree. Without axes, the pytree is returned unchanged.

    The value and the forward derivative are always correct. Reverse mode raises ValueError if types do not list an axis (see `typed`). For
    such an axis, JAX transposes a sum over devices into another sum over devices. If a shared loss is differentiated inside the map, its
    gradient would then be counted once per device. If it is differentiated outside the map, its gradient would be correct. JAX does not
    show which of the two happens, so reverse mode raises in both cases.
    """
    axes = tuple(axes)
    if not axes:
        return tree
    untyped = tuple(axis for axis in axes if axis not in axes_of(tree) and not typed(axis))

    def sum_leaf(x: Array) -> Array:  # one leaf at a time: JAX 0.8 cannot transpose a sum of several arrays if one has no derivative
        return _one_way.bind(lax.psum(x, axes), axes=untyped) if untyped else lax.psum(x, axes)

    return jax.tree.map(sum_leaf, tree)


def check_class_split(function: str, axis_name: AxisName, split: dict[str, Array], same: dict[str, Array | None]) -> None:
    """Raise ValueError unless, over the axes in `axis_name`, the arrays in `split` vary and the arrays in `same` do not vary."""
    for axis in names(axis_name):
        try:
            known = typed(axis)
        except NameError:
            raise ValueError(
                f"{function}: axis_name must name an axis of a surrounding jax.shard_map; got {axis!r}. "
                "Under plain jit, leave axis_name out, even for sharded arrays."
            ) from None
        for name, x in split.items():
            if known and axis not in axes_of(x):
                raise ValueError(
                    f"{function}: {name} must be split along the class axis over mesh axis {axis!r}, which axis_name names; got the same "
                    f"{name} of shape {x.shape} on all its devices. Name {axis!r} for the class axis in in_specs of jax.shard_map."
                )
        for name, x in same.items():
            check_shared(function, name, x, frozenset({axis}) if known else frozenset())


def check_class_axis(function: str, name: str, logits: Array, axis: int, labels: Array | None) -> None:
    """Raise ValueError if an explicit mesh splits class indices over a mesh axis that also splits the classes."""
    if labels is None or not (is_explicit(logits) and is_explicit(labels)):
        return
    of_classes = names(jax.typeof(logits).sharding.spec[axis])
    for entry in jax.typeof(labels).sharding.spec:
        for split in set(names(entry)) & set(of_classes):
            raise ValueError(
                f"{function}: labels must not be split over mesh axis {split!r}, which splits the classes of {name}; got "
                f"{jax.typeof(labels)} for {jax.typeof(logits)}. Use jax.sharding.reshard to split labels like the examples of {name}."
            )


def check_shared(function: str, name: str, x: Array | None, axes: frozenset[Hashable]) -> None:
    """Raise ValueError if `x` may differ between devices that hold different classes of the same examples."""
    for axis in axes & axes_of(x):
        raise ValueError(
            f"{function}: {name} must be the same on all devices of mesh axis {axis!r}, which hold classes of the same examples; got "
            f"{name} split over that axis. Leave {axis!r} out of the in_specs of {name} in jax.shard_map (class indices are global)."
        )


def _type(x: Array | core.ShapedArray) -> core.ShapedArray:
    return x if isinstance(x, core.ShapedArray) else jax.typeof(x)  # type: ignore[return-value]  # of an array it is a ShapedArray


def _vary(x: Array, axes: tuple[Hashable, ...]) -> Array:
    if not axes:
        return x
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)  # type: ignore  # before JAX 0.9


def _varying(x: Array | core.ShapedArray) -> frozenset[Hashable]:
    aval = _type(x)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma  # type: ignore  # before JAX 0.10


# An identity function, applied after a sum over axes that types do not list. It has no transpose, so reverse mode raises. Once `jax.vmap`
# has turned all these axes into array axes, the identity disappears.
_one_way = Primitive("sum_over_untyped_devices")
_one_way.def_impl(lambda x, *, axes: x)
_one_way.def_abstract_eval(lambda x, *, axes: x)
mlir.register_lowering(_one_way, lambda _, x, *, axes: [x])


def _transpose(_: Any, x: Any, *, axes: tuple[Hashable, ...]) -> NoReturn:
    named = ", ".join(map(repr, axes))
    raise ValueError(
        f"xentjax: reverse-mode differentiation of a sum over axis {named} needs jax.shard_map with check_vma=True, its default; got "
        "check_vma=False, jax.pmap or jax.vmap(axis_name=...). There, a gradient of a shared loss, taken inside, would be counted once per "
        "device. Use check_vma=True. Forward mode (jax.jvp) needs no change, and neither does jax.grad of the whole jax.vmap."
    )


def _batch(axis_data: Any, arrays: Sequence[Array], dims: Sequence[Any], *, axes: tuple[Hashable, ...]) -> tuple[Array, Any]:
    axes = tuple(axis for axis in axes if axis != axis_data.name)
    return _one_way.bind(*arrays, axes=axes) if axes else arrays[0], dims[0]


ad.deflinear2(_one_way, _transpose)
batching.fancy_primitive_batchers[_one_way] = _batch
