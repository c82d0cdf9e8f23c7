"""What a compiled program sends between devices: read off its text, with loops counted."""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(?:-start)?\(")
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,]+\}|\[[\d,]+\]|mesh\[.*?\] \{.*?\})")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One operation between devices; a device is meant wherever a size is given."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of its results
    bytes: int  # of its results
    devices: int  # that take part together
    times: int  # how often it runs in one run of the program

    @property
    def in_loop(self) -> bool:
        """Whether it runs more than once."""
        return self.times > 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, by the ring algorithm: 2(n−1)/n of an all-reduce, (n−1)/n of the others' larger side."""
        share = (self.devices - 1) / self.devices
        return (
            self.times
            * self.bytes
            * {"all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "collective-permute": 1}.get(self.kind, share)
        )


def collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`, of groups larger than one device."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            lines[name] = []
            entry = name if start[1] else entry
        elif name:
            lines[name].append(line)
    found: list[Collective] = []
    _visit(entry, 1, lines, found)
    return found


def _visit(name, times, lines, found):
    for line in lines.get(name, ()):
        if match := _COLLECTIVE.search(line):
            results = [(dtype, _numbers(shape)) for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if dtype in BYTES]
            size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in results)
            groups = _GROUPS.search(line)
            devices = _group(groups[1]) if groups else 2  # a permutation has pairs
            if devices > 1:
                found.append(Collective(match[2], tuple(shape for _, shape in results), size, devices, times))
            continue  # what it applies is one addition
        trips = _TRIPS.search(line)
        for role, called, branches in _CALLED.findall(line):
            more = int(trips[1]) if trips and role in ("body", "condition") else 1
            for other in [called] if called else re.findall(r"[\w.\-]+", branches):
                _visit(other, times * more, lines, found)


def _numbers(text):
    return tuple(int(n) for n in text.split(",") if n)


def _group(groups):
    """Devices in one group of `{{0,1}`, of `[2,4]` (groups, devices), or of `mesh['a'=2,'b'=4] {'b'}`."""
    if groups.startswith("mesh"):
        sizes, axes = groups[4:].split(" ")
        size = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
        return math.prod(size[name] for name in re.findall(r"'(\w+)'", axes))
    numbers = _numbers(groups.strip("{}[]"))
    return numbers[-1] if groups.startswith("[") else len(numbers)
