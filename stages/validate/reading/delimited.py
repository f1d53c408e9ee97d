"""Read CSV and TSV as rows of text."""

import csv
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from schemas.errors import DataError
from stages.validate.findings import Finding, RowFault
from stages.validate.reading.containers import MAX_LINE_BYTES, RawRow, Split
from stages.validate.reading.text_files import open_stream
from stages.validate.strict_json import describe_bad_byte

_DELIMITERS = (",", "\t", ";")
_COLUMN_NAME = re.compile(r"[\w .()/-]+")
_BOM = b"\xef\xbb\xbf"


def sniff_delimiter(line: bytes) -> str | None:
    """Return the delimiter of a header line; None if the line is no header.

    A header has at least two columns with distinct names of letters, digits and a few marks, so
    that a damaged line of JSON is not taken for one.
    """
    try:
        text = line.removeprefix(_BOM).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return None
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([text], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        is_named = all(_COLUMN_NAME.fullmatch(name) for name in names)
        if len(names) > 1 and is_named and len(set(names)) == len(names):
            return delimiter
    return None


def read_delimited(split: Split) -> Iterator[RawRow]:
    """Read rows below the header; every value is text, and a quoted one may hold newlines.

    Raises:
        DataError: a row has no end within 16 MiB.
    """
    # The parser's default is 128 Ki characters a value; the limit is global to the process.
    csv.field_size_limit(MAX_LINE_BYTES)
    assert split.container.delimiter is not None
    with open_stream(split.file, split.container.compression) as stream:
        lines = _Lines(stream, split.file.name)
        reader = csv.reader(lines, delimiter=split.container.delimiter, strict=True)
        header = next(reader)
        number = 0
        while True:
            lines.begin_row(number)
            content: dict[str, Any] | Finding
            try:
                content = _name_values(header, next(reader))
            except StopIteration:
                return
            except csv.Error as error:
                content = Finding("CSV_INVALID", None, str(error))
            except RowFault as fault:
                content = fault.finding
            raw = b"".join(lines.taken).removesuffix(b"\n").removesuffix(b"\r")
            if raw:
                # A line without its header says little, so readable rows keep their named columns.
                kept = raw if isinstance(content, Finding) else None
                yield RawRow(number=number, content=content, raw=kept)
            number += 1


class _Lines:
    """Feeds lines to the parser, and keeps the bytes of the current row."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.taken: list[bytes] = []
        self._stream = stream
        self._name = name
        self._num_bytes = 0
        self._place = "the header"
        self._is_start = True

    def begin_row(self, number: int) -> None:
        self.taken = []
        self._num_bytes = 0
        self._place = f"row {number}"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_BYTES + 1)
        if self._is_start:
            line = line.removeprefix(_BOM)
            self._is_start = False
        if not line:
            raise StopIteration
        self.taken.append(line)
        self._num_bytes += len(line)
        if self._num_bytes > MAX_LINE_BYTES:
            raise DataError(
                f"{self._name}: {self._place} does not end within 16 MiB. "
                "Most likely a quote is opened there and never closed; mend that row."
            )
        return line.decode("utf-8", "surrogateescape")


def _name_values(header: list[str], values: list[str]) -> dict[str, str]:
    if len(values) != len(header):
        detail = f"{len(values)} values under {len(header)} column names"
        raise RowFault("CSV_RAGGED", None, detail)
    row = dict(zip(header, values, strict=True))
    for name, value in row.items():
        try:
            value.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise RowFault("ENCODING_INVALID", name, describe_bad_byte(error)) from None
    return row
