"""How many examples a hypothesis test draws. `conftest.py` sets both values before it imports a test."""

import hypothesis

number: int | None = None  # of `--randomize N`
exhaustive = False


def examples(usual: int) -> hypothesis.settings:
    """The settings of a test that draws `usual` examples, the same in every run; the short run draws a fifth.

    Under `--randomize N`, the test draws N random ones.
    """
    if number is not None:
        return hypothesis.settings(max_examples=number)
    return hypothesis.settings(max_examples=usual if exhaustive else max(usual // 5, 5))
