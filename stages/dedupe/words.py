"""Which words does each text of a batch hold, and which of its signs carry meaning?

A word is a maximal run of letters and digits of the case-folded text in Unicode's NFKC; all
else separates. In scripts that are written without spaces every character is a word. ASCII text is
read as bytes, all texts of a batch at once; other text is first respelled (`respell`),
which leaves ASCII as it is, so that both ways give the same words.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.dedupe.hashing import I64, U64, make_constants, mix, sum_segments

_UNSPACED_RANGES = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
    "\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"([{_UNSPACED_RANGES}])")
_SEPARATOR = re.compile(rf"[^\w\x00-\x7f{_UNSPACED_RANGES}]+")
_OTHER_DIGIT = re.compile(r"[^\D0-9]")
_TYPOGRAPHIC = "\u2019\u2018\u201c\u201d\u2013\u2014\u2022\u00a0\u200b"
"""Signs that keep many an English text from being ASCII; each only separates words."""
_SYMBOLS = ("Sm", "Sc")
"""Unicode's categories of mathematical and currency signs."""

_NEGATIONS = ("not", "no", "never", "cannot", "without", "t")
"""What is left of n't is the word t."""
_PLAIN_OPERATORS = b"+=<>^%&#$"
_DOUBTFUL_OPERATORS = b"-*/"
"""They are operators between operands only; else they are hyphens, bullets and emphasis."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of T texts."""

    hashes: U64
    """Of all words, in order; every text has at least one."""
    bounds: I64
    """[T + 1]: text t holds words bounds[t] to bounds[t + 1]."""
    guards: U64
    """[T]: a hash of the multiset of numbers, operators and negations."""
    is_unspaced: npt.NDArray[np.bool_]
    """[T]: whether at least half of the words are characters of scripts without spaces."""


def respell(text: str) -> tuple[str, int]:
    """Write a text so that splitting at ASCII's separators gives its words.

    Returns:
        The new spelling, and how many characters of scripts without spaces are in it.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    text, num_unspaced = _UNSPACED.subn(r" \1 ", text)
    return _SEPARATOR.sub(" ", text), num_unspaced


def find_words(texts: Sequence[str]) -> Words:
    """Find the words of every text.

    A text without any is taken as a single word, made of all that is not white space.
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
    hashes, bounds = _name_the_wordless(texts, hashes, bounds)
    return Words(hashes=hashes, bounds=bounds, guards=guards, is_unspaced=is_unspaced)


def _respell_all(texts: Sequence[str]) -> tuple[list[str], I64, dict[int, int]]:
    """Respell what is not ASCII; give its unspaced characters, and guards of its symbols."""
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
    """Put texts behind one another, a space around each; give the bytes and [T + 1] places."""
    encoded = [text.encode() for text in texts]
    data = np.frombuffer(b" " + b"".join(part for text in encoded for part in (text, b" ")), "u1")
    starts = np.ones(len(texts) + 1, np.int64)
    np.cumsum(
        np.fromiter((len(text) + 1 for text in encoded), np.int64, len(texts)), out=starts[1:]
    )
    starts[1:] += 1
    return data, starts


def _hash_words(data: npt.NDArray[np.uint8], starts: I64, ends: I64) -> U64:
    """Hash data[start:end] for every word: a polynomial over the bytes' own random numbers."""
    powers, inverses = _powers(1 << max(16, int(len(data) - 1).bit_length()))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_VALUE[data] * powers[: len(data)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[U64, U64]:
    with np.errstate(over="ignore"):
        factors = np.full((2, count), _BASE, np.uint64)
        factors[1] = _BASE_INVERSE
        factors[:, 0] = 1
        powers = np.multiply.accumulate(factors, axis=1)
    return powers[0], powers[1]


def _guard_words(hashes: U64, bounds: I64, kinds: npt.NDArray[np.uint8], starts: I64) -> U64:
    """Sum up, by text, the words that hold a digit or negate."""
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
    """Sum up, by text, the ASCII signs that work as operators."""
    is_sign = (kinds == _OPERATOR) | (kinds == _DOUBTFUL) | (kinds == _EXCLAMATION)
    places = np.flatnonzero(is_sign)
    kind = kinds[places]
    last = len(data) - 1
    is_inequality = (kind == _EXCLAMATION) & (data[np.minimum(places + 1, last)] == ord("="))
    counts = (kind == _OPERATOR) | is_inequality
    doubtful = np.flatnonzero(kind == _DOUBTFUL)
    counts[doubtful] = _stands_between_operands(kinds, places[doubtful])
    places = places[counts]
    values = _SIGN_VALUE[data[places]]
    return sum_segments(values, np.searchsorted(places, text_starts))


def _stands_between_operands(kinds: npt.NDArray[np.uint8], places: I64) -> npt.NDArray[np.bool_]:
    """Tell a minus from a hyphen: between numbers, brackets or single letters, or as a sign."""
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
    """Sum up the mathematical and currency signs beyond ASCII."""
    found = [sign for sign in text if sign > "\x7f" and unicodedata.category(sign) in _SYMBOLS]
    if not found:
        return 0
    codes = np.array([ord(sign) for sign in found], np.uint64)
    return int(np.sum(mix(codes + np.uint64(1 << 32)), dtype=np.uint64))


def _name_the_wordless(texts: Sequence[str], hashes: U64, bounds: I64) -> tuple[U64, I64]:
    """Give every text without words one: all of it but white space."""
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
"""Kinds of bytes; from _LETTER on they are parts of words."""


def _tell_kinds() -> npt.NDArray[np.uint8]:
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
    """Give each byte of a word its number; capitals have that of their small letter."""
    values = np.where(_KIND >= _LETTER, make_constants(256, seed=1), np.uint64(0))
    values[ord("A") : ord("Z") + 1] = values[ord("a") : ord("z") + 1]
    return values


_KIND = _tell_kinds()
_VALUE = _choose_values()
_SIGN_VALUE = make_constants(256, seed=2)
_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
