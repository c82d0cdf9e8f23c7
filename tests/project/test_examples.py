"""The example scripts do what their headers say."""

import gzip
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's cosine schedule mixes int32 and Python floats, and flax adds biases by rank: neither runs in strict mode.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def example(monkeypatch):
    """Imports an example script by its path, its helpers beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def idx_bytes(array, type_code=0x08):
    """An IDX file, written from the format's description and not by the loader's code."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, type_code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def some_mnist(train=192, test=40):
    """Arrays under the names of the four files: images of digits' size, labels 0 to 9 in turn, a bright bar where the label says."""
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.random.default_rng(count).integers(0, 50, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6, 4:24] = 255
        arrays |= {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}
    return arrays


def write_mnist(folder, arrays, rename=str, encode=bytes):
    for name, array in arrays.items():
        (folder / rename(name)).write_bytes(encode(idx_bytes(array)))


SPELLINGS = {
    "plain": (str, bytes),
    "gzip": (lambda name: f"{name}.gz", gzip.compress),
    "dotted": (lambda name: name.replace("-idx", ".idx"), bytes),
    "dotted gzip": (lambda name: name.replace("-idx", ".idx") + ".gz", gzip.compress),
    "plain under a name in .gz": (lambda name: f"{name}.gz", bytes),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_idx_files_load_as_written(example, tmp_path, spelling):
    arrays = some_mnist()
    write_mnist(tmp_path, arrays, *SPELLINGS[spelling])
    for loaded, name in zip(example("idx").load_mnist(tmp_path), NAMES, strict=True):
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, arrays[name])


@pytest.mark.parametrize(("type_code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")])
def test_every_idx_type_is_read_in_its_byte_order(example, tmp_path, type_code, dtype):
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype) * 5
    (tmp_path / "file").write_bytes(idx_bytes(array, type_code))
    loaded = example("idx").read_idx(tmp_path / "file")
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
WHOLE = idx_bytes(some_mnist()[IMAGES])  # 192 images of 28 × 28: 16 + 150528 bytes
BROKEN = {
    "cut off in the numbers": (IMAGES, WHOLE[:-1], "expected 150544 bytes.*found 150543 bytes"),
    "cut off in the header": (IMAGES, WHOLE[:9], r"expected \d+ bytes.*found 9 bytes"),
    "bytes too many": (IMAGES, WHOLE + b"\0", "expected 150544 bytes.*found 150545 bytes"),
    "empty": (IMAGES, b"", "expected an IDX file.*found nothing"),
    "not IDX": (IMAGES, b"<html>not found</html>", "expected an IDX file.*found 3c 68 74 6d"),
    "unknown type": (IMAGES, b"\0\0\x0a" + WHOLE[3:], "expected an IDX file.*found 00 00 0a 03"),
    "gzip cut off": (IMAGES, gzip.compress(WHOLE)[:-900], "expected a whole gzip file"),
    "gzip damaged": (IMAGES, gzip.compress(WHOLE)[:500] + b"\xff" * 500, "expected a whole gzip file"),
    "labels under the name of images": (IMAGES, idx_bytes(some_mnist()[LABELS]), "0x00000803.*found uint8 in 1 dimensions"),
    "images under the name of labels": (LABELS, WHOLE, "0x00000801.*found uint8 in 3 dimensions"),
    "numbers wider than bytes": (LABELS, idx_bytes(np.arange(192, dtype="i4"), 0x0C), "unsigned bytes.*found int32"),
    "too few labels": (LABELS, idx_bytes(np.zeros(191, np.uint8)), "expected 192 labels.*found 191"),
    "images of another size": (IMAGES, idx_bytes(np.zeros((192, 8, 8), np.uint8)), r"one size; got \(8, 8\) and \(28, 28\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file_is_named_with_expected_found_and_remedy(example, tmp_path, case):
    name, content, message = BROKEN[case]
    write_mnist(tmp_path, some_mnist())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        example("idx").load_mnist(tmp_path)
    assert (str(tmp_path) if case == "images of another size" else name) in str(caught.value)
    assert str(caught.value).rsplit(". ", 1)[1].startswith(("Download", "Keep"))


def test_a_missing_idx_file_is_named_with_what_the_folder_holds(example, tmp_path):
    write_mnist(tmp_path, some_mnist())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte: expected.*found \['t10k-images.*Name the folder"):
        example("idx").load_mnist(tmp_path)


def test_a_missing_folder_is_named(example, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*found no such folder"):
        example("idx").load_mnist(tmp_path / "nowhere")


def run_digits(example, tmp_path, *options):
    """Held-out accuracy, after checking that the picture is one."""
    picture = tmp_path / "made" / "picture.png"
    accuracy = example("digits_cnn").main(["--quiet", "--output", str(picture), *options])
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    return accuracy


@pytest.mark.exhaustive
def test_digits_are_learned_and_reported(example, tmp_path, capsys):
    assert run_digits(example, tmp_path, "--epochs", "12", "--seed", "1") >= 0.95
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    precision, recall = np.array([row[1:3] for row in rows if len(row) == 5 and row[0].isdigit()], float).T
    assert precision.shape == recall.shape == (10,)
    assert min(*precision, *recall) > 0.7
    assert "gradient norm per example" in printed and "held-out accuracy" in printed


@pytest.mark.exhaustive
def test_digits_are_learned_with_focal_loss_and_smoothing(example, tmp_path):
    assert run_digits(example, tmp_path, "--epochs", "12", "--loss", "focal", "--label-smoothing", "0.05") >= 0.95


@pytest.mark.exhaustive
def test_digits_are_learned_from_idx_files(example, tmp_path):
    write_mnist(tmp_path, some_mnist(train=640), *SPELLINGS["gzip"])
    assert run_digits(example, tmp_path, "--data-dir", str(tmp_path), "--epochs", "3") >= 0.9  # chance is 0.1


@pytest.mark.exhaustive
def test_gradient_norms_are_those_of_single_examples(example):
    digits = example("digits_cnn")
    images, labels = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32), np.array([0, 4, 9], np.int32)
    graph, parameters = digits.nnx.split(digits.Network(8, 8, 10, rngs=digits.nnx.Rngs(0)))

    def loss(parameters, index):
        logits = digits.nnx.merge(graph, parameters)(images[index : index + 1])[0]
        return jax.nn.logsumexp(logits) - logits[labels[index]]

    expected = [np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(jax.grad(loss)(parameters, index)))) for index in range(3)]
    norms = digits.gradient_norms(graph, parameters, digits.xentjax.softmax_cross_entropy, images, labels)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)  # ≈ 84 eps of float32: sums over 20 thousand parameters in two orders


def test_gradients_by_hand_and_by_jax_agree(example):
    differences = example("logistic_regression").main([])
    assert set(differences) == {"logistic_trajectory", "softmax_trajectory", "probability_derivative", "logit_derivative"}
    assert max(differences.values()) < 1e-6
    assert max(differences["probability_derivative"], differences["logit_derivative"]) < 16 * np.finfo(np.float64).eps
    assert not jax.config.jax_enable_x64  # the script leaves the caller's precision alone


def test_gradient_descent_by_hand_lowers_the_loss(example):
    regression = example("logistic_regression")
    inputs, labels = regression.make_data(features=2, classes=2)
    first, last = regression.logistic_by_hand(inputs, labels)[[0, -1]]
    loss = [np.mean(np.logaddexp(0, (1 - 2 * labels) * (inputs @ w[:-1] + w[-1]))) for w in (first, last)]
    assert loss[1] < loss[0] / 2 and loss[0] < np.log(2)


@pytest.mark.exhaustive
def test_scenes(example, tmp_path, capsys):
    """Losses of regions raise the overlap, and detectors with half of the training find most boxes."""
    picture = tmp_path / "scenes.png"
    figures = example("scenes").main(["--quiet", "--steps", "400", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert min(figures["+ Dice"], figures["+ Lovász"]) > figures["cross-entropy"] + 0.05
    assert min(figures[name] for name in ("focal", "quality focal", "varifocal")) > 0.7
    assert "average precision" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_speech(example, tmp_path, capsys):
    """Both losses find the letters of utterances that they have not seen."""
    picture = tmp_path / "speech.png"
    figures = example("speech").main(["--quiet", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(figures) == {"CTC", "transducer"}
    for before, after in figures.values():
        assert before > 0.9 and after < 0.05
    assert "label error rate" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_tagging(example, tmp_path, capsys):
    """A random field finds more names than tags per word, also if these are decoded with the rules of the tags."""
    picture = tmp_path / "tagging.png"
    figures = example("tagging").main(["--quiet", "--seed", "1", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone, rules, field = figures["per word"], figures["per word, then rules"], figures["random field"]
    for name, gain in {"words": 0.01, "names (F1)": 0.03, "whole sentences": 0.03}.items():
        assert field[name] > rules[name] + gain and rules[name] > alone[name] + gain
    assert field["names (F1)"] > alone["names (F1)"] + 0.25
    assert "whole sentences" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_preference(example, tmp_path, capsys):
    """Both trainings raise the share of balanced answers, and order the pairs."""
    picture = tmp_path / "preference.png"
    figures = example("preference").main(["--quiet", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    before, preferred, rewarded = (figures[name] for name in ("pre-trained", "DPO", "GRPO"))
    assert before["divergence"] == before["chosen"] == before["rejected"] == 0
    assert before["balanced"] < 0.45 and preferred["balanced"] > 0.6 and rewarded["balanced"] > 0.8
    assert min(preferred["tokens"], rewarded["tokens"]) > before["tokens"] - 2  # the gain does not come from short answers
    assert all(row["divergence"] > 0 and row["chosen"] > row["rejected"] and row["right"] > 0.7 for row in (preferred, rewarded))
    assert "pairs in order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "right", "balanced"),
    [
        ("()[]{}([{}])()[]⏎", 17, True),
        ("()[]{}([{}])()⏎", 14, False),  # too short
        ("()[]{}([{}])()[[⏎", 16, False),  # not closed
        ("()[]{}([{}))()[]⏎", 10, False),  # closed by another kind
        ("()[]{}([{}]][]()⏎", 11, False),  # the same, with a later kind
        ("()[]{})", 6, False),  # never opened
        ("()[]{}" + "(" * 19, 25, False),  # does not end
    ],
)
def test_brackets_are_checked(example, text, right, balanced):
    data = example("preference_data")
    string = np.array([data.SYMBOLS.index(symbol) for symbol in text.ljust(25, "⏎")])
    assert data.check(string) == (right, balanced)
    answer = len(text) - 6  # tokens with the end, which count
    rewards, shares = data.rewards(string[None])
    np.testing.assert_allclose(rewards, [(balanced + (right - 6) / answer) / 2], rtol=1e-6)  # float32
    assert shares.tolist() == [balanced]


def test_strings_of_brackets_are_balanced_but_for_the_errors(example):
    data = example("preference_data")
    strings = data.load_strings(200, np.random.default_rng(0))
    np.testing.assert_array_equal(strings, data.load_strings(200, np.random.default_rng(0)))
    assert data.rewards(strings)[1].all()
    wrong = data.load_strings(200, np.random.default_rng(0), errors=1.0)
    assert not data.rewards(wrong)[1].any() and min(data.check(string)[0] for string in wrong) >= data.PROMPT


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("saturday", "sunday", 3), ("ab", "ba", 2), ("aab", "ab", 1)],
)
def test_label_errors_are_counted(example, first, second, expected):
    first, second = (np.array([ord(letter) for letter in word], int) for word in (first, second))
    assert example("speech_report").distance(first, second) == expected


def test_label_error_rate_is_relative_to_all_labels(example):
    found, labels = np.array([[1, 2, -1], [3, 3, 3]]), np.array([[1, 2, 3], [3, -1, -1]])
    assert example("speech_report").error_rate(found, labels) == (1 + 2) / 4


def test_names_are_read_from_tags(example):
    data = example("tagging_data")

    def spans(*tags):
        return data.spans(np.array([data.TAGS.index(tag) for tag in tags] + [-1]))

    assert spans("O", "O") == set()
    assert spans("B-firm", "I-firm", "B-firm", "O", "B-place") == {(0, 2, "firm"), (2, 3, "firm"), (4, 5, "place")}
    assert spans("I-person", "I-firm", "I-firm") == {(0, 1, "person"), (1, 3, "firm")}  # against the rules


def test_speech_and_sentences_are_padded_and_repeatable(example):
    speech, tagging = example("speech_data"), example("tagging_data")
    first, again = speech.load_speech(20, 3), speech.load_speech(20, 3)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal((first.labels > 0).sum(axis=-1), first.counts)
    np.testing.assert_array_equal((first.labels == -1).sum(axis=-1), speech.COUNT - first.counts)
    assert (first.frames % 2 == 0).all() and (first.counts <= first.frames // 2).all()
    assert all((sound[frames:] == 0).all() for sound, frames in zip(first.sounds, first.frames, strict=True))
    sentences = tagging.load_sentences(200, 3)
    np.testing.assert_array_equal(sentences.words, tagging.load_sentences(200, 3).words)
    np.testing.assert_array_equal(sentences.words >= 0, sentences.tags >= 0)


def test_the_rules_of_the_tags_hold_in_all_sentences(example):
    tagging = example("tagging")
    tags = tagging.load_sentences(200, 3).tags
    before, after = tags[:, :-1], tags[:, 1:]
    pairs = after >= 0
    assert tagging.BEGINS[tags[:, 0]].all() and tagging.FOLLOWS[before[pairs], after[pairs]].all()
    assert tagging.BEGINS.sum() == 4 and tagging.FOLLOWS.sum() == 7 * 4 + 6  # B or O after all tags, I after the two tags of its kind
