"""The notebooks: their cells run, they hold what their scripts say, and they are stored with outputs.

The figures that a notebook promises are asserted in its own cells.
"""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

pytestmark = pytest.mark.exhaustive
FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
BUILD = FOLDER / "build.py"
each_script = pytest.mark.parametrize("script", [path for path in sorted(FOLDER.glob("*.py")) if path != BUILD], ids=lambda path: path.stem)


def outputs(notebook):
    return [(cell.id, out) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def kinds(notebook):
    return [(cell, out.output_type) for cell, out in outputs(notebook)]


@each_script
def test_every_cell_runs(script, tmp_path):
    # In a process of its own: nbclient's sockets and event loop warn in ways that are not ours to fix, and a failing cell ends it.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # one device, not the eight of conftest.py
    command = [sys.executable, BUILD, "--into", tmp_path, script.stem]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert kinds(jupytext.read(tmp_path / f"{script.stem}.ipynb")) == kinds(jupytext.read(script.with_suffix(".ipynb")))


@each_script
def test_the_notebook_holds_the_script(script):
    wanted, found = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells] for path in (script, script.with_suffix(".ipynb"))
    )
    assert found == wanted, f"run: python examples/notebooks/build.py {script.stem}"


@each_script
def test_the_notebook_is_stored_with_clean_outputs(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    assert "display_data" in dict(map(reversed, kinds(notebook)))  # a plot
    unwanted = [(cell, out) for cell, out in outputs(notebook) if out.output_type == "error" or out.get("name") == "stderr"]
    assert not unwanted
    assert [cell.id for cell in notebook.cells] == [f"cell-{i}" for i in range(len(notebook.cells))]
    assert all(cell.get("execution_count", 1) for cell in notebook.cells)
    text = script.with_suffix(".ipynb").read_text()
    assert len(text) < 600_000
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages", str(Path.cwd())))


@each_script
def test_colab(script):
    """The first cell links to Colab; the first code cell installs the package from its repository, as it is on no index."""
    text = script.read_text()
    assert f"https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/{script.stem}.ipynb" in text
    assert text.index("colab-badge.svg") < text.index("git+https://github.com/xentjax/xentjax") < text.index("import jax")
