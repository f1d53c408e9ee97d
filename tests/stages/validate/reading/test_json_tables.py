"""JSON that is spread over lines, or is one object around all rows, gives its rows."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError, DataError
from stages.validate.findings import Finding
from stages.validate.reading import json_tables, read_rows, sniff_container, whole_file
from tests.stages.validate.running import GOOD, Outcome, find_files, jsonl, validate, write

OTHER = {"prompt": "Q", "chosen": 'A {"b": [', "rejected": "B"}
ROWS = [GOOD, OTHER]
STRINGS = "prompt_completion_strings"
MESSAGES = {
    "prompt": [{"role": "user", "content": "Q"}],
    "chosen": [{"role": "assistant", "content": "A"}],
    "rejected": [{"role": "assistant", "content": "B"}],
}


def contents(path: Path) -> list[dict[str, Any] | Finding]:
    (file,) = find_files(path)
    return [row.content for row in read_rows(whole_file(file, sniff_container(file)))]


def kind(path: Path) -> str:
    return sniff_container(find_files(path)[0]).kind


def said(outcome: Outcome) -> list[str]:
    return [pair["chosen"][0]["content"] for pair in outcome.pairs]


def pretty(*rows: object) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("orient", ["records", "split", "index", "columns", "table"])
def test_table_of_pandas_is_read(orient: Any, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    pd.DataFrame(ROWS).to_json(path, orient=orient, indent=indent)
    outcome = validate(tmp_path / "out", path)
    assert said(outcome) == [row["chosen"] for row in ROWS]
    assert [pair["source_row"] for pair in outcome.pairs] == [0, 1]
    assert outcome.rejected == []


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "value",
    [
        {"data": ROWS},
        {"rows": ROWS},
        {"pairs": ROWS},
        {"version": "1.1", "data": ROWS, "num_rows": 2},
        {"schema": {"fields": ["text"]}, "data": ROWS},
        {name: [row[name] for row in ROWS] for name in GOOD},
        {name: {str(at): row[name] for at, row in enumerate(ROWS)} for name in GOOD},
        {"columns": list(GOOD), "data": [list(row.values()) for row in ROWS]},
        pd.DataFrame(ROWS).to_dict("tight"),
    ],
    ids=lambda value: str(list(value)),
)
def test_object_around_rows_is_read(value: Any, indent: int | None, tmp_path: Path) -> None:
    content = json.dumps(value, indent=indent).encode()
    with_returns = b"\xef\xbb\xbf\r\n" + content.replace(b"\n", b"\r\n")
    for at, written in enumerate((content, with_returns, gzip.compress(content))):
        path = write(tmp_path / str(at), written)
        assert kind(path) == "json table"
        assert contents(path) == ROWS


def test_columns_of_messages_are_read(tmp_path: Path) -> None:
    by_list = {name: [value, value] for name, value in MESSAGES.items()}
    by_row = {name: {"0": value, "1": value} for name, value in MESSAGES.items()}
    for at, value in enumerate((by_list, by_row)):
        path = write(tmp_path / str(at), json.dumps(value).encode())
        assert said(validate(tmp_path / f"{at}.out", path)) == ["A", "A"]


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        MESSAGES,
        {"question": "Q", "data": [{"text": "A", "score": 1}, {"text": "B", "score": 0}]},
        {"messages": MESSAGES["prompt"]},
        {name: messages[0] for name, messages in MESSAGES.items()},
        {n: {"role": [m[0]["role"]], "content": [m[0]["content"]]} for n, m in MESSAGES.items()},
        {"conversations": [{"from": "human", "value": "Q"}]},
        {"a": [{"x": 1}], "b": [{"x": 2}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_single_object_that_is_a_row_stays_one(row: Any, indent: Any, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "a.json", json.dumps(row, indent=indent).encode())) == [row]


def test_rows_of_wrong_length_are_rejected_alone(tmp_path: Path) -> None:
    value = {"columns": list(GOOD), "index": [0, 1], "data": [["Q", "A"], ["Q", "A", "B"]]}
    outcome = validate(tmp_path / "out", write(tmp_path / "a.json", json.dumps(value).encode()))
    assert said(outcome) == ["A"]
    assert [(row["source_row"], row["code"]) for row in outcome.rejected] == [
        (0, "SCHEMA_MISMATCH")
    ]


def test_objects_whose_rows_and_columns_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS, index=["first", "second"])
    for orient in ("index", "columns"):
        frame.to_json(tmp_path / "a.json", orient=orient)
        with pytest.raises(DataError, match=r"told apart.*orient='records', lines=True"):
            validate(tmp_path / "out", tmp_path / "a.json")


def test_values_without_names_and_several_tables_are_refused(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_json(tmp_path / "a.json", orient="values")
    with pytest.raises(DataError, match=r"line 1: JSON_NOT_OBJECT"):
        validate(tmp_path / "out", tmp_path / "a.json")
    path = write(tmp_path / "b.json", json.dumps({"train": ROWS, "test": ROWS}).encode())
    with pytest.raises(ConfigError, match="Columns found: train, test"):
        validate(tmp_path / "out", path)


def test_table_beyond_the_bound_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", json.dumps({"data": ROWS * 500}).encode())
    assert kind(path) == "json table"
    monkeypatch.setattr(json_tables, "MAX_TABLE_BYTES", 10_000)
    with pytest.raises(ConfigError, match="Columns found: data"):
        validate(tmp_path / "out", path)


def test_large_objects_are_recognised_beyond_the_start_of_the_file(tmp_path: Path) -> None:
    """The first object ends after the first 64 KiB, which are all that is looked at otherwise."""
    big = GOOD | {"chosen": "x" * 100_000, "notes": [{"a": 1}]}
    for indent in (None, 2):
        path = write(tmp_path / "t", json.dumps({"data": [big, big]}, indent=indent).encode())
        assert kind(path) == "json table"
        assert contents(path) == [big, big]
    path = write(tmp_path / "o", pretty(big, OTHER).encode())
    assert kind(path) == "json objects"
    assert contents(path) == [big, OTHER]
    path = write(tmp_path / "l", jsonl([big, OTHER]))
    assert kind(path) == "jsonl"


@pytest.mark.parametrize("between", ["", "\n", "\n\n", "\r\n", " "])
def test_pretty_printed_objects_are_read(between: str, tmp_path: Path) -> None:
    text = between.join(json.dumps(row, indent=2) for row in [*ROWS, MESSAGES])
    for at, written in enumerate((text.encode(), gzip.compress(b"\xef\xbb\xbf" + text.encode()))):
        path = write(tmp_path / str(at), written)
        assert kind(path) == "json objects"
        assert contents(path) == [*ROWS, MESSAGES]
    outcome = validate(tmp_path / "out", tmp_path / "0", format=STRINGS, max_pairs=1)
    assert said(outcome) == [GOOD["chosen"]]


def test_pretty_objects_are_not_held_together(tmp_path: Path) -> None:
    row = json.dumps(GOOD | {"x": "y" * 50_000}, indent=2).encode() + b"\n"
    path = write(tmp_path / "a.json", row * 1000)
    (file,) = find_files(path)
    tracemalloc.start()
    num_rows = sum(1 for _ in read_rows(whole_file(file, sniff_container(file))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 1000
    assert peak < len(row) * 1000 / 4


def test_damaged_object_among_pretty_ones_is_rejected_alone(tmp_path: Path) -> None:
    bad = '{\n  "prompt": "Q",\n}'
    for at, texts in enumerate(
        ([bad, pretty(*ROWS)], [pretty(GOOD), bad, pretty(OTHER)], [pretty(*ROWS), bad])
    ):
        path = write(tmp_path / str(at), "\n".join(texts).encode())
        outcome = validate(tmp_path / f"{at}.out", path)
        assert said(outcome) == [row["chosen"] for row in ROWS]
        (rejected,) = outcome.rejected
        assert (rejected["source_row"], rejected["code"]) == (at, "JSON_INVALID")
        assert rejected["raw"] == bad.encode()


def test_pretty_object_that_does_not_end_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", pretty(GOOD, OTHER, GOOD)[:-20].encode())
    with pytest.raises(DataError, match=r"a\.json .* in or after its row 2 \(line 11\)"):
        validate(tmp_path / "out", path)


@pytest.mark.parametrize(
    "first", [b'{"prompt": "a", "cho', b'{"prompt": "a",', b'{"a": {', b'{"prompt":', b"{"]
)
def test_damaged_first_line_leaves_jsonl(first: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([first, GOOD, OTHER]))
    outcome = validate(tmp_path / "out", path)
    assert [(row["source_row"], row["code"]) for row in outcome.rejected] == [(0, "JSON_INVALID")]
    assert said(outcome) == [row["chosen"] for row in ROWS]


def test_lines_that_end_in_commas_stay_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b",\n".join(jsonl([row]).strip() for row in ROWS))
    with pytest.raises(DataError, match=r"read as jsonl: line 1: JSON_INVALID"):
        validate(tmp_path / "out", write(tmp_path / "b.jsonl", path.read_bytes() + b",\n"))
    assert [row["source_row"] for row in validate(tmp_path / "out", path).rejected] == [0]


def test_rows_without_lines_are_named_by_number(tmp_path: Path) -> None:
    column = pa.array(["x"])
    table = pa.Table.from_arrays([column, column], names=["chosen", "chosen"])
    pq.write_table(table, tmp_path / "a.parquet")
    found = r"read as parquet: row 0: JSON_DUPLICATE_KEY \(chosen: names two columns\)"
    with pytest.raises(DataError, match=found):
        validate(tmp_path / "out", tmp_path / "a.parquet")


def test_unreadable_rows_are_named_with_their_lines(tmp_path: Path) -> None:
    lines = [b"{'prompt': 'Q'}", b"", b'{"prompt": "\xff"}', b"[1]"]
    path = write(tmp_path / "a.jsonl", jsonl(lines))
    with pytest.raises(DataError) as caught:
        validate(tmp_path / "out", path)
    message = str(caught.value)
    assert "none of its first 3 rows can be read as jsonl: line 1: JSON_INVALID (" in message
    assert "line 3: ENCODING_INVALID (byte 0xff at 12 is not UTF-8); line 4: JSON_NOT" in message
