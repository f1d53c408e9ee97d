"""Read CSV and TSV as rows of text."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from schemas.errors import DataError
from stages.validate.findings import Finding, RowFault
from stages.validate.reading.containers import MAX_LINE_BYTES, RawRow, Split
from stages.validate.reading.text_files import open_stream
from stages.validate.strict_json import describe_bad_byte

_DELIMITERS = (",", "\t", ";", "|")
_SNIFFED_ROWS = 50
_BOM = b"\xef\xbb\xbf"
_SEPARATOR_LINE = re.compile(rb"sep=(.)\r?\n?", re.IGNORECASE)
"""Excel's first line that names the delimiter."""


def sniff_delimiter(start: bytes) -> str | None:
    """Return the delimiter of a table; None if the text does not begin with a header.

    A header has at least two named columns. If several delimiters give one, it is the delimiter
    that cuts most of the first rows into as many values as the header.

    Args:
        start: the start of the file.
    """
    text = start.removeprefix(_BOM).lstrip(b"\r\n")
    if named := _SEPARATOR_LINE.match(text):
        return named[1].decode("ascii", "replace")
    found: dict[str, tuple[float, int]] = {}
    for delimiter in _DELIMITERS:
        header, *rows = _parse_start(text.decode("utf-8", "surrogateescape"), delimiter)
        if sum(bool(name.strip()) for name in header) > 1:
            num_alike = sum(len(row) == len(header) for row in rows)
            found[delimiter] = (num_alike / max(len(rows), 1), len(header))
    return max(found, key=lambda delimiter: found[delimiter]) if found else None


def _parse_start(text: str, delimiter: str) -> list[list[str]]:
    """Parse the header and the first rows of a text; a row that is damaged or cut is empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    while len(rows) <= _SNIFFED_ROWS:
        try:
            rows.append(next(reader))
        except StopIteration:
            break
        except csv.Error:
            rows.append([])
    return rows or [[]]


def read_delimited(split: Split) -> Iterator[RawRow]:
    """Read rows below the header; every value is text, and a quoted one may hold newlines.

    An empty cell is null.

    Raises:
        DataError: the header is not UTF-8 or names a column twice, or a row has no end within
            16 MiB.
    """
    # The parser's default is 128 Ki characters a value; the limit is global to the process.
    csv.field_size_limit(MAX_LINE_BYTES)
    assert split.container.delimiter is not None
    with open_stream(split.file, split.container.compression) as stream:
        lines = _Lines(stream, split.file.name)
        header = _read_header(lines, split.container.delimiter)
        reader = header.read_below(lines)
        number = 0
        while True:
            lines.begin_row(number)
            content: dict[str, Any] | Finding
            try:
                content = header.name_values(next(reader), lines.place)
            except StopIteration:
                return
            except csv.Error as error:
                content = Finding("CSV_INVALID", None, f"{error} ({lines.place})")
            except RowFault as fault:
                content = fault.finding
            raw = b"".join(lines.taken).removesuffix(b"\n").removesuffix(b"\r")
            if raw:
                # A line without its header says little, so readable rows keep their named columns.
                kept = raw if isinstance(content, Finding) else None
                yield RawRow(number=number, content=content, raw=kept, line=lines.first_line)
            number += 1


class _Lines:
    """Feeds lines to the parser, and keeps the bytes of the current row."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.taken: list[bytes] = []
        self.name = name
        self.first_line = 1
        """Line of the file, from 1, where the current row begins."""
        self._stream = stream
        self._num_bytes = 0
        self._row = "the header"
        self._is_start = True

    @property
    def place(self) -> str:
        """The lines of the current row."""
        last = self.first_line + len(self.taken) - 1
        is_one = last == self.first_line
        return f"line {last}" if is_one else f"lines {self.first_line} to {last}"

    def begin_row(self, number: int) -> None:
        self._row = f"row {number}"
        self.forget()

    def forget(self) -> None:
        """Begin a new row after the lines taken."""
        self.first_line += len(self.taken)
        self.taken = []
        self._num_bytes = 0

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
                f"{self.name}: {self._row} does not end within 16 MiB. Most likely a quote is "
                f"opened there (line {self.first_line}) and never closed; mend that row."
            )
        return line.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The column names of a table, and how its rows are parsed."""

    names: list[str]
    cells: list[str]
    """The names as the file has them."""
    delimiter: str
    is_spaced: bool
    """Whether a space follows every delimiter of the header; it is then no part of any value."""

    def read_below(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(
            lines, delimiter=self.delimiter, strict=True, skipinitialspace=self.is_spaced
        )

    def name_values(self, values: list[str], place: str) -> dict[str, str | None]:
        if values == self.cells:  # Tables were written to one file, one after another.
            raise RowFault("CSV_INVALID", None, f"repeats the header ({place})")
        if len(values) != len(self.names):
            detail = f"{len(values)} values under {len(self.names)} column names ({place})"
            raise RowFault("CSV_RAGGED", None, detail)
        for name, value in zip(self.names, values, strict=True):
            try:
                value.encode("utf-8", "surrogateescape").decode()
            except UnicodeDecodeError as error:
                raise RowFault("ENCODING_INVALID", name, describe_bad_byte(error)) from None
        return dict(zip(self.names, (value or None for value in values), strict=True))


def _read_header(lines: _Lines, delimiter: str) -> _Header:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names = next(reader)
    while not any(name.strip() for name in names) or _SEPARATOR_LINE.fullmatch(lines.taken[0]):
        lines.forget()
        names = next(reader)
    is_spaced = all(name.startswith(" ") for name in names[1:])
    if is_spaced:
        text = b"".join(lines.taken).decode("utf-8", "surrogateescape")
        names = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
    cells = names
    # A nameless column, such as the index of a table, is named as pandas names it.
    names = [name.strip() or f"Unnamed: {at}" for at, name in enumerate(names)]
    _check_names(names, lines.name)
    return _Header(names=names, cells=cells, delimiter=delimiter, is_spaced=is_spaced)


def _check_names(names: list[str], file: str) -> None:
    try:
        " ".join(names).encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: its header is not UTF-8 ({describe_bad_byte(error)}). Convert the file, for "
            "example from a Western Windows: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {file} > converted.csv"
        ) from None
    twice = [name for at, name in enumerate(names) if name in names[:at]]
    if twice:
        raise DataError(
            f"{file}: its header names the column {ascii(twice[0])[:80]} twice, and readers "
            "disagree on which of the two counts. Rename one."
        )
