"""How a value lies on a mesh of devices: over which axes it differs inside `jax.shard_map`, and how its type splits it outside.

JAX types every value there by the axes over which it may vary. A value that varies less than another is made to vary when they
meet, and the transpose of that is a sum over devices: where it happens decides how often a gradient is summed.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import jax
from jax import Array, core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, reshard


def axes_of(*trees: Any) -> frozenset[Hashable]:
    """The mesh axes over which any array, or type of one, in these pytrees varies; none outside `jax.shard_map`."""
    return frozenset().union(*map(_varying, jax.tree.leaves(trees)))


def vary(tree: Any, axes: Iterable[Hashable]) -> Any:
    """The same arrays, which from here on may vary over these axes; their gradients are summed over devices here, and only here."""
    return jax.tree.map(lambda x: _vary(x, tuple(a for a in axes if a not in axes_of(x))), tree)


def is_explicit(x: Array) -> bool:
    """Whether the type of an array says how it is split over devices."""
    return AxisType.Explicit in (jax.typeof(x).sharding.mesh.axis_types or ())


def is_apart(x: Array) -> bool:
    """Whether the type of an array says that its last axis is split."""
    return is_explicit(x) and jax.typeof(x).sharding.spec[-1] is not None


def split_of(x: Array) -> Any:
    """How an explicit mesh splits an array, as an `out_sharding`; None for the compiler to decide."""
    return jax.typeof(x).sharding if is_explicit(x) else None


def split_as(like: Array, x: Array) -> Array:
    """`x`, split over an explicit mesh as another array of its shape is."""
    return x if not is_explicit(like) or jax.typeof(x).sharding == jax.typeof(like).sharding else reshard(x, jax.typeof(like).sharding)


def split_alike(*arrays: Array) -> list[Array]:
    """Arrays of one shape, all split over an explicit mesh as that of them which is split along most axes: none is gathered."""
    like = max(arrays, key=lambda x: sum(axis is not None for axis in jax.typeof(x).sharding.spec))
    return [split_as(like, x) for x in arrays]


def names(axis_name: Hashable | tuple[Hashable, ...] | None) -> tuple[Hashable, ...]:
    """The axes that `axis_name` names, which may be one, several, or None."""
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def size(axis_name: Any) -> int:
    """How many devices share the axes that `axis_name` names; 1 for None."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def typed(axis: Hashable) -> bool:
    """Whether JAX knows what varies over this axis: inside `jax.shard_map` with `check_vma`, and not under `jax.vmap(axis_name=…)`."""
    return axis in axes_of(lax.axis_index(axis))


def psum(tree: Any, axes: Iterable[Hashable]) -> Any:
    """The sum over devices of every array of a pytree; over no axes, the pytree itself.

    The value and the forward derivative are right everywhere. Reverse mode raises a ValueError where an axis has no types. There JAX
    transposes a sum over devices into another one. The gradient of a number that all devices share, taken inside, would be counted once
    for each of them. JAX cannot tell that from a gradient taken outside, which would be right, so it is an error too.
    """
    axes = tuple(axes)
    if not axes:
        return tree
    untyped = tuple(axis for axis in axes if axis not in axes_of(tree) and not typed(axis))

    def of_leaf(x):  # one at a time: JAX 0.8 cannot transpose a sum of which a part has no derivative
        return _one_way.bind(lax.psum(x, axes), axes=untyped) if untyped else lax.psum(x, axes)

    return jax.tree.map(of_leaf, tree)


def check_class_split(function: str, axis_name: Any, split: dict[str, Array], same: dict[str, Array | None]) -> None:
    """ValueError unless `axis_name` names mesh axes over which what is `split` along its classes differs, and the `same` does not."""
    for axis in names(axis_name):
        try:
            known = typed(axis)
        except NameError:
            raise ValueError(
                f"{function}: axis_name must name an axis of a surrounding jax.shard_map; got {axis!r}. "
                "Under plain jit leave it out, for sharded arrays too."
            ) from None
        for name, x in split.items():
            if known and axis not in axes_of(x):
                raise ValueError(
                    f"{function}: {name} must be split along the class axis over mesh axis {axis!r}, as axis_name says; got the same "
                    f"{name} of shape {x.shape} on all its devices. Name {axis!r} for the class axis in in_specs of jax.shard_map."
                )
        for name, x in same.items():
            check_shared(function, name, x, frozenset({axis}) if known else frozenset())


def check_class_axis(function: str, name: str, logits: Array, axis: int, labels: Array | None) -> None:
    """ValueError if an explicit mesh splits class indices over an axis that splits the classes."""
    if labels is None or not (is_explicit(logits) and is_explicit(labels)):
        return
    of_classes = names(jax.typeof(logits).sharding.spec[axis])
    for entry in jax.typeof(labels).sharding.spec:
        for split in set(names(entry)) & set(of_classes):
            raise ValueError(
                f"{function}: labels must not be split over mesh axis {split!r}, which splits the classes of {name}; got "
                f"{jax.typeof(labels)} for {jax.typeof(logits)}. Use jax.sharding.reshard to split them as the examples are."
            )


def check_shared(function: str, name: str, x: Array | None, axes: frozenset) -> None:
    """ValueError if `x` may differ between devices that hold classes of the same examples."""
    for axis in axes & axes_of(x):
        raise ValueError(
            f"{function}: {name} must be the same on all devices of mesh axis {axis!r}, which hold classes of the same examples; got "
            f"{name} split over it. Leave {axis!r} out of their in_specs of jax.shard_map (class indices are global)."
        )


def _vary(x, axes):
    if not axes:
        return x
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)  # type: ignore  # before JAX 0.9


def _varying(x):
    aval = x if isinstance(x, core.ShapedArray) else jax.typeof(x)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma  # type: ignore  # before JAX 0.10


# The identity after a sum over axes without types. It has no transpose. It disappears where `jax.vmap` makes its axis one of an array.
_one_way = Primitive("sum_over_untyped_devices")
_one_way.def_impl(lambda x, *, axes: x)
_one_way.def_abstract_eval(lambda x, *, axes: x)
mlir.register_lowering(_one_way, lambda _, x, *, axes: [x])


def _transpose(_, x, *, axes):
    named = ", ".join(map(repr, axes))
    raise ValueError(
        f"xentjax: reverse-mode differentiation of a sum over axis {named} needs jax.shard_map with check_vma=True, its default; got "
        "check_vma=False, jax.pmap or jax.vmap(axis_name=...). There the gradient of a loss that devices share would be summed over "
        "them. Use check_vma=True. Forward mode (jax.jvp) works as it is, and so does jax.grad of the whole jax.vmap."
    )


def _batch(axis_data, arrays, dims, *, axes):
    axes = tuple(axis for axis in axes if axis != axis_data.name)
    return _one_way.bind(*arrays, axes=axes) if axes else arrays[0], dims[0]


ad.deflinear2(_one_way, _transpose)
batching.fancy_primitive_batchers[_one_way] = _batch
