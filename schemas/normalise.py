"""Which differences between two texts do not matter when rows are compared."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

_TRAILING_SPACES = re.compile(r"[ \t]+(?=\n|\Z)")


def normalise_text(text: str) -> str:
    """Give a text without what no reader sees: NFC, LF line ends, no trailing white space.

    Nothing else: case, punctuation and inner spaces decide what code and formulas mean.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _TRAILING_SPACES.sub("", text).rstrip()


def normalise_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Normalise every text of some messages; absent fields are left out."""
    return [
        {
            key: normalise_text(value) if key in ("content", "reasoning") else value
            for key, value in message.items()
            if value is not None
        }
        for message in messages
    ]
