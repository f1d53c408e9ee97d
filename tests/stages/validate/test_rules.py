"""Is every reason to reject or to doubt found where it is, and nowhere else?"""

from pathlib import Path
from typing import Any

import pytest

from stages.validate.findings import CODES, RowFault
from stages.validate.formats import convert_row
from stages.validate.rules import RULES, check_pair, describe_code
from tests.stages.validate.running import GOOD, jsonl, validate, write

STRINGS = "prompt_completion_strings"
Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
B = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "Be kind."}
MESSAGES = {"prompt": [Q], "chosen": [A], "rejected": [B]}
IMPLICIT = {"chosen": [Q, A], "rejected": [Q, B]}
ULTRA = {"prompt": "Q", **IMPLICIT}
OPENAI = {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]}


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def calling(arguments: object) -> list[dict[str, object]]:
    return [said("assistant", None, tool_calls=[{"name": "f", "arguments": arguments}])]


# (format, row, all codes in order, field of the first)
REJECTED: list[tuple[str, dict[str, Any], list[str], str | None]] = [
    (STRINGS, {"prompt": "Q", "chosen": "A"}, ["SCHEMA_MISMATCH"], "rejected"),
    (STRINGS, GOOD | {"prompt": ["Q"]}, ["SCHEMA_MISMATCH"], "prompt"),
    ("messages", MESSAGES | {"prompt": "Q", "chosen": 1}, ["SCHEMA_MISMATCH"], "prompt"),
    ("hh_transcripts", {"chosen": "Q?", "rejected": "R?"}, ["SCHEMA_MISMATCH"], "chosen"),
    (STRINGS, GOOD | {"chosen": None}, ["FIELD_NULL"], "chosen"),
    ("messages", MESSAGES | {"prompt": [Q, None]}, ["FIELD_NULL"], "prompt.1"),
    (
        "messages",
        MESSAGES | {"chosen": [said("assistant", None)]},
        ["FIELD_NULL"],
        "chosen.0.content",
    ),
    ("openai_preferences", OPENAI | {"input": {}}, ["FIELD_NULL"], "input.messages"),
    (STRINGS, GOOD | {"prompt": 5}, ["TYPE_WRONG"], "prompt"),
    (STRINGS, GOOD | {"prompt": True}, ["TYPE_WRONG"], "prompt"),
    (STRINGS, GOOD | {"prompt": {}}, ["TYPE_WRONG"], "prompt"),
    (STRINGS, GOOD | {"score_chosen": "8.5"}, ["TYPE_WRONG"], "score_chosen"),
    (STRINGS, GOOD | {"weight": True}, ["TYPE_WRONG"], "weight"),
    ("messages", MESSAGES | {"prompt": [Q, 5]}, ["TYPE_WRONG"], "prompt.1"),
    ("messages", MESSAGES | {"prompt": [said("user", 5)]}, ["TYPE_WRONG"], "prompt.0.content"),
    (
        "messages",
        MESSAGES | {"chosen": [A | {"name": 5}]},
        ["TYPE_WRONG"],
        "chosen.0.name",
    ),
    ("openai_preferences", OPENAI | {"input": "Q"}, ["TYPE_WRONG"], "input"),
    ("messages", MESSAGES | {"prompt": [said("narrator", "x")]}, ["ROLE_UNKNOWN"], "prompt.0.role"),
    ("messages", MESSAGES | {"prompt": [said("", "x")]}, ["ROLE_UNKNOWN"], "prompt.0.role"),
    (
        "messages",
        MESSAGES | {"prompt": [said("user", [{"type": "image_url", "image_url": "x"}])]},
        ["UNSUPPORTED_MODALITY"],
        "prompt.0.content.0",
    ),
    (STRINGS, GOOD | {"tools": "[{"}, ["TOOLS_INVALID_JSON"], "tools"),
    (STRINGS, GOOD | {"tools": {"name": "f"}}, ["TOOLS_INVALID_JSON"], "tools"),
    (
        "messages",
        MESSAGES | {"chosen": [*calling("{'x': 1}"), said("tool", "1"), A]},
        ["TOOLS_INVALID_JSON"],
        "chosen.0.tool_calls.0.arguments",
    ),
    (
        "messages",
        MESSAGES | {"chosen": [said("assistant", "", tool_calls=[{"arguments": {}}])]},
        ["TOOLS_INVALID_JSON"],
        "chosen.0.tool_calls.0",
    ),
    (
        "implicit_prompt",
        {"chosen": [Q, A], "rejected": [said("user", "R"), B]},
        ["PROMPT_MISMATCH"],
        "chosen.0",
    ),
    (
        "implicit_prompt",
        {"chosen": [SYSTEM, Q, A], "rejected": [said("system", "Be rude."), Q, B]},
        ["PROMPT_MISMATCH"],
        "chosen.0",
    ),
    (
        "hh_transcripts",
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: C",
            "rejected": "\n\nHuman: Q\n\nAssistant: B\n\nHuman: R\n\nAssistant: D",
        },
        ["PROMPT_MISMATCH"],
        "chosen.1",
    ),
    (STRINGS, GOOD | {"prompt": ""}, ["PROMPT_EMPTY"], "prompt"),
    ("messages", MESSAGES | {"prompt": []}, ["PROMPT_EMPTY"], "prompt"),
    ("messages", MESSAGES | {"prompt": [Q, A, said("user", " ")]}, ["PROMPT_EMPTY"], "prompt"),
    (STRINGS, GOOD | {"chosen": " \u200b\ufeff"}, ["CHOSEN_EMPTY"], "chosen"),
    ("implicit_prompt", IMPLICIT | {"chosen": []}, ["CHOSEN_EMPTY"], "chosen"),
    (
        "hh_transcripts",
        {"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        ["CHOSEN_EMPTY"],
        "chosen",
    ),
    (STRINGS, GOOD | {"rejected": "\n\t"}, ["REJECTED_EMPTY"], "rejected"),
    (STRINGS, GOOD | {"prompt": " ", "chosen": ""}, ["PROMPT_EMPTY", "CHOSEN_EMPTY"], "prompt"),
    ("messages", MESSAGES | {"prompt": [Q, A, SYSTEM, Q]}, ["SYSTEM_NOT_FIRST"], "prompt.2"),
    (
        "messages",
        MESSAGES | {"prompt": [Q, A]},
        ["PROMPT_LAST_ROLE", "ROLE_ORDER"],
        "prompt.1.role",
    ),
    ("messages", MESSAGES | {"prompt": [SYSTEM]}, ["PROMPT_LAST_ROLE"], "prompt.0.role"),
    (
        "messages",
        MESSAGES | {"prompt": [Q, *calling({})], "chosen": [said("tool", "1"), A]},
        ["PROMPT_LAST_ROLE", "COMPLETION_FIRST_ROLE", "ROLE_ORDER"],
        "prompt.1.role",
    ),
    (
        "messages",
        MESSAGES | {"rejected": [said("tool", "1"), B]},
        ["COMPLETION_FIRST_ROLE"],
        "rejected.0.role",
    ),
    ("implicit_prompt", IMPLICIT | {"chosen": [Q, A, Q]}, ["FINAL_NOT_ASSISTANT"], "chosen.1.role"),
    ("messages", MESSAGES | {"prompt": [Q, Q]}, ["ROLE_ORDER"], "prompt.1"),
    ("messages", MESSAGES | {"rejected": [A, B]}, ["ROLE_ORDER"], "rejected.1"),
    (STRINGS, GOOD | {"rejected": "4"}, ["CHOSEN_EQ_REJECTED"], "rejected"),
    (STRINGS, GOOD | {"rejected": " 4\n"}, ["CHOSEN_EQ_REJECTED"], "rejected"),
    (
        STRINGS,
        GOOD | {"chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        ["CHOSEN_EQ_REJECTED"],
        "rejected",
    ),
    (STRINGS, GOOD | {"chosen": "x" * 1_000_001}, ["FIELD_TOO_LONG"], "chosen.0.content"),
    (STRINGS, GOOD | {"chosen": "4\0"}, ["CONTROL_CHARS"], "chosen.0.content"),
    (STRINGS, GOOD | {"source": "a\0b"}, ["CONTROL_CHARS"], "source"),
    (STRINGS, GOOD | {"score_chosen": float("nan")}, ["SCORE_NONFINITE"], "score_chosen"),
    (STRINGS, GOOD | {"margin": 10**400}, ["SCORE_NONFINITE"], "margin"),
    (
        STRINGS,
        GOOD | {"score_chosen": 1, "score_rejected": 2},
        ["SCORE_CONTRADICTS_LABEL"],
        "score_chosen",
    ),
    (STRINGS, GOOD | {"margin": -0.5}, ["SCORE_CONTRADICTS_LABEL"], "score_chosen"),
    (STRINGS, GOOD | {"score_chosen": 7, "score_rejected": 7.0}, ["TIE"], "score_chosen"),
    (STRINGS, GOOD | {"weight": 0}, ["WEIGHT_INVALID"], "weight"),
    (STRINGS, GOOD | {"weight": -1}, ["WEIGHT_INVALID"], "weight"),
    (STRINGS, GOOD | {"weight": 1e-60}, ["WEIGHT_INVALID"], "weight"),
    (STRINGS, GOOD | {"weight": float("nan")}, ["WEIGHT_INVALID"], "weight"),
]

WARNED: list[tuple[str, dict[str, Any], str]] = [
    (
        "implicit_prompt",
        {"chosen": [Q, A], "rejected": [said("user", "Q "), B]},
        "PROMPT_MISMATCH_WS",
    ),
    ("ultrafeedback_binarized", ULTRA | {"prompt": "R"}, "PROMPT_FIELD_DISAGREES"),
    ("messages", MESSAGES | {"chosen": [A | {"weight": 0}]}, "MESSAGE_FIELD_IGNORED"),
    (STRINGS, GOOD | {"chosen": "\u202e4"}, "BIDI_OVERRIDE"),
    (STRINGS, GOOD | {"chosen": "4\ufffd"}, "REPLACEMENT_CHAR"),
]

# These are found while bytes are read; test_reading.py has them.
OF_READING = {
    "LINE_TOO_LONG",
    "ENCODING_INVALID",
    "JSON_INVALID",
    "JSON_NOT_OBJECT",
    "JSON_DEPTH",
    "JSON_DUPLICATE_KEY",
    "JSON_NONFINITE",
    "CSV_INVALID",
    "CSV_RAGGED",
    "VALUE_UNREADABLE",
    "RAW_CUT",
}


def find_codes(format_name: str, row: dict[str, Any]) -> tuple[list[str], str | None]:
    try:
        findings, _ = check_pair(convert_row(row, format_name))
    except RowFault as fault:
        findings = [fault.finding]
    codes = list(dict.fromkeys(finding.code for finding in findings))
    return codes, findings[0].field if findings else None


@pytest.mark.parametrize(("format_name", "row", "codes", "field"), REJECTED)
def test_broken_row_is_rejected_with_all_its_codes(
    format_name: str, row: dict[str, Any], codes: list[str], field: str | None
) -> None:
    assert find_codes(format_name, row) == (codes, field)


@pytest.mark.parametrize(
    ("format_name", "row"),
    [
        (STRINGS, GOOD),
        ("messages", MESSAGES),
        ("implicit_prompt", IMPLICIT),
        ("ultrafeedback_binarized", ULTRA),
        ("openai_preferences", OPENAI),
        ("messages", MESSAGES | {"prompt": [SYSTEM, Q, A, Q]}),
        ("messages", MESSAGES | {"prompt": [Q, *calling({}), said("tool", "")]}),
        ("messages", MESSAGES | {"chosen": calling('{"x": 1}')}),
        (
            "messages",
            MESSAGES | {"chosen": [*calling({}), said("tool", "1"), said("tool", "2"), A]},
        ),
        (STRINGS, GOOD | {"score_chosen": 8, "score_rejected": None, "weight": 0.5}),
        (STRINGS, GOOD | {"tools": "[]", "chosen": "4\u2028\u0085 "}),
    ],
)
def test_sound_row_is_kept_without_a_word(format_name: str, row: dict[str, Any]) -> None:
    assert check_pair(convert_row(row, format_name)) == ([], [])


@pytest.mark.parametrize(("format_name", "row", "code"), WARNED)
def test_doubtful_row_is_kept_with_its_warning(
    format_name: str, row: dict[str, Any], code: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "data.jsonl", jsonl([row]))
    outcome = validate(tmp_path / "out", file, format=format_name)
    assert [pair["warnings"] for pair in outcome.pairs] == [[code]]
    assert outcome.counts.warnings == {code: 1}


def test_prompts_that_differ_by_a_space_are_repaired_to_the_chosen_side() -> None:
    format_name, row, _ = WARNED[0]
    assert convert_row(row, format_name).prompt[0]["content"] == "Q"


def test_every_code_has_a_sentence_and_a_test() -> None:
    known = {rule.code: rule.level for rule in RULES} | {c: CODES[c].level for c in CODES}
    tested = {code for _, _, codes, _ in REJECTED for code in codes} | OF_READING
    assert tested == {code for code, level in known.items() if level == "reject"}
    assert {code for _, _, code in WARNED} == {c for c, level in known.items() if level == "warn"}
    assert all(describe_code(code).endswith(".") for code in known)
    assert len(known) == len(RULES) + len(CODES)


def test_detail_never_exceeds_its_column_and_shows_no_control_characters(tmp_path: Path) -> None:
    row = {"prompt": "Q", **{f"column {at}\x1b[31m": at for at in range(500)}}
    file = write(tmp_path / "data.jsonl", jsonl([row]))
    (rejected,) = validate(tmp_path / "out", file, format=STRINGS).rejected
    assert len(rejected["detail"]) <= 500
    assert rejected["detail"].isprintable()
