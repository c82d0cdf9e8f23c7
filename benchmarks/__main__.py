"""`python -m benchmarks NAME [--peers …] [--shapes …] [--json FILE] [--plot FILE]`; `BENCHMARKS` has the names."""

import argparse
from collections.abc import Sequence

from benchmarks import accelerator, accuracy, ahead, compilation, dense, linear, sequence, sharded

BENCHMARKS = {
    "linear": linear,
    "dense": dense,
    "sequence": sequence,
    "compile": compilation,
    "accuracy": accuracy,
    "sharded": sharded,
    "accelerator": accelerator,
    "ahead": ahead,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        description = module.__doc__ or ""
        style = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=description.splitlines()[0], description=description, formatter_class=style)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    main()
