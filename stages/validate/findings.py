"""Findings: faults of a row as the checks report them."""

import math
from typing import Literal, NamedTuple

Level = Literal["off", "warn", "reject"]
"""What a code does to its row."""

_MAX_CHARS = 500


class Finding(NamedTuple):
    """One fault of a row, or one thing to warn about."""

    code: str
    field: str | None = None
    """Its place, as a dotted path; None means the row as a whole."""
    detail: str = ""
    """What was found at that place."""


class RowFault(Exception):
    """A row that cannot become a pair; raised and caught inside one worker."""

    def __init__(self, code: str, field: str | None = None, detail: str = "") -> None:
        super().__init__(code)
        self.finding = Finding(code, field, detail)


MISSING_WORDS = frozenset({"na", "n/a", "#n/a", "<na>", "nan", "nat", "null", "none"})
"""Words, in lower case, that tables of text have for a missing cell."""


def is_missing(value: object) -> bool:
    """Return whether a cell is null, or NaN, which many writers put there instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def make_printable(text: str) -> str:
    """Cut a text from data to 500 characters and escape control characters."""
    if text.isprintable():
        return text[:_MAX_CHARS]
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_CHARS])
    return escaped[:_MAX_CHARS]
