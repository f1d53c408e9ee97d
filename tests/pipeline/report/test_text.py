"""Tests of number formatting and of escaping hostile text."""

import pytest

from pipeline.report.text import (
    Message,
    count,
    duration,
    number,
    percent,
    plain,
    show_messages,
    signed,
    size,
    visible,
)
from tests.stages_rows import message


def simplify(text: str) -> str:
    """Replace typographic minus signs and no-break spaces by ASCII."""
    return text.replace("\u2212", "-").replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.012345, "0.0123"),
        (-12.345, "-12.3"),
        (12345.0, "12,300"),
        (0.9996, "1.00"),  # rounding carries
        (0.000034, "3.4e-5"),
        (-5e-6, "-5e-6"),
        (float("nan"), "not a number"),
        (float("-inf"), "-infinity"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, written: str) -> None:
    assert simplify(number(value)) == written


@pytest.mark.parametrize(
    ("share", "written"),
    [(0, "0 %"), (1, "100 %"), (0.9999, "99.9 %"), (0.00001, "0.1 %"), (0.426, "43 %")],
)
def test_only_all_is_a_hundred_percent_and_only_none_is_zero(share: float, written: str) -> None:
    assert simplify(percent(share)) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0412, "0.041 s"),
        (9.99, "10 s"),
        (59.6, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.7, "1 h 00 min"),
        (3930, "1 h 06 min"),
    ],
)
def test_durations_carry_into_the_next_unit(seconds: float, written: str) -> None:
    assert simplify(duration(seconds)) == written


def test_plain_numbers_keep_their_digits() -> None:
    assert [plain(0.1), plain(5e-6), plain(2.0), plain(2e7)] == ["0.1", "5e-6", "2", "2e7"]


def test_signs_thousands_and_bytes() -> None:
    assert [simplify(signed(v)) for v in (0.5, -0.5, 0)] == ["+0.500", "-0.500", "0"]
    assert count(1234567.0) == "1,234,567"
    assert [simplify(size(n)) for n in (12, 4_560_000_000)] == ["12 bytes", "4.56 GB"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x00\x7f", "␛[31mred␀␡"),
        ("a\u202eb\u2066c\u200fd", "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200F⟩d"),
        ("one\r\ntwo\rthree\n\tfour", "one\ntwo\nthree\n\tfour"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("👩\u200d🚀 नमस्\u200cते <b>&", "👩\u200d🚀 नमस्\u200cते <b>&"),
    ],
)
def test_control_and_invisible_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_long_text_is_cut_with_an_ellipsis() -> None:
    assert visible("x" * 11, max_characters=10) == "x" * 10 + "…"
    assert visible("x" * 10, max_characters=10) == "x" * 10


def test_messages_keep_name_reasoning_and_tool_calls() -> None:
    shown = show_messages(
        [
            message("user", "Look\x1b up", name="ann\u202e"),
            message("assistant", None, reasoning="Hm.", tool_calls="[]"),
            message("tool", None),
        ]
    )
    assert shown == [
        Message(role="user (ann⟨U+202E⟩)", content="Look␛ up"),
        Message(role="assistant", content="[reasoning] Hm.\n[tool calls] []"),
        Message(role="tool", content=""),
    ]


def test_a_long_conversation_keeps_its_last_messages() -> None:
    """The last message takes 100 of the 200 characters; the one before it is cut to the rest."""
    messages = [message("user", letter * 100) for letter in "abcd"]
    messages[2] = message("assistant", "c" * 101)
    shown = show_messages(messages, max_characters=200)
    assert [(m.role, m.content) for m in shown] == [
        ("", "2 earlier messages not shown"),
        ("assistant", "c" * 100 + "…"),
        ("user", "d" * 100),
    ]
    assert len(show_messages([message("user", "")] * 1000, max_characters=2000)) < 50
