"""Words, shingles and MinHash bands; the ASCII and the Unicode path find the same words."""

import hashlib
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.dedupe.minhash import ALGORITHM, make_band_keys, sign_sets
from stages.dedupe.text import (
    find_shingles,
    find_words,
    hash_grams,
    hash_whole,
    respell,
    take_segments,
)


def hashes_of(text: str) -> list[int]:
    found: list[int] = find_words([text]).hashes.tolist()
    return found


def plain_words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c if c.isalnum() else " " for c in folded).split()


ascii_text = st.text(st.characters(max_codepoint=0x7F), max_size=60)
european = st.text(
    st.characters(max_codepoint=0x24F, exclude_categories=["Cs", "Mn", "Mc", "Me"]), max_size=60
)


@given(ascii_text)
def test_respelling_leaves_the_words_of_ascii(text: str) -> None:
    assert hashes_of(respell(text)[0]) == hashes_of(text.lower()) == hashes_of(text)


@given(european)
def test_words_are_runs_of_letters_and_digits(text: str) -> None:
    words = plain_words(text)
    found = find_words([text])
    if words:
        assert len(found.hashes) == len(words)
        assert found.hashes.tolist() == [hashes_of(word)[0] for word in words]
    else:
        assert len(found.hashes) == 1


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=6))
def test_texts_of_a_batch_do_not_meet(texts: list[str]) -> None:
    together = find_words(texts)
    shingles = find_shingles(together)
    for number, text in enumerate(texts):
        alone = find_words([text])
        first, end = together.bounds[number : number + 2]
        assert together.hashes[first:end].tolist() == alone.hashes.tolist()
        assert together.guards[number] == alone.guards[0]
        first, end = shingles.bounds[number : number + 2]
        assert shingles.hashes[first:end].tolist() == find_shingles(alone).hashes.tolist()
        assert end > first


def test_different_words_have_different_hashes() -> None:
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst0123" for c in "uvwxyzab789"]
    assert len(set(find_words([" ".join(words)]).hashes.tolist())) == len(words)


@pytest.mark.parametrize(
    ("text", "num_words", "num_unspaced"),
    [("你好世界", 4, 4), ("版本 3.14 是 new", 6, 3), ("สวัสดี", 6, 6), ("안녕 하세요", 2, 0)],
)
def test_characters_of_scripts_without_spaces_are_words(
    text: str, num_words: int, num_unspaced: int
) -> None:
    found = find_words([text])
    assert len(found.hashes) == num_words
    assert found.is_unspaced[0] == (2 * num_unspaced >= num_words)


def test_digits_of_other_scripts_are_digits() -> None:
    assert hashes_of("٣٤ apples") == hashes_of("34 apples")


def test_grams_are_the_runs_of_words_within_a_text() -> None:
    words = find_words(["a b c d", "e", "f g h"])
    grams, texts, places = hash_grams(words, 3)
    assert texts.tolist() == [0, 0, 2]
    assert places.tolist() == [0, 1, 5]
    assert len(set(grams.tolist())) == 3
    assert grams[1] == hash_grams(find_words(["b c d"]), 3)[0][0]


def test_whole_texts_are_equal_where_all_words_are() -> None:
    one, same, other, longer = hash_whole(
        find_words(["How are you?", "how ARE you", "you are how", "how are you you"])
    )
    assert one == same
    assert len({one, other, longer}) == 3


def test_bands_agree_as_often_as_theory_predicts() -> None:
    """For 1,000 pairs of sets of J = 0.7 the share of equal values is 0.7, with a deviation of
    sqrt(0.7 * 0.3 / 125,000) = 0.0013 if values were independent; 1 - (1 - 0.7^5)^25 = 0.990 of the
    pairs share a band."""
    generator = np.random.default_rng(0)
    flat, bounds = [], [0]
    for _ in range(1000):
        numbers = generator.integers(0, 1 << 32, 170, dtype=np.uint32)
        for members in (numbers[:140], np.concatenate([numbers[:119], numbers[140:161]])):
            flat.append(members)
            bounds.append(bounds[-1] + len(members))
    one, other = 119, 140 + 140 - 119
    similarity = one / other
    signatures = sign_sets(np.concatenate(flat), np.array(bounds))
    shares = (signatures[0::2] == signatures[1::2]).mean()
    assert shares == pytest.approx(similarity, abs=0.01)
    keys = make_band_keys(signatures, 25)
    meets = (keys[0::2] == keys[1::2]).any(axis=1).mean()
    assert meets == pytest.approx(1 - (1 - similarity**5) ** 25, abs=0.01)


def test_sets_of_other_contexts_never_meet() -> None:
    signatures = sign_sets(np.array([1, 2, 3, 1, 2, 3], np.uint32), np.array([0, 3, 6]))
    keys = make_band_keys(signatures, 25, salts=np.array([0, 9], np.uint64))
    assert not (keys[0] == keys[1]).any()
    assert len(set(keys[0].tolist())) == 25


def test_segments_are_taken_in_any_order() -> None:
    flat = np.array([10, 11, 20, 30, 31, 32])
    taken, bounds = take_segments(flat, np.array([3, 0, 2, 0]), np.array([6, 2, 2, 2]))
    assert taken.tolist() == [30, 31, 32, 10, 11, 10, 11]
    assert bounds.tolist() == [0, 3, 5, 5, 7]


def test_bands_change_only_with_the_name_of_the_algorithm() -> None:
    """A snapshot recorded when the algorithm got its name. A change needs a new name and a higher
    version of the stage."""
    texts = ["The quick brown fox jumps over the lazy dog.", "Schöne Grüße, 你好世界再见"]
    shingles = find_shingles(find_words(texts))
    keys = make_band_keys(sign_sets(shingles.hashes, shingles.bounds), 25)
    digest = hashlib.sha256(keys.astype("<u8").tobytes()).hexdigest()[:16]
    assert (ALGORITHM, digest) == ("minhash-affine32-1", "b1505e322b3f4b13")
