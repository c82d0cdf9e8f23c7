"""The benchmarks run, measure what they say, and name what they could not measure. No time is asserted."""

import argparse
import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import xentjax
from benchmarks import (
    accelerator,
    accuracy,
    ahead,
    compilation,
    families,
    grid,
    linear,
    measure,
    peers,
    problem,
    published,
    sequence,
    shapes,
)
from benchmarks.__main__ import main
from tests.tables import cases

ALWAYS = ["limit", "xentjax", "optax", "checkpoint-scan"]  # those that the test extra can run


@pytest.fixture(autouse=True)
def standard_promotion():
    # Peers are written for JAX's defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def few_losses(monkeypatch):
    # Each takes seconds to compile in all the ways that are measured; one shows what the rest does.
    monkeypatch.setattr(compilation, "DENSE", dict(list(compilation.DENSE.items())[-1:]))


@pytest.fixture
def no_losses(monkeypatch):
    monkeypatch.setattr(compilation, "DENSE", {})


@pytest.fixture
def few_margins(monkeypatch):
    monkeypatch.setattr(accuracy, "MARGINS", (1.0, 20.0))


def run(tmp_path, capsys, *arguments, plot=False):
    """What a benchmark printed, and what it wrote as JSON, after a look at its picture."""
    file, picture = tmp_path / "made" / "rows.json", tmp_path / "drawn" / "picture.png"
    main([*arguments, "--json", str(file), *(["--plot", str(picture)] if plot else [])])
    assert picture.exists() == plot
    if plot:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000  # an empty figure takes 3,000
    return capsys.readouterr().out, json.loads(file.read_text())


@pytest.mark.exhaustive
def test_linear_has_a_row_for_each_contender_and_shape(tmp_path, capsys):
    options = ["--peers", *ALWAYS, "--shapes", "tiny", "130x4x30:bfloat16", "--rounds", "2"]
    printed, written = run(tmp_path, capsys, "linear", *options)
    assert {"benchmark", "versions", "device", "cores", "rounds", "rows", "absent", "sweeps"} <= set(written)
    assert written["versions"]["jax"] == jax.__version__ and written["absent"] == {} and written["sweeps"] == {}
    rows = written["rows"]
    assert [(row["shape"], row["dtype"], row["contender"]) for row in rows] == [
        (*case, name) for case in (("24 x 8 x 41", "float32"), ("130 x 4 x 30", "bfloat16")) for name in ALWAYS
    ]
    for row in rows:
        assert set(row) == {"shape", "dtype", "contender", *linear.KEYS, "note"}
        assert row["note"] is None and row["milliseconds"] > 0 and row["ratio"] > 0 and row["temporary MB"] >= 0
        assert row["peak MB"] is None  # a CPU keeps no count
        if row["contender"] == "limit":
            assert row["ratio"] == row["ratio of medians"] == 1 and row["error of value"] is None
        else:  # gradients of half precision are rounded to 8 bits; those of float32 carry a few eps
            limit = 2**-7 if row["dtype"] == "bfloat16" else 32 * np.finfo(np.float32).eps
            assert row["error of value"] <= limit and row["error of gradients"] <= limit
    assert printed.count("| 24 x 8 x 41 |") == len(ALWAYS)


def test_linear_plots_its_sweeps(tmp_path, capsys):
    options = ["--peers", "limit", "xentjax", "--shapes", "tiny", "--sweep", "2x4x3", "--rounds", "1"]
    _, written = run(tmp_path, capsys, "linear", *options, plot=True)
    assert [row["classes"] for row in written["sweeps"]["classes"]] == [1, 1, 3, 3]
    assert [row["tokens"] for row in written["sweeps"]["tokens"]] == [1, 1, 2, 2]


@pytest.mark.exhaustive
def test_dense_has_a_row_for_each_shape(tmp_path, capsys):
    printed, written = run(tmp_path, capsys, "dense", "--shapes", "tiny", "8x4:bfloat16", "--rounds", "1", plot=True)
    assert [row["shape"] for row in written["compiled"]] == ["24 x 41", "8 x 4"]
    assert {"shape", "dtype", "milliseconds", "time ratio", "compile ratio", "first compile ratio", "temporary MB"} == set(
        written["compiled"][0]
    )
    assert set(written["median"]) == {"float32", "bfloat16"}
    assert [row["call"] for row in written["eager"]] == ["value", "value and gradient"]
    assert "| 24 x 41 |" in printed


@pytest.mark.exhaustive
@pytest.mark.parametrize("option", [["--value"], ["--smoothing", "0.1"]])
def test_dense_measures_the_value_alone_and_label_smoothing(tmp_path, capsys, option):
    _, written = run(tmp_path, capsys, "dense", *option, "--shapes", "400x1000", "--rounds", "1")
    (row,) = written["compiled"]
    ours, theirs = row["temporary MB"]
    assert ours < 0.1 and (theirs < 0.1 or "--smoothing" in option)  # optax stores arrays as large as the logits (1.6 MB) with smoothing


@pytest.mark.exhaustive
def test_the_grid_has_a_ratio_for_each_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid.rows_of, "__defaults__", (((3, 7), (2, 5)),))
    printed, written = run(tmp_path, capsys, "dense", "--grid", "--rounds", "1", plot=True)
    cells = [(row["dtype"], row["rows"], row["classes"]) for row in written["grid"]]
    assert cells == [(dtype, n, k) for dtype in ("float32", "bfloat16") for n in (3, 7) for k in (2, 5)]
    assert all(row["time ratio"] > 0 for row in written["grid"]) and "| rows | 2 classes | 5 classes |" in printed
    assert [row["dtype"] for row in written["summary"]] == ["float32", "bfloat16"]


@pytest.mark.exhaustive
def test_sequence_compares_losses_that_are_equal(tmp_path, capsys):
    printed, written = run(tmp_path, capsys, "sequence", "--tiny", "--rounds", "1", plot=True)
    rows = [row for row in written["rows"] if row["peer"] != "torch"]
    assert [row["loss"] for row in rows] == ["ctc", "ctc, one confident", "transducer", "tdt", "crf"]
    for row in written["rows"]:
        assert row["difference of values"] < 1e-4 and min(row["milliseconds"]) > 0 and row["time ratio"] > 0
        assert row["peer"] == "torch" or (min(row["temporary MB"]) > 0 and row["memory ratio"] > 0)
    assert all(row["shape"] in printed for row in rows)
    for case in sequence.cases(tiny=True):
        of = tuple(range(case.differentiated))
        ours, theirs = (jax.grad(f, of)(*case.arguments) for f in (case.ours, next(iter(case.peers.values()))))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
def test_published_formulas_are_those_of_the_losses(tmp_path, capsys, rng):
    """Their values and gradients equal ours up to the rounding of the formulas; labels of the bi-tempered loss differ by a constant."""
    x, y = (jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for _ in range(2))
    for divergence, formula in published.DIVERGENCES.items():
        ours = jax.value_and_grad(lambda *z, d=divergence: xentjax.distillation_loss(*z, divergence=d).sum(), (0, 1))(x, y)
        theirs = jax.value_and_grad(lambda *z, f=formula: f(*z).sum(), (0, 1))(x, y)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    labels = jnp.asarray([0, 4, 2, 2, 1, 3, 0])
    for t in (labels, jax.nn.softmax(y)):
        ours, theirs = (jax.grad(lambda z, f=f, t=t: f(z, t).sum())(x) for f in (xentjax.bi_tempered_cross_entropy, published.bi_tempered))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # five fixed-point iterations
    printed, written = run(tmp_path, capsys, "dense", "--published", "--shapes", "12x5", "--rounds", "1", plot=True)
    assert len(written["losses"]) == 10 and all(row["time ratio"] > 0 for row in written["losses"])
    assert "| 12 x 5 |" in printed and "| largest memory |" in printed


@pytest.mark.exhaustive
def test_dense_with_all_losses_has_a_row_for_each(tmp_path, capsys):
    printed, written = run(tmp_path, capsys, "dense", "--all", "--shapes", "12x5", "--rounds", "1", plot=True)
    assert {row["loss"] for row in written["losses"]} == set(families.contenders(5))
    assert all(len(row["milliseconds"]) == 2 and row["time ratio"] > 0 for row in written["losses"])
    named = {row["loss"].split(",")[0] for row in written["losses"]}
    assert {case.name for case in cases.FAMILIES} <= named, "a family loss without a row"
    assert "| 12 x 5 |" in printed


@pytest.mark.exhaustive
def test_compile_has_a_row_for_each_loss_and_contender(tmp_path, capsys, few_losses):
    printed, written = run(
        tmp_path, capsys, "compile", "--peers", "xentjax", "optax", "limit", "--shapes", "tiny", "--rounds", "1", plot=True
    )
    names = [(row["loss"], row["contender"]) for row in written["rows"]]
    assert names[-3:] == [("linear cross-entropy", name) for name in ("xentjax", "optax", "limit")]
    assert len(names) == len(set(names)) == 2 + 3  # one dense loss by two libraries, and the layer by three
    for row in written["rows"]:
        assert {"shape", "dtype", "warm milliseconds", "warm ratio", "cold milliseconds", "cold ratio", "note"} <= set(row)
        assert row["warm milliseconds"] > 0 and row["cold milliseconds"] > 0 and f"| {row['loss']} |" in printed
        assert row["contender"] != "optax" or row["warm ratio"] == row["cold ratio"] == 1


@pytest.mark.exhaustive
def test_accelerator_runs_every_step_on_a_cpu(tmp_path, capsys):
    steps = list(accelerator.STEPS)
    printed, written = run(tmp_path, capsys, "accelerator", "--rounds", "1", "--steps", *steps)
    assert list(written["steps"]) == steps and written["skipped"] == [] and "tests" not in written
    rows = [row for found in written["steps"].values() for row in found]
    assert not [row for row in rows if row.get("note")]
    contenders = {name: {row["contender"] for row in found} for name, found in written["steps"].items()}
    assert contenders["linear"] == set(accelerator.LINEAR) and contenders["dense"] == {"xentjax", "optax", "copy"}
    assert sum(row["planned"] for row in written["steps"]["chunks"]) == 1
    assert {"forward", "reverse", "js", "tv"} < contenders["distillation"]
    errors = {(row["margin"], row["contender"]): row["error of gradient"] for row in written["steps"]["accuracy"]}
    assert errors[20.0, "xentjax"] < 1e-5 and errors[20.0, "optax"] == 1
    assert all(f"\n{name}, " in printed for name in steps)


@pytest.mark.exhaustive
def test_accelerator_writes_what_it_has_when_the_time_is_over(tmp_path, capsys):
    printed, written = run(tmp_path, capsys, "accelerator", "--minutes", "0", "--steps", "linear", "dense")
    assert written["steps"] == {"linear": [], "dense": []} and written["skipped"] == ["linear", "dense"] and "skipped" in printed


@pytest.mark.exhaustive
def test_accelerator_runs_the_tests_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setattr(accelerator, "TESTS", ("tests/project/test_release.py",))
    found = accelerator.run_tests(60)
    assert found["finished"] and found["passed"] and "1 passed" in found["output"]
    assert not accelerator.run_tests(0)["finished"]


@pytest.mark.exhaustive
def test_one_shape_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(accelerator.STEPS, "linear", lambda rounds: iter([lambda: 1 / 0, lambda: [{"note": None}]]))
    _, written = run(tmp_path, capsys, "accelerator", "--steps", "linear")
    assert [row["note"] for row in written["steps"]["linear"]] == ["ZeroDivisionError: division by zero", None]


def test_accuracy_shows_where_zero_is_returned(tmp_path, capsys):
    printed, written = run(tmp_path, capsys, "accuracy", "--peers", "xentjax", "optax", plot=True)
    rows = {(row["margin"], row["contender"]): row for row in written["rows"]}
    assert set(rows) == {(margin, name) for margin in accuracy.MARGINS for name in ("xentjax", "optax")}
    for margin in accuracy.MARGINS:
        ours, theirs = rows[margin, "xentjax"], rows[margin, "optax"]
        assert max(ours["error of loss"], ours["error of gradient"]) <= (8 + margin) * np.finfo(np.float32).eps
        if margin >= 17:
            assert theirs["loss"] == theirs["gradient"] == 0 and theirs["error of loss"] == theirs["error of gradient"] == 1
    assert printed.count("1 (0) / 1 (0)") == sum(margin >= 17 for margin in accuracy.MARGINS)


@pytest.mark.parametrize("margin", accuracy.MARGINS)
def test_the_truth_of_accuracy_is_that_of_mpmath(margin):
    with mpmath.workdps(60):
        rest = sum(mpmath.exp(z - mpmath.mpf(margin)) for z in accuracy.OTHERS)
        expected = float(mpmath.log1p(rest)), float(-rest / (1 + rest))
    np.testing.assert_allclose(accuracy.truth(margin), expected, rtol=8 * np.finfo(np.float64).eps)  # a few roundings
    assert float(jnp.asarray(margin, jnp.bfloat16)) == margin


def test_the_truth_of_linear_is_that_of_the_formula(monkeypatch):
    monkeypatch.setattr(problem, "_BLOCK", 16)  # several blocks, the last one short
    given = problem.draw(shapes.Shape(5, 3, 11))
    h, k, y = given.hidden.astype(float), given.kernel.astype(float), given.labels
    p = np.exp(h @ k) / np.exp(h @ k).sum(1, keepdims=True)
    slope = (p - np.eye(11)[y]) / 5
    for found, expected in zip(problem.truth(given), (-np.log(p[range(5), y]).mean(), slope @ k.T, h.T @ slope), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)  # sums of at most 11 numbers below 10


def test_errors_see_a_wrong_component_in_any_block(monkeypatch):
    monkeypatch.setattr(problem, "_BLOCK", 16)
    exact = problem.truth(problem.draw(shapes.Shape(5, 3, 11)))
    assert problem.errors(exact, exact) == (0, 0)
    wrong = exact.kernel.copy()
    wrong[-1, -1] += np.abs(exact.kernel).max() / 4
    assert problem.errors(exact._replace(kernel=wrong), exact)[1] == pytest.approx(0.25)
    wrong[0, 0] = np.nan
    assert np.isnan(problem.errors(exact._replace(kernel=wrong), exact)[1])
    with pytest.raises(ValueError, match="has shape"):
        problem.errors(exact._replace(kernel=wrong.T), exact)


@pytest.mark.parametrize("benchmark", ["linear", "compile", "accuracy"])
def test_an_absent_peer_is_named_and_skipped(tmp_path, capsys, monkeypatch, benchmark, no_losses, few_margins):
    monkeypatch.setitem(sys.modules, "jax_cce", None)
    options = [] if benchmark == "accuracy" else ["--shapes", "4x3x5", "--rounds", "1"]
    printed, written = run(tmp_path, capsys, benchmark, "--peers", "xentjax", "jax-cce", *options)
    assert "skipped: jax-cce is absent (" in printed and "jax_cce" in written["absent"]["jax-cce"]
    assert {row["contender"] for row in written["rows"]} >= {"xentjax"} and "jax-cce" not in {row["contender"] for row in written["rows"]}


@pytest.mark.filterwarnings("ignore")  # what importing torch says is not ours
def test_those_for_a_gpu_are_named_on_a_cpu(tmp_path, capsys):
    pytest.importorskip("torch")
    printed, _ = run(tmp_path, capsys, "linear", "--peers", "xentjax", "liger", "--shapes", "tiny", "--rounds", "1")
    assert "skipped: liger is absent (measured on a GPU only)" in printed


@pytest.mark.parametrize("benchmark", ["linear", "compile", "accuracy"])
def test_a_failing_peer_keeps_its_row_with_the_reason(tmp_path, capsys, monkeypatch, benchmark, no_losses, few_margins):
    def fail(*arguments):
        raise RuntimeError("only for shapes\nof another kind")

    monkeypatch.setitem(peers.JAX, "tokamax", lambda: peers.Contender(fail))
    options = [] if benchmark == "accuracy" else ["--shapes", "4x3x5", "--rounds", "1"]
    printed, written = run(tmp_path, capsys, benchmark, "--peers", "xentjax", "tokamax", *options)
    notes = {row["contender"]: row["note"] for row in written["rows"]}
    assert notes == {"xentjax": None, "tokamax": "RuntimeError: only for shapes"}
    assert notes["tokamax"] in printed


def test_a_wrong_gradient_is_seen(tmp_path, capsys, monkeypatch):
    right = peers.JAX["optax"]().function

    def doubled(*arguments):
        value, (hidden, kernel) = right(*arguments)
        return value, (hidden, 2 * kernel)

    monkeypatch.setitem(peers.JAX, "optax", lambda: peers.Contender(doubled))
    _, written = run(tmp_path, capsys, "linear", "--peers", "optax", "--shapes", "tiny", "--rounds", "1")
    assert written["rows"][0]["error of gradients"] == pytest.approx(1)
    assert written["rows"][0]["ratio"] is None  # no limit to compare with


@pytest.mark.filterwarnings("ignore")  # what importing torch says is not ours
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_gets_the_same_numbers(tmp_path, capsys, dtype):
    pytest.importorskip("torch")
    _, written = run(tmp_path, capsys, "linear", "--peers", "torch", "--shapes", f"tiny:{dtype}", "--rounds", "1")
    (row,) = written["rows"]
    assert row["note"] is None and row["milliseconds"] > 0 and row["temporary MB"] is None
    assert row["error of gradients"] <= (2**-6 if dtype == "bfloat16" else 1e-5)  # its logits are rounded to 8 bits too


ERRORS = {
    "peer": (["linear", "--peers", "nobody"], "invalid choice: 'nobody'"),
    "shape": (["linear", "--shapes", "nothing"], r"'nothing' is neither.*llama-3-8b"),
    "size of zero": (["linear", "--shapes", "0x3x5"], "'0x3x5' is neither"),
    "dtype": (["dense", "--shapes", "4x5:int8"], "must be one of float32, bfloat16, float16"),
    "two sizes for a layer": (["compile", "--shapes", "4x5"], "needs three sizes"),
    "no rounds": (["linear", "--rounds", "0"], "at least 1; got '0'"),
    "benchmark": (["nothing"], "invalid choice: 'nothing'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_not_known_is_a_clear_error(capsys, case):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        main(arguments)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed)


def test_a_missing_matplotlib_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="--plot needs matplotlib"):
        main(["linear", "--plot", str(tmp_path / "picture.png")])


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_of_the_file_are_positive_integers(name):
    shape = shapes.parse_layer(name)
    assert all(isinstance(size, int) and size > 0 for size in shape[:3]) and shape.dtype in shapes.DTYPES
    assert shapes.parse(f"{name}:float16") == shape._replace(dtype="float16")


def test_shapes_are_read_as_written():
    assert shapes.defaults() and all(shape in shapes.SHAPES.values() for shape in shapes.defaults())
    assert shapes.parse("7x5x3:bfloat16") == shapes.Shape(7, 5, 3, "bfloat16")
    assert shapes.parse("7x3") == shapes.Shape(7, None, 3) and str(shapes.parse("7x3")) == "7 x 3"
    for text in ("7", "7x", "x7x3", "7x5x3x2", "7 x 3", "-7x3"):
        with pytest.raises(argparse.ArgumentTypeError):
            shapes.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_order_comes_in_turn(count):
    names = [str(k) for k in range(count)]
    orders = [measure.rotation(names, turn) for turn in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    assert all(sum(order[place] == name for order in orders) == 2 for name in names for place in range(count))  # each place equally often
    assert all(later == earlier[::-1] for earlier, later in zip(orders[::2], orders[1::2], strict=True))


def test_ratios_are_taken_within_a_round():
    ticks = iter([2.0, 1.0, 30.0, 60.0, 4.0, 8.0])  # both slow down in the second round, where b goes first
    times = measure.interleaved_times({"a": lambda: next(ticks), "b": lambda: next(ticks)}, range(3))
    assert times == {"a": [2.0, 60.0, 8.0], "b": [1.0, 30.0, 4.0]}
    assert measure.median_ratio(times["a"], times["b"]) == 2


@pytest.mark.parametrize(("peak", "expected"), [(900, 600), (700, None)])
def test_a_peak_below_an_earlier_one_is_not_known(monkeypatch, peak, expected):
    stats = iter([{"bytes_in_use": 300, "peak_bytes_in_use": 700}, {"bytes_in_use": 300, "peak_bytes_in_use": peak}])
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: next(stats))])
    assert measure.peak_bytes(lambda: None) == expected


def test_bytes_that_kernels_move():
    program = """HloModule jit_f
%fused (p: f32[8,4]) -> bf16[8] { ROOT %r = bf16[8]{0} reduce(%p, %c), dimensions={1} }
ENTRY %main (x: f32[8,4], y: s32[8]) -> bf16[8] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = s32[8]{0} parameter(1)
  %a = (f32[8]{0}, f32[8,4]{1,0}) fusion(%x, %y), kind=kInput, calls=%fused
  %b = f32[8]{0} get-tuple-element(%a), index=0
  ROOT %c = bf16[8]{0} fusion(%b), kind=kLoop, calls=%fused
}"""
    of_a = (32 + 128) + 128 + 32  # results and operands
    assert ahead.moved(program) == of_a + 16 + 32


def test_compiling_ahead_says_what_it_needs():
    if importlib.util.find_spec("jax_plugins") is not None:
        pytest.skip("JAX's plugin for CUDA is installed")
    with pytest.raises(SystemExit, match=r"gpu-compiler"):
        main(["ahead"])
