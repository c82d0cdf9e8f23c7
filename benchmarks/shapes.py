"""Sizes of linear layers before a loss: names from shapes.json, or literals such as 2048x512x32000:bfloat16."""

import argparse
import json
import pathlib
import re
from typing import NamedTuple

import jax

DTYPES = ("float32", "bfloat16", "float16")


class Shape(NamedTuple):
    """Examples and sizes of the layer; `features` is None where only logits [tokens, classes] are given."""

    tokens: int
    features: int | None
    classes: int
    dtype: str = "float32"

    def __str__(self) -> str:
        """The sizes, to read."""
        return " x ".join(str(size) for size in self[:3] if size is not None)


_FILE = json.loads(pathlib.Path(__file__).with_name("shapes.json").read_text())
SHAPES = {name: Shape(**sizes) for name, sizes in _FILE["shapes"].items()}


def defaults() -> list[Shape]:
    """The shapes of the file that suit this machine."""
    return [SHAPES[name] for name in _FILE["defaults"]["gpu" if jax.default_backend() == "gpu" else "cpu"]]


def parse(text: str) -> Shape:
    """The shape that an argument of the command line names."""
    name, _, dtype = text.partition(":")
    if dtype and dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: the dtype must be one of {', '.join(DTYPES)}.")
    if name in SHAPES:
        return SHAPES[name]._replace(dtype=dtype or SHAPES[name].dtype)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither sizes, as in 2048x512x32000:bfloat16, nor a name of benchmarks/shapes.json: {', '.join(SHAPES)}."
        )
    sizes = [int(size) for size in name.split("x")]
    return Shape(sizes[0], sizes[1] if len(sizes) == 3 else None, sizes[-1], dtype or "float32")


def parse_layer(text: str) -> Shape:
    """The same, for a benchmark of a linear layer."""
    shape = parse(text)
    if shape.features is None:
        raise argparse.ArgumentTypeError(f"{text!r}: a linear layer needs three sizes, tokens x features x classes.")
    return shape
