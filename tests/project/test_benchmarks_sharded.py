"""What a program sends between devices is read off its text as it stands there, and the formula on paper is that of the programs."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import paper, shapes, sharded
from benchmarks.__main__ import main
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


SHAPE = shapes.Shape(128, 12, 160)  # no two sizes of its arrays are alike


@pytest.mark.parametrize("mesh", [(2, 4), (8, 1)])
@pytest.mark.parametrize("name", ["fuse_linear_sharded", "logits-shard-map"])
def test_a_program_sends_what_the_formula_says(name, mesh):
    data, model = mesh
    (row,) = sharded.rows_of(SHAPE, [mesh], [name])
    chip = paper.Chip(1.0, 1.0, 1.0, 1.0)  # seconds are bytes
    expected = paper.times(paper.Model(12, 160, 1.0), chip, data, model, tokens=128 // data)
    sums = 2 * 4 * 2 * (data - 1) / data  # of losses and of weights, over all tokens
    assert row["loss B/token"] == pytest.approx((expected.numbers + sums / 2) * data / 128, abs=sums / 2 * data / 128 + 0.05)  # one decimal
    assert row["hidden B/token"] == pytest.approx(expected.hidden * data / 128)
    assert row["kernel MB"] == pytest.approx(expected.kernel / 1e6, rel=1e-4)
    assert row["logits B/token"] == row["gathers"] == 0 and row["in loops"] == "none"
    assert row["data x model"] == f"{data} x {model}" and row["temporary MB"] > 0


@pytest.mark.exhaustive
def test_a_loop_of_chunks_sends_the_numbers_per_token_only(monkeypatch):
    monkeypatch.setattr("xentjax._linear.plan._SMALL_BYTES", 0)
    monkeypatch.setattr("xentjax._linear.plan._FEW_EXAMPLES", 1)
    jax.clear_caches()  # programs of the same losses with other plans, from other tests, and after this one
    try:
        monkeypatch.setattr("xentjax._linear.products._BLOCK_BYTES", 2**10)
        rows = sharded.rows_of(SHAPE, [(2, 4)], ["fuse_linear_sharded", "jit-batch", "jit-batch-no-blocks", "jit-length"])
    finally:
        jax.clear_caches()
    ours, blocks, batch, length = rows
    assert blocks["gathers"] > 0 and batch["gathers"] == 0
    assert ours["in loops"] == "6 loss" and ours["gathers"] == 0 and ours["loss B/token"] == pytest.approx(18, abs=0.2)  # and a few sums
    assert batch["kernel MB"] >= ours["kernel MB"] and "4 kernel" in batch["in loops"] and "4 hidden" in batch["in loops"]
    assert length["gathers"] > 0 and length["hidden B/token"] > ours["hidden B/token"]


def test_gradients_of_half_precision_cross_devices_in_float32():
    # As the formula has it. Seen before compilation: XLA on CPUs has no sums of bfloat16.
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    loss = jax.value_and_grad(sharded.sharded(mesh).loss, (0, 1))
    shapes_and_specs = (((128, 12), jnp.bfloat16, P("data")), ((12, 160), jnp.bfloat16, P(None, "model")), ((128,), jnp.int32, P("data")))
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in shapes_and_specs]
    found = re.findall(r'all_reduce"?\(.*?\}\) : \(tensor<(.*?)>\)', jax.jit(loss).lower(*arguments).as_text(), re.DOTALL)
    assert sorted(found) == ["12x40xf32", "64x12xf32", "64xf32", "64xf32", "64xf32", "f32", "f32"]


def test_arrays_are_told_apart_by_their_sizes():
    def carried(dtype, *sizes, split=1):
        (result,) = one(f"%r = {dtype}[{','.join(map(str, sizes))}] all-gather(%p), replica_groups={{}}").results
        return sharded.carried(result, shapes.Shape(128, 12, 160), model=4, split=split)

    assert [carried("f32", *sizes) for sizes in ((), (12,), (160,), (16, 1), (2, 8))] == ["loss"] * 5
    assert [carried("f32", *sizes) for sizes in ((16, 12), (4, 8, 12), (1, 16, 12))] == ["hidden"] * 3
    assert [carried("f32", *sizes) for sizes in ((12, 40), (12, 160), (40, 12), (12, 7))] == ["kernel"] * 4
    assert [carried("bf16", *sizes) for sizes in ((16, 40), (16, 160), (16, 9))] == ["logits"] * 3
    assert carried("s32", 4, 12) == carried("pred", 4, 12) == "loss"
    assert carried("f32", 1, 16, 3, split=4) == "hidden"


def test_the_tables_have_a_row_for_each_mesh(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharded, "SHARDS", (8,))
    file = tmp_path / "rows.json"
    main(
        [
            "sharded",
            "--peers",
            "logits-shard-map",
            "jit-tokens",
            "--shapes",
            "64x3x16",
            "--json",
            str(file),
            "--plot",
            str(tmp_path / "p.png"),
        ]
    )
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [(row["contender"], row["data x model"]) for row in written["rows"]] == [
        ("logits-shard-map", "1 x 8"),
        ("jit-tokens", "1 x 8"),
    ]
    assert [row["contender"] for row in written["classes only"]] == ["logits-shard-map"] and written["benchmark"] == "sharded"
    assert printed.count("| 64 x 3 x 16 |") == 3 and (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["60x3x16", "64x3x17"])
def test_sizes_that_devices_cannot_share_are_an_error(text, capsys):
    with pytest.raises(SystemExit):
        main(["sharded", "--shapes", text])
    assert "must be a multiple of 64" in " ".join(capsys.readouterr().err.split())


def test_too_few_devices_are_an_error(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [None])
    with pytest.raises(SystemExit, match=r"needs 8 CPU devices; got 1\. Set XLA_FLAGS="):
        sharded.devices()


def test_the_table_on_paper_is_that_of_a_calculator(tmp_path, capsys):
    # Llama 3 405B on 64 chips: 8 groups of 8, 32,768 tokens of each group at a time.
    step = 6 * 405e9 * 32_768 / 8 / (0.4 * 989e12)  # 25.16 s
    products = 6 * 16_384 * 128_256 * 32_768 / 8 / (0.4 * 989e12)  # 0.1305 s
    numbers = 12 * 1.75 * 32_768 / 450e9  # 1.5 µs
    hidden = 4 * 16_384 * 1.75 * 32_768 / 450e9  # 8.35 ms
    kernel = 4 * 16_384 * 128_256 / 8 * 1.75 / 50e9  # 36.8 ms
    main(["sharded", "--paper", "--json", str(tmp_path / "paper.json")])
    written = json.loads((tmp_path / "paper.json").read_text())
    (row,) = [row for row in written["rows"] if row["model"] == "Llama 3 405B" and row["chips"] == 64]
    assert row["data x model"] == "8 x 8" and row["calls"] == 2**24 // (8 * 2**15)
    assert [row[k] for k in ("step", "products", "hidden", "kernel")] == [round(s * 1e3, 1) for s in (step, products, hidden, kernel)]
    assert row["numbers"] == round(numbers * 1e3, 4)
    assert row["loss, % of step"] == round(100 * (products + numbers + hidden + kernel) / step, 2) == 0.7
    chunks = -(-8 * 32_768 // (3 * 2**29 // (4 * 128_256)))  # of at most 1.5 GiB of logits of the global arrays
    assert row["in a loop"] == pytest.approx(chunks * kernel * 1e3, abs=1)
    printed = capsys.readouterr().out.strip()
    assert "| Llama 3 405B | 64 | 8 x 8 | 64 | 25160.0 | 130.5 |" in printed
    assert printed in (pathlib.Path(__file__).parents[2] / "benchmarks" / "NOTES.md").read_text()
    assert [row["chips"] for row in written["rows"]] == [8, 64, 512, 4096] * 2 and written["tokens of a call"] == 32_768
