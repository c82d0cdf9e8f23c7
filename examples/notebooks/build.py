"""Make quickstart.ipynb from quickstart.py: convert, run every cell, write with outputs. `python examples/notebooks/build.py [output]`."""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SCRIPT = Path(__file__).with_name("quickstart.py")


def build(output: Path) -> None:
    notebook = jupytext.read(SCRIPT)
    options = {"kernel_name": "python3", "timeout": 300, "record_timing": False, "extra_arguments": ["--log-level=ERROR"]}
    NotebookClient(notebook, coalesce_streams=True, **options).execute()  # raises if a cell does
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
        for out in cell.get("outputs", []):
            if out.output_type == "stream" and out.name == "stderr":
                raise RuntimeError(f"cell-{i} wrote to stderr, which a reader would see in the notebook:\n{out.text}")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    nbformat.write(notebook, output)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the same outputs on every machine, and no search for a GPU on stderr
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else SCRIPT.with_suffix(".ipynb"))
