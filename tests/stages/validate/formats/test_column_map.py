"""A column map reads pairs from any table, and a map that does not fit is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from schemas.config import parse_config
from schemas.errors import ConfigError
from stages.validate.config import ValidateConfig
from stages.validate.findings import RowFault
from stages.validate.formats.column_map import MAP, ColumnMap
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.formats.row_reader import RowReader
from tests.stages.validate.running import jsonl, spoken, validate, write

Row = dict[str, Any]


def convert(row: Row, **places: Any) -> list[PairDraft]:
    return RowReader(format=MAP, column_map=ColumnMap(**places)).read(row)


def said(draft: PairDraft) -> tuple[str | None, str | None, str | None]:
    """Return the last text of prompt, chosen and rejected."""
    prompt, chosen, rejected = (
        side[-1]["content"] for side in (draft.prompt, draft.chosen, draft.rejected)
    )
    return prompt, chosen, rejected


def test_dotted_paths_reach_into_objects_and_lists() -> None:
    row = {
        "task": {"q": {"text": "Tea?"}},
        "a.b": "No.",
        "meta": {"quality": 1, "from": "web"},
        "answers": [{"text": "Yes."}],
    }
    before = copy.deepcopy(row)
    (draft,) = convert(
        row,
        prompt="task.q.text",
        chosen="answers.0.text",
        rejected="a.b",
        source="meta.from",
    )
    assert said(draft) == ("Tea?", "Yes.", "No.")
    assert draft.source == "web"
    # Taken values are removed; lists from which an item was taken are kept whole.
    assert draft.extra == '{"answers":[{"text":"Yes."}],"meta":{"quality":1}}'
    assert row == before


def test_template_puts_a_prompt_together_and_evaluates_nothing() -> None:
    row = {"q": "{x} {{ 7*7 }}", "meta": {"topic": "maths"}, "c": "49", "r": "48"}
    (draft,) = convert(row, prompt_template="{meta.topic}: {q} {{}}", chosen="c", rejected="r")
    assert said(draft)[0] == "maths: {x} {{ 7*7 }} {}"


def test_places_may_hold_messages() -> None:
    row = {
        "talk": [{"from": "human", "value": "Tea?"}],
        "good": {"role": "assistant", "content": "Yes."},
        "bad": [{"role": "assistant", "content": "No."}],
        "sys": "Be kind.",
    }
    (draft,) = convert(row, prompt="talk", system="sys", chosen="good", rejected="bad")
    assert spoken(draft.prompt) == [("system", "Be kind."), ("user", "Tea?")]
    assert said(draft) == ("Tea?", "Yes.", "No.")


@pytest.mark.parametrize(
    ("label", "chosen"),
    [("left", "A"), ("right", "B"), (1, "A"), ("1", "A"), (1.0, "A"), (2, "B")],
)
def test_labels_mean_what_the_map_says(label: object, chosen: str) -> None:
    row = {"q": "Q", "one": "A", "two": "B", "winner": label}
    (draft,) = convert(
        row,
        prompt="q",
        response_a="one",
        response_b="two",
        label="winner",
        label_a=["left", 1],
        label_b=["right", 2],
        label_tie=["same"],
    )
    assert draft.chosen[0]["content"] == chosen


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("same", "TIE"),
        (None, "LABEL_MISSING"),
        ("middle", "LABEL_INVALID"),
        (True, "LABEL_INVALID"),
    ],
)
def test_labels_that_decide_nothing_are_refused(label: object, code: str) -> None:
    row = {"q": "Q", "one": "A", "two": "B", "winner": label}
    with pytest.raises(RowFault) as caught:
        convert(
            row,
            prompt="q",
            response_a="one",
            response_b="two",
            label="winner",
            label_a=["left", 1],
            label_b=["right"],
            label_tie=["same"],
        )
    assert (caught.value.finding.code, caught.value.finding.field) == (code, "winner")


@pytest.mark.parametrize(
    ("higher_is_better", "chosen", "scores"),
    [(True, "B", (3.5, 2.0)), (False, "A", (-2.0, -3.5))],
)
def test_scores_decide_where_there_is_no_label(
    higher_is_better: bool, chosen: str, scores: tuple[float, float]
) -> None:
    row = {"q": "Q", "one": "A", "two": "B", "s1": 2, "s2": "3.5"}
    (draft,) = convert(
        row,
        prompt="q",
        response_a="one",
        response_b="two",
        score_a="s1",
        score_b="s2",
        higher_is_better=higher_is_better,
    )
    assert draft.chosen[0]["content"] == chosen
    assert (draft.score_chosen, draft.score_rejected, draft.margin) == (*scores, 1.5)
    with pytest.raises(RowFault) as caught:
        convert(
            row | {"s2": 2},
            prompt="q",
            response_a="one",
            response_b="two",
            score_a="s1",
            score_b="s2",
        )
    assert caught.value.finding.code == "TIE"


@pytest.mark.parametrize(
    ("row", "places"),
    [
        ({"outs": [{"t": "A", "s": 1}, {"t": "B", "s": 2}]}, {"response": "t", "score": "s"}),
        ({"outs": ["A", "B"], "losses": [2, 1]}, {"score": "losses", "higher_is_better": False}),
    ],
)
def test_lists_of_responses_become_pairs(row: Row, places: Row) -> None:
    (draft,) = convert({"q": "Q"} | row, prompt="q", responses="outs", **places)
    assert said(draft) == ("Q", "B", "A")


def test_texts_that_hold_prompt_and_answer_are_split_where_the_user_says() -> None:
    """They are split at the last separator, because the prompt's examples may contain it too."""
    row = {"chosen": "Q: 1+1 A: 2 Q: 2+2 A: 4", "rejected": "Q: 1+1 A: 2 Q: 2+2 A: 5"}
    (draft,) = convert(row, chosen="chosen", rejected="rejected", separator=" A: ")
    assert said(draft) == ("Q: 1+1 A: 2 Q: 2+2", "4", "5")
    with pytest.raises(RowFault) as caught:
        convert(row, chosen="chosen", rejected="rejected", separator="###")
    assert caught.value.finding.code == "SCHEMA_MISMATCH"
    with pytest.raises(RowFault) as caught:
        convert(
            row | {"rejected": "Q: 3+3 A: 5"},
            chosen="chosen",
            rejected="rejected",
            separator=" A: ",
        )
    assert caught.value.finding.code == "PROMPT_MISMATCH"


def test_other_places_are_taken_too() -> None:
    row = {
        "q": "Q",
        "c": "A",
        "r": "B",
        "gap": "0.5",
        "w": 2,
        "from": "web",
        "key": 7,
        "fns": '[{"name": "f"}]',
        "quality": 1,
    }
    (draft,) = convert(
        row,
        prompt="q",
        chosen="c",
        rejected="r",
        margin="gap",
        weight="w",
        source="from",
        source_id="key",
        tools="fns",
    )
    assert (draft.margin, draft.weight, draft.source, draft.source_id) == (0.5, 2.0, "web", "7")
    assert (draft.tools, draft.extra) == ('[{"name":"f"}]', '{"quality":1}')


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"c": "A", "r": "B"}, "SCHEMA_MISMATCH", "q"),
        ({"q": None, "c": "A", "r": "B"}, "FIELD_NULL", "q"),
        ({"q": "Q", "c": 5, "r": "B"}, "TYPE_WRONG", "c"),
        ({"q": {"role": "user"}, "c": "A", "r": "B"}, "TYPE_WRONG", "q"),
    ],
)
def test_row_that_does_not_fit_its_map_is_refused(row: Row, code: str, field: str) -> None:
    with pytest.raises(RowFault) as caught:
        convert(row, prompt="q", chosen="c", rejected="r")
    assert (caught.value.finding.code, caught.value.finding.field) == (code, field)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"prompt": "q"}, "name the answers in one way"),
        ({"prompt": "q", "chosen": "c"}, "name the answers in one way"),
        (
            {"prompt": "q", "chosen": "c", "rejected": "r", "responses": "x"},
            "name the answers in one way",
        ),
        ({"chosen": "c", "rejected": "r"}, "name the prompt in one way"),
        (
            {"prompt": "q", "prompt_template": "{q}", "chosen": "c", "rejected": "r"},
            "name the prompt in one way",
        ),
        ({"prompt": "q", "response_a": "a", "response_b": "b"}, "need a label"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "score_a": "s"}, "go together"),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "label": "l", "label_a": [1]},
            "label needs label_a and label_b",
        ),
        (
            {
                "prompt": "q",
                "response_a": "a",
                "response_b": "b",
                "label": "l",
                "label_a": [1],
                "label_b": ["1"],
            },
            "has two meanings",
        ),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "score_a": "s", "score_b": "t"}
            | {"label_tie": [0]},
            "need a label",
        ),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "label": "l"}, "label has no effect"),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "score": "s"}, "score has no effect"),
        ({"prompt": "q", "responses": "x", "score": "s", "score_chosen": "c"}, "has no effect"),
        ({"chosen": "c", "rejected": "r", "separator": "|", "score_chosen": "s"}, "has no effect"),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": "s"}, "go together"),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "label": "l"}
            | {"label_a": [1], "label_b": [2], "label_tie": [1.0]},
            "has two meanings",
        ),
        ({"prompt": "q", "responses": "x"}, "responses need a score"),
        (
            {"prompt": "q", "chosen": "c", "rejected": "r", "separator": "|"},
            "separator goes with",
        ),
        ({"prompt_template": "no place", "chosen": "c", "rejected": "r"}, "no {column}"),
        ({"prompt_template": "{q!r}", "chosen": "c", "rejected": "r"}, "nothing else"),
        ({"prompt_template": "{q", "chosen": "c", "rejected": "r"}, "expected '}'"),
        ({"prompt": "q", "chosen": "c", "rejcted": "r"}, "Did you mean 'rejected'"),
    ],
)
def test_map_that_cannot_be_meant_is_refused_with_the_recipe(places: Row, message: str) -> None:
    recipe = {"inputs": [{"path": "a.jsonl", "map": places}]}
    with pytest.raises(ConfigError) as caught:
        parse_config(ValidateConfig, recipe, path="stages.validate")
    assert message in str(caught.value)
    assert "stages.validate.inputs.0.map" in str(caught.value)


def test_format_beside_a_map_is_refused() -> None:
    block = {"path": "a", "format": "shp", "map": {"prompt": "q", "chosen": "c", "rejected": "r"}}
    with pytest.raises(ConfigError, match="a format or a map, not both"):
        parse_config(ValidateConfig, {"inputs": [block]}, path="stages.validate")


def test_stage_reads_a_mapped_table_and_refuses_a_map_that_no_row_fits(tmp_path: Path) -> None:
    rows = [{"question": "Q", "good": "A", "bad": "B"}, {"question": "Q", "good": "C"}]
    file = write(tmp_path / "table.jsonl", jsonl(rows))
    places = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    outcome = validate(tmp_path / "out", {"path": str(file), "map": places})
    assert outcome.summary["formats"] == {file.as_posix(): MAP}
    assert [pair["source_row"] for pair in outcome.pairs] == [0]
    assert [row["code"] for row in outcome.rejected] == ["SCHEMA_MISMATCH"]
    with pytest.raises(ConfigError) as caught:
        validate(tmp_path / "no", {"path": str(file), "map": places | {"prompt": "questions"}})
    assert "COLUMN_MISSING" in str(caught.value)
    assert "Did you mean 'question'?" in str(caught.value)


def test_an_inputs_own_format_goes_before_the_common_one(tmp_path: Path) -> None:
    swift = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    one = write(tmp_path / "one.jsonl", jsonl([swift | {"rejected_response": "B"}]))
    two = write(tmp_path / "two.jsonl", jsonl([{"prompt": "Q", "chosen": "A", "rejected": "C"}]))
    outcome = validate(
        tmp_path / "out",
        {"path": str(one), "format": "swift_response"},
        two,
        format="prompt_completion_strings",
    )
    assert list(outcome.summary["formats"].values()) == [
        "swift_response",
        "prompt_completion_strings",
    ]
    assert len(outcome.pairs) == 2


MESSAGES = [{"role": "user", "content": "Tea?"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (json.dumps(MESSAGES), json.dumps(ANSWERS[0]), json.dumps(ANSWERS[1][0])),
        (
            {"role": ["user"], "content": ["Tea?"]},
            {"role": ["assistant"], "content": ["Yes."]},
            ANSWERS[1][0],
        ),
    ],
)
def test_messages_may_be_json_text_or_objects_of_lists(
    prompt: object, chosen: object, rejected: object
) -> None:
    row = {"q": prompt, "good": chosen, "bad": rejected}
    (draft,) = convert(row, prompt="q", chosen="good", rejected="bad")
    assert said(draft) == ("Tea?", "Yes.", "No.")


def test_lists_of_answers_and_scores_may_be_json_text() -> None:
    row = {"q": "Tea?", "answers": '["No.", "Yes."]', "scores": '["1", 2.5]'}
    (draft,) = convert(row, prompt="q", responses="answers", score="scores")
    assert said(draft) == ("Tea?", "Yes.", "No.")
    assert (draft.score_chosen, draft.score_rejected) == (2.5, 1.0)


def test_python_notation_is_refused_in_maps_too() -> None:
    row = {"q": "Tea?", "good": repr(ANSWERS[0]), "bad": repr(ANSWERS[1])}
    with pytest.raises(RowFault) as caught:
        convert(row, prompt="q", chosen="good", rejected="bad")
    assert caught.value.finding[:2] == ("NESTED_NOT_JSON", "good")
