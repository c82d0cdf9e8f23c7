"""What a program sends between devices is read off its text as it stands there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import collectives

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n"


def program(*lines: str, before: str = "") -> str:
    return HEADER + before + "ENTRY %main.1 (p: f32[4]) -> f32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def one(line: str):
    """The only collective of a program of one line."""
    (found,) = collectives(program(line))
    return found


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{}", 8),  # all there are
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'model'=4] {'model'}", 4),
        ("mesh['data'=2,'model'=4] {'data','model'}", 8),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", 2),
        ("mesh['a'=8] {'a':(2)4}", 4),  # a part of an axis
    ],
)
def test_groups_are_counted_in_every_notation(groups, devices):
    found = one(f"%r = f32[3,5]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add")
    assert (found.kind, found.devices, found.shapes, found.bytes) == ("all-reduce", devices, ((3, 5),), 60)
    assert found.sent == pytest.approx(2 * 60 * (devices - 1) / devices)


@pytest.mark.parametrize(
    ("line", "kind", "result", "sent"),
    [
        ("f32[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", [(16,)], 64 * 3 / 4),
        ("f32[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add", "reduce-scatter", [(4,)], 16 * 3),
        (
            "(f32[4]{0}, bf16[2,3]{1,0}, pred[]) all-reduce(%p, %q), replica_groups=[4,2]<=[8], to_apply=%a",
            "all-reduce",
            [(4,), (2, 3), ()],
            29,
        ),
        ("(s32[1,2]{1,0}, /*index=1*/s32[1,2]{1,0}) all-to-all(%p, %q), replica_groups={{0,1},{2,3}}", "all-to-all", [(1, 2), (1, 2)], 8),
        ("f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", [(4,)], 16),
        ("f32[4]{0} all-reduce-start(%p), replica_groups=[1,8]<=[8], to_apply=%add", "all-reduce", [(4,)], 28),
        ("(f32[2]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]", "all-gather", [(16,)], 56),
        (
            "((f32[2]{0}, f32[1]{0}), (f32[4]{0}, f32[2]{0})) all-gather-start(%p, %q), replica_groups=[4,2]<=[8]",
            "all-gather",
            [(4,), (2,)],
            12,
        ),
        (
            "(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
            "collective-permute",
            [(4,)],
            16,
        ),
        ("f8e4m3fn[4]{0:T(128)} collective-broadcast(%p), replica_groups={{0,1}}", "collective-broadcast", [(4,)], 2),
    ],
)
def test_bytes_are_those_of_a_ring(line, kind, result, sent):
    found = one(f"%r.1 = {line}")
    assert (found.kind, list(found.shapes), found.sent) == (kind, result, pytest.approx(sent))


@pytest.mark.parametrize(
    "line",
    [
        "f32[4]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add",
        "f32[4]{0} all-reduce(%p), replica_groups=mesh['a'=8,'b'=1] {'b'}, to_apply=%add",
        "f32[4]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
        "f32[4]{0} all-reduce-done(%r)",
        "f32[4]{0} async-done(%r), calls=%gather",
        'f32[4]{0} fusion(%p), kind=kLoop, calls=%nothing, metadata={op_name="all-gather(x)"}',
    ],
)
def test_what_stays_on_a_device_is_not_counted(line):
    gather = "%gather (p: f32[4]) -> f32[8] {\n  ROOT %g = f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8]\n}\n\n"
    assert collectives(program(f"%r.1 = {line}", before=gather)) == []


def test_loops_multiply_and_their_length_may_be_unknown():
    before = """%inner (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%outer (p: f32[4]) -> f32[4] {
  %g = f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8]
  ROOT %w = f32[4]{0} while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"step":"1"}}
}

%once (p: f32[4]) -> f32[4] {
  ROOT %t = f32[2]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], to_apply=%add
}

"""
    lines = (
        '%w.1 = f32[4]{0} while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}',
        "%w.2 = f32[4]{0} while(%p), condition=%c, body=%inner",
        "%c.1 = f32[4]{0} conditional(%p, %p), branch_computations={%once, %inner}",
        "%s = ((f32[4]{0}), f32[2]{0}) async-start(%p), calls=%once",
        "ROOT %d = f32[2]{0} async-done(%s), calls=%once",
    )
    found = collectives(program(*lines, before=before))
    assert [(c.kind, c.times, c.in_loop) for c in found] == [
        ("all-gather", 5, True),
        ("all-reduce", 15, True),
        ("all-reduce", 1, True),  # of a loop that may end any time
        ("reduce-scatter", 1, False),
        ("all-reduce", 1, False),
        ("reduce-scatter", 1, False),
    ]
    assert found[1].sent == 15 * 16 * 2 * 7 / 8


def test_a_compiled_program_says_what_was_written():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

    def local(x):  # [3, 2]
        def step(_, total):
            return lax.psum(jnp.sin(total), "model")

        return lax.all_gather(lax.fori_loop(0, 7, step, x), "data", tiled=True)

    f = jax.shard_map(local, mesh=mesh, in_specs=P("data", "model"), out_specs=P(None, "model"), check_vma=False)
    given = jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=NamedSharding(mesh, P("data", "model")))
    found = collectives(jax.jit(f).lower(given).compile().as_text())
    assert {(c.kind, np.prod(c.shapes[0]), c.devices, c.times) for c in found} == {("all-reduce", 6, 4, 7), ("all-gather", 12, 2, 1)}
