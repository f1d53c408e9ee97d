"""Every code is found in rows that have its fault, and in no others."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import parse_config
from schemas.errors import ConfigError
from stages.validate.check_rows import PairRules
from stages.validate.codes import CODES
from stages.validate.config import ValidateConfig
from stages.validate.findings import Finding, Level, RowFault
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.rules import RULES
from stages.validate.rules.answers import find_refusal
from stages.validate.rules.pair_view import PairView
from stages.validate.rules.rule import Thresholds
from tests.stages.validate.running import GOOD, convert_row, jsonl, validate, write

STRINGS = "prompt_completion_strings"
Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
B = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "Be kind."}
MESSAGES = {"prompt": [Q], "chosen": [A], "rejected": [B]}
IMPLICIT = {"chosen": [Q, A], "rejected": [Q, B]}
ULTRA = {"prompt": "Q", **IMPLICIT}
OPENAI = {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]}


SEARCH = '[{"type":"function","function":{"name":"search","parameters":{}}}]'
SENTENCE = "one two three four five six seven eight nine ten "


def words(amount: int, *, start: int = 0) -> str:
    """Return a number of different words."""
    return " ".join(f"word{at}" for at in range(start, start + amount))


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
    (STRINGS, GOOD | {"score_chosen": "good"}, ["TYPE_WRONG"], "score_chosen"),
    (
        STRINGS,
        GOOD | {"chosen": "[{'role': 'assistant', 'content': '4'}]"},
        ["NESTED_NOT_JSON"],
        "chosen",
    ),
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
    (STRINGS, GOOD | {"images": ["a.png"]}, ["UNSUPPORTED_MODALITY"], "images"),
    (
        STRINGS,
        GOOD | {"system": "a", "history": [said("system", "b")]},
        ["PROMPT_CONFLICT"],
        "history",
    ),
    (STRINGS, GOOD | {"documents": ["Oslo is rainy."]}, ["PROMPT_COLUMN_UNREAD"], "documents"),
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
        ["COMPLETION_FIRST_ROLE", "TOOL_RESULT_ORPHAN"],
        "rejected.0.role",
    ),
    ("implicit_prompt", IMPLICIT | {"chosen": [Q, A, Q]}, ["FINAL_NOT_ASSISTANT"], "chosen.1.role"),
    ("messages", MESSAGES | {"prompt": [Q, Q]}, ["ROLE_ORDER"], "prompt.1"),
    ("messages", MESSAGES | {"rejected": [A, B]}, ["ROLE_ORDER"], "rejected.1"),
    (STRINGS, GOOD | {"rejected": "4"}, ["CHOSEN_EQ_REJECTED"], "rejected"),
    (STRINGS, GOOD | {"rejected": " 4\n"}, ["CHOSEN_EQ_REJECTED"], "rejected"),
    (
        "messages",
        MESSAGES | {"chosen": calling({"b": 1, "a": 2}), "rejected": calling('{"a": 2, "b": 1}')},
        ["CHOSEN_EQ_REJECTED"],
        "rejected",
    ),
    (
        STRINGS,
        GOOD | {"chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        ["CHOSEN_EQ_REJECTED"],
        "rejected",
    ),
    (STRINGS, GOOD | {"chosen": "x" * 1_000_001}, ["FIELD_TOO_LONG"], "chosen.0.content"),
    (STRINGS, GOOD | {"chosen": "4\0"}, ["NUL_IN_TEXT"], "chosen.0.content"),
    (STRINGS, GOOD | {"source": "a\0b"}, ["NUL_IN_TEXT", "SOURCE_UNSAFE_NAME"], "source"),
    (STRINGS, GOOD | {"source": "../../etc/x"}, ["SOURCE_UNSAFE_NAME"], "source"),
    (STRINGS, GOOD | {"id": "a\\..\\b"}, ["SOURCE_UNSAFE_NAME"], "source_id"),
    (STRINGS, GOOD | {"id": ".."}, ["SOURCE_UNSAFE_NAME"], "source_id"),
    (STRINGS, GOOD | {"source": "a\nb"}, ["SOURCE_UNSAFE_NAME"], "source"),
    (STRINGS, GOOD | {"source": "é" * 129}, ["SOURCE_UNSAFE_NAME"], "source"),
    ("messages", MESSAGES | {"prompt": [Q, said("tool", "1")]}, ["TOOL_RESULT_ORPHAN"], "prompt.1"),
    (
        "messages",
        MESSAGES | {"chosen": [*calling({}), said("tool", "1"), A, said("tool", "2"), A]},
        ["TOOL_RESULT_ORPHAN"],
        "chosen.3",
    ),
    (
        "messages",
        MESSAGES
        | {
            "rejected": [
                said("assistant", "", tool_calls=[{"id": "c1", "name": "f", "arguments": {}}]),
                said("tool", "1", tool_call_id="c2"),
                B,
            ]
        },
        ["TOOL_RESULT_ORPHAN"],
        "rejected.1.tool_call_id",
    ),
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
    (STRINGS, GOOD | {"chosen": "\u20694"}, "BIDI_OVERRIDE"),
    (STRINGS, GOOD | {"chosen": "4\ufffd"}, "REPLACEMENT_CHAR"),
    *(
        (STRINGS, GOOD | {side: text}, "MISSING_AS_TEXT")
        for side in ("prompt", "chosen", "rejected")
        for text in ("NA", " nan\n", "None", "NULL", "#N/A", "<NA>")
    ),
    (STRINGS, GOOD | {"chosen": "4\x1b[31m"}, "CONTROL_CHARS"),
    (STRINGS, GOOD | {"prompt": "Q\x01"}, "CONTROL_CHARS"),
    # 39 words in common of 41: Jaccard similarity 0.951.
    (STRINGS, GOOD | {"chosen": words(40), "rejected": words(40, start=1)}, "CHOSEN_NEAR_REJECTED"),
    (
        STRINGS,
        GOOD | {"chosen": f"x {words(40)}", "rejected": f"{words(40)} x"},
        "CHOSEN_NEAR_REJECTED",
    ),
    # 39 words of 40: 0.975.
    (STRINGS, GOOD | {"chosen": words(40), "rejected": words(39)}, "CHOSEN_NEAR_REJECTED"),
    (
        "messages",
        MESSAGES | {"tools": SEARCH, "chosen": calling({})},
        "TOOL_CALL_UNKNOWN",
    ),
    (
        "messages",
        MESSAGES | {"rejected": [said("assistant", "B", reasoning="Hm.")]},
        "REASONING_ONE_SIDED",
    ),
    (STRINGS, GOOD | {"chosen": "As an AI language model, 4."}, "REFUSAL_BOILERPLATE"),
    (STRINGS, GOOD | {"chosen": "I\u2019m sorry, but I can\u2019t help."}, "REFUSAL_BOILERPLATE"),
    # 30 of 99 words are one run of ten that occurs three times.
    (STRINGS, GOOD | {"rejected": f"{words(69)} {SENTENCE * 3}"}, "REPETITION"),
    (STRINGS, GOOD | {"rejected": "ha " * 30}, "REPETITION"),
    (STRINGS, GOOD | {"prompt": "Hi.\n\nAssistant: Hello.\n\nQ"}, "TRANSCRIPT_MARKER"),
    (STRINGS, GOOD | {"chosen": "Human: 4"}, "TRANSCRIPT_MARKER"),
    (STRINGS, GOOD | {"prompt": "Do it.\n### Response:\n"}, "TRANSCRIPT_MARKER"),
    (STRINGS, GOOD | {"prompt": "Q<|im_end|>"}, "SPECIAL_TOKEN_IN_TEXT"),
    (STRINGS, GOOD | {"chosen": "<\uff5cUser\uff5c>4"}, "SPECIAL_TOKEN_IN_TEXT"),
    (STRINGS, GOOD | {"prompt": "[INST] Q [/INST]"}, "SPECIAL_TOKEN_IN_TEXT"),
    (STRINGS, GOOD | {"prompt": "Q<extra_id_1>"}, "SPECIAL_TOKEN_IN_TEXT"),
    (STRINGS, GOOD | {"chosen": "4</s>"}, "SPECIAL_TOKEN_IN_TEXT"),
    (STRINGS, GOOD | {"prompt": "<image>\nQ"}, "MEDIA_PLACEHOLDER"),
    (STRINGS, GOOD | {"prompt": "Q <audio_1>", "images": []}, "MEDIA_PLACEHOLDER"),
    (STRINGS, GOOD | {"chosen": "Use <video> in HTML."}, "MEDIA_PLACEHOLDER"),
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


def check_pair(draft: PairDraft, **levels: Level) -> tuple[list[Finding], list[Finding]]:
    return PairRules(levels, Thresholds()).check(PairView(draft))


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
        (STRINGS, GOOD | {"source": "org/name", "id": "https://example.org/a..b/.hidden"}),
        (STRINGS, GOOD | {"source": "é" * 128, "id": "C:\\data\\1"}),
        (STRINGS, GOOD | {"chosen": "x" * 1_000_000}),
        (STRINGS, GOOD | {"chosen": "4\t\r\n\x7f\u200e"}),
        # 19 words in common of 21: 0.905.
        (STRINGS, GOOD | {"chosen": words(20), "rejected": words(20, start=1)}),
        # The same words in different numbers: 40 of 43.
        (STRINGS, GOOD | {"chosen": f"{words(38)} x x x x x", "rejected": f"{words(38)} x x"}),
        ("messages", MESSAGES | {"tools": SEARCH, "chosen": [A]}),
        (
            "messages",
            MESSAGES
            | {
                "tools": SEARCH,
                "chosen": [
                    said(
                        "assistant",
                        None,
                        tool_calls=[
                            {"id": "c1", "function": {"name": "search", "arguments": {}}},
                            {"id": "c2", "function": {"name": "search", "arguments": {}}},
                        ],
                    ),
                    said("tool", "2", tool_call_id="c2"),
                    said("tool", "1", tool_call_id="c1"),
                    A,
                ],
            },
        ),
        (
            "messages",
            MESSAGES
            | {
                "chosen": [said("assistant", "A", reasoning="So.")],
                "rejected": [said("assistant", "B", thinking="Hm.")],
            },
        ),
        (STRINGS, GOOD | {"chosen": "AI is a field. I can help.", "rejected": "As an AI, no."}),
        (STRINGS, GOOD | {"chosen": "He said: I can't help you."}),
        # 30 of 100 words, which is not more than 30 %; and two runs in 40 words.
        (STRINGS, GOOD | {"rejected": f"{words(70)} {SENTENCE * 3}"}),
        (STRINGS, GOOD | {"rejected": f"{words(20)} {SENTENCE * 2}"}),
        (STRINGS, GOOD | {"rejected": "ha " * 29}),
        (STRINGS, GOOD | {"prompt": "What is a Human: a novel? ### Response times"}),
        (STRINGS, GOOD | {"prompt": "a < b | c > d; x[INSTALL]; <start>"}),
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


def test_every_character_that_turns_the_direction_is_found_and_no_other() -> None:
    """The embeddings and overrides U+202A to U+202E and the isolates U+2066 to U+2069."""
    turning = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
    for code in range(0x2000, 0x2100):
        _, warnings = check_pair(convert_row(GOOD | {"chosen": f"4{chr(code)}"}, STRINGS))
        found = [finding.code for finding in warnings]
        assert found == ["BIDI_OVERRIDE"] * (chr(code) in turning), hex(code)


def test_prompts_that_differ_by_a_space_are_repaired_to_the_chosen_side() -> None:
    format_name, row, _ = WARNED[0]
    assert convert_row(row, format_name).prompt[0]["content"] == "Q"


def test_every_code_has_a_sentence_and_a_test() -> None:
    tested = {code for _, _, codes, _ in REJECTED for code in codes} | OF_READING
    warned = {code for _, _, code in WARNED} | {"PAIR_DROPPED"}  # test_several_pairs.py has it.
    # The tests of the formats and of messages have the rest.
    tested |= {"UNPAIRED_NO_OPPOSITE"}  # test_unpaired.py has it.
    tested |= {"LABEL_INVALID", "LABEL_MISSING", "MARGIN_TOO_SMALL", "REASONING_UNCLOSED"}
    assert tested == {code for code, described in CODES.items() if described.level == "reject"}
    assert warned == {code for code, described in CODES.items() if described.level == "warn"}
    assert all(described.meaning.endswith(".") for described in CODES.values())


def test_every_code_of_a_finished_pair_has_a_rule_and_is_listed_in_its_order() -> None:
    assert list(RULES) == [code for code, described in CODES.items() if described.found == "pair"]


LEVELLED = [
    ("implicit_prompt", WARNED[0][1], "PROMPT_MISMATCH_WS"),
    (STRINGS, GOOD | {"chosen": "\u202e4"}, "BIDI_OVERRIDE"),
    (
        STRINGS,
        GOOD | {"prompt": "Q", "score_chosen": 1, "score_rejected": 2},
        "SCORE_CONTRADICTS_LABEL",
    ),
    ("messages", MESSAGES | {"prompt": [Q, Q]}, "ROLE_ORDER"),
]


@pytest.mark.parametrize(("format_name", "row", "code"), LEVELLED)
def test_recipe_sets_what_a_code_leads_to(
    format_name: str, row: dict[str, Any], code: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "data.jsonl", jsonl([row, row]))
    outcomes = {
        level: validate(tmp_path / level, file, format=format_name, rules={code: level})
        for level in ("off", "warn", "reject")
    }
    assert [pair["warnings"] for pair in outcomes["off"].pairs] == [[], []]
    assert [pair["warnings"] for pair in outcomes["warn"].pairs] == [[code], [code]]
    assert outcomes["warn"].counts.warnings == {code: 2}
    assert outcomes["reject"].pairs == []
    assert outcomes["reject"].counts.reasons == {code: 2}


@pytest.mark.parametrize(
    ("thresholds", "row", "code"),
    [
        ({"max_text_chars": 3}, GOOD | {"prompt": "Q", "chosen": "four"}, "FIELD_TOO_LONG"),
        ({"max_name_bytes": 4}, GOOD | {"source": "sport"}, "SOURCE_UNSAFE_NAME"),
        (
            {"near_jaccard": 0.9},
            GOOD | {"chosen": words(20), "rejected": words(20, start=1)},
            "CHOSEN_NEAR_REJECTED",
        ),
        (
            {"repeated_share": 0.29},
            GOOD | {"chosen": f"{words(70)} {SENTENCE * 3}"},
            "REPETITION",
        ),
    ],
)
def test_threshold_moves_where_its_rule_begins(
    thresholds: dict[str, float], row: dict[str, Any], code: str
) -> None:
    """Each of these rows passes with the default threshold."""
    view = PairView(convert_row(row, STRINGS))
    assert PairRules({}, Thresholds()).check(view) == ([], [])
    rejections, warnings = PairRules({}, Thresholds(**thresholds)).check(view)  # type: ignore[arg-type]
    assert [finding.code for finding in rejections + warnings] == [code]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from([SENTENCE, "a ", "b c ", words(5) + " "]), max_size=12),
    share=st.sampled_from([0.1, 0.3, 0.7]),
)
def test_repetition_is_found_exactly_where_plain_counting_finds_it(
    parts: list[str], share: float
) -> None:
    """The oracle counts every run of ten from left to right, without a screen."""
    text = "".join(parts) or "x"
    tokens = text.split()
    covered = 0
    for begin in range(len(tokens) - 9):
        run, at, count = tokens[begin : begin + 10], 0, 0
        while at <= len(tokens) - 10:
            is_run = tokens[at : at + 10] == run
            count += is_run
            at += 10 if is_run else 1
        covered = max(covered, count * 10 if count >= 3 else 0)
    draft = convert_row(GOOD | {"rejected": text}, STRINGS)
    _, warnings = PairRules({}, Thresholds(repeated_share=share)).check(PairView(draft))
    assert (warnings != []) == (covered > share * len(tokens))


def test_off_is_what_yaml_reads_as_false() -> None:
    block = yaml.safe_load("{inputs: [a], rules: {REPETITION: off, TIE: warn}}")
    config = parse_config(ValidateConfig, block, path="stages.validate")
    assert config.rules == {"REPETITION": "off", "TIE": "warn"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"REPETITON": "warn"}, "no such code: REPETITON. Did you mean REPETITION? "),
        ({"NOTHING_LIKE_IT": "warn"}, "Those that have a level are PROMPT_COLUMN_UNREAD, "),
        ({"JSON_INVALID": "off"}, "JSON_INVALID always leads to reject, because such a row never"),
        ({"CHOSEN_EMPTY": "warn"}, "CHOSEN_EMPTY always leads to reject, because later stages"),
        ({"PAIR_DROPPED": "off"}, "PAIR_DROPPED always leads to warn, because"),
        ({"TIE": "fatal"}, "stages.validate.rules.TIE: "),
    ],
)
def test_mistake_about_a_level_is_named(rules: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(ValidateConfig, {"inputs": ["a"], "rules": rules}, path="stages.validate")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("I cannot assist with that.", True),
        ("Sorry, but I can't help you with this.", True),
        ("I am unable to provide that.", True),
        ("I'm a large language model, so no.", True),
        ("I cannot agree more.", False),
        ("I can help you.", False),
        ("A language model predicts words.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_set_phrases(text: str, is_refusal: bool) -> None:
    assert (find_refusal(text) is not None) is is_refusal


PIECES = [
    "",
    " ",
    "4",
    "é",
    "\0",
    "\x1b",
    "\u202e",
    "\u2067",
    "\ufffd",
    "As an AI",
    "<|x|>",
    "<s>",
    "##",
]
PIECES += [
    "Human:",
    "\n\nHuman:",
    "### User:",
    "[INST]",
    "../",
    "ha " * 30,
    SENTENCE * 3,
    words(41),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
SPEAKERS = st.sampled_from(["user", "assistant", "tool", "system"])
CALLS = [{"id": "c", "name": "f", "arguments": {}}]
SPOKEN = st.lists(
    st.fixed_dictionaries(
        {"role": SPEAKERS, "content": TEXTS},
        optional={
            "reasoning": TEXTS,
            "tool_calls": st.just(CALLS),
            "tool_call_id": st.sampled_from(["c", "d"]),
        },
    ),
    max_size=3,
)
NUMBERS = st.none() | st.sampled_from([0, 1, -1, float("nan")])
DRAFTS = st.fixed_dictionaries(
    {"prompt": SPOKEN, "chosen": SPOKEN, "rejected": SPOKEN},
    optional={
        "source": TEXTS,
        "id": TEXTS,
        "tools": st.just(SEARCH),
        "margin": NUMBERS,
        "score_chosen": NUMBERS,
        "weight": NUMBERS,
    },
).map(lambda row: convert_row(row, "messages"))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(draft=DRAFTS)
def test_no_screen_spares_a_pair_that_breaks_its_rule(draft: PairDraft) -> None:
    view, thresholds = PairView(draft), Thresholds()
    for code, rule in RULES.items():
        if rule.screen is not None and not rule.screen(view, thresholds):
            assert list(rule.check(view, thresholds)) == [], code


def test_detail_never_exceeds_its_column_and_shows_no_control_characters(tmp_path: Path) -> None:
    row = {"prompt": "Q", **{f"column {at}\x1b[31m": at for at in range(500)}}
    file = write(tmp_path / "data.jsonl", jsonl([row]))
    (rejected,) = validate(tmp_path / "out", file, format=STRINGS).rejected
    assert len(rejected["detail"]) <= 500
    assert rejected["detail"].isprintable()
