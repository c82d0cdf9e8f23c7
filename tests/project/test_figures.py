"""The table of examples/README.md: every figure is one that its notebook or script prints, and the exact ones are right.

The cells of the notebooks, and the tests of the scripts, assert the same figures within a tolerance. They run under `--exhaustive`.
"""

import ast
import re

import jupytext
import numpy as np
import pytest

from tests.project import pages
from xentjax import information

EXAMPLES = pages.ROOT / "examples"
ROWS = pages.tables(EXAMPLES / "README.md", "system", "where", "measured")
FIGURE = re.compile(r"(?<![\w.])−?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\d)")


def printed(path):
    """What a notebook printed or says, or what the header of a script says."""
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(path.read_text())) or ""
    cells = jupytext.read(path).cells
    outputs = [out.get("text") or out["data"].get("text/plain", "") for cell in cells for out in cell.get("outputs", [])]
    return "\n".join([*outputs, *(cell.source for cell in cells if cell.cell_type == "markdown")])


@pytest.mark.parametrize(("system", "where", "measured"), ROWS)
def test_every_figure_is_printed(system, where, measured):
    (name,) = re.findall(r"\]\(([^)]+)\)", where)
    text = printed(EXAMPLES / name).replace("−", "-").replace(",", "")
    figures = [figure.replace("−", "-").replace(",", "") for figure in FIGURE.findall(measured)]
    missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text)]
    assert figures and not missing, missing


def test_every_notebook_and_script_is_in_the_table():
    named = {name for _, where, _ in ROWS for name in re.findall(r"\]\(([^)]+)\)", where)} | {"notebooks/quickstart.ipynb"}
    imported = re.findall(r"^(?:from|import) (\w+)", "\n".join(path.read_text() for path in EXAMPLES.glob("*.py")), re.M)
    parts = {f"{name}.py" for name in imported}  # such as the data of an example
    files = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.ipynb")]
    assert named == {str(path.relative_to(EXAMPLES)) for path in files} - parts


def test_the_weather_forecast():
    p, q = np.array([0.5, 0.3, 0.2], np.float32), np.array([0.4, 0.4, 0.2], np.float32)
    entropy = -sum(x * np.log(x) for x in (0.5, 0.3, 0.2))
    cross_entropy = -(0.5 * np.log(0.4) + 0.3 * np.log(0.4) + 0.2 * np.log(0.2))
    assert [round(x, 4) for x in (entropy, cross_entropy, cross_entropy - entropy)] == [1.0297, 1.0549, 0.0253]
    found = information.entropy(p), information.cross_entropy(p, q), information.kl_divergence(p, q)
    # 4 eps for the rounded probabilities and the sums; the divergence is a difference of terms of size 0.1
    np.testing.assert_allclose(found, (entropy, cross_entropy, cross_entropy - entropy), rtol=4 * 1.2e-7, atol=1.2e-7)
