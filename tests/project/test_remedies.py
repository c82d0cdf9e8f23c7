"""The comparison of losses on rare classes and wrong labels: its training sets, its figures, its table and picture."""

import contextlib
import importlib
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

pytestmark = pytest.mark.exhaustive
EXAMPLES = Path(__file__).parents[2] / "examples"
SEEDS, STEPS = 3, 600
DIGITS = load_digits().target


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's cosine schedule mixes int32 and Python floats, and the network adds its bias by rank: neither runs in strict mode.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def remedies():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("remedies")
    for name in ("remedies", "remedies_report"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def report(remedies):
    return remedies.report


@pytest.fixture(scope="module")
def finished(remedies, tmp_path_factory):
    """Scores, what was printed, and the picture of a shortened comparison."""
    picture = tmp_path_factory.mktemp("remedies") / "made" / "picture.png"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        scores = remedies.main(["--seeds", str(SEEDS), "--steps", str(STEPS), "--output", str(picture)])
    return scores, printed.getvalue(), picture


def training_rows(run):
    return np.flatnonzero(run.trained)


def test_rare_classes_fall_off_exponentially_from_100_images_to_1(report):
    expected = [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]  # 100^(1 − k/9), rounded
    runs = [report.draw_run(report.RARE, DIGITS, 10, seed) for seed in range(20)]
    for run in runs:
        drawn = np.bincount(DIGITS[training_rows(run)], minlength=10)
        np.testing.assert_array_equal(np.sort(drawn)[::-1], expected)
        np.testing.assert_array_equal(run.counts, drawn)
        np.testing.assert_array_equal(run.labels, DIGITS)
        np.testing.assert_array_equal(run.noise, np.eye(10))
    assert len({int(run.counts.argmin()) for run in runs}) > 4  # the seed says which class is the rarest


def test_two_labels_in_five_are_replaced_by_another_class_at_random(report):
    runs = [report.draw_run(report.WRONG, DIGITS, 10, seed) for seed in range(20)]
    shift = np.concatenate([(run.labels - DIGITS)[training_rows(run)] % 10 for run in runs])
    assert len(shift) == 20 * 500
    shares = np.bincount(shift, minlength=10) / len(shift)
    assert abs(shares[0] - 0.6) < 0.025  # 5 standard deviations of a share of 10,000 draws
    assert np.abs(shares[1:] - 0.4 / 9).max() < 0.0105  # likewise
    for run in runs:
        np.testing.assert_array_equal(run.counts, np.bincount(run.labels[training_rows(run)], minlength=10))
        np.testing.assert_allclose(run.noise, np.full((10, 10), 0.4 / 9) + (0.6 - 0.4 / 9) * np.eye(10), rtol=1e-6)


@pytest.mark.parametrize("setting", range(2))
def test_held_out_images_are_balanced_and_never_trained_on(report, setting):
    run = report.draw_run(report.SETTINGS[setting], DIGITS, 300, 7)
    np.testing.assert_array_equal(np.bincount(DIGITS[run.held_out]), [50] * 10)
    assert run.batches.shape == (300, 32)
    np.testing.assert_array_equal(np.unique(run.batches), training_rows(run))  # every training image, no other
    assert not np.isin(run.held_out, run.batches).any()
    visits = np.bincount(run.batches.ravel(), minlength=len(DIGITS))[run.trained]
    assert visits.max() - visits.min() <= 1  # whole epochs but for the last


def test_scores_are_those_of_the_answers(report):
    runs = [report.draw_run(report.WRONG, DIGITS, 10, seed) for seed in range(2)]
    ideal, parrot = np.stack([DIGITS] * 2), np.stack([run.labels for run in runs])
    accuracy, learned = report.judge(report.WRONG, np.stack([ideal, parrot]), runs, DIGITS)
    np.testing.assert_array_equal(accuracy[0], 100)
    np.testing.assert_array_equal(learned, [[0, 0], [100, 100]])
    np.testing.assert_allclose(accuracy[1], [100 * np.mean(run.labels[run.held_out] == DIGITS[run.held_out]) for run in runs])
    run = report.draw_run(report.RARE, DIGITS, 10, 0)
    answers = np.where(run.counts[DIGITS] <= 3, DIGITS, -1)[None, None]  # right on the three rarest classes, nowhere else
    accuracy, rarest = report.judge(report.RARE, answers, [run], DIGITS)
    np.testing.assert_allclose([accuracy.item(), rarest.item()], [30, 100])


def test_cosines_are_cosines(remedies):
    random = np.random.default_rng(0)
    first, bias, last, images = (random.normal(size=shape) for shape in ((64, 128), (128,), (128, 10), (5, 64)))
    hidden = np.maximum(images @ first + bias, 0)
    logits = hidden @ last
    cosines = logits / np.linalg.norm(hidden, axis=1)[:, None] / np.linalg.norm(last, axis=0)
    parameters = {"first": jnp.float32(first), "bias": jnp.float32(bias), "last": jnp.float32(last)}
    for flag, expected in ((True, cosines), (False, logits)):
        found = remedies.network(parameters, jnp.float32(images), jnp.array(flag))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())  # sums of 64 and 128 float32 products


def test_every_loss_is_in_the_sorted_table(finished, remedies):
    scores, printed, _ = finished
    title, *lines = printed.splitlines()[: len(remedies.LOSSES) + 1]
    assert title.count("median") == 2
    for side, setting in enumerate(scores):
        cells = [line.split("│")[side].strip() for line in lines]
        names = [cell[:19].strip().removeprefix("▸ ") for cell in cells]
        assert sorted(names) == sorted(remedies.LOSSES)
        medians = [float(cell[19:].split()[0]) for cell in cells]
        assert medians == sorted(medians, reverse=True)
        marked = [name for name, cell in zip(names, cells, strict=True) if cell.startswith("▸")]
        assert marked == ["cross-entropy"]
        np.testing.assert_allclose(medians, [np.median(scores[setting].accuracy[list(remedies.LOSSES).index(n)]) for n in names], atol=0.06)


def test_the_picture_is_written(finished):
    content = finished[2].read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_the_best_remedy_gains_5_points_in_both_settings(finished, report):
    for setting in report.SETTINGS:
        accuracy = finished[0][setting].accuracy
        assert accuracy.shape == (20, SEEDS)
        assert np.median(accuracy[1:] - accuracy[0], axis=1).max() >= 5


def test_cross_entropy_learns_wrong_labels_and_a_bounded_loss_does_not(finished, remedies, report):
    learned = dict(zip(remedies.LOSSES, np.median(finished[0][report.WRONG].detail, axis=1), strict=True))
    assert learned["cross-entropy"] > 30  # a network that knows the digits and nothing else has 0, a guess 10
    assert learned["Taylor"] < learned["cross-entropy"] / 2


def test_corrections_for_noise_that_is_not_there_are_cross_entropy(finished, remedies, report):
    accuracy = dict(zip(remedies.LOSSES, finished[0][report.RARE].accuracy, strict=True))
    for name in ("forward-corrected", "backward-corrected"):
        np.testing.assert_allclose(accuracy[name], accuracy["cross-entropy"], atol=2)  # other rounding over 600 steps: a few images
