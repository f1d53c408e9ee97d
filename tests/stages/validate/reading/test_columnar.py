"""Every type of Parquet and Arrow gives a value or a rejected row, and never a crash."""

import decimal
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import DataError
from stages.validate.findings import Finding
from stages.validate.reading import read_rows, sniff_container, whole_file
from tests.stages.validate.running import find_files, validate

BAD_TEXT = pa.array([b"ok", b"\xff"]).view(pa.string())


def write_parquet(path: Path, batch: pa.RecordBatch) -> None:
    pq.write_table(pa.Table.from_batches([batch]), path)


def write_stream(path: Path, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(str(path), batch.schema) as writer:
        writer.write_batch(batch)


Write = Callable[[Path, pa.RecordBatch], None]


def read_columns(write: Write, folder: Path, **columns: pa.Array) -> list[dict[str, Any] | Finding]:
    write(folder / "a", pa.record_batch(columns))
    (file,) = find_files(folder / "a")
    rows = list(read_rows(whole_file(file, sniff_container(file))))
    assert [row.number for row in rows] == list(range(len(rows)))
    for row in rows:
        row.excerpt()
    return [row.content for row in rows]


def extended(type_: pa.DataType, values: list[Any]) -> pa.Array:
    """Return an array of an extension type, from values of its storage."""
    storage = pa.array(values, type_.storage_type)
    return pa.ExtensionArray.from_storage(type_, storage)


def nan_as_null(value: Any) -> Any:
    """Replace NaN, which equals nothing."""
    if isinstance(value, dict):
        return {name: nan_as_null(item) for name, item in value.items()}
    return None if value != value else value


def list_view(values: pa.Array, *, is_large: bool = False) -> pa.Array:
    """Return a list view with one value in each list."""
    index = pa.array(range(len(values)), pa.int64() if is_large else pa.int32())
    ones = pa.array([1] * len(values), index.type)
    view = pa.LargeListViewArray if is_large else pa.ListViewArray
    return view.from_arrays(index, ones, values)


@pytest.mark.parametrize("write", [write_parquet, write_stream])
@pytest.mark.parametrize(
    ("column", "first"),
    [
        (list_view(pa.array(["a"])), ["a"]),
        (list_view(pa.array(["a"]), is_large=True), ["a"]),
        (pa.array([0], pa.timestamp("s", "+07:30")), "1970-01-01T07:30:00+07:30"),
        (pa.array([1001], pa.timestamp("ns")), "1970-01-01T00:00:00.000001001"),
        (pa.array([1], pa.time64("us")), "00:00:00.000001"),
        (pa.array([1], pa.duration("s")), "0:00:01"),
        (pa.array([decimal.Decimal(10) ** 60], pa.decimal256(76, 2)), 1e60),
        (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        (pa.array([b"a"], pa.binary(1)), "a"),
        (pa.array([b"a"], pa.binary_view()), "a"),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), {"k": 1}),
        (pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())), [["k", 1], ["k", 2]]),
        (pa.array([[(5, "v")]], pa.map_(pa.int64(), pa.string())), [[5, "v"]]),
        (pa.nulls(1), None),
        (extended(pa.json_(), ['{"b": [1, null], "a": NaN}']), {"b": [1, None], "a": None}),
        (extended(pa.json_(), ['"text"']), "text"),
        (extended(pa.json_(), ["not JSON"]), "not JSON"),
        (extended(pa.uuid(), [b"\0" * 15 + b"\7"]), "00000000-0000-0000-0000-000000000007"),
        (extended(pa.bool8(), [2]), True),
        (extended(pa.fixed_shape_tensor(pa.int8(), (2, 2)), [[1, 2, 3, 4]]), [1, 2, 3, 4]),
        (extended(pa.opaque(pa.string(), "point", "database"), ["1,2"]), "1,2"),
        (pa.array(["a"]).dictionary_encode(), "a"),
        (pa.array(["a"], pa.large_string()), "a"),
        (pa.array([decimal.Decimal(10) ** 20], pa.decimal128(38, 0)), 10**20),
        (pa.array([1.5], pa.float16()), 1.5),
        (pa.array([b"\xff\0"]), {"num_bytes": 2, "sha256": hashlib.sha256(b"\xff\0").hexdigest()}),
        (pa.array([[{"bytes": b"ok"}]]), [{"bytes": "ok"}]),
    ],
)
def test_type_is_read_as_json_would_have_held_it(
    column: pa.Array, first: object, write: Write, tmp_path: Path
) -> None:
    (row,) = read_columns(write, tmp_path, c=column)
    assert isinstance(row, dict)
    assert nan_as_null(row["c"]) == first
    nested = pa.StructArray.from_arrays([column], names=["in"])
    (row,) = read_columns(write, tmp_path, c=nested)
    assert isinstance(row, dict)
    assert nan_as_null(row["c"]) == {"in": first}


def test_types_that_only_arrow_has_are_read(tmp_path: Path) -> None:
    names = ["a", "b"]
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["x"]))
    members = [pa.array(["x", None]), pa.array([None, b"\xff"])]
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), members, names)
    interval = pa.array([(1, 2, 3)] * 2, pa.month_day_nano_interval())
    first, second = read_columns(write_stream, tmp_path, r=runs, u=union, i=interval)
    digest = {"num_bytes": 1, "sha256": hashlib.sha256(b"\xff").hexdigest()}
    assert first == {"r": "x", "u": "x", "i": [1, 2, 3]}
    assert second == {"r": "x", "u": digest, "i": [1, 2, 3]}


def test_json_column_holds_messages_and_calls_as_datasets_writes_them(tmp_path: Path) -> None:
    """`Json()` columns of `datasets` are arrow.json, also inside messages."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": "ø"}}}
    calls = extended(pa.json_(), [json.dumps(call)])
    message = pa.StructArray.from_arrays(
        [pa.array(["assistant"]), pa.array([""]), pa.ListArray.from_arrays([0, 1], calls)],
        names=["role", "content", "tool_calls"],
    )
    table = pa.table(
        {
            "prompt": extended(pa.json_(), ['[{"role": "user", "content": "Q"}]']),
            "chosen": pa.ListArray.from_arrays([0, 1], message),
            "rejected": extended(pa.json_(), ['[{"role": "assistant", "content": "B"}]']),
            "tools": pa.ListArray.from_arrays([0, 1], extended(pa.json_(), ['{"name": "f"}'])),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        (pair,) = validate(tmp_path / f"{path.name}.out", path).pairs
        assert pair["prompt"][0]["content"] == "Q"
        assert json.loads(pair["chosen"][0]["tool_calls"]) == [call]
        assert json.loads(pair["tools"]) == [{"name": "f"}]


def test_integers_beyond_64_bits_are_named_and_not_damage(tmp_path: Path) -> None:
    frame = pl.DataFrame({"prompt": ["Q"], "n": pl.Series([2**70], dtype=pl.Int128)})
    frame.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a column of a type that cannot be read"):
        validate(tmp_path / "out", tmp_path / "a.parquet")


@pytest.mark.parametrize("write", [write_parquet, write_stream])
@pytest.mark.parametrize(
    ("column", "code"),
    [
        (pa.array([0, 2**62]).view(pa.duration("s")), "VALUE_UNREADABLE"),
        (pa.array([0, 2**62]).view(pa.timestamp("ms")), "VALUE_UNREADABLE"),
        (pa.array([0, 2**31 - 1], pa.int32()).view(pa.date32()), "VALUE_UNREADABLE"),
        (pa.array([0, 86_400_000 << 30]).view(pa.date64()), "VALUE_UNREADABLE"),
        (pa.StructArray.from_arrays([BAD_TEXT], names=["a"]), "ENCODING_INVALID"),
    ],
)
def test_value_that_cannot_be_held_is_rejected_alone_and_named(
    column: pa.Array, code: str, write: Write, tmp_path: Path
) -> None:
    first, second = read_columns(write, tmp_path, before=pa.array([1, 2]), c=column)
    assert not isinstance(first, Finding)
    assert first["before"] == 1
    assert isinstance(second, Finding)
    assert (second.code, (second.field or "").split(".")[0]) == (code, "c")


def test_text_in_list_views_that_is_not_utf8_is_rejected_alone(tmp_path: Path) -> None:
    """Arrow cannot cast a view, so this is found row by row."""
    for is_large in (False, True):
        column = list_view(BAD_TEXT, is_large=is_large)
        first, second = read_columns(write_parquet, tmp_path, c=column)
        assert first == {"c": ["ok"]}
        assert isinstance(second, Finding)
        assert (second.code, second.field) == ("ENCODING_INVALID", "c")


@pytest.mark.parametrize("write", [write_parquet, write_stream])
def test_name_used_twice_is_rejected(write: Write, tmp_path: Path) -> None:
    """As with JSON's duplicate keys, readers disagree on which of the two counts."""
    column = pa.array(["x"])
    batch = pa.RecordBatch.from_arrays([column, pa.array(["y"])], names=["c", "c"])
    write(tmp_path / "columns", batch)
    inner = pa.StructArray.from_arrays([column, column], names=["a", "a"])
    write(tmp_path / "struct", pa.record_batch({"c": inner}))
    for name, code, held in (
        ("columns", "JSON_DUPLICATE_KEY", [b"'x'", b"'y'"]),
        ("struct", "VALUE_UNREADABLE", [b'"x"']),
    ):
        (file,) = find_files(tmp_path / name)
        (row,) = read_rows(whole_file(file, sniff_container(file)))
        assert isinstance(row.content, Finding)
        assert (row.content.code, row.content.field) == (code, "c")
        raw, _ = row.excerpt()
        assert all(text in raw for text in held)
