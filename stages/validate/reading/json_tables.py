"""Read a table that is one JSON object: rows under one key, or columns.

pandas writes most of these layouts. Columns can only be turned into rows when all of them are
there, so the object is held whole, and its size is bounded.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from schemas.errors import DataError
from stages.validate.findings import Finding, RowFault
from stages.validate.formats.format import is_messages
from stages.validate.inputs import InputFile
from stages.validate.reading.containers import Compression, RawRow, Split, decode_object
from stages.validate.reading.text_files import open_stream

MAX_TABLE_BYTES = 64 << 20
"""A larger object is not looked into."""
_BOM = b"\xef\xbb\xbf"
_ROWS_KEYS = ("data", "rows", "records", "examples", "instances", "samples")
_ABOUT_KEYS = ("version", "name", "description", "license")
"""Texts that may stand beside the rows."""
_SPLIT_KEYS = {"columns", "data"}
_INDEX_KEYS = {"index", "index_names", "column_names"}
_WRITE_ROWS = (
    "Write one row a line instead, in pandas: df.to_json(path, orient='records', lines=True)."
)


def read_whole_object(file: InputFile, compression: Compression | None) -> dict[str, Any] | None:
    """Return the one object that a file holds; None if it is too large or no such file."""
    with open_stream(file, compression) as stream:
        content = stream.read(MAX_TABLE_BYTES + 1)
    if len(content) > MAX_TABLE_BYTES:
        return None
    try:
        return decode_object(content.removeprefix(_BOM))
    except RowFault:
        return None


def read_table(split: Split) -> Iterator[RawRow]:
    """Read the rows of a table that is one object."""
    value = read_whole_object(split.file, split.container.compression)
    rows = None if value is None else find_rows(value, file=split.file.name)
    assert rows is not None  # Else the file would not have been recognised.
    for number, row in enumerate(rows):
        yield RawRow(number=number, content=row, raw=None)


def find_rows(value: Mapping[str, Any], *, file: str) -> list[dict[str, Any] | Finding] | None:
    """Return the rows of an object that holds a table; None if it is itself a row.

    Raises:
        DataError: rows and columns cannot be told apart.
    """
    return (
        _find_wrapped_rows(value)
        or _split_rows(value)
        or _rows_of_lists(value)
        or _rows_of_objects(value, file)
    )


def _find_wrapped_rows(value: Mapping[str, Any]) -> list[dict[str, Any] | Finding] | None:
    """Return rows that stand under one key, beside nothing that could be part of a row."""
    names = [name for name in value if name in _ROWS_KEYS or len(value) == 1]
    if len(names) != 1 or not _is_list_of(value[names[0]], dict):
        return None
    if is_messages(value[names[0]]):
        return None
    for name, beside in value.items():
        is_about = not isinstance(beside, str | list) or name in _ABOUT_KEYS
        if name != names[0] and not is_about:
            return None
    rows: list[dict[str, Any] | Finding] = value[names[0]]
    return rows


def _split_rows(value: Mapping[str, Any]) -> list[dict[str, Any] | Finding] | None:
    """Return the rows of pandas' "split" and "tight": column names, and a list of values a row."""
    if set(value) - _INDEX_KEYS != _SPLIT_KEYS:
        return None
    names, rows = value["columns"], value["data"]
    if not _is_list_of(names, str) or len(set(names)) < len(names) or not _is_list_of(rows, list):
        return None
    return [_name_values(names, row) for row in rows]


def _name_values(names: list[str], values: list[Any]) -> dict[str, Any] | Finding:
    if len(values) != len(names):
        detail = f"{len(values)} values under {len(names)} column names"
        return Finding("SCHEMA_MISMATCH", None, detail)
    return dict(zip(names, values, strict=True))


def _rows_of_lists(value: Mapping[str, Any]) -> list[dict[str, Any] | Finding] | None:
    """Return the rows of columns that are lists of equal length; lists of messages are a row's."""
    columns = list(value.values())
    if len(columns) < 2 or not _is_list_of(columns, list) or not _are_alike(map(len, columns)):
        return None
    if any(isinstance(cell, dict) for column in columns for cell in column):
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _rows_of_objects(value: Mapping[str, Any], file: str) -> list[dict[str, Any] | Finding] | None:
    """Return the rows of pandas' orient="columns" and "index": objects in an object.

    The numbers of the rows tell the two apart.
    """
    inner = list(value.values())
    if len(inner) < 2 or not _is_list_of(inner, dict) or not _are_alike(map(tuple, inner)):
        return None
    labels = list(inner[0])
    if not labels or is_messages(inner):
        return None
    if _are_numbers(value) and not _are_numbers(labels):
        return inner
    if _are_numbers(labels) and not _are_numbers(value):
        return [{name: value[name][label] for name in value} for label in labels]
    raise DataError(
        f"{file} is one JSON object of objects with equal keys ({', '.join(labels)[:80]}), so that "
        f"rows and columns cannot be told apart. {_WRITE_ROWS}"
    )


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def _are_alike(values: Iterator[object]) -> bool:
    return len(set(values)) == 1


def _are_numbers(labels: Mapping[str, Any] | list[str]) -> bool:
    return all(label.isdecimal() for label in labels)
