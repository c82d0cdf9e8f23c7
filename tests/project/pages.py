"""Reads Markdown pages and executes the Python code in them."""

import doctest
import pathlib
import re

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
_GENERATED = (ROOT / "docs" / ".gitignore").read_text().split()  # copies that the site makes of pages elsewhere
DOCS = sorted(page for page in (ROOT / "docs").glob("*.md") if f"/{page.name}" not in _GENERATED)
_NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


class _Checker(doctest.OutputChecker):
    """Compares printed numbers to five digits, and everything else exactly: other machines round differently."""

    def check_output(self, want, got, optionflags):
        if _NUMBER.sub("#", want).split() != _NUMBER.sub("#", got).split():
            return False
        return np.allclose(*(np.array(_NUMBER.findall(text), float) for text in (want, got)), rtol=1e-5, atol=0)


def code(page: pathlib.Path, language: str = "python") -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


def names_of(page: pathlib.Path) -> dict:
    """The names that a page defines. All blocks share one namespace; blocks with prompts must print what they show."""
    names: dict = {}
    for block in code(page):
        if block.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0)
            assert doctest.DocTestRunner(_Checker()).run(test, clear_globs=False).failed == 0, page
            names |= test.globs
        else:
            exec(block, names)
    return names


def tables(page: pathlib.Path, *header: str) -> list[list[str]]:
    """The rows of all tables with this header, as cells."""
    pattern = re.escape("| " + " | ".join(header) + " |") + r"\n\|[-|: ]+\|\n((?:\|.*\n)+)"
    lines = [line for body in re.findall(pattern, page.read_text()) for line in body.splitlines()]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def links(page: pathlib.Path) -> list[str]:
    """The relative links of a page."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
