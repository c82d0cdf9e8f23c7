"""Sentences for `tagging.py`: made-up names of persons, firms and places between ordinary words, tagged by BIO."""

from typing import NamedTuple

import numpy as np

KINDS, SHARES = ("person", "firm", "place"), (0.6, 0.25, 0.15)
TAGS = ("O", *(f"{part}-{kind}" for kind in KINDS for part in "BI"))  # outside; the beginning of a name; inside it
CUES = {"person": (["Mr", "Dr"], ["Jr", "Sr"]), "firm": (["Bank"], ["Inc", "Ltd"]), "place": (["Lake", "Mount"], ["Street", "River"])}
NAMES = "Austin Jordan Paris Lincoln Jackson Florence Chester Hudson Carter Savannah Sydney Kent Grant Rose Dale Ford".split()
BOTH = ["May", "Will"]  # parts of names, and also ordinary words
ORDINARY = "the of and said visited near bought sold met today left from with new".split()
WORDS = [*ORDINARY, *BOTH, *NAMES, *(word for cues in CUES.values() for side in cues for word in side)]
LENGTH = 24


class Sentences(NamedTuple):
    """Indices of words and of tags, [n, 24]; −1 after the end."""

    words: np.ndarray
    tags: np.ndarray


def name(before: str, rng: np.random.Generator) -> tuple[list[str], str]:
    """A name of 2 to 6 words and its kind. Only its first or its last word, the cue, tells the kind, and one of 15 cues misleads.

    After a name (`before`), three of four names are of the next kind: a firm after a person, a place after a firm, a person after a place.
    """
    kind = KINDS[(KINDS.index(before) + 1) % 3] if before and rng.uniform() < 0.75 else rng.choice(KINDS, p=SHARES)
    words = list(rng.choice(NAMES + BOTH, rng.integers(1, 6)))
    first, last = CUES[kind if rng.uniform() < 0.9 else rng.choice(KINDS)]
    return ([rng.choice(first), *words] if rng.uniform() < 0.5 else [*words, rng.choice(last)]), str(kind)


def load_sentences(count: int, seed: int) -> Sentences:
    """Sentences of ordinary words and names. Two names may follow each other."""
    rng = np.random.default_rng(seed)
    sentences = Sentences(np.full((count, LENGTH), -1), np.full((count, LENGTH), -1))
    for row in range(count):
        words, tags, least = [], [], rng.integers(8, 15)
        while len(words) < least:
            ordinary = rng.choice(ORDINARY + BOTH, max(0, rng.integers(-3, 5)))
            named, kind = name("" if len(ordinary) or not tags else tags[-1][2:], rng)
            words += [*ordinary, *named]
            tags += ["O"] * len(ordinary) + [f"B-{kind}"] + [f"I-{kind}"] * (len(named) - 1)
        sentences.words[row, : len(words)] = [WORDS.index(word) for word in words]
        sentences.tags[row, : len(tags)] = [TAGS.index(tag) for tag in tags]
    return sentences


def spans(tags: np.ndarray) -> set[tuple[int, int, str]]:
    """First position, end and kind of each name in a sequence of tags [length]. An I that continues nothing begins a name."""
    found, begin, kind = set(), 0, ""
    for i, tag in enumerate([*(TAGS[k] if k >= 0 else "O" for k in tags), "O"]):
        if kind and tag != f"I-{kind}":
            found.add((begin, i, kind))
            kind = ""
        if tag != "O" and not kind:
            begin, kind = i, tag[2:]
    return found
