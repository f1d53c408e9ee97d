"""Words and shingles of texts, as 64-bit hashes that are the same on every machine.

A word is a maximal run of letters and digits of the case-folded text in Unicode's NFKC; everything
else separates words. In scripts written without spaces each character is a word. ASCII text is
processed as bytes, a whole batch at once. Other text is first respelled (`respell`), which leaves
the words of ASCII text as they are, so both paths find the same words.

Texts are compared by their shingles: the set of their word 3-grams, or character 5-grams in scripts
without spaces. *Guards* are hashes of the signs that carry meaning (numbers, operators, negations):
near-duplicates with different guards are never merged.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15


def make_constants(count: int, *, seed: int) -> U64:
    """Return the first numbers of the splitmix64 sequence of a seed."""
    with np.errstate(over="ignore"):
        return mix(np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def mix(values: U64) -> U64:
    """Apply splitmix64's finaliser, a bijection in which each bit depends on all bits."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values ^= values >> np.uint64(27)
        values *= np.uint64(0x94D049BB133111EB)
        values ^= values >> np.uint64(31)
    return values


def sort_unique(values: U64) -> U64:
    """Return the distinct values in ascending order; np.unique hashes, ten times slower."""
    values = np.sort(values)
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def sum_segments(values: U64, bounds: I64) -> U64:
    """Return the sum of values[bounds[k]:bounds[k + 1]], modulo 2^64, for every k, empty or not."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    return sums[bounds[1:]] - sums[bounds[:-1]]


def take_segments(flat: npt.NDArray[Any], starts: I64, ends: I64) -> tuple[npt.NDArray[Any], I64]:
    """Concatenate flat[start:end] of every segment.

    Returns:
        The members, and [segments + 1] bounds of the segments among them.
    """
    lengths = ends - starts
    bounds = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    indices = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
    return flat[indices], bounds


_UNSPACED_RANGES = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
    "\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"([{_UNSPACED_RANGES}])")
_SEPARATOR = re.compile(rf"[^\w\x00-\x7f{_UNSPACED_RANGES}]+")
_OTHER_DIGIT = re.compile(r"[^\D0-9]")
_TYPOGRAPHIC = "\u2019\u2018\u201c\u201d\u2013\u2014\u2022\u00a0\u200b"
"""Common typographic signs of English text; each only separates words, and replacing them lets most
such text take the ASCII path."""
_SYMBOLS = ("Sm", "Sc")
"""Unicode's categories of mathematical and currency signs."""

_NEGATIONS = ("not", "no", "never", "cannot", "without", "t")
"""The word t is what remains of n't."""
_PLAIN_OPERATORS = b"+=<>^%&#$"
_DOUBTFUL_OPERATORS = b"-*/"
"""Operators only between operands; elsewhere hyphens, bullets and emphasis."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of T texts."""

    hashes: U64
    """Hashes of all words, in order; every text has at least one."""
    bounds: I64
    """[T + 1]: text t holds words bounds[t] to bounds[t + 1]."""
    guards: U64
    """[T]: a hash of the multiset of numbers, operators and negations."""
    is_unspaced: npt.NDArray[np.bool_]
    """[T]: whether at least half of the words are single characters of scripts without spaces."""


def respell(text: str) -> tuple[str, int]:
    """Rewrite a text so that splitting it at ASCII separators yields its words.

    Returns:
        The new spelling, and its number of characters of scripts without spaces.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    text, num_unspaced = _UNSPACED.subn(r" \1 ", text)
    return _SEPARATOR.sub(" ", text), num_unspaced


def find_words(texts: Sequence[str]) -> Words:
    """Find the words of every text.

    A text without words counts as a single word: all of it but the white space.
    """
    respelled, num_unspaced, symbols = _respell_all(texts)
    data, text_starts = _join(respelled)
    kinds = _KIND[data]
    is_word = kinds >= _LETTER
    borders = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    starts, ends = borders[0::2], borders[1::2]
    with np.errstate(over="ignore"):
        hashes = _hash_words(data, starts, ends)
        bounds = np.searchsorted(starts, text_starts)
        guards = _guard_words(hashes, bounds, kinds, starts)
        guards += _guard_operators(data, kinds, text_starts)
        for text, guard in symbols.items():
            guards[text] += np.uint64(guard)
    is_unspaced = 2 * num_unspaced >= np.maximum(bounds[1:] - bounds[:-1], 1)
    hashes, bounds = _fill_wordless(texts, hashes, bounds)
    return Words(hashes=hashes, bounds=bounds, guards=guards, is_unspaced=is_unspaced)


def _respell_all(texts: Sequence[str]) -> tuple[list[str], I64, dict[int, int]]:
    """Respell non-ASCII texts; also count unspaced characters and hash symbols of each text."""
    respelled = list(texts)
    num_unspaced = np.zeros(len(texts), np.int64)
    symbols: dict[int, int] = {}
    for number, text in enumerate(texts):
        if text.isascii():
            continue
        for sign in _TYPOGRAPHIC:
            text = text.replace(sign, " ")
        if not text.isascii():
            guard = _guard_symbols(text)
            if guard:
                symbols[number] = guard
            text, num_unspaced[number] = respell(text)
        respelled[number] = text
    return respelled, num_unspaced, symbols


def _join(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint8], I64]:
    """Concatenate texts with a space around each; return the bytes and [T + 1] start positions."""
    encoded = [text.encode() for text in texts]
    data = np.frombuffer(b" " + b"".join(part for text in encoded for part in (text, b" ")), "u1")
    starts = np.ones(len(texts) + 1, np.int64)
    np.cumsum(
        np.fromiter((len(text) + 1 for text in encoded), np.int64, len(texts)), out=starts[1:]
    )
    starts[1:] += 1
    return data, starts


def _hash_words(data: npt.NDArray[np.uint8], starts: I64, ends: I64) -> U64:
    """Hash data[start:end] for every word: a polynomial over a random constant for each byte."""
    powers, inverses = _powers(1 << max(16, int(len(data) - 1).bit_length()))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_VALUE[data] * powers[: len(data)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[U64, U64]:
    with np.errstate(over="ignore"):
        factors = np.full((2, count), _GOLDEN, np.uint64)
        factors[1] = _BASE_INVERSE
        factors[:, 0] = 1
        powers = np.multiply.accumulate(factors, axis=1)
    return powers[0], powers[1]


def _guard_words(hashes: U64, bounds: I64, kinds: npt.NDArray[np.uint8], starts: I64) -> U64:
    """Sum the hashes of words that contain a digit or negate, for each text."""
    matters = np.isin(hashes, _negation_hashes())
    digits = np.flatnonzero(kinds == _DIGIT)
    matters[np.searchsorted(starts, digits, side="right") - 1] = True
    return sum_segments(np.where(matters, mix(hashes), np.uint64(0)), bounds)


@functools.cache
def _negation_hashes() -> U64:
    data, _ = _join([" ".join(_NEGATIONS)])
    is_word = _KIND[data] >= _LETTER
    borders = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    with np.errstate(over="ignore"):
        return _hash_words(data, borders[0::2], borders[1::2])


def _guard_operators(
    data: npt.NDArray[np.uint8], kinds: npt.NDArray[np.uint8], text_starts: I64
) -> U64:
    """Sum the values of ASCII signs that act as operators, for each text."""
    is_sign = (kinds == _OPERATOR) | (kinds == _DOUBTFUL) | (kinds == _EXCLAMATION)
    places = np.flatnonzero(is_sign)
    kind = kinds[places]
    last = len(data) - 1
    is_inequality = (kind == _EXCLAMATION) & (data[np.minimum(places + 1, last)] == ord("="))
    counts = (kind == _OPERATOR) | is_inequality
    doubtful = np.flatnonzero(kind == _DOUBTFUL)
    counts[doubtful] = _is_between_operands(kinds, places[doubtful])
    places = places[counts]
    values = _SIGN_VALUE[data[places]]
    return sum_segments(values, np.searchsorted(places, text_starts))


def _is_between_operands(kinds: npt.NDArray[np.uint8], places: I64) -> npt.NDArray[np.bool_]:
    """Whether a sign lies between numbers, brackets or single letters, or before a number."""
    last = len(kinds) - 1

    def kind_at(index: I64) -> npt.NDArray[np.uint8]:
        return kinds[np.clip(index, 0, last)]

    def is_operand(step: int, bracket: int) -> npt.NDArray[np.bool_]:
        near = places + step
        near = np.where(kind_at(near) == _SPACE, near + step, near)
        kind = kind_at(near)
        is_single = (kind == _LETTER) & (kind_at(near + step) < _LETTER)
        return (kind == _DIGIT) | (kind == bracket) | is_single

    is_signed_number = (kind_at(places + 1) == _DIGIT) & (kind_at(places - 1) < _LETTER)
    return (is_operand(-1, _CLOSING) & is_operand(1, _OPENING)) | is_signed_number


def _guard_symbols(text: str) -> int:
    """Sum the hashes of mathematical and currency signs beyond ASCII."""
    found = [sign for sign in text if sign > "\x7f" and unicodedata.category(sign) in _SYMBOLS]
    if not found:
        return 0
    codes = np.array([ord(sign) for sign in found], np.uint64)
    return int(np.sum(mix(codes + np.uint64(1 << 32)), dtype=np.uint64))


def _fill_wordless(texts: Sequence[str], hashes: U64, bounds: I64) -> tuple[U64, I64]:
    """Add a single word to every text without words: all of it but the white space."""
    wordless = np.flatnonzero(bounds[1:] == bounds[:-1])
    if not len(wordless):
        return hashes, bounds
    content = ["".join(texts[number].split()).encode() for number in wordless]
    digests = [hashlib.sha256(text).digest()[:8] for text in content]
    names = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
    added = np.zeros(len(bounds), np.int64)
    added[wordless + 1] = 1
    return np.insert(hashes, bounds[wordless], names), bounds + np.cumsum(added)


_SEPARATING, _SPACE, _OPERATOR, _DOUBTFUL, _EXCLAMATION, _OPENING, _CLOSING = range(7)
_LETTER, _DIGIT = 8, 9
"""Kinds of bytes; those from _LETTER on are parts of words."""


def _list_kinds() -> npt.NDArray[np.uint8]:
    kinds = np.full(256, _SEPARATING, np.uint8)
    kinds[0x80:] = _LETTER
    for first, end in (("a", "z"), ("A", "Z")):
        kinds[ord(first) : ord(end) + 1] = _LETTER
    kinds[ord("0") : ord("9") + 1] = _DIGIT
    for signs, kind in (
        (b" ", _SPACE),
        (_PLAIN_OPERATORS, _OPERATOR),
        (_DOUBTFUL_OPERATORS, _DOUBTFUL),
        (b"!", _EXCLAMATION),
        (b"([{", _OPENING),
        (b")]}", _CLOSING),
    ):
        kinds[np.frombuffer(signs, np.uint8)] = kind
    return kinds


def _choose_values() -> U64:
    """Return a constant for each byte of a word; capitals share that of their small letter."""
    values = np.where(_KIND >= _LETTER, make_constants(256, seed=1), np.uint64(0))
    values[ord("A") : ord("Z") + 1] = values[ord("a") : ord("z") + 1]
    return values


_KIND = _list_kinds()
_VALUE = _choose_values()
_SIGN_VALUE = make_constants(256, seed=2)
_BASE_INVERSE = pow(_GOLDEN, -1, 1 << 64)
_WORDS_PER_SHINGLE = 3
_CHARACTERS_PER_SHINGLE = 5

_FACTORS = make_constants(8, seed=3) | np.uint64(1)


@dataclass(frozen=True, kw_only=True)
class Shingles:
    """The shingles of T texts as 32-bit hashes."""

    hashes: U32
    """Ascending and distinct within a text."""
    bounds: I64
    """[T + 1]: text t holds hashes bounds[t] to bounds[t + 1], at least one."""


def find_shingles(words: Words) -> Shingles:
    """Return each text's word 3-grams, or character 5-grams in scripts without spaces.

    A text with fewer words than that is one shingle. With 32 bits, the probability that two of the
    400 different shingles in a comparison collide is 2e-5.
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
        The hashes, the index of each one's text, and the position of its first word.
    """
    grams, places = _all_runs(words, size)
    return grams, np.searchsorted(words.bounds, places, side="right") - 1, places


def hash_whole(words: Words) -> U64:
    """Hash the sequence of all words of each text."""
    lengths = words.bounds[1:] - words.bounds[:-1]
    position = np.arange(len(words.hashes)) - np.repeat(words.bounds[:-1], lengths)
    with np.errstate(over="ignore"):
        placed = mix(words.hashes + mix(position.astype(np.uint64)))
        sums = np.zeros(len(placed) + 1, np.uint64)
        np.cumsum(placed, out=sums[1:])
        return mix(sums[words.bounds[1:]] - sums[words.bounds[:-1]] + lengths.astype(np.uint64))


def _all_runs(words: Words, size: int) -> tuple[U64, I64]:
    """Hash every run of words that lies within one text; also return its first word's position."""
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
    """Return (text << 32) + shingle for the wanted texts, unordered."""
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
    """Hash texts with fewer words than a run."""
    firsts, ends = words.bounds[:-1][short], words.bounds[1:][short]
    with np.errstate(over="ignore"):
        runs = np.zeros(len(short), np.uint64)
        for step in range(size - 1):
            is_there = firsts + step < ends
            runs[is_there] += words.hashes[firsts[is_there] + step] * _FACTORS[step]
    return mix(runs)


def _key(texts: U64, hashes: U64) -> U64:
    return (texts << np.uint64(32)) | (hashes >> np.uint64(32))
