"""Formats numbers and untrusted text for people to read."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ELLIPSIS = "…"
_NO_BREAK = "\u00a0"
MINUS = "\u2212"
_CONTROL_PICTURES = 0x2400
"""U+2400 to U+241F and U+2421 depict the control characters 0 to 31 and 127."""
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
_MIN_MESSAGE_CHARACTERS = 50
"""Each message counts at least this much, so that many empty messages are cut as well."""
_JOINERS = "\u200c\u200d"
"""Invisible, but Persian, Hindi and many emoji need them."""


def visible(text: str, *, max_characters: int = 2000) -> str:
    """Replace characters that control the display or cannot be seen by visible symbols.

    Control characters, such as escape codes, become control pictures; direction overrides and other
    invisible characters become their code point; line ends become newlines. HTML is escaped by the
    template.

    Args:
        text: untrusted.
        max_characters: longer text is cut and ends in an ellipsis.
    """
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    shown = "".join(map(_show_character, unified[:max_characters]))
    return shown + _ELLIPSIS if len(unified) > max_characters else shown


def one_line(text: str, *, max_characters: int = 200) -> str:
    """Collapse white space and make the text visible, as a single line."""
    return visible(" ".join(text.split()), max_characters=max_characters)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation, escaped for display."""

    role: str
    """With the name of the speaker or tool, if there is one."""
    content: str
    """With reasoning and tool calls, if there are any."""


def show_messages(
    messages: Sequence[Mapping[str, Any]], *, max_characters: int = 2000
) -> list[Message]:
    """Escape a conversation for display; if it is too long, keep its last messages.

    Args:
        messages: as in the columns prompt, chosen and rejected.
        max_characters: in all messages together.
    """
    shown: list[Message] = []
    for message in reversed(messages):
        if max_characters <= 0:
            break
        content = visible(_join_content(message), max_characters=max_characters)
        shown.append(Message(role=_describe_role(message), content=content))
        max_characters -= max(len(content), _MIN_MESSAGE_CHARACTERS)
    if left_out := len(messages) - len(shown):
        shown.append(Message(role="", content=f"{plural(left_out, 'earlier message')} not shown"))
    return shown[::-1]


def _join_content(message: Mapping[str, Any]) -> str:
    parts = [
        f"[reasoning] {message['reasoning']}" if message["reasoning"] else "",
        message["content"] or "",
        f"[tool calls] {message['tool_calls']}" if message["tool_calls"] else "",
    ]
    return "\n".join(part for part in parts if part)


def _describe_role(message: Mapping[str, Any]) -> str:
    role, name = one_line(message["role"]), message["name"]
    return f"{role} ({one_line(name, max_characters=60)})" if name else role


def decode(raw: bytes) -> str:
    """Decode bytes as UTF-8; invalid bytes become U+FFFD."""
    return raw.decode("utf-8", errors="replace")


def _show_character(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    if unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    code = ord(character)
    if code < 32:
        return chr(_CONTROL_PICTURES + code)
    return "\u2421" if code == 127 else f"⟨U+{code:04X}⟩"


def count(value: float) -> str:
    """Format an integer, such as 12,345."""
    return _with_minus(f"{value:,.0f}")


def number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, such as 0.0123, 4.56, 12,300 or 2e-6."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}infinity"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if magnitude < -4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return _with_minus(f"{mantissa}e{int(exponent)}")
    rounded = round(value, digits - 1 - magnitude)
    return _with_minus(f"{rounded:,.{max(0, digits - 1 - magnitude)}f}")


def signed(value: float, digits: int = 3) -> str:
    """Format a number with its sign, such as +1.20."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def plain(value: float) -> str:
    """Format a configured number without padding its digits, such as 0.1 or 5e-6."""
    mantissa, has_exponent, exponent = f"{value:.6g}".partition("e")
    return _with_minus(f"{mantissa}e{int(exponent)}" if has_exponent else mantissa)


def percent(share: float) -> str:
    """Format a share in percent; only 0 becomes 0 % and only 1 becomes 100 %."""
    if 0 < share < 0.005 or 0.995 <= share < 1:
        shown = min(max(share * 100, 0.1), 99.9)
        return f"{shown:.1f}{_NO_BREAK}%"
    return f"{share * 100:.0f}{_NO_BREAK}%"


def interval(low: float, high: float) -> str:
    """Format a range of shares, such as 79 % \N{EN DASH} 95 %."""
    return f"{percent(low)} \u2013 {percent(high)}"


def duration(seconds: float) -> str:
    """Format a duration, such as 0.84 s, 42 s, 3 min 12 s or 1 h 05 min."""
    whole = round(seconds)
    if seconds < 9.95:
        words = [f"{seconds:.2g}", "s"]
    elif whole < 60:
        words = [f"{whole}", "s"]
    elif whole < 3600:
        words = [f"{whole // 60}", "min", f"{whole % 60:02d}", "s"]
    else:
        minutes = round(seconds / 60)
        words = [f"{minutes // 60}", "h", f"{minutes % 60:02d}", "min"]
    return _NO_BREAK.join(words)


def size(num_bytes: float) -> str:
    """Format a number of bytes in decimal units, such as 4.56 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            shown = count(num_bytes) if unit == "bytes" else number(num_bytes)
            return f"{shown}{_NO_BREAK}{unit}"
        num_bytes /= 1000
    return f"{number(num_bytes)}{_NO_BREAK}TB"


def plural(amount: int, noun: str) -> str:
    """Format a count with its noun, such as 1 pair or 2,000 pairs."""
    return f"{count(amount)} {noun}" if amount == 1 else f"{count(amount)} {noun}s"


def join_words(words: list[str]) -> str:
    """Join words as in a, b and c."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _with_minus(text: str) -> str:
    return text.replace("-", MINUS, 1) if text.startswith("-") else text
