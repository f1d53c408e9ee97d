"""Normalisation of texts before they are compared."""

import re
import unicodedata

_TRAILING_SPACES = re.compile(r"[ \t]+(?=\n)")


def normalise_text(text: str) -> str:
    """Remove differences that no reader sees: NFC, LF line ends, no trailing white space.

    Case, punctuation and inner spaces stay, because they carry meaning in code and formulas.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\n" in text and (" \n" in text or "\t\n" in text):
        text = _TRAILING_SPACES.sub("", text)
    return text.rstrip()
