"""Record of a format, and the kinds of column values that identify one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.validate.findings import is_missing
from stages.validate.formats.columns import Columns
from stages.validate.formats.nested import (
    holds_items,
    holds_list,
    holds_message,
    holds_messages,
    open_object,
)
from stages.validate.formats.pair_drafts import Converted

IsKind = Callable[[object], bool]
"""Returns whether a column's value is of one kind."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A layout of rows that can be recognised and converted."""

    name: str
    columns: Mapping[str, IsKind]
    """The columns that identify it, and the kind of value that each must hold."""
    without: tuple[str, ...] = ()
    """Columns that must be absent, null or empty text, because they belong to another format."""
    convert: Callable[[Columns], Converted]
    is_unpaired: bool = False
    """Whether a row holds one answer, so that pairs are made from rows of one prompt."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has the format's shape."""
        for name, is_kind in self.columns.items():
            if name not in row or not is_kind(row[name]):
                return False
        return not any(is_given(row.get(name)) for name in self.without)

    def matches_but_for_gaps(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row would have the format's shape if its empty cells were filled."""
        return any(is_given(row.get(name)) for name in self.columns) and all(
            name in row and (is_kind(row[name]) or not is_given(row[name]))
            for name, is_kind in self.columns.items()
        )

    def list_misfits(self, row: Mapping[str, Any]) -> list[str]:
        """List why a row has not the format's shape, a few words each."""
        return [
            *(f"there is no {name}" for name in self.columns if name not in row),
            *(
                f"{name} is {_describe_kind(row[name])}"
                for name, is_kind in self.columns.items()
                if name in row and not is_kind(row[name])
            ),
            *(f"{name} is there, too" for name in self.without if is_given(row.get(name))),
        ]


def _describe_kind(value: object) -> str:
    kinds = {
        "empty": not is_given(value),
        "messages": holds_messages(value),
        "one message": holds_message(value),
        "text": isinstance(value, str),
        "a list": isinstance(value, list),
        "an object": isinstance(value, dict),
    }
    return next((kind for kind, is_so in kinds.items() if is_so), "a number or a flag")


def is_text(value: object) -> bool:
    """Return whether the value is text, and not the source text of messages."""
    return isinstance(value, str) and not holds_messages(value) and not holds_message(value)


def is_messages(value: object) -> bool:
    return holds_messages(value)


def is_message(value: object) -> bool:
    return holds_message(value)


def is_text_or_messages(value: object) -> bool:
    return isinstance(value, str) or holds_messages(value)


def is_text_or_message(value: object) -> bool:
    return is_text(value) or holds_message(value)


def is_message_or_messages(value: object) -> bool:
    return holds_message(value) or holds_messages(value)


def is_answers(value: object) -> bool:
    """Return whether the value is an answer (text, a message or messages) or a list of answers."""
    return is_text_or_message(value) or isinstance(value, list) or holds_messages(value)


def is_list_of_answers(value: object) -> bool:
    """Return whether the value is a list of answers, each text or messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and not holds_messages(value)
        and all(is_text(answer) or holds_messages(answer) for answer in value)
    )


def is_two_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_text, value))


def is_given(value: object) -> bool:
    return value != "" and not is_missing(value)


def is_cell(value: object) -> bool:
    """Accept every value: the column must be there."""
    return True


def is_object(value: object) -> bool:
    return isinstance(open_object(value), dict)


def is_list(value: object) -> bool:
    return holds_list(value)


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def has_messages(value: object) -> bool:
    opened = open_object(value)
    return isinstance(opened, dict) and is_messages(opened.get("messages"))


def is_list_with(*keys: str) -> IsKind:
    """Return a test for lists of objects that each have these keys."""
    return lambda value: holds_items(value, keys)
