"""What can be wrong with a row, and what is said about it?"""

from typing import Literal, NamedTuple

Level = Literal["reject", "warn"]

_MAX_CHARS = 500


class Finding(NamedTuple):
    """One thing that is wrong with a row."""

    code: str
    field: str | None = None
    """Where, as a dotted path; None means the row as a whole."""
    detail: str = ""
    """What was found there."""


class RowFault(Exception):
    """A row that cannot become a pair; raised and caught inside one worker."""

    def __init__(self, code: str, field: str | None = None, detail: str = "") -> None:
        super().__init__(code)
        self.finding = Finding(code, field, detail)


def make_printable(text: str) -> str:
    """Cut a text that comes from data to 500 characters, and escape what a terminal acts on."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_CHARS])
    return escaped[:_MAX_CHARS]


class Code(NamedTuple):
    level: Level
    sentence: str


CODES: dict[str, Code] = {
    # Found while a line is read.
    "LINE_TOO_LONG": Code("reject", "The line is longer than 16 MiB."),
    "ENCODING_INVALID": Code(
        "reject", "The text is not valid UTF-8, or has half a surrogate pair."
    ),
    "JSON_INVALID": Code("reject", "The line is not one JSON value."),
    "JSON_NOT_OBJECT": Code("reject", "The line is JSON, but not an object."),
    "JSON_DEPTH": Code("reject", "The JSON is nested more than 64 levels deep."),
    "JSON_DUPLICATE_KEY": Code("reject", "A key occurs twice in one object."),
    "JSON_NONFINITE": Code("reject", "A number is NaN, infinite, or beyond a 64-bit float."),
    # Found while a row is turned into messages.
    "SCHEMA_MISMATCH": Code("reject", "The row does not have the shape of its file's format."),
    "FIELD_NULL": Code("reject", "A value that is needed is null."),
    "TYPE_WRONG": Code("reject", "A value has another type than its place demands."),
    "ROLE_UNKNOWN": Code("reject", "A message's role is not known."),
    "UNSUPPORTED_MODALITY": Code("reject", "A message has parts other than text."),
    "TOOLS_INVALID_JSON": Code("reject", "Tool definitions or tool calls are not valid JSON."),
    "REASONING_UNCLOSED": Code("reject", "An answer has <think> without </think>, or the reverse."),
    "LABEL_MISSING": Code("reject", "Nothing says which answer is preferred."),
    "LABEL_INVALID": Code(
        "reject", "The label is none of those that the format knows."
    ),
    "MARGIN_TOO_SMALL": Code(
        "reject", "The scores differ by no more than stages.validate.min_margin."
    ),
    "PROMPT_MISMATCH": Code("reject", "The two sides answer different conversations."),
    "PROMPT_MISMATCH_WS": Code(
        "warn", "The two sides' prompts differ in white space; the chosen side's is used."
    ),
    "PROMPT_FIELD_DISAGREES": Code(
        "warn", "The prompt column is neither the first nor the last question; it is not used."
    ),
    "MESSAGE_FIELD_IGNORED": Code("warn", "A message has a field that is not carried along."),
}
"""What reading and converting a row can find; what a finished pair can break is in rules.py."""
