"""Record of a format, and the kinds of column values that identify one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.validate.formats.columns import Columns
from stages.validate.formats.pair_drafts import Ranking, Sides

IsKind = Callable[[object], bool]
"""Returns whether a column's value is of one kind."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A layout of rows that can be recognised and converted."""

    name: str
    columns: Mapping[str, IsKind]
    """The columns that identify it, and the kind of value that each must hold."""
    without: tuple[str, ...] = ()
    """Columns that must be absent or null, because they belong to another format."""
    convert: Callable[[Columns], Sides | Ranking]

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has the format's shape."""
        for name, is_kind in self.columns.items():
            if not is_kind(row.get(name)):
                return False
        return not any(row.get(name) is not None for name in self.without)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


def is_message(value: object) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def is_turns(value: object) -> bool:
    """Return whether the value is a list of messages with ShareGPT's names."""
    return isinstance(value, list) and all(isinstance(m, dict) and "from" in m for m in value)


def is_text_or_messages(value: object) -> bool:
    return is_text(value) or is_messages(value)


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def has_messages(value: object) -> bool:
    return isinstance(value, dict) and is_messages(value.get("messages"))


def is_list_with(*keys: str) -> IsKind:
    """Return a test for lists of objects that each have these keys."""

    def is_such_a_list(value: object) -> bool:
        return isinstance(value, list) and all(
            isinstance(item, dict) and all(key in item for key in keys) for item in value
        )

    return is_such_a_list
