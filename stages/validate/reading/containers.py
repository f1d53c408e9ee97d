"""Types that all readers share: container, part of a file, raw row."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import pyarrow as pa

from schemas.errors import DataError
from stages.validate.findings import Finding, RowFault
from stages.validate.inputs import InputFile
from stages.validate.messages import drop_padding
from stages.validate.strict_json import decode_strictly

Kind = Literal[
    "jsonl",
    "json array",
    "json objects",
    "json table",
    "csv",
    "parquet",
    "rejected",
    "arrow file",
    "arrow stream",
]
Compression = Literal["gzip", "zstd"]

MAX_LINE_BYTES = 16 << 20
MAX_EXCERPT_BYTES = 64 << 10
BUFFER_BYTES = 1 << 20
_DELIMITED_NAMES = {"\t": "tsv", ";": "csv with semicolons", "|": "csv with bars"}


@dataclass(frozen=True, kw_only=True)
class Container:
    """A file's container, recognised by its first bytes."""

    kind: Kind
    """`json objects` are spread over lines, one after another; `json table` is one object around
    all rows; `rejected` is Parquet with rows that validate rejected."""
    compression: Compression | None = None
    """Only of text kinds."""
    delimiter: str | None = None
    """Delimiter of csv; None for all other kinds."""

    @property
    def is_cut_by_bytes(self) -> bool:
        """Whether the file's parts are byte ranges, whose rows must be counted."""
        return self.kind == "jsonl" and self.compression is None

    def __str__(self) -> str:
        if self.kind == "jsonl":
            return self.compression or "jsonl"
        name = _DELIMITED_NAMES.get(self.delimiter or "", self.kind)
        return f"{name} in {self.compression}" if self.compression else name


JSONL = Container(kind="jsonl")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The sampled rows of an input: those whose keys are small enough."""

    seed: int
    max_key: int
    """The largest 64-bit key that is taken; -1 takes none."""
    num_rows: int
    """Number of rows in this part, sampled or not."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of a file that one worker reads."""

    file: InputFile
    container: Container
    begin: int
    end: int
    """Plain JSONL: the lines that start in bytes [begin, end). Parquet: row groups [begin, end).
    Arrow files: record batches [begin, end). All other kinds are read whole."""
    first_row: int = 0
    """Row number in the file of the first row in this part; blank lines count."""
    max_rows: int | None = None
    """Largest number of rows to read; None means all."""
    sample: Sample | None = None
    """The sample to take from these rows; None means all."""

    @property
    def description(self) -> str:
        """What the part is, for layouts and for error messages."""
        units = {"parquet": "row groups", "rejected": "row groups", "arrow file": "record batches"}
        unit = units.get(self.container.kind, "bytes")
        rows = "" if self.max_rows is None else f", {self.max_rows} rows"
        return f"{self.file.name} ({self.container}, {unit} {self.begin} to {self.end}{rows})"


class RawRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row as read: its columns, or the finding why they could not be read."""

    number: int
    """Row number in the file, from 0; blank lines count."""
    content: dict[str, Any] | Finding
    raw: bytes | None
    """The line without its newline, cut to 64 KiB if it is too long to hold. None for readable rows
    of CSV, JSON tables, Parquet and Arrow, which have no JSON line."""
    line: int | None = None
    """Line of the file where the row begins, from 1; None in files without lines."""
    sha256: str | None = None
    """sha256 of the whole line, if `raw` is only a part of it."""
    file: str | None = None
    """The file from which the row was first read, if it is another one."""

    @property
    def place(self) -> str:
        """The row's place in its file, for messages."""
        if self.line is None:
            return f"row {self.number}"
        is_counted = self.line == self.number + 1
        return f"line {self.line}" if is_counted else f"row {self.number} (line {self.line})"

    def excerpt(self) -> tuple[bytes, str]:
        """Return the row's first 64 KiB and the sha256 of all of it; columns as JSON text."""
        whole = encode_columns(self.content) if self.raw is None else self.raw
        return whole[:MAX_EXCERPT_BYTES], self.sha256 or hashlib.sha256(whole).hexdigest()


def encode_columns(content: object) -> bytes:
    """Write columns as JSON, so that the row can be read again as it was.

    NaN stays NaN; the padding of columnar files goes, which in JSON would be data.
    """
    text = json.dumps(drop_padding(content), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def decode_object(content: bytes) -> dict[str, Any]:
    """Decode a row's JSON; NaN and Infinity, which Python writes for missing cells, stay floats.

    Raises:
        RowFault: it is not one JSON object.
    """
    value = decode_strictly(content, may_have_nan=True)
    if not isinstance(value, dict):
        raise RowFault("JSON_NOT_OBJECT", None, f"found {ascii(value)[:80]}")
    return value


@contextmanager
def named_damage(file: InputFile) -> Iterator[None]:
    """Name the file in errors that occur while it is read."""
    try:
        yield
    except pa.ArrowNotImplementedError as error:
        raise DataError(
            f"{file.name} has a column of a type that cannot be read ({str(error).strip()}). "
            "Write it again without that column, or cast the column to text."
        ) from error
    # pyarrow raises UnicodeDecodeError for column names that are not UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.name} is truncated or damaged ({str(error).strip()}). "
            "Fetch or write it again, or remove it from stages.validate.inputs."
        ) from error
