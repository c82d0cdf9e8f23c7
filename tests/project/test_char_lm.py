"""The language model of `examples/char_lm.py`: it learns, fused or not, and measures what it says."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

pytestmark = pytest.mark.exhaustive
SCRIPT = Path(__file__).parents[2] / "examples" / "char_lm.py"
TINY = ("--batch", "4", "--length", "16", "--features", "32", "--layers", "1", "--characters", "20000")


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's schedules mix int32 and Python floats, and flax adds biases by rank: neither runs in strict mode.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("example_char_lm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("unit", ["char", "word"])
def test_training_lowers_the_held_out_perplexity(example, capsys, unit):
    found = example.main([*TINY, "--unit", unit, "--steps", "30", "--classes", "500"])
    assert found["after"] < found["before"] / 2
    assert len(found["losses"]) == 30 and found["losses"][-1] < found["losses"][0]
    printed = capsys.readouterr().out
    assert found["sample"] in printed and f"{found['after']:.2f}" in printed and "temporary" not in printed


def test_fused_and_materialised_training_agree_and_are_compared(example, capsys):
    fused = example.main([*TINY, "--steps", "6"])
    assert "temporary" not in capsys.readouterr().out
    materialised = example.main([*TINY, "--steps", "6", "--no-fuse"])
    printed = capsys.readouterr().out
    # 168 eps of float32: sums in two orders, and AdamW's steps of gradients near its epsilon
    np.testing.assert_allclose(fused["losses"], materialised["losses"], rtol=2e-5)
    assert len(set(fused["losses"])) == 6
    sizes, times = re.findall(r"([\d.]+) MiB temporary", printed), re.findall(r"(\d+) ms a step", printed)
    assert len(sizes) == len(times) == 2 and min(map(float, sizes)) > 0
    assert float(re.findall(r"difference of their losses (\S+)", printed)[0]) < 2e-5


def some_model(example, classes, length):
    return nnx.split(example.Transformer(classes, length, 32, 1, nnx.Rngs(0)))


def test_a_step_in_chunks_equals_the_step_on_all_logits(example):
    # 3·700·4096 logits take 32.8 MiB: just enough to be cut
    graph, parameters = some_model(example, 4096, 700)
    windows = np.random.default_rng(0).integers(0, 4096, (3, 701)).astype(np.int32)
    plan = example.xentjax.plan_linear(
        jax.ShapeDtypeStruct((3, 700, 32), np.float32), parameters["embed"]["embedding"][...], classes_first=True
    )
    assert plan.chunks > 1
    optimizer, values = example.optax.sgd(1.0), []
    for fuse in (True, False):
        copy = jax.tree.map(jax.numpy.copy, parameters)
        learned, _, value = example.make_step(graph, optimizer, fuse)(copy, optimizer.init(copy), windows)
        values.append((value, learned["embed"]["embedding"][...]))
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-6)  # 8 eps: one mean in two orders
    np.testing.assert_allclose(values[0][1], values[1][1], rtol=1e-5, atol=1e-7)


def test_no_token_sees_those_after_it(example):
    model = example.Transformer(11, 5, 32, 1, nnx.Rngs(0))
    first, second = model(np.array([[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]], np.int32))[0]
    np.testing.assert_array_equal(first[:3], second[:3])
    assert (np.abs(first[3:] - second[3:]).max(axis=1) > 0.01).all()


@pytest.mark.parametrize("tokens", [2, 25, 26, 27, 76])  # a batch is 5·5 labels: one label, a full one less one, full, one more, …
def test_perplexity_over_ragged_batches_is_that_of_numpy(example, tokens):
    graph, parameters = some_model(example, 11, 5)
    parameters["embed"]["embedding"] = parameters["embed"]["embedding"].replace(
        np.random.default_rng(1).normal(size=(11, 32)).astype(np.float32)
    )
    text = np.random.default_rng(tokens).integers(0, 11, tokens).astype(np.int32)
    losses = []
    for start in range(0, tokens - 1, 5):
        inputs = np.zeros((1, 5), np.int32)  # causal: what stands after the last token changes nothing before it
        part = text[start : start + 5][: tokens - 1 - start]
        inputs[0, : len(part)] = part
        hidden, kernel = nnx.merge(graph, parameters)(inputs)
        logits = np.asarray(hidden[0], float) @ np.asarray(kernel, float).T
        logits -= logits.max(axis=1, keepdims=True)
        for row, label in zip(logits, text[start + 1 : start + 6], strict=False):
            losses.append(np.log(np.exp(row).sum()) - row[label])
    assert len(losses) == tokens - 1
    # 84 eps of float32: the logits, of size 10, are rounded before the exponential
    np.testing.assert_allclose(example.perplexity(graph, parameters, text, 5, 5), np.exp(np.mean(losses)), rtol=1e-5)


TEXT = "def f(x):\n    return x  # x + 1\n" * 12


@pytest.mark.parametrize("unit", ["char", "word"])
def test_text_comes_back_from_its_tokens(example, unit):
    names = example.vocabulary(TEXT, unit, 24)
    assert len(names) == len(set(names)) and (unit == "char" or (len(names) == 24 and any(len(name) > 1 for name in names)))
    for text in (TEXT, "refund  xx1\n\n:)", ""):  # words never seen are spelled
        tokens = example.encode(text, unit, names)
        assert tokens.dtype == np.int32 and "".join(names[token] for token in tokens) == text
    assert unit == "char" or len(example.encode(TEXT, unit, names)) <= len(TEXT) // 2
    assert [names[token] for token in example.encode("xéx", unit, names)] == ["x", "�", "x"]


def test_the_first_characters_are_counted(example):
    assert "é" not in example.vocabulary(TEXT + "é" * 9, "char", 99) and "é" in example.vocabulary(TEXT + "é" * 10, "char", 99)
