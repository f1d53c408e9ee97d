"""Which sequences of neighbouring words does each text hold: the sets that are compared?"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.dedupe.hashing import I64, U32, U64, make_constants, mix, sort_unique
from stages.dedupe.words import Words

_WORDS_PER_SHINGLE = 3
_CHARACTERS_PER_SHINGLE = 5
_FACTORS = make_constants(8, seed=3) | np.uint64(1)


@dataclass(frozen=True, kw_only=True)
class Shingles:
    """The shingles of T texts as 32-bit hashes."""

    hashes: U32
    """Ascending within a text, each once."""
    bounds: I64
    """[T + 1]: text t holds hashes bounds[t] to bounds[t + 1], at least one."""


def find_shingles(words: Words) -> Shingles:
    """Give each text's word 3-grams, or character 5-grams where a script has no spaces.

    A text of fewer words is one shingle. With 32 bits the chance that two of the 400 different
    shingles of a comparison pass for one is 2e-5.
    """
    keys = [
        _hash_runs(words, _WORDS_PER_SHINGLE, ~words.is_unspaced),
        _hash_runs(words, _CHARACTERS_PER_SHINGLE, words.is_unspaced),
    ]
    flat = sort_unique(np.concatenate(keys))
    num_texts = len(words.bounds) - 1
    borders = np.arange(num_texts + 1, dtype=np.uint64) << np.uint64(32)
    return Shingles(hashes=flat.astype(np.uint32), bounds=np.searchsorted(flat, borders))


def hash_grams(words: Words, size: int) -> tuple[U64, I64, I64]:
    """Hash all runs of `size` neighbouring words.

    Returns:
        The hashes, the number of each one's text, and the place of its first word.
    """
    grams, places = _all_runs(words, size)
    return grams, np.searchsorted(words.bounds, places, side="right") - 1, places


def hash_whole(words: Words) -> U64:
    """Hash each text's words, all of them in order."""
    lengths = words.bounds[1:] - words.bounds[:-1]
    position = np.arange(len(words.hashes)) - np.repeat(words.bounds[:-1], lengths)
    with np.errstate(over="ignore"):
        placed = mix(words.hashes + mix(position.astype(np.uint64)))
        sums = np.zeros(len(placed) + 1, np.uint64)
        np.cumsum(placed, out=sums[1:])
        return mix(sums[words.bounds[1:]] - sums[words.bounds[:-1]] + lengths.astype(np.uint64))


def _all_runs(words: Words, size: int) -> tuple[U64, I64]:
    """Hash every run of words that lies within one text, and say where it begins."""
    hashes = words.hashes
    num_runs = len(hashes) - size + 1
    if num_runs <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    with np.errstate(over="ignore"):
        runs = hashes[:num_runs] * _FACTORS[0]
        for step in range(1, size):
            runs += hashes[step : num_runs + step] * _FACTORS[step]
    is_whole = np.ones(num_runs, np.bool_)
    for step in range(1, size):
        crossing = words.bounds[1:] - step
        is_whole[crossing[(crossing >= 0) & (crossing < num_runs)]] = False
    places = np.flatnonzero(is_whole)
    return mix(runs[places]), places


def _hash_runs(words: Words, size: int, is_wanted: npt.NDArray[np.bool_]) -> U64:
    """Give (text << 32) + shingle for the wanted texts, unordered."""
    if not is_wanted.any():
        return np.zeros(0, np.uint64)
    lengths = words.bounds[1:] - words.bounds[:-1]
    runs, places = _all_runs(words, size)
    text_of_word = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    texts = text_of_word[places]
    if not is_wanted.all():
        chosen = is_wanted[texts]
        runs, texts = runs[chosen], texts[chosen]
    short = np.flatnonzero(is_wanted & (lengths < size))
    return np.concatenate(
        [_key(texts, runs), _key(short.astype(np.uint64), _hash_short(words, short, size))]
    )


def _hash_short(words: Words, short: I64, size: int) -> U64:
    """Hash texts of fewer words than a run has, whole."""
    firsts, ends = words.bounds[:-1][short], words.bounds[1:][short]
    with np.errstate(over="ignore"):
        runs = np.zeros(len(short), np.uint64)
        for step in range(size - 1):
            is_there = firsts + step < ends
            runs[is_there] += words.hashes[firsts[is_there] + step] * _FACTORS[step]
    return mix(runs)


def _key(texts: U64, hashes: U64) -> U64:
    return (texts << np.uint64(32)) | (hashes >> np.uint64(32))
