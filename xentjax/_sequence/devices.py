"""Batches of sequences that a mesh with explicit axes splits over devices.

On such a mesh, JAX must know the sharding of every new array, of every result of a lookup, and of every carry of a loop. A sequence needs
nothing from the other sequences of its batch. So each device computes its own sequences inside `jax.shard_map`, where arrays are not split.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from xentjax._core import mesh, numerics, rows


def on_each(f: Callable[..., Any], axes: int, batched: Sequence[Any], shared: Sequence[Any] = ()) -> Any:
    """`f(*batched, *shared)`. The first `axes` axes of all arrays in `batched` and of all results are the axes of the batch.

    If an array lies on an explicit mesh, each device calls `f` with its own part of the batch, and of the classes of `rows.Examples` in
    `batched`. If the mesh splits the classes of `Examples`, their `axis_name` becomes the mesh axes of the classes.
    """
    splits = [jax.typeof(x).sharding for x in jax.tree.leaves((batched, shared)) if mesh.is_explicit(x)]
    if not splits:
        return f(*batched, *shared)
    of_batch = [mesh.split_of(x) for x in jax.tree.leaves(batched)]
    front = [next((x.spec[i] for x in of_batch if x is not None and x.spec[i] is not None), None) for i in range(axes)]
    arguments, specs = [], []
    for x in batched:
        last = []
        if isinstance(x, rows.Examples):
            x, classes = _with_split_classes(x)
            last = [*[None] * (x.logits.ndim - axes - 1), classes]
        arguments.append(x)
        specs.append(jax.tree.map(lambda _, last=last: PartitionSpec(*front, *last), x))
    arguments, specs = (*arguments, *shared), (*specs, *jax.tree.map(lambda _: PartitionSpec(), tuple(shared)))
    on, explicit = splits[0].mesh, AxisType.Explicit
    placed = jax.tree.map(lambda x, spec: reshard(x, NamedSharding(on, spec)), arguments, specs)
    manual = {name for name, kind in zip(on.axis_names, on.axis_types, strict=True) if kind == explicit}
    return jax.shard_map(f, mesh=on, in_specs=specs, out_specs=PartitionSpec(*front), axis_names=manual)(*placed)


def _with_split_classes(examples: rows.Examples) -> tuple[rows.Examples, Any]:
    """The examples, and the mesh axes that split the classes, or None.

    These mesh axes become the `axis_name` of the examples. A class mask is broadcast to [..., classes].
    """
    z, mask = examples.logits, examples.class_mask
    split = jax.typeof(z).sharding.spec[-1] if mesh.is_last_axis_split(z) else None
    if mask is not None:
        mask = jnp.broadcast_to(numerics.expand_leading(mask, z.ndim), z.shape)
    return dataclasses.replace(examples, class_mask=mask, axis_name=examples.axis_name if split is None else split), split
