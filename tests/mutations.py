"""Faults that the short run must find.

`python -m tests.mutations` copies the repository, makes one fault at a time, and runs the tests of the room with the fault until one fails.
It prints a table with the test that caught each fault, and exits with 1 if a fault survived. Names of faults may follow: only these are
made. The results of the last run are in `docs/mutations.md`.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROPERTIES = "tests/properties"
SHARDED = "tests/sharded"
LINEAR = "tests/linear"
FAMILIES = "tests/families"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A line of the package, what replaces it, and where a test should fail."""

    name: str
    file: str  # below `xentjax`
    old: str  # occurs once
    new: str
    tests: tuple[str, ...]


MUTATIONS: tuple[Mutation, ...] = ()


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails on the faulty copy; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".pytest_cache", "__pycache__", "output", "*.ipynb"))
        path = copy / "xentjax" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.name}: the line must occur once in {mutation.file}; got {text.count(mutation.old)} times.")
        path.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *mutation.tests]
        programs = ROOT / ".pytest_cache" / "d" / "programs"  # those of the code as it is are still right
        environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": str(programs)}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
    return found.group(1) if found else f"exit status {run.returncode}"


def main() -> int:
    """Makes the faults and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="faults to make; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    print("| fault | file | caught by |\n|---|---|---|")
    survived = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutation, test in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += test is None
            print(f"| {mutation.name} | {mutation.file} | {f'`{test}`' if test else '**survived**'} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} faults were caught.")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
