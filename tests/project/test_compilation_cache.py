"""The folder of compiled programs, which conftest.py sets, serves programs of one device only. The reason stands there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

HITS = []
jax.monitoring.register_event_listener(lambda name, **_: HITS.append(name) if name.endswith("/cache_hits") else None)


@pytest.mark.parametrize(("devices", "served"), [(1, True), (2, False)])
def test_programs_read_from_the_folder(devices, served):
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    x = jnp.arange(4.0)
    for _ in range(2):
        jax.clear_caches()
        lowered = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "i"), mesh=mesh, in_specs=P("i"), out_specs=P())).lower(x)
        HITS.clear()
        lowered.compile()
    assert bool(HITS) == served
