"""Lists and messages in another shape are read as themselves, in every layout and container."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.validate.formats import FORMATS
from tests.stages.validate.formats.test_labelled import LABELS, example
from tests.stages.validate.formats.test_pairs import EXAMPLES
from tests.stages.validate.running import Outcome, jsonl, spoken, validate, write

Row = dict[str, Any]


def as_text(row: Row) -> Row:
    """Return a row as a table without types holds it: numbers as text, the rest as JSON text."""
    return {
        name: value if isinstance(value, str) else "" if value is None else json.dumps(value)
        for name, value in row.items()
    }


def write_csv(path: Path, rows: list[Row]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return write(path, text.getvalue().encode())


def turn_lists(value: Any) -> Any:
    """Turn every list of objects with equal keys into an object of lists, as `datasets` did."""
    if isinstance(value, dict):
        return {name: turn_lists(item) for name, item in value.items()}
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, dict) and set(item) == set(value[0]) for item in value):
        return {name: [item[name] for item in value] for name in value[0]}
    return value


def without_extra(outcome: Outcome) -> list[Row]:
    dropped = ("extra", "source", "source_file", "source_id")
    return [{k: v for k, v in pair.items() if k not in dropped} for pair in outcome.pairs]


# A cell with a JSON list of texts cannot be told from an answer.
NOT_IN_CSV = {"llama_factory_outputs", "rejected_list"}


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - NOT_IN_CSV))
def test_a_csv_of_every_layout_gives_the_same_pair(name: str, tmp_path: Path) -> None:
    plain = validate(tmp_path / "a", write(tmp_path / "a.jsonl", jsonl([EXAMPLES[name]])))
    table = validate(tmp_path / "b", write_csv(tmp_path / "b.csv", [as_text(EXAMPLES[name])]))
    assert list(table.summary["formats"].values()) == [name]
    assert without_extra(table) == without_extra(plain)


@pytest.mark.parametrize("name", EXAMPLES)
def test_objects_of_lists_are_read_as_lists_of_objects(name: str, tmp_path: Path) -> None:
    turned = {column: turn_lists(value) for column, value in EXAMPLES[name].items()}
    plain = validate(tmp_path / "a", write(tmp_path / "a.jsonl", jsonl([EXAMPLES[name]])))
    other = validate(tmp_path / "b", write(tmp_path / "b.jsonl", jsonl([turned])))
    assert without_extra(other) == without_extra(plain)


def test_objects_of_lists_are_read_from_parquet(tmp_path: Path) -> None:
    """What `datasets` wrote for a sequence of objects: a struct of lists."""
    sides = {
        side: {"role": ["user", "assistant"], "content": ["Where is Oslo?", answer]}
        for side, answer in (("chosen", "In Norway."), ("rejected", "In Spain."))
    }
    pq.write_table(pa.Table.from_pylist([sides]), tmp_path / "a.parquet")
    (pair,) = validate(tmp_path / "out", tmp_path / "a.parquet").pairs
    assert spoken([*pair["prompt"], *pair["chosen"]]) == [
        ("user", "Where is Oslo?"),
        ("assistant", "In Norway."),
    ]


@pytest.mark.parametrize(("name", "first", "second"), [row[:3] for row in LABELS])
def test_labels_as_text_mean_the_same(name: str, first: Row, second: Row, tmp_path: Path) -> None:
    """Numbers as a table without types spells them: 1, 1.0, or with spaces around."""
    for at, label in enumerate((first, second)):
        plain = example(name) | label
        texts = {
            column: value if isinstance(value, str) else f" {float(value)} "
            for column, value in plain.items()
            if isinstance(value, str | int | float) and column in {*label, *FLAGS}
        }
        outcomes = [
            validate(
                tmp_path / f"{at}{kind}", write(tmp_path / f"{at}.jsonl", jsonl([row])), format=name
            )
            for kind, row in (("plain", plain), ("text", plain | texts))
        ]
        assert without_extra(outcomes[0]) == without_extra(outcomes[1]) != []


FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")


@pytest.mark.parametrize(
    ("text", "score"), [("8.5", 8.5), (" 3 ", 3.0), ("1e1", 10.0), ("", None), ("  ", None)]
)
def test_scores_as_text_are_numbers_and_blank_ones_are_missing(
    text: str, score: float | None, tmp_path: Path
) -> None:
    row = {"prompt": "Where is Oslo?", "chosen": "In Norway.", "rejected": "In Spain."}
    scored = row | {"score_chosen": text, "score_rejected": "1", "weight": "2", "margin": ""}
    (pair,) = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([scored]))).pairs
    assert (pair["score_chosen"], pair["score_rejected"]) == (score, 1.0)
    assert pair["margin"] == (None if score is None else score - 1.0)
    assert (pair["weight"], pair["extra"]) == (2.0, None)


@pytest.mark.parametrize(
    "answer",
    [
        "[1, 2]",
        '{"city": "Oslo"}',
        '[{"name": "Oslo", "country": "Norway"}]',
        '[{"role": "mayor", "content": "Ann"}]',
        '{"role": "user"}',
        '[{"role": "user", "content": "Hi"}] is a list of messages.',
        "[not json",
        "[]",
        "{'city': 'Oslo'}",
    ],
)
def test_an_answer_that_happens_to_be_json_is_text(answer: str, tmp_path: Path) -> None:
    row = {"prompt": "Answer in JSON.", "chosen": answer, "rejected": "No."}
    (pair,) = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([row]))).pairs
    assert spoken(pair["chosen"]) == [("assistant", answer)]


@pytest.mark.parametrize(
    "prompt", ["Where is Oslo?", [{"role": "user", "content": "Where is Oslo?"}]]
)
@pytest.mark.parametrize("names", [("role", "content", "assistant"), ("from", "value", "gpt")])
@pytest.mark.parametrize("is_list", [True, False])
def test_source_text_of_messages_is_parsed(
    prompt: object, names: tuple[str, str, str], is_list: bool, tmp_path: Path
) -> None:
    role, content, speaker = names
    row: Row = {"prompt": prompt if isinstance(prompt, str) else json.dumps(prompt)}
    for side, answer in (("chosen", "In Norway."), ("rejected", "In Spain.")):
        message = {role: speaker, content: answer}
        row[side] = json.dumps([message] if is_list else message)
    for name, file in {
        "csv": write_csv(tmp_path / "a.csv", [row]),
        "jsonl": write(tmp_path / "a.jsonl", jsonl([row])),
    }.items():
        (pair,) = validate(tmp_path / name, file).pairs
        assert spoken(pair["prompt"]) == [("user", "Where is Oslo?")]
        assert spoken(pair["chosen"]) == [("assistant", "In Norway.")]


PYTHON = [
    "[{'role': 'assistant', 'content': 'In Norway.'}]",
    "{'role': 'assistant', 'content': 'In Norway.'}",
    "[{'from': 'gpt', 'value': \"It's in Norway.\"}]",
    "array([{'content': 'In Norway.', 'role': 'assistant'}], dtype=object)",
    "{'role': array(['user', 'assistant']), 'content': array(['Where?', 'In Norway.'])}",
    '[{"role": "assistant", "content": "In Nor',
    '[{"role": "assistant", "content": "a", "content": "b"}]',
]


@pytest.mark.parametrize("source", PYTHON)
@pytest.mark.parametrize("has_prompt", [True, False])
def test_messages_that_are_not_json_are_refused_by_name(
    source: str, has_prompt: bool, tmp_path: Path
) -> None:
    row = {"prompt": "Where is Oslo?", "chosen": source, "rejected": "In Spain."}
    if not has_prompt:
        row = {"chosen": source, "rejected": source.replace("Norway", "Spain")}
    file = write(tmp_path / "a.jsonl", jsonl([row]))
    format_name = "prompt_completion_strings" if has_prompt else "implicit_prompt"
    outcome = validate(tmp_path / "out", file, format=format_name)
    assert [(r["code"], r["field"]) for r in outcome.rejected] == [("NESTED_NOT_JSON", "chosen")]


@pytest.mark.parametrize("name", ["implicit_prompt", "messages", "arena_battles", "nectar"])
def test_a_csv_of_python_notation_says_so(name: str, tmp_path: Path) -> None:
    """What pandas writes for columns of lists: the layout is still recognised."""
    row = {k: v if isinstance(v, str) else repr(v) for k, v in EXAMPLES[name].items()}
    outcome = validate(tmp_path / "out", write_csv(tmp_path / "a.csv", [row]))
    assert list(outcome.summary["formats"].values()) == [name]
    assert [rejected["code"] for rejected in outcome.rejected] == ["NESTED_NOT_JSON"]


def test_every_ranked_list_can_be_json_text() -> None:
    ranked = [name for name in FORMATS if "completions" in FORMATS[name].columns]
    for name in [*ranked, "nectar"]:
        assert FORMATS[name].matches(as_text(EXAMPLES[name]))
