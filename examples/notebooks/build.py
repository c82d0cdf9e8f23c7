"""Make the notebooks from their scripts: convert, run every cell, write with outputs.

`python examples/notebooks/build.py` makes all of them. `python examples/notebooks/build.py [--into FOLDER] NAME ...` makes the named ones.
"""

import argparse
import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path != Path(__file__)}


def build(script: Path, output: Path) -> None:
    notebook = jupytext.read(script)
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="FOLDER", help="where to write; by default beside the scripts")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the same outputs on every machine, and no search for a GPU on stderr
    for name in arguments.names or SCRIPTS:
        build(SCRIPTS[name], arguments.into / f"{name}.ipynb")
