"""NaN, which libraries write for a missing cell, is null wherever no number belongs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.validate.running import GOOD, Row, jsonl, validate, write

NAN = float("nan")
Write = Callable[[Path, list[Row]], Path]


def write_lines(folder: Path, rows: list[Row]) -> Path:
    return write(folder / "a.jsonl", jsonl(rows))


def write_array(folder: Path, rows: list[Row]) -> Path:
    return write(folder / "a.json", json.dumps(rows, indent=1).encode())


def write_table(folder: Path, rows: list[Row]) -> Path:
    return write(folder / "a.json", json.dumps({"data": rows}).encode())


def write_parquet(folder: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


WRITERS = pytest.mark.parametrize("written", [write_lines, write_array, write_table, write_parquet])


@WRITERS
def test_nan_where_text_belongs_is_null(written: Write, tmp_path: Path) -> None:
    names = ["system", "tools", "history", "image", "context", "chat_template_kwargs"]
    names += ["rejected_tools", "source", "id", "source_id", "note"]
    missing = GOOD | dict.fromkeys(names, NAN)
    absent = {**GOOD}
    (tmp_path / "b").mkdir()
    outcome = validate(tmp_path / "out", written(tmp_path, [missing] * 2))
    plain = validate(tmp_path / "plain", written(tmp_path / "b", [absent] * 2))
    assert outcome.rejected == []
    for pair, expected in zip(outcome.pairs, plain.pairs, strict=True):
        assert pair == expected | {"source_file": pair["source_file"]}


@WRITERS
@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"score_chosen": NAN, "score_rejected": 1.0}, "SCORE_NONFINITE"),
        ({"margin": NAN}, "SCORE_NONFINITE"),
        ({"weight": NAN}, "WEIGHT_INVALID"),
        ({"score_chosen": float("inf"), "score_rejected": 1.0}, "SCORE_NONFINITE"),
    ],
)
def test_nan_where_a_number_belongs_rejects_the_row(
    columns: Row, code: str, written: Write, tmp_path: Path
) -> None:
    outcome = validate(tmp_path / "out", written(tmp_path, [GOOD | columns] * 2))
    assert [row["code"] for row in outcome.rejected] == [code] * 2


@pytest.mark.parametrize("written", [write_lines, write_array, write_table])
def test_nan_as_an_answer_or_a_label_is_a_missing_one(written: Write, tmp_path: Path) -> None:
    file = written(tmp_path, [GOOD, GOOD | {"chosen": NAN}, GOOD])
    outcome = validate(tmp_path / "out", file, format="prompt_completion_strings")
    assert [(row["code"], row["field"]) for row in outcome.rejected] == [("FIELD_NULL", "chosen")]
    battle = {"prompt": "Q", "left": "A", "right": "B", "winner": "left"}
    column_map = {"prompt": "prompt", "response_a": "left", "response_b": "right"}
    labels = {"label": "winner", "label_a": ["left"], "label_b": ["right"]}
    file = written(tmp_path, [battle, battle | {"winner": NAN}, battle | {"left": NAN}])
    outcome = validate(tmp_path / "map", {"path": str(file), "map": column_map | labels})
    assert len(outcome.pairs) == 1
    assert [row["code"] for row in outcome.rejected] == ["LABEL_MISSING", "FIELD_NULL"]


def test_nan_in_a_message_is_an_absent_field(tmp_path: Path) -> None:
    message = {"role": "assistant", "tool_calls": NAN, "name": NAN, "reasoning": NAN}
    row = {
        "prompt": [{"role": "user", "content": "Q", "name": NAN}],
        "chosen": [message | {"content": "A"}],
        "rejected": [message | {"content": "B"}],
    }
    (pair,) = validate(tmp_path / "out", write_lines(tmp_path, [row])).pairs
    assert pair["warnings"] == []
    assert pair["chosen"][0]["content"] == "A"
    assert {pair["chosen"][0][name] for name in ("tool_calls", "name", "reasoning")} == {None}


def test_nan_that_a_template_would_print_is_refused(tmp_path: Path) -> None:
    """As null it would be another argument than the data's."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": NAN}}}
    row: Row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "B"}],
    }
    tools = {"tools": [{"name": "f", "parameters": {"default": NAN}}]}
    as_text = {"tools": '[{"name": "f", "parameters": {"default": NaN}}]'}
    for at, bad in enumerate((row, GOOD | tools, GOOD | as_text)):
        outcome = validate(tmp_path / str(at), write_lines(tmp_path, [bad]))
        assert [rejected["code"] for rejected in outcome.rejected] == ["TOOLS_INVALID_JSON"]


def test_columns_that_nothing_reads_keep_what_json_can_hold(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"x": float("inf"), "y": NAN, "z": {"w": [1.5, -float("inf")]}}
    for written in (write_lines, write_parquet):
        (pair,) = validate(tmp_path / written.__name__, written(tmp_path, [GOOD | columns])).pairs
        assert json.loads(pair["extra"]) == {"x": "Infinity", "z": {"w": [1.5, "-Infinity"]}}
