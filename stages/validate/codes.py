"""Codes of rejected rows and warnings: meaning, level, and where they are found.

Every code has one entry in CODES; the checks, the levels that a recipe may set and the
documentation are made from it.
"""

import difflib
from collections.abc import Mapping
from typing import Literal, NamedTuple

Level = Literal["off", "warn", "reject"]
Place = Literal["line", "conversion", "pair", "row"]

_MAX_CHARS = 500
_NEEDED = "later stages rely on it"
_NO_PAIR = "such a row never becomes a pair"
_ACCOUNTS = "it says what became of the row's other pairs"


class Finding(NamedTuple):
    """One thing that is wrong with a row."""

    code: str
    field: str | None = None
    """Where, as a dotted path; None means the row as a whole."""
    detail: str = ""
    """What was found at that place."""


class RowFault(Exception):
    """A row that cannot become a pair; raised and caught inside one worker."""

    def __init__(self, code: str, field: str | None = None, detail: str = "") -> None:
        super().__init__(code)
        self.finding = Finding(code, field, detail)


def make_printable(text: str) -> str:
    """Cut a text from data to 500 characters and escape control characters."""
    if text.isprintable():
        return text[:_MAX_CHARS]
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_CHARS])
    return escaped[:_MAX_CHARS]


class Code(NamedTuple):
    level: Level
    """Its level unless stages.validate.rules sets another."""
    sentence: str
    found: Place = "conversion"
    """While a line is read, while a row becomes pairs, by a rule on a finished pair, or when all
    pairs of a row have been judged."""
    threshold: str | None = None
    """The field of stages.validate.thresholds that it is held against."""
    why_fixed: str | None = None
    """Why a recipe cannot change the level; None = it can."""


def _of_line(sentence: str) -> Code:
    return Code("reject", sentence, found="line", why_fixed=_NO_PAIR)


def _of_row(sentence: str) -> Code:
    return Code("reject", sentence, why_fixed=_NO_PAIR)


def _of_pair(
    level: Level, sentence: str, *, threshold: str | None = None, why_fixed: str | None = None
) -> Code:
    return Code(level, sentence, "pair", threshold, why_fixed)


CODES: dict[str, Code] = {
    # Found while a line is read.
    "LINE_TOO_LONG": _of_line("The line is longer than 16 MiB."),
    "ENCODING_INVALID": _of_line("The text is not valid UTF-8, or has half a surrogate pair."),
    "JSON_INVALID": _of_line("The line is not one JSON value."),
    "JSON_NOT_OBJECT": _of_line("The line is JSON, but not an object."),
    "JSON_DEPTH": _of_line("The JSON is nested more than 64 levels deep."),
    "JSON_DUPLICATE_KEY": _of_line("A key occurs twice in one object."),
    "JSON_NONFINITE": _of_line("A number is NaN, infinite, or beyond a 64-bit float."),
    "CSV_INVALID": _of_line("The row of CSV cannot be parsed."),
    "CSV_RAGGED": _of_line("The row of CSV has another number of values than its header."),
    "VALUE_UNREADABLE": _of_line(
        "A value of a Parquet or Arrow type lies beyond what can be read."
    ),
    "RAW_CUT": _of_line("Only a part of the row was kept when it was first rejected."),
    # Found while a row is turned into pairs. Rejections here leave nothing that could be kept.
    "SCHEMA_MISMATCH": _of_row("The row does not have the shape of its file's format."),
    "FIELD_NULL": _of_row("A value that is needed is null."),
    "TYPE_WRONG": _of_row("A value has another type than its place demands."),
    "ROLE_UNKNOWN": _of_row("A message's role is not known."),
    "UNSUPPORTED_MODALITY": _of_row("A message has parts other than text."),
    "TOOLS_INVALID_JSON": _of_row("Tool definitions or tool calls are not valid JSON."),
    "REASONING_UNCLOSED": _of_row("An answer has <think> without </think>, or the reverse."),
    "LABEL_MISSING": _of_row("Nothing says which answer is preferred."),
    "LABEL_INVALID": _of_row("The label is none of those that the format knows."),
    "MARGIN_TOO_SMALL": _of_row("The scores differ by no more than stages.validate.min_margin."),
    "PROMPT_MISMATCH": _of_row("The two sides answer different conversations."),
    "PROMPT_MISMATCH_WS": Code(
        "warn", "The two sides' prompts differ in white space; the chosen side's is used."
    ),
    "PROMPT_FIELD_DISAGREES": Code(
        "warn", "The prompt column is neither the first nor the last question; it is not used."
    ),
    "MESSAGE_FIELD_IGNORED": Code("warn", "A message has a field that is not carried along."),
    # Rules on a finished pair, in the order in which a row's reasons are listed; the first is its
    # code.
    "PROMPT_EMPTY": _of_pair("reject", "The prompt has no visible text.", why_fixed=_NEEDED),
    "CHOSEN_EMPTY": _of_pair("reject", "The chosen answer has no visible text.", why_fixed=_NEEDED),
    "REJECTED_EMPTY": _of_pair(
        "reject", "The other answer has no visible text.", why_fixed=_NEEDED
    ),
    "SYSTEM_NOT_FIRST": _of_pair("reject", "A system message stands elsewhere than at the start."),
    "PROMPT_LAST_ROLE": _of_pair(
        "reject", "The prompt does not end with a user's message or a tool's result."
    ),
    "COMPLETION_FIRST_ROLE": _of_pair("reject", "An answer does not begin with the assistant."),
    "FINAL_NOT_ASSISTANT": _of_pair("reject", "An answer does not end with the assistant."),
    "ROLE_ORDER": _of_pair("reject", "A user or assistant speaks twice in a row."),
    "TOOL_RESULT_ORPHAN": _of_pair(
        "reject", "A tool's result follows no call, or names a call that was not made."
    ),
    "CHOSEN_EQ_REJECTED": _of_pair(
        "reject", "Both answers are the same, but for outer white space and Unicode composition."
    ),
    "FIELD_TOO_LONG": _of_pair(
        "reject", "A text has more characters than allowed.", threshold="max_text_chars"
    ),
    "NUL_IN_TEXT": _of_pair(
        "reject", "A text contains NUL, at which other programs end or refuse it."
    ),
    "SOURCE_UNSAFE_NAME": _of_pair(
        "reject",
        "The source or source_id is too long, has characters that cannot be printed, or climbs "
        "directories with `..`; slashes are fine.",
        threshold="max_name_bytes",
    ),
    "SCORE_NONFINITE": _of_pair("reject", "A score is NaN or infinite.", why_fixed=_NEEDED),
    "SCORE_CONTRADICTS_LABEL": _of_pair("reject", "The chosen answer has the lower score."),
    "TIE": _of_pair("reject", "The scores are equal, or the label prefers neither answer."),
    "WEIGHT_INVALID": _of_pair(
        "reject",
        "The weight is not a number above 0 that a 32-bit float can hold.",
        why_fixed=_NEEDED,
    ),
    "CHOSEN_NEAR_REJECTED": _of_pair(
        "warn",
        "The answers use nearly the same words: little tells them apart.",
        threshold="near_jaccard",
    ),
    "TOOL_CALL_UNKNOWN": _of_pair(
        "warn", "A call names a tool that is not among those that the row declares."
    ),
    "REASONING_ONE_SIDED": _of_pair(
        "warn", "One answer has reasoning and the other none: training would reward having it."
    ),
    "REFUSAL_BOILERPLATE": _of_pair(
        "warn", "The chosen answer speaks as an AI model, or declines in a set phrase."
    ),
    "REPETITION": _of_pair(
        "warn",
        "An answer repeats ten words at least three times, and they are much of it.",
        threshold="repeated_share",
    ),
    "TRANSCRIPT_MARKER": _of_pair(
        "warn", "A message has the turn markers of a transcript: more than one speaker in it."
    ),
    "SPECIAL_TOKEN_IN_TEXT": _of_pair(
        "warn", "A text has what looks like a chat template's control token, such as `<|im_end|>`."
    ),
    "CONTROL_CHARS": _of_pair(
        "warn", "A text has control characters other than tab, newline, return and NUL."
    ),
    "BIDI_OVERRIDE": _of_pair("warn", "A text has characters that turn the direction of writing."),
    "REPLACEMENT_CHAR": _of_pair(
        "warn", "A text has U+FFFD, which stands for what could not be decoded."
    ),
    # Found when a row that gives several pairs has been judged.
    "PAIR_DROPPED": Code(
        "warn",
        "Another pair of the same row broke a rule and was left out.",
        found="row",
        why_fixed=_ACCOUNTS,
    ),
}


def describe_code(code: str) -> str:
    """Return the meaning of a code, in one sentence."""
    return CODES[code].sentence


def check_levels(levels: Mapping[str, Level]) -> Mapping[str, Level]:
    """Refuse levels for codes that are not known or cannot be changed.

    Raises:
        ValueError: naming the code, and those that can be changed or why this one cannot.
    """
    for code in levels:
        if code not in CODES:
            known = [name for name, described in CODES.items() if described.why_fixed is None]
            close = difflib.get_close_matches(code.upper(), known, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"no such code: {code}.{meant} Those that have a level are {', '.join(known)}"
            )
        if (why := CODES[code].why_fixed) is not None:
            raise ValueError(f"{code} always leads to {CODES[code].level}, because {why}")
    return levels
