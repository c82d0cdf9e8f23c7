"""What every benchmark prints and writes, and the options that they share."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable

import jax

from benchmarks import peers, shapes

Rows = list[dict]


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    rounds: int,
    names: Iterable[str] = (),
    shape: Callable[[str], shapes.Shape] | None = None,
) -> None:
    """The common options; `--peers` if there are `names` to choose from, `--shapes` if there is a `shape` to parse them."""
    names = tuple(names)
    if names:
        parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (default all)")
    if shape:
        text = "names from benchmarks/shapes.json or sizes such as 2048x512x32000, with :bfloat16 behind if so (default: by the machine)"
        parser.add_argument("--shapes", nargs="+", type=shape, metavar="SHAPE", help=text)
    if rounds:
        parser.add_argument("--rounds", type=positive, default=rounds, help=f"measurements of each (default {rounds})")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw to this PNG file (needs matplotlib)")


def positive(text: str) -> int:
    """A count from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}.")
    return int(text)


def cell(value) -> str:
    """A value of a row, to read."""
    if isinstance(value, list):
        return " / ".join(map(cell, value))
    return "–" if value is None else str(value)


def table(rows: Rows) -> str:
    """Rows with equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(value: float | None, count: int) -> float | None:
    """A number with so many significant digits."""
    return None if value is None else float(f"{value:.{count}g}")


def machine(names: Iterable[str]) -> dict:
    """Where and with what a benchmark ran."""
    found = {"versions": peers.versions(names), "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    if "torch" in sys.modules:
        found["torch threads"] = sys.modules["torch"].get_num_threads()
    return found


def heading(where: dict) -> str:
    """The same as a line."""
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    threads = f", {where['torch threads']} threads of torch" if "torch threads" in where else ""
    return f"{versions}; {where['device']}, {where['cores']} cores{threads}"


def named_absent(absent: dict[str, str]) -> str:
    """A line for each contender that is not installed here."""
    return "".join(f"skipped: {name} is absent ({why})\n" for name, why in absent.items())


def write(path: pathlib.Path | None, result: dict) -> None:
    """The result as JSON, if a file was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
