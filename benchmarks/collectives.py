"""What a compiled program sends between devices: read off its text, with loops counted."""

import math
import re
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # tokens and contexts of other kinds hold no data
_GROUPS = re.compile(r"replica_groups=(\{\}|\{\{[\d,]+\}|\[[\d,]+\]|mesh\[.*?\].*? \{.*?\})")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}(?:,|$|\s)")
_DEVICES = re.compile(r"(?:num_partitions|replica_count)=(\d+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FINISH = re.compile(r" [\w\-]+-(?:done|update)\(")


class Result(NamedTuple):
    """One array that an operation returns, on a device."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Collective(NamedTuple):
    """One operation between devices; a device is meant wherever a size is given."""

    kind: str
    results: tuple[Result, ...]
    devices: int  # that take part together
    loops: tuple[int | None, ...] = ()  # trips of each loop around it; None where the compiler does not know

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its results."""
        return tuple(result.shape for result in self.results)

    @property
    def bytes(self) -> int:
        """Of its results."""
        return sum(result.bytes for result in self.results)

    @property
    def times(self) -> int:
        """How often it runs in one run of the program; a loop of unknown length counts once."""
        return math.prod(trips or 1 for trips in self.loops)

    @property
    def in_loop(self) -> bool:
        """Whether a loop may run it more than once."""
        return any(trips != 1 for trips in self.loops)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs."""
        return self.sent_for(self.bytes)

    def sent_for(self, size: int) -> float:
        """The same for so many bytes of its results, in a ring: 2(n−1)/n of an all-reduce, (n−1)/n of the others' larger side."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "collective-permute": 1}.get(self.kind, share)
        return self.times * size * factor


def collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`, of groups larger than one device."""
    lines: dict[str, list[str]] = {}
    entry = name = header = ""
    for line in program.splitlines():
        if line.startswith("HloModule "):
            header = line
        elif start := _COMPUTATION.match(line):
            name = start[2]
            lines[name] = []
            entry = name if start[1] else entry
        elif name:
            lines[name].append(line)
    found: list[Collective] = []
    _visit(entry, (), lines, math.prod(map(int, _DEVICES.findall(header))), found)
    return found


def _visit(name, loops, lines, everyone, found):
    for line in lines.get(name, ()):
        if _FINISH.search(line):
            continue  # of what its start has counted
        if match := _COLLECTIVE.search(line):
            devices = _participants(line, everyone)
            if devices > 1:
                found.append(Collective(match[2], _results(match[1], match[2], bool(match[3])), devices, loops))
            continue  # what it applies is one addition
        trips = _TRIPS.search(line)
        for role, called, branches in _CALLED.findall(line):
            inner = (*loops, int(trips[1]) if trips else None) if role in ("body", "condition") else loops
            for other in [called] if called else re.findall(r"[\w.\-]+", branches):
                _visit(other, inner, lines, everyone, found)


def _results(text, kind, starts):
    """The arrays that `text` declares; what starts an operation returns (operands, results, …), but for an all-reduce."""
    if starts and kind != "all-reduce":
        text = _parts(text)[1]
    found = []
    for dtype, bits, shape in _ARRAY.findall(text):
        sizes = _numbers(shape)
        found.append(Result(dtype, tuple(sizes), -(-math.prod(sizes) * int(bits or 8) // 8)))  # pred has no number in its name
    return tuple(found)


def _parts(text):
    """The members of a tuple `(a, (b, c), d)`."""
    found, depth = [""], 0
    for sign in text[1:-1]:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            found.append("")
        else:
            found[-1] += sign
    return found


def _participants(line, everyone):
    """Devices that take part together; 1 if nothing leaves a device."""
    if pairs := _PAIRS.search(line):
        moves = re.findall(r"(\d+),(\d+)", pairs[1])
        return 2 if any(a != b for a, b in moves) else 1
    groups = _GROUPS.search(line)
    return _group(groups[1]) if groups and groups[1] != "{}" else everyone


def _numbers(text):
    return [int(n) for n in text.split(",") if n]


def _group(groups):
    """Devices in one group of `{{0,1}`, of `[2,4]` (groups, devices), or of `mesh['a'=2,'b'=4] {'b'}`, also `{'b':(1)2}`, half of it."""
    if groups.startswith("mesh"):
        size = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", groups)}
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[groups.rindex("{") :])
        return math.prod(int(part) if part else size[name] for name, part in named)
    numbers = _numbers(groups.strip("{}[]"))
    return numbers[-1] if groups.startswith("[") else len(numbers)
