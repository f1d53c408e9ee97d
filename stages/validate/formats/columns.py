"""Columns of a raw row, each taken once."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from stages.validate.findings import MISSING_WORDS, Finding, RowFault, is_missing
from stages.validate.formats.nested import (
    holds_message,
    holds_messages,
    open_list,
    open_messages,
    open_object,
)
from stages.validate.messages import (
    Message,
    find_parts,
    new_assistant,
    new_message,
    read_conversation,
    read_message,
)
from stages.validate.part_names import PartKind, find_kind

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
_FLAGS = {"true": True, "false": False}
SOURCE_COLUMNS = ("source", "dataset")
ID_COLUMNS = ("source_id", "id", "prompt_id", "question_id", "uuid")


class PromptPart(NamedTuple):
    """A column that holds a part of the prompt other than its messages."""

    kind: PartKind
    path: str
    value: Any


class Columns:
    """Columns of a row that are not converted yet; those left at the end become `extra`."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.left = dict(row)
        self.warnings: list[Finding] = []
        self.stated: list[PromptPart] = []
        """Parts for which the format or the column map names a place."""
        self._row = row

    def list_parts(self) -> list[PromptPart]:
        """List the parts of the prompt that are stated, or that have a known name.

        Null and NaN are no part. The keys of an object of which something has been taken count as
        columns.
        """
        parts = list(self.stated)
        for name, value in self.left.items():
            if isinstance(value, dict) and value is not self._row.get(name):
                parts += [
                    PromptPart(kind, f"{name}.{key}", inner)
                    for key, inner in value.items()
                    if (kind := find_kind(key)) is not None
                ]
            elif (kind := find_kind(name)) is not None:
                parts.append(PromptPart(kind, name, value))
        return [part for part in parts if not is_missing(part.value)]

    def drop(self, place: str) -> None:
        """Remove a column, or a key of a nested object; items of lists stay."""
        _drop(self.left, place)

    def take(self, name: str) -> Any:
        """Take a column out; None if it is absent, null or NaN."""
        value = self.left.pop(name, None)
        return None if is_missing(value) else value

    def require(self, name: str) -> Any:
        """Take out a column that must not be absent or null."""
        if name not in self.left:
            raise RowFault("SCHEMA_MISMATCH", name, f"missing; found {', '.join(self.left)[:300]}")
        value = self.take(name)
        if value is None:
            raise RowFault("FIELD_NULL", name, "null")
        return value

    def take_label(self, name: str) -> Any:
        """Take out the label that says which answer is preferred; a number may be text."""
        value = as_number(self.take(name))
        if value is None or value != value:
            raise RowFault("LABEL_MISSING", name, "nothing says which answer is preferred")
        return value

    def take_text(self, name: str) -> str:
        return read_text(self.require(name), name)

    def take_optional_text(self, name: str) -> str:
        """Take text out; empty if it is absent or null."""
        value = self.take(name)
        return "" if value is None else read_text(value, name)

    def take_question(self, name: str) -> list[Message]:
        """Take text as a user's message."""
        return [new_message("user", self.take_text(name))]

    def take_answer(self, name: str) -> list[Message]:
        """Take text as an assistant's message."""
        return [new_assistant(self.take_text(name), name)]

    def take_messages(self, name: str) -> list[Message]:
        return self.read_messages(self.require(name), name)

    def take_question_or_messages(self, name: str) -> list[Message]:
        return self.read_question(self.require(name), name)

    def read_question(self, value: object, path: str) -> list[Message]:
        """Read a question that is text or messages."""
        if isinstance(value, list) or holds_messages(value):
            return self.read_messages(value, path)
        return [new_message("user", read_text(value, path))]

    def take_answer_or_messages(self, name: str) -> list[Message]:
        """Take an answer that is text, one message, or messages."""
        return self.read_answer(self.require(name), name)

    def read_answer(self, value: object, path: str) -> list[Message]:
        """Read an answer that is text, one message, or messages."""
        if is_missing(value):
            raise RowFault("FIELD_NULL", path, "null")
        if isinstance(value, list | dict) or holds_messages(value) or holds_message(value):
            return self.read_messages(value, path)
        return [new_assistant(read_text(value, path), path)]

    def read_messages(self, value: object, path: str) -> list[Message]:
        """Read a list of messages or one message, which may come from within a column."""
        value = open_messages(value, path)
        if is_missing(value):
            raise RowFault("FIELD_NULL", path, "null")
        if isinstance(value, dict):
            return [read_message(value, path, self.warnings)]
        if not isinstance(value, list):
            raise wrong_kind(path, "messages", value)
        return read_conversation(value, path, self.warnings)

    def take_list(self, name: str) -> list[Any]:
        """Take a list, which may be JSON text or an object of lists."""
        value = open_list(self.require(name), name)
        if not isinstance(value, list):
            raise wrong_kind(name, "a list", value)
        return value

    def take_items(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """Take a list of objects, each with its path.

        Raises:
            RowFault: one of them is no object, or holds media.
        """
        items = [(f"{name}.{at}", item) for at, item in enumerate(self.take_list(name))]
        for path, item in items:
            if not isinstance(item, dict):
                raise wrong_kind(path, "an object", item)
            find_parts(item, path)
        return items

    def take_object(self, name: str) -> dict[str, Any]:
        """Take an object, which may be JSON text, as a copy."""
        value = open_object(self.require(name))
        if not isinstance(value, dict):
            raise wrong_kind(name, "an object", value)
        return dict(value)

    def take_number(self, name: str) -> float | None:
        """Take a number, which may be text; None if it is absent, null or blank.

        NaN stays, because a rule rejects it.
        """
        value = as_number(self.left.pop(name, None))
        return None if value is None else read_number(value, name)

    def take_scores(self) -> tuple[float | None, float | None]:
        """Take the scores of the chosen and of the rejected answer, under the first known names."""
        if not self.left:
            return None, None
        for of_chosen, of_rejected in SCORE_COLUMNS:
            if of_chosen in self.left or of_rejected in self.left:
                chosen, rejected = self.take_number(of_chosen), self.take_number(of_rejected)
                if chosen is not None or rejected is not None:
                    return chosen, rejected
        return None, None

    def take_first_text(self, names: Iterable[str]) -> str | None:
        """Take the first of some columns that holds text or a whole number, as text."""
        for name in names:
            if name not in self.left:
                continue
            value = self.left[name]
            if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                return str(self.take(name))
        return None

    def write_extra(self) -> str | None:
        """Write the remaining columns as JSON text, without nulls."""
        if not self.left:
            return None
        extra = {name: value for name, value in self.left.items() if not is_missing(value)}
        if not extra:
            return None
        encoded = msgspec.json.encode(extra, order="deterministic")
        if b"null" in encoded:  # msgspec writes infinity as null.
            encoded = msgspec.json.encode(_spell_infinity(extra), order="deterministic")
        return encoded.decode()


def _spell_infinity(value: Any) -> Any:
    """Write infinite numbers as text, which JSON can hold."""
    if isinstance(value, dict):
        return {name: _spell_infinity(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_spell_infinity(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _drop(left: dict[str, Any], place: str) -> None:
    """Remove a place; nested objects are copied on the way, so the row stays as it was read."""
    if place in left:
        del left[place]
        return
    outer, _, inner = place.partition(".")
    if isinstance(left.get(outer), dict):
        left[outer] = dict(left[outer])
        _drop(left[outer], inner)
        if not left[outer]:
            del left[outer]


def read_text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise wrong_kind(path, "text", value)
    messages = open_messages(value, path)
    if messages is not value:
        raise wrong_kind(path, "text", messages)
    return value


def read_flag(value: object, path: str) -> bool:
    """Read a flag: true or false, 1 or 0, or one of these as text.

    Raises:
        RowFault: it is something else.
    """
    flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(flag, int | float) or flag not in (0, 1):
        detail = f"1 or 0, true or false wanted, found {ascii(value)[:80]}"
        raise RowFault("LABEL_INVALID", path, detail)
    return bool(flag)


def as_number(value: Any) -> Any:
    """Convert text to a number, as in tables without types; return anything else unchanged.

    Blank text, and a word that tables have for a missing cell, becomes None.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return float(value)
    except ValueError:
        return None if value.strip().lower() in MISSING_WORDS else value


def read_number(value: object, path: str) -> float:
    """Read a number; one too large for a float becomes infinite, which a rule rejects."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_kind(path, "a number", value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_rating(value: object, path: str) -> float:
    """Read a label that is a number, which some data sets write as text."""
    number = as_number(value)
    if number is None or number != number or isinstance(number, str):
        raise RowFault("LABEL_MISSING", path, f"found {ascii(value)[:80]}")
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise RowFault("LABEL_INVALID", path, f"a number wanted, found {ascii(value)[:80]}")
    if not math.isfinite(read_number(number, path)):
        raise RowFault("LABEL_INVALID", path, f"found {ascii(value)[:80]}")
    return float(number)


def wrong_kind(path: str, wanted: str, found: object) -> RowFault:
    """Return the fault of a value of the wrong kind: another format's, or a wrong type."""
    is_other_format = (wanted, type(found)) in {("text", list), ("messages", str)}
    code = "SCHEMA_MISMATCH" if is_other_format else "TYPE_WRONG"
    return RowFault(code, path, f"{wanted} wanted, found {ascii(found)[:80]}")
