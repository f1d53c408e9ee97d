"""Which differences between two texts do not matter when rows are compared."""

import re
import unicodedata

_TRAILING_SPACES = re.compile(r"[ \t]+(?=\n)")


def normalise_text(text: str) -> str:
    """Give a text without what no reader sees: NFC, LF line ends, no trailing white space.

    Nothing else: case, punctuation and inner spaces decide what code and formulas mean.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\n" in text and (" \n" in text or "\t\n" in text):
        text = _TRAILING_SPACES.sub("", text)
    return text.rstrip()
