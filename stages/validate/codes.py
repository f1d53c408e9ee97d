"""Codes of rejected rows and warnings: meaning, level, and where they are found.

CODES lists them all, in the order of the documentation. A rule's code is declared with the rule, in
rules/; all other codes are declared here.
"""

import difflib
from collections.abc import Mapping
from typing import Literal, NamedTuple

from stages.validate.findings import Level
from stages.validate.rules import RULES

Place = Literal["line", "conversion", "pair", "row"]

_NO_PAIR = "such a row never becomes a pair"
_ACCOUNTS = "it says what became of the row's other pairs"


class Code(NamedTuple):
    level: Level
    """Its level unless stages.validate.rules sets another."""
    meaning: str
    """One sentence for the documentation and for messages."""
    found: Place = "conversion"
    """While a line is read, while its row becomes pairs, by a rule on a finished pair, or after all
    pairs of the row have been checked."""
    threshold: str | None = None
    """The field of stages.validate.thresholds that its rule compares with."""
    why_fixed: str | None = None
    """Why a recipe cannot change the level; None means that it can."""


def _of_line(meaning: str) -> Code:
    return Code("reject", meaning, found="line", why_fixed=_NO_PAIR)


def _of_row(meaning: str) -> Code:
    return Code("reject", meaning, why_fixed=_NO_PAIR)


CODES: dict[str, Code] = {
    # Found while a line is read.
    "LINE_TOO_LONG": _of_line("The line is longer than 16 MiB."),
    "ENCODING_INVALID": _of_line("The text is not valid UTF-8, or has half a surrogate pair."),
    "JSON_INVALID": _of_line("The line is not one JSON value."),
    "JSON_NOT_OBJECT": _of_line("The line is JSON, but not an object."),
    "JSON_DEPTH": _of_line("The JSON is nested more than 64 levels deep."),
    "JSON_DUPLICATE_KEY": _of_line("A key occurs twice in one object."),
    "JSON_NONFINITE": _of_line("A number is beyond a 64-bit float."),
    "CSV_INVALID": _of_line("The row of CSV cannot be parsed, or repeats the header."),
    "CSV_RAGGED": _of_line("The row of CSV has more or fewer values than its header."),
    "VALUE_UNREADABLE": _of_line("A Parquet or Arrow value is outside the range that can be read."),
    "RAW_CUT": _of_line("Only a part of the row was kept when it was first rejected."),
    # Found while a row is turned into pairs. A row rejected here gives no pair at all.
    "SCHEMA_MISMATCH": _of_row("The row does not have the shape of its file's format."),
    "FIELD_NULL": _of_row("A required value is null."),
    "TYPE_WRONG": _of_row("A value has the wrong type for its place."),
    "NESTED_NOT_JSON": _of_row(
        "A text is the source of messages or of a list, but not JSON; such as Python's notation."
    ),
    "ROLE_UNKNOWN": _of_row("A message's role is not known."),
    "UNSUPPORTED_MODALITY": _of_row(
        "The row has an image, audio or video, or a message has parts other than text."
    ),
    "PROMPT_CONFLICT": _of_row(
        "Two places of the row state different system messages, histories or tools."
    ),
    "PROMPT_COLUMN_UNREAD": Code(
        "reject",
        "A column that can change the prompt is not understood, and the prompt does not quote it.",
    ),
    "TOOLS_INVALID_JSON": _of_row("Tool definitions or tool calls are not valid JSON."),
    "REASONING_UNCLOSED": _of_row("An answer has <think> without </think>, or the reverse."),
    "LABEL_MISSING": _of_row("Nothing says which answer is preferred."),
    "LABEL_INVALID": _of_row("The format does not know the label."),
    "MARGIN_TOO_SMALL": _of_row("The scores differ by no more than stages.validate.min_margin."),
    "PROMPT_MISMATCH": _of_row("The two sides answer different conversations."),
    "UNPAIRED_NO_OPPOSITE": _of_row(
        "The row is unpaired (one answer with a label, as for KTO), and no row with the same "
        "prompt has the opposite label."
    ),
    "PROMPT_MISMATCH_WS": Code(
        "warn",
        "The two sides' prompts differ in white space or the order of keys; the chosen side's is "
        "used.",
    ),
    "PROMPT_FIELD_DISAGREES": Code(
        "warn", "The prompt column is neither the first nor the last question; it is not used."
    ),
    "MESSAGE_FIELD_IGNORED": Code("warn", "A message has a field that pairs do not keep."),
    # Rules on a finished pair, in the order in which a row's codes are listed; the first is its
    # main code.
    **{
        code: Code(rule.level, rule.meaning, "pair", rule.threshold, rule.why_fixed)
        for code, rule in RULES.items()
    },
    # Found after all pairs of a row have been checked.
    "PAIR_DROPPED": Code(
        "warn",
        "Another pair of the same row broke a rule and was left out.",
        found="row",
        why_fixed=_ACCOUNTS,
    ),
}


def describe_code(code: str) -> str:
    """Return the meaning of a code, in one sentence."""
    return CODES[code].meaning


def check_levels(levels: Mapping[str, Level]) -> Mapping[str, Level]:
    """Refuse levels of unknown codes and of codes whose level is fixed.

    Raises:
        ValueError: naming the code, and the settable codes or why this one is fixed.
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
