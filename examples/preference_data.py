"""Strings of brackets for `preference.py`, and the check of an answer."""

import numpy as np

SYMBOLS = "⏎()[]{}"  # token 0 ends a string and fills the places after it; opening brackets are odd
END, PROMPT, SHORTEST, LENGTH = 0, 6, 16, 25  # a prompt has 6 tokens; a string has 16 brackets at least, and 25 tokens with its end


def balanced_string(rng: np.random.Generator) -> list[int]:
    """A balanced string of 16 to 24 brackets."""
    left, stack, tokens = 2 * rng.integers(8, 13), [], []
    while left:
        opens = not stack or (len(stack) < left and rng.uniform() < 0.55)
        if opens:
            stack.append(1 + 2 * rng.integers(3))
        tokens.append(stack[-1] if opens else stack.pop() + 1)
        left -= 1
    return tokens


def load_strings(count: int, rng: np.random.Generator, errors: float = 0.0) -> np.ndarray:
    """Strings [count, 25]. A share of `errors` has one wrong bracket after the prompt."""
    strings = np.full((count, LENGTH), END)
    for row in strings:
        tokens = balanced_string(rng)
        if rng.uniform() < errors:
            wrong = rng.integers(PROMPT, len(tokens))
            tokens[wrong] = rng.choice([k for k in range(1, len(SYMBOLS)) if k != tokens[wrong]])
        row[: len(tokens)] = tokens
    return strings


def check(string: np.ndarray) -> tuple[int, bool]:
    """How many tokens come before the first error, and whether the string is balanced. An end with open brackets is an error."""
    stack = []
    for i, token in enumerate(string.tolist()):
        if token == END:
            return (i, False) if stack or i < SHORTEST else (i + 1, True)
        if token % 2:
            stack.append(token)
        elif not stack or stack.pop() + 1 != token:
            return i, False
    return len(string), False  # it does not end


def length(string: np.ndarray) -> int:
    """The number of tokens with the end."""
    return min(int(np.argmax(np.append(string, END) == END)) + 1, len(string))


def rewards(strings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each answer, half for being balanced and half for the share of its tokens before the first error; and whether it is balanced."""
    right, balanced = np.array([check(string) for string in strings]).T
    lengths = np.array([length(string) for string in strings])
    return (balanced + (right - PROMPT) / (lengths - PROMPT)).astype(np.float32) / 2, balanced.astype(bool)
