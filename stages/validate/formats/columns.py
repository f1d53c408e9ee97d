"""Columns of a raw row, each taken once."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from stages.validate.findings import Finding, RowFault
from stages.validate.messages import Message, new_assistant, new_message, read_message

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
SOURCE_COLUMNS = ("source", "dataset")
ID_COLUMNS = ("source_id", "id", "prompt_id", "question_id", "uuid")


class Columns:
    """Columns of a row that are not converted yet; those left at the end become `extra`."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.left = dict(row)
        self.warnings: list[Finding] = []

    def take(self, name: str) -> Any:
        """Take a column out; None if it is absent or null."""
        return self.left.pop(name, None)

    def require(self, name: str) -> Any:
        """Take out a column that must not be absent or null."""
        if name not in self.left:
            raise RowFault("SCHEMA_MISMATCH", name, f"missing; found {', '.join(self.left)[:300]}")
        value = self.take(name)
        if value is None:
            raise RowFault("FIELD_NULL", name, "null")
        return value

    def take_label(self, name: str) -> Any:
        """Take out the label that says which answer is preferred."""
        value = self.take(name)
        if value is None:
            raise RowFault("LABEL_MISSING", name, "nothing says which answer is preferred")
        return value

    def take_text(self, name: str) -> str:
        return read_text(self.require(name), name)

    def take_optional_text(self, name: str) -> str:
        """Take text out; empty if it is absent or null."""
        value = self.take(name)
        return "" if value is None else read_text(value, name)

    def take_system(self) -> list[Message]:
        """Take the `system` column as a message; no message if it is blank."""
        system = self.take_optional_text("system")
        return [new_message("system", system)] if system.strip() else []

    def take_question(self, name: str) -> list[Message]:
        """Take text as a user's message, after the `system` column's if there is one."""
        return [*self.take_system(), new_message("user", self.take_text(name))]

    def take_answer(self, name: str) -> list[Message]:
        """Take text as an assistant's message."""
        return [new_assistant(self.take_text(name), name)]

    def take_messages(self, name: str) -> list[Message]:
        return self.read_messages(self.require(name), name)

    def take_question_or_messages(self, name: str) -> list[Message]:
        is_list = isinstance(self.left.get(name), list)
        return self.take_messages(name) if is_list else self.take_question(name)

    def take_answer_or_messages(self, name: str) -> list[Message]:
        is_list = isinstance(self.left.get(name), list)
        return self.take_messages(name) if is_list else self.take_answer(name)

    def take_message(self, name: str) -> list[Message]:
        """Take a single message that is not in a list."""
        return [read_message(self.require(name), name, self.warnings)]

    def read_messages(self, value: object, path: str) -> list[Message]:
        """Read a list of messages, which may come from within a column."""
        if value is None:
            raise RowFault("FIELD_NULL", path, "null")
        if not isinstance(value, list):
            raise wrong_kind(path, "messages", value)
        return [read_message(m, f"{path}.{at}", self.warnings) for at, m in enumerate(value)]

    def take_number(self, name: str) -> float | None:
        value = self.take(name)
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
        extra = {name: value for name, value in self.left.items() if value is not None}
        return msgspec.json.encode(extra, order="deterministic").decode() if extra else None


def read_text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise wrong_kind(path, "text", value)
    return value


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
    if value is None:
        raise RowFault("LABEL_MISSING", path, "null")
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise RowFault("LABEL_MISSING", path, f"found {ascii(value)[:80]}") from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise RowFault("LABEL_INVALID", path, f"a number wanted, found {ascii(value)[:80]}")
    else:
        number = read_number(value, path)
    if not math.isfinite(number):
        raise RowFault("LABEL_INVALID", path, f"found {ascii(value)[:80]}")
    return number


def wrong_kind(path: str, wanted: str, found: object) -> RowFault:
    """Return the fault of a value of the wrong kind: another format's, or a wrong type."""
    is_other_format = (wanted, type(found)) in {("text", list), ("messages", str)}
    code = "SCHEMA_MISMATCH" if is_other_format else "TYPE_WRONG"
    return RowFault(code, path, f"{wanted} wanted, found {ascii(found)[:80]}")
