"""Synthetic speech for `speech.py`: spectrograms of words whose sounds have random lengths and loudness, by voices of random pitch."""

from typing import NamedTuple

import numpy as np

BANDS = 40  # of the spectrogram, from 0 to 8 kHz
VOWELS = {"a": (730, 1100), "e": (530, 1840), "i": (270, 2290), "o": (570, 840), "u": (320, 640)}  # resonances in Hz
CONSONANTS = {
    "m": (250, 1000),
    "n": (250, 1700),
    "l": (360, 2700),
    "s": (5500, 7000),
    "f": (3500, 6500),
    "k": (2000, 3000),
    "t": (4200, 5200),
}
LETTERS = "_" + "".join(VOWELS) + "".join(CONSONANTS)  # index 0 is the blank
FRAMES, COUNT = 96, 12  # at most


class Speech(NamedTuple):
    """Spectrograms [n, 96, 40] and labels [n, 12] (−1 after the end), with the numbers of frames [n] and of labels [n]."""

    sounds: np.ndarray
    labels: np.ndarray
    frames: np.ndarray
    counts: np.ndarray


def word(rng: np.random.Generator) -> str:
    """Up to three syllables: a consonant and a vowel, and sometimes m, n or s."""
    parts = (
        rng.choice(list(CONSONANTS)) + rng.choice(list(VOWELS)) + rng.choice(["", "", "m", "n", "s"]) for _ in range(rng.integers(1, 4))
    )
    return "".join(parts)


def spectrum(letter: str, scale: float) -> np.ndarray:
    """Energy [40] of a sound. Its resonances are wider at high frequencies."""
    peaks, narrow = (VOWELS | CONSONANTS)[letter], letter in "aeioumnl"
    bands = np.linspace(0, 1, BANDS)
    centers = mel(np.array(peaks) * scale)
    return np.exp(-(((bands[:, None] - centers) / (0.045 if narrow else 0.09)) ** 2)) @ np.array([1.0, 0.7])


def mel(frequency: np.ndarray) -> np.ndarray:
    """Position on the mel scale, which resolves low frequencies better, from 0 (0 Hz) to 1 (8 kHz)."""
    return np.log1p(frequency / 700) / np.log1p(8000 / 700)


def utterance(words: list[str], rng: np.random.Generator) -> np.ndarray:
    """Spectrogram [frames, 40] of words, with pauses between them. The number of frames is even."""
    scale, frames = rng.uniform(0.88, 1.14), [np.zeros((rng.integers(2, 7), BANDS))]
    for text in words:
        for letter, before in zip(text, " " + text, strict=False):
            gap = rng.integers(2, 4) if letter == before else 1 if letter in "kt" else 0  # silence before a burst
            length = rng.integers(4, 9) if letter in VOWELS else rng.integers(2, 4) if letter in "kt" else rng.integers(3, 6)
            held = rng.uniform(0.6, 1.2) * spectrum(letter, scale)
            frames += [np.zeros((gap, BANDS)), np.tile(held, (length, 1))]
        frames.append(np.zeros((rng.integers(3, 8), BANDS)))
    clean = np.concatenate(frames)
    clean = clean[: len(clean) // 2 * 2]
    return np.stack([np.convolve(band, (0.25, 0.5, 0.25), "same") for band in clean.T], axis=-1)  # sounds flow into each other


def load_speech(count: int, seed: int) -> Speech:
    """Utterances of one to three words with noise."""
    rng = np.random.default_rng(seed)
    speech = Speech(np.zeros((count, FRAMES, BANDS), np.float32), np.full((count, COUNT), -1), np.zeros(count, int), np.zeros(count, int))
    n = 0
    while n < count:
        words = [word(rng) for _ in range(rng.integers(1, 4))]
        text, sound = "".join(words), utterance(words, rng)
        if len(text) <= COUNT and len(sound) <= FRAMES:
            noisy = sound + 0.25 * rng.normal(size=sound.shape)
            speech.sounds[n, : len(sound)], speech.labels[n, : len(text)] = noisy, [LETTERS.index(letter) for letter in text]
            speech.frames[n], speech.counts[n], n = len(sound), len(text), n + 1
    return speech
