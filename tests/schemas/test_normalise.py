"""Normalising removes only differences that no reader sees."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.normalise import normalise_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a \t\n b  ", "a\n b"),
        ("cafe\u0301", "caf\u00e9"),
        ("  X != y\n\n", "  X != y"),
        ("a \r", "a"),
    ],
)
def test_line_ends_trailing_spaces_and_composition_go(text: str, expected: str) -> None:
    assert normalise_text(text) == expected


@given(st.text(st.sampled_from("a \t\r\n\u00e9e\u0301\u00a0."), max_size=12))
def test_the_short_cuts_for_plain_text_change_nothing(text: str) -> None:
    """The oracle applies every step to every text, needed or not."""
    plain = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    assert normalise_text(text) == re.sub(r"[ \t]+(?=\n|\Z)", "", plain).rstrip()
