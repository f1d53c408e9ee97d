"""Records that all containers share: part of a file, raw row, error of a damaged file."""

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
from stages.validate.strict_json import decode_strictly

Kind = Literal["jsonl", "json array", "csv", "parquet", "rejected", "arrow file", "arrow stream"]
Compression = Literal["gzip", "zstd"]

MAX_LINE_BYTES = 16 << 20
MAX_EXCERPT_BYTES = 64 << 10
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Container:
    """A file's container, recognised by its first bytes."""

    kind: Kind
    """`rejected` is Parquet that validate wrote about rows it could not use."""
    compression: Compression | None = None
    """Around text kinds only."""
    delimiter: str | None = None
    """Between the columns of csv; None for all else."""

    @property
    def is_cut_by_bytes(self) -> bool:
        """Return whether parts of the file are byte ranges, whose rows must be counted."""
        return self.kind == "jsonl" and self.compression is None

    def __str__(self) -> str:
        if self.kind == "jsonl":
            return self.compression or "jsonl"
        name = {"\t": "tsv", ";": "csv with semicolons"}.get(self.delimiter or "", self.kind)
        return f"{name} in {self.compression}" if self.compression else name


JSONL = Container(kind="jsonl")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The sampled rows of an input: those whose keys are small enough."""

    seed: int
    max_key: int
    """The largest 64-bit key that is taken; -1 takes none."""
    num_rows: int
    """Rows in this part, taken or not."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of a file that one worker reads."""

    file: InputFile
    container: Container
    begin: int
    end: int
    """Plain JSONL: the lines that start in bytes [begin, end). Parquet: row groups [begin, end).
    Arrow files: record batches [begin, end). All else is read whole."""
    first_row: int = 0
    """Row number in the file of the first row in this part; blank lines count."""
    max_rows: int | None = None
    """Read no more rows than this; None means all."""
    sample: Sample | None = None
    """Of the rows read, take only these; None means all."""


class RawRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row as read: its columns, or why they could not be read."""

    number: int
    """Row number in the file, from 0; blank lines count."""
    content: dict[str, Any] | Finding
    raw: bytes | None
    """The line without its newline, cut to 64 KiB if it was too long to hold; None where the
    columns did not come as JSON and could be read: CSV, Parquet and Arrow."""
    sha256: str | None = None
    """Of the whole line, where `raw` is only a part of it."""
    file: str | None = None
    """The file that the row was first read from, if that is another one."""

    def excerpt(self) -> tuple[bytes, str]:
        """Return the row's first 64 KiB and the sha256 of all of it; columns as JSON text."""
        whole = encode_columns(self.content) if self.raw is None else self.raw
        return whole[:MAX_EXCERPT_BYTES], self.sha256 or hashlib.sha256(whole).hexdigest()


def encode_columns(content: object) -> bytes:
    """Write columns as JSON; NaN stays NaN, which no reader here takes for a number."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def decode_object(content: bytes) -> dict[str, Any]:
    """Decode a row's JSON.

    Raises:
        RowFault: it is not one JSON object.
    """
    value = decode_strictly(content)
    if not isinstance(value, dict):
        raise RowFault("JSON_NOT_OBJECT", None, f"found {ascii(value)[:80]}")
    return value


@contextmanager
def named_damage(file: InputFile) -> Iterator[None]:
    """Name the file in errors of reading it."""
    try:
        yield
    # UnicodeDecodeError: pyarrow reads the names of columns without looking.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.name} is truncated or damaged ({str(error).strip()}). "
            "Fetch or write it again, or remove it from stages.validate.inputs."
        ) from error
