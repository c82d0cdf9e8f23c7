"""The README: its code prints what it shows, its figures were measured, its commands are those of CI."""

import re

import numpy as np
import pytest

from tests.project import pages

README = pages.ROOT / "README.md"
TEXT = README.read_text()


@pytest.mark.usefixtures("standard_promotion")
def test_the_code_runs():
    names = pages.names_of(README)
    assert names["value"] < np.log(3) / 2  # of a uniform prediction, before training


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 110


def test_commands():
    install, tests = pages.code(README, "sh")
    assert install == "pip install git+https://github.com/xentjax/xentjax\n"
    assert tests.splitlines() == ['pip install -e ".[test]" && python -m pytest', "python -m pytest --exhaustive"]
    assert set(tests.splitlines()) <= set((pages.ROOT / ".ci" / "run").read_text().splitlines())


def test_its_figures_are_those_of_the_benchmarks():
    notes = (pages.ROOT / "benchmarks" / "NOTES.md").read_text()
    accuracy = {row[0]: row[1:] for row in re.findall(r"^\| ([\d.]+) \| \S+ / (\S+) \| \S+ / (\S+) \| \S+ / \S+ \|$", notes, re.M)}
    (ours, theirs) = pages.tables(README, "margin", "5", "10", "17", "50")
    for margin, mine, optax in zip((5, 10, 17, 50), ours[1:], theirs[1:], strict=True):
        assert (mine, optax.split()[0]) == accuracy[f"{margin}.0"]
    (ours, theirs) = pages.tables(README, "tokens × classes", "4,096 × 8,192", "2,048 × 32,000", "512 × 128,256")
    measured = {line.split(" | ")[0]: line for line in re.findall(r"^\| (\S.*) \|$", notes, re.M) if "MB" in line}
    for (name, *cells), line in ((ours, measured["xentjax"]), (theirs, measured["optax, all logits"])):
        assert all(", ".join(reversed(cell.split(", "))) in line for cell in cells), name
