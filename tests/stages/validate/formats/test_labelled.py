"""A label prefers the answer that its data set means; a label without meaning is refused."""

from pathlib import Path
from typing import Any

import pytest

from stages.validate.findings import RowFault
from tests.stages.validate.formats.test_pairs import EXAMPLES, PKU
from tests.stages.validate.running import convert_row, jsonl, validate, write

Row = dict[str, Any]

# Format; the labels that prefer the first and the second answer; their margins.
LABELS: list[tuple[str, Row, Row, float | None, float | None]] = [
    ("shp", {"labels": 1, "score_A": 9, "score_B": 2}, {"labels": 0}, 7.0, 39.0),
    ("helpsteer2", {"preference_strength": -3}, {"preference_strength": 1}, 3.0, 1.0),
    ("helpsteer3", {"overall_preference": -1}, {"overall_preference": 3}, 1.0, 3.0),
    ("arena_battles", {"winner": "model_a"}, {"winner": "model_b"}, None, None),
    (
        "arena_kaggle",
        {"winner_model_a": 1, "winner_model_b": 0},
        {"winner_model_a": 0, "winner_model_b": 1},
        None,
        None,
    ),
    ("pku_safe_rlhf_helpful", {"better_response_id": 0}, {"better_response_id": 1}, None, None),
    ("pku_safe_rlhf_safe", {"safer_response_id": 0}, {"safer_response_id": 1}, None, None),
    # 2 * |1.25 - 1.5| and 2 * |2 - 1.5|
    ("alpaca_eval", {"preference": 1.25}, {"preference": 2}, 0.5, 1.0),
    (
        "halos_feedback",
        {"label": 1, "reward_A": 3, "reward_B": 1},
        {"label": 0, "reward_A": 1, "reward_B": 1.5},
        2.0,
        0.5,
    ),
]
FIRST = {
    "helpsteer2": "Yes, please.",
    "arena_kaggle": "Yes, please.",
    "halos_feedback": "Yes, please.",
}
"""The first answer of each example; in the other formats it is No."""


def example(name: str) -> Row:
    return PKU if name.startswith("pku") else EXAMPLES[name]


@pytest.mark.parametrize(
    ("name", "first", "second", "margin_first", "margin_second"), LABELS, ids=lambda v: str(v)[:40]
)
def test_label_decides_which_answer_is_chosen(
    name: str, first: Row, second: Row, margin_first: float | None, margin_second: float | None
) -> None:
    one, other = (convert_row(example(name) | label, name) for label in (first, second))
    assert one.chosen[0]["content"] == FIRST.get(name, "No.")
    assert (one.prompt, one.chosen, one.rejected) == (other.prompt, other.rejected, other.chosen)
    assert (one.margin, other.margin) == (margin_first, margin_second)


@pytest.mark.parametrize(
    ("name", "label", "code", "field"),
    [
        ("shp", {"labels": None}, "LABEL_MISSING", "labels"),
        ("shp", {"labels": 2}, "LABEL_INVALID", "labels"),
        ("shp", {"labels": True}, "LABEL_INVALID", "labels"),
        ("helpsteer2", {"preference_strength": 0}, "TIE", "preference_strength"),
        ("helpsteer2", {"preference_strength": None}, "LABEL_MISSING", "preference_strength"),
        ("helpsteer2", {"preference_strength": 4}, "LABEL_INVALID", "preference_strength"),
        ("helpsteer2", {"preference_strength": "much"}, "LABEL_INVALID", "preference_strength"),
        ("helpsteer2", {"preference_strength": " "}, "LABEL_MISSING", "preference_strength"),
        ("helpsteer3", {"overall_preference": 0}, "TIE", "overall_preference"),
        ("helpsteer3", {"overall_preference": float("nan")}, "LABEL_MISSING", "overall_preference"),
        ("arena_battles", {"winner": "tie"}, "TIE", "winner"),
        ("arena_battles", {"winner": "tie (bothbad)"}, "TIE", "winner"),
        ("arena_battles", {"winner": "both_bad"}, "TIE", "winner"),
        ("arena_battles", {"winner": "model_c"}, "LABEL_INVALID", "winner"),
        ("arena_battles", {"winner": None}, "LABEL_MISSING", "winner"),
        ("arena_battles", {"winner": ["model_a"]}, "LABEL_INVALID", "winner"),
        ("arena_kaggle", {"winner_model_a": 0, "winner_tie": 1}, "TIE", "winner_tie"),
        ("arena_kaggle", {"winner_model_a": 0}, "LABEL_INVALID", "winner_model_a"),
        ("arena_kaggle", {"winner_model_b": 1}, "LABEL_INVALID", "winner_model_a"),
        ("arena_kaggle", {"winner_model_b": None}, "LABEL_MISSING", "winner_model_b"),
        ("arena_kaggle", {"winner_model_b": 0.5}, "LABEL_INVALID", "winner_model_b"),
        ("arena_kaggle", {"winner_model_b": "yes"}, "LABEL_INVALID", "winner_model_b"),
        ("arena_kaggle", {"winner_model_a": ""}, "LABEL_MISSING", "winner_model_a"),
        ("arena_kaggle", {"prompt": "Tea?"}, "SCHEMA_MISMATCH", "prompt"),
        ("arena_kaggle", {"response_b": "[null]"}, "FIELD_NULL", "response_b.0"),
        ("arena_kaggle", {"response_b": '["No.", "No!"]'}, "SCHEMA_MISMATCH", "response_b"),
        ("pku_safe_rlhf_helpful", {"better_response_id": -1}, "TIE", "better_response_id"),
        ("pku_safe_rlhf_safe", {"safer_response_id": None}, "LABEL_MISSING", "safer_response_id"),
        ("alpaca_eval", {"preference": 1.5}, "TIE", "preference"),
        ("alpaca_eval", {"preference": 0}, "TIE", "preference"),
        ("alpaca_eval", {"preference": None}, "LABEL_MISSING", "preference"),
        ("alpaca_eval", {"preference": 2.5}, "LABEL_INVALID", "preference"),
        ("alpaca_eval", {"preference": "N/A"}, "LABEL_MISSING", "preference"),
        ("halos_feedback", {"label": 0.5}, "TIE", "label"),
        ("halos_feedback", {"label": None}, "LABEL_MISSING", "label"),
        ("halos_feedback", {"label": -1}, "LABEL_INVALID", "label"),
        ("rejected_list", {"rejected": ["No.", None]}, "FIELD_NULL", "rejected.1"),
        ("distilabel_generations", {"ratings": [1, 2]}, "SCHEMA_MISMATCH", "ratings"),
        ("distilabel_generations", {"ratings": "[1, null, 3]"}, "LABEL_MISSING", "ratings.1"),
        ("distilabel_orca", {"status": "tie"}, "TIE", "status"),
        (
            "swift_messages",
            {"rejected_tools": [{"name": "f"}]},
            "PROMPT_MISMATCH",
            "rejected_tools",
        ),
    ],
)
def test_row_whose_label_says_nothing_is_refused(
    name: str, label: Row, code: str, field: str
) -> None:
    with pytest.raises(RowFault) as caught:
        convert_row(example(name) | label, name)
    assert (caught.value.finding.code, caught.value.finding.field) == (code, field)


@pytest.mark.parametrize("cell", ["", None])
@pytest.mark.parametrize(
    ("name", "label"), [("arena_kaggle", "winner_model_a"), ("arena_responses", "winner")]
)
def test_empty_cells_of_a_label_do_not_hide_the_layout(
    name: str, label: str, cell: str | None, tmp_path: Path
) -> None:
    rows = [EXAMPLES[name] | {label: cell}, EXAMPLES[name]]
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(rows)))
    assert list(outcome.summary["formats"].values()) == [name]
    assert [row["code"] for row in outcome.rejected] == ["LABEL_MISSING"]


def test_conversations_whose_history_differs_have_no_common_prompt() -> None:
    def talk(first: str, last: str) -> list[Row]:
        roles = ("user", "assistant", "user", "assistant")
        texts = ("Hi", first, "Tea?", last)
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]

    row = EXAMPLES["arena_battles"] | {
        "conversation_a": talk("Hello!", "Yes"),
        "conversation_b": talk("Howdy!", "No"),
    }
    with pytest.raises(RowFault) as caught:
        convert_row(row, "arena_battles")
    assert caught.value.finding.code == "PROMPT_MISMATCH"


def test_shp_scores_that_contradict_the_label_are_kept_for_the_rule() -> None:
    draft = convert_row(EXAMPLES["shp"] | {"labels": 1}, "shp")
    assert (draft.score_chosen, draft.score_rejected, draft.margin) == (13.0, 52.0, -39.0)
