"""How many examples a hypothesis test draws. `conftest.py` sets the number before it imports a test."""

import hypothesis

number: int | None = None  # of `--randomize N`


def examples(usual: int) -> hypothesis.settings:
    """The settings of a test that draws `usual` examples, the same in every run, or N random ones under `--randomize N`."""
    return hypothesis.settings(max_examples=usual if number is None else number)
