"""Read Parquet and Arrow files as rows."""

import datetime
import decimal
import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ConfigError
from stages.validate.findings import Finding, RowFault
from stages.validate.inputs import InputFile
from stages.validate.messages import Padded
from stages.validate.reading.containers import (
    Container,
    RawRow,
    Split,
    decode_object,
    named_damage,
)
from stages.validate.strict_json import decode_strictly, describe_bad_byte

_BATCH_ROWS = 512
_REJECTED = b"rejected/"
_UNREADABLE = (OverflowError, ValueError)
"""Raised for a date after the year 9999, text that is not UTF-8, a name used twice."""
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_Convert = Callable[[Any, str], Any]


def sniff_parquet(file: InputFile) -> Container:
    """Recognise Parquet that holds rows rejected by validate.

    Raises:
        ConfigError: the rows were rejected by another stage, which keeps no raw rows.
        DataError: the file is damaged.
    """
    footer = open_parquet(file).schema_arrow.metadata or {}
    if not footer.get(b"dpo.schema", b"").startswith(_REJECTED):
        return Container(kind="parquet")
    stage = footer.get(b"dpo.stage", b"?").decode("utf-8", "replace")
    if stage != "validate":
        raise ConfigError(
            f"stages.validate.inputs: {file.name} holds rows that the stage {stage} rejected; they "
            "are pairs that validate read without fault, and their text is not kept there. Only "
            "the rejected/ folder of a validate directory can be read again."
        )
    return Container(kind="rejected")


def read_parquet(split: Split) -> Iterator[RawRow]:
    """Read row groups, one at a time."""
    with named_damage(split.file):
        yield from _read_columns(_parquet_batches(split), split.first_row)


def read_rejected(split: Split) -> Iterator[RawRow]:
    """Read again the rows that validate rejected, under their former file and number."""
    with named_damage(split.file):
        for batch in _parquet_batches(split):
            for row in batch.to_pylist():
                yield _restore_row(row)


def read_arrow_file(split: Split) -> Iterator[RawRow]:
    """Read record batches of an Arrow IPC file (Feather)."""
    with named_damage(split.file), pa.memory_map(split.file.local_path) as source:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(at) for at in range(split.begin, split.end))
        yield from _read_columns(_checked(batches), split.first_row)


def read_arrow_stream(split: Split) -> Iterator[RawRow]:
    """Read an Arrow IPC stream, one record batch at a time."""
    with named_damage(split.file), pa.memory_map(split.file.local_path) as source:
        _check_stream_end(source)
        reader = pa.ipc.open_stream(source)
        yield from _read_columns(_checked(iter(reader)), split.first_row)


def count_rows_of_batches(file: InputFile) -> list[int]:
    """Return the number of rows of each record batch of an Arrow file, reading one column."""
    with named_damage(file), pa.memory_map(file.local_path) as source:
        options = pa.ipc.IpcReadOptions(included_fields=[0])
        reader = pa.ipc.open_file(source, options=options)
        return [reader.get_batch(at).num_rows for at in range(reader.num_record_batches)]


def open_parquet(file: InputFile) -> pq.ParquetFile:
    with named_damage(file):
        return pq.ParquetFile(file.local_path, arrow_extensions_enabled=True)


def _parquet_batches(split: Split) -> Iterator[pa.RecordBatch]:
    groups = list(range(split.begin, split.end))
    parquet = open_parquet(split.file)
    yield from parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, use_threads=False)


def _check_stream_end(source: pa.NativeFile) -> None:
    """Refuse a stream without its end mark; Arrow accepts one that is cut between batches."""
    source.seek(max(source.size() - len(_STREAM_END), 0))
    if source.read() != _STREAM_END:
        raise pa.ArrowInvalid("the mark that ends an Arrow stream is missing")
    source.seek(0)


def _checked(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Validate batches: Arrow does not check offsets, and crashes on those that point outside."""
    for batch in batches:
        for column in batch.columns:
            _check_column(column)
        for begin in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(begin, _BATCH_ROWS)


def _check_column(column: pa.Array) -> None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        # Text that is not UTF-8 rejects only its row.
        column.cast(_as_binary(column.type)).validate(full=True)


def _read_columns(batches: Iterator[pa.RecordBatch], number: int) -> Iterator[RawRow]:
    for batch in batches:
        convert = {field.name: _make_converter(field.type) for field in batch.schema}
        for row, fault in _batch_rows(batch):
            content: dict[str, Any] | Finding
            raw = None
            try:
                content = fault or {name: convert[name](row[name], name) for name in row}
            except RowFault as found:
                content = found.finding
            if isinstance(content, Finding):
                raw = repr(row).encode()
            yield RawRow(number=number, content=content, raw=raw)
            number += 1


def _restore_row(row: dict[str, Any]) -> RawRow:
    raw: bytes = row["raw"] or b""
    name, number = row["source_file"], row["source_row"]
    content: dict[str, Any] | Finding
    if hashlib.sha256(raw).hexdigest() != row["raw_sha256"]:
        detail = f"only {len(raw):,} bytes of {name} row {number} were kept; mend it there"
        content = Finding("RAW_CUT", None, detail)
    else:
        try:
            content = decode_object(raw)
        except RowFault as fault:
            content = fault.finding
    return RawRow(number=number, content=content, raw=raw, sha256=row["raw_sha256"], file=name)


def _batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], Finding | None]]:
    """Return a batch as dicts, with the fault of each row that Python cannot hold.

    Text comes as bytes if some of it is not UTF-8, which Arrow allows.
    """
    rows = _to_dicts(batch)
    if rows is None:
        yield from (_single_row(batch.slice(at, 1)) for at in range(batch.num_rows))
    else:
        yield from ((row, None) for row in rows)


def _to_dicts(batch: pa.RecordBatch) -> list[dict[str, Any]] | None:
    """Return a batch as dicts; None if a value or a column would be lost."""
    if len(set(batch.schema.names)) < batch.num_columns:
        return None  # A dict keeps the last of two columns of one name.
    with suppress(*_UNREADABLE):
        return cast(list[dict[str, Any]], batch.to_pylist())
    with suppress(*_UNREADABLE, pa.ArrowNotImplementedError):  # Not all types can be cast.
        return cast(list[dict[str, Any]], _with_binary_text(batch).to_pylist())
    return None


def _single_row(batch: pa.RecordBatch) -> tuple[dict[str, Any], Finding | None]:
    """Return a batch of one row as a dict; a value that Python cannot hold becomes text."""
    row: dict[str, Any] = {}
    fault: Finding | None = None
    for at, (name, column) in enumerate(zip(batch.schema.names, batch.columns, strict=True)):
        key = name
        if name in row:
            fault = fault or Finding("JSON_DUPLICATE_KEY", name, "names two columns")
            key = f"{name} (column {at})"
        try:
            row[key] = column[0].as_py()
        except UnicodeDecodeError as error:
            fault = fault or Finding("ENCODING_INVALID", name, describe_bad_byte(error))
            row[key] = error.object
        except _UNREADABLE as error:
            fault = fault or Finding("VALUE_UNREADABLE", name, f"{column.type}: {error}")
            row[key] = str(column)
    return row, fault


def _with_binary_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    schema = pa.schema([(field.name, _as_binary(field.type)) for field in batch.schema])
    return batch.cast(schema)


def _as_binary(type_: pa.DataType) -> pa.DataType:
    """Replace text by bytes everywhere in a type."""
    if pa.types.is_string(type_) or pa.types.is_string_view(type_):
        return pa.binary()
    if pa.types.is_large_string(type_):
        return pa.large_binary()
    if pa.types.is_dictionary(type_):
        return _as_binary(type_.value_type)
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _as_binary(field.type)) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(_as_binary(type_.key_type), _as_binary(type_.item_type))
    if pa.types.is_large_list(type_):
        return pa.large_list(_as_binary(type_.value_type))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_as_binary(type_.value_type), type_.list_size)
    if pa.types.is_list(type_):
        return pa.list_(_as_binary(type_.value_type))
    return type_


def _make_converter(type_: pa.DataType) -> _Convert:
    """Return the function that converts a type's values, and their path, to what JSON can hold."""
    if isinstance(type_, pa.JsonType):
        return _read_json
    if isinstance(type_, pa.BaseExtensionType):
        return _make_converter(type_.storage_type)
    if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return _make_converter(type_.value_type)
    if pa.types.is_struct(type_):
        return _make_struct_converter(type_)
    if pa.types.is_map(type_):
        return _make_map_converter(type_)
    if any(is_kind(type_) for is_kind in _LISTS):
        return _make_list_converter(type_)
    return _read_text if any(is_kind(type_) for is_kind in _TEXTS) else _read_untyped


def _make_struct_converter(type_: pa.DataType) -> _Convert:
    fields = {field.name: _make_converter(field.type) for field in type_}

    def convert(value: Any, path: str) -> Any:
        if value is None:
            return None
        return Padded((name, fields[name](item, f"{path}.{name}")) for name, item in value.items())

    return convert


def _make_list_converter(type_: pa.DataType) -> _Convert:
    item_type = _make_converter(type_.value_type)

    def convert(value: Any, path: str) -> Any:
        if value is None:
            return None
        return [item_type(item, f"{path}.{at}") for at, item in enumerate(value)]

    return convert


def _make_map_converter(type_: pa.DataType) -> _Convert:
    """Convert a map to an object where its keys are texts, each once, and else to pairs."""
    key_type, item_type = _make_converter(type_.key_type), _make_converter(type_.item_type)

    def convert(value: Any, path: str) -> Any:
        if value is None:
            return None
        pairs = [[key_type(key, path), item_type(item, f"{path}.{key}")] for key, item in value]
        is_object = all(isinstance(key, str) for key, _ in pairs)
        as_object = dict(pairs) if is_object else {}
        return as_object if is_object and len(as_object) == len(pairs) else pairs

    return convert


def _read_json(value: Any, path: str) -> Any:
    """Parse a cell of a JSON column; one that is not JSON stays text."""
    text = _read_text(value, path)
    if text is None:
        return None
    try:
        return decode_strictly(text.encode(), may_have_nan=True)
    except RowFault:
        return text


def _read_text(value: Any, path: str) -> Any:
    """Read a cell of a text column, which comes as bytes if some of the column is not UTF-8.

    Raises:
        RowFault: this one is not UTF-8.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RowFault("ENCODING_INVALID", path, describe_bad_byte(error)) from None


def _read_untyped(value: Any, path: str) -> Any:
    """Read a cell by its value alone; of bytes that are not text, only size and hash are kept."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"num_bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, dict):
        return {name: _read_untyped(item, path) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_read_untyped(item, path) for item in value]
    if isinstance(value, decimal.Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
