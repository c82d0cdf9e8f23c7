"""Which tests the short run takes.

`python -m pytest --exhaustive` runs every test with every combination of its parameters. The short run takes, for each test function:

- every value of every parameter at least once. Rows of the tables count as the function that they are about, so each public function
  meets each property once, and its other rows only in the test functions that ask for all of them. In a test marked `by_module`, rows
  count as the module of their function. So one loss of each module is tested, because the losses of a module share code;
- as few combinations as this needs, chosen so that over all functions each pair of options occurs about equally often;
- nothing if it is marked `exhaustive`: it takes long, starts processes, or tests what another test of the short run already tests.
"""

import collections
import itertools
import zlib
from collections.abc import Hashable, Iterable
from typing import Any

import pytest

# What pytest collected, and which of it belongs to the short run.
EVERYTHING: pytest.StashKey[list[str]] = pytest.StashKey()
SHORT: pytest.StashKey[set[str]] = pytest.StashKey()


def short(items: Iterable[pytest.Item]) -> set[str]:
    """The identifiers of the tests in the short run."""
    functions: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("exhaustive") is None:
            functions[item.nodeid.split("[")[0]].append(item)
    return {item.nodeid for group in functions.values() for item in covering(group)}


def subject(value: Any) -> Hashable | None:
    """The public function that a row of a table is about; None for other parameters."""
    name = getattr(value, "name", None)
    return name.split("-")[0] if isinstance(name, str) else None


def module(value: Any) -> Hashable | None:
    """The module of the public function that a row of a table is about; None for other parameters."""
    return getattr(getattr(value, "function", None), "__module__", None)


def parameters(item: pytest.Item) -> dict[str, Hashable]:
    """The parameters of a test; a row of a table is represented by its function, or by the module of its function."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return {}
    marks = {"every_row": str, "by_module": module}
    key = next((key for mark, key in marks.items() if item.get_closest_marker(mark) is not None), subject)
    return {name: key(value) or repr(value) for name, value in callspec.params.items()}


def covering(items: list[pytest.Item]) -> list[pytest.Item]:
    """Few of the tests of one function that together have every value of every parameter."""
    settings = {item: frozenset(parameters(item).items()) for item in items}
    missing = set().union(*settings.values())
    start = zlib.crc32(items[0].nodeid.split("[")[0].encode()) % len(items)  # another row for each property
    waiting = items[start:] + items[:start]
    chosen, used = [], collections.Counter()
    while missing or not chosen:
        best = max(waiting, key=lambda item: (len(settings[item] & missing), -sum(used[pair] for pair in pairs(settings[item]))))
        chosen.append(best)
        waiting.remove(best)
        missing -= settings[best]
        used.update(pairs(settings[best]))
    return chosen


def pairs(settings: frozenset) -> list[tuple]:
    """The settings of a test, alone and in pairs."""
    return [*((setting,) for setting in settings), *itertools.combinations(sorted(settings), 2)]
