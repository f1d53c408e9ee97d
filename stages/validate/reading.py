"""How do the bytes of an input file become raw rows?

JSONL is split on the byte 0x0A and nothing else: `str.splitlines` also splits on U+2028, which JSON
allows inside strings. Parquet is read row group by row group.
"""

import datetime
import decimal
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DataError
from stages.validate.findings import Finding, RowFault
from stages.validate.inputs import InputFile
from stages.validate.strict_json import decode_strictly, describe_bad_byte

Container = Literal["jsonl", "gzip", "zstd", "parquet"]
"""JSONL as it is, JSONL compressed, or Parquet."""

MAX_LINE_BYTES = 16 << 20
MAX_EXCERPT_BYTES = 64 << 10
_BUFFER_BYTES = 1 << 20
_BATCH_ROWS = 512
_BOM = b"\xef\xbb\xbf"
_UTF16_STARTS = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")
_LFS_START = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of a file that one worker reads."""

    file: InputFile
    container: Container
    begin: int
    end: int
    """Plain JSONL: the lines that start in bytes [begin, end). Parquet: row groups [begin, end).
    Compressed JSONL is read whole."""
    first_row: int = 0
    """Row number in the file of the first row in this part; blank lines count."""
    max_rows: int | None = None
    """Read no more rows than this; None means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """A row as read: its columns, or why they could not be read."""

    number: int
    """Row number in the file, from 0; blank lines count."""
    content: dict[str, Any] | Finding
    raw: bytes
    """The line without its newline, cut to 64 KiB if it was too long to hold; empty for Parquet."""
    sha256: str | None = None
    """Of the whole line, where `raw` is only a part of it."""

    def excerpt(self) -> tuple[bytes, str]:
        """Give the row's first 64 KiB and the sha256 of all of it; Parquet rows as JSON text."""
        whole = self.raw or msgspec.json.encode(self.content)
        return whole[:MAX_EXCERPT_BYTES], self.sha256 or hashlib.sha256(whole).hexdigest()


def sniff_container(file: InputFile) -> Container:
    """Tell what a file is by its first bytes, whatever its name says.

    Raises:
        DataError: the file is empty, a Git LFS pointer, UTF-16, or Parquet inside gzip or zstd.
    """
    with open(file.path, "rb") as stream:
        start = stream.read(64)
    if not start:
        raise DataError(f"{file.name} is empty (0 bytes). Remove it from stages.validate.inputs.")
    if start.startswith(b"PAR1"):
        return "parquet"
    container: Container = "jsonl"
    if start.startswith(b"\x1f\x8b"):
        container = "gzip"
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        container = "zstd"
    if container != "jsonl":
        with _open_stream(file, container) as inner:
            start = inner.read(64)
    _refuse_other_content(file, start)
    return container


def split_file(file: InputFile, container: Container, *, split_bytes: int) -> list[Split]:
    """Cut a file into parts that can be read apart.

    Args:
        file: the file.
        container: what `sniff_container` said.
        split_bytes: plain JSONL: size of a byte range; Parquet: row groups are gathered until they
            hold this many uncompressed bytes.
    """
    if container == "parquet":
        return _split_row_groups(file, split_bytes)
    if container != "jsonl":
        return [whole_file(file, container)]
    cuts = [*range(0, file.num_bytes, split_bytes), file.num_bytes]
    return [
        Split(file=file, container=container, begin=begin, end=end)
        for begin, end in itertools.pairwise(cuts)
    ]


def whole_file(file: InputFile, container: Container) -> Split:
    """Give a file as one part."""
    end = _open_parquet(file).num_row_groups if container == "parquet" else file.num_bytes
    return Split(file=file, container=container, begin=0, end=end)


def count_lines(split: Split) -> int:
    """Count the lines that start in a byte range, as fast as the disk allows.

    A line starts at byte 0 and after each newline, so all newlines but the last byte of the range
    and the one just before it are counted.
    """
    begin = max(split.begin - 1, 0)
    num_left = split.end - 1 - begin
    num_lines = 1 if split.begin == 0 else 0
    with open(split.file.path, "rb") as stream:
        stream.seek(begin)
        while num_left > 0 and (chunk := stream.read(min(_BUFFER_BYTES, num_left))):
            num_lines += chunk.count(b"\n")
            num_left -= len(chunk)
    return num_lines


def limit_rows(splits: Sequence[Split], max_rows: int) -> tuple[list[Split], int]:
    """Keep only the first rows of a file; of JSONL no more is read than they take.

    Args:
        splits: the parts of one file, from its start.
        max_rows: rows wanted, at least 1.
    Returns:
        The parts that hold these rows, and how many they are.
    """
    if splits[0].container == "parquet":
        return _limit_row_groups(splits, max_rows)
    num_rows, end = _find_end_of_rows(splits[0], max_rows)
    if splits[0].container == "jsonl":
        kept = [replace(s, end=min(s.end, end)) for s in splits if s.begin < end]
    else:
        kept = [replace(splits[0], max_rows=num_rows)]
    return kept, num_rows


def read_rows(split: Split) -> Iterator[RawRow]:
    """Read a part of a file, row by row.

    Blank lines are skipped, but counted in the row numbers. Memory is bounded by the longest line
    that is accepted (16 MiB) and, for Parquet, by one row group.

    Raises:
        DataError: the file is truncated or damaged; the message names it.
    """
    rows = _read_parquet(split) if split.container == "parquet" else _read_jsonl(split)
    return itertools.islice(rows, split.max_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    content: bytes
    """Without its newline; cut to 64 KiB if the line is too long."""
    num_bytes: int
    """Of the line with its newline."""
    is_complete: bool
    """Whether it ends in a newline; a file's last line need not."""
    sha256: str | None = None
    """Of the whole line without its newline, if it is too long to hold."""

    @property
    def is_blank(self) -> bool:
        return self.sha256 is None and not self.content.strip()


def _read_jsonl(split: Split) -> Iterator[RawRow]:
    with _open_stream(split.file, split.container) as stream:
        position = _skip_to_line_start(stream, split.begin)
        number = split.first_row
        for line in _read_lines(stream, is_file_start=position == 0):
            if split.container == "jsonl" and position >= split.end:
                return
            if not line.is_blank:
                yield _read_row(line, number)
            position += line.num_bytes
            number += 1


def _skip_to_line_start(stream: BinaryIO, begin: int) -> int:
    """Move to the first line that starts at `begin` or later, and say where that is."""
    if begin == 0:
        return 0
    position = begin - 1
    stream.seek(position)
    while chunk := stream.readline(_BUFFER_BYTES):
        position += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return position


def _read_lines(stream: BinaryIO, *, is_file_start: bool) -> Iterator[_Line]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            yield _read_long_line(stream, line)
        else:
            content = line.removesuffix(b"\n")
            if is_file_start:
                content = content.removeprefix(_BOM)
            yield _Line(content=content, num_bytes=len(line), is_complete=line.endswith(b"\n"))
        is_file_start = False


def _read_long_line(stream: BinaryIO, start: bytes) -> _Line:
    """Read past a line that is too long to hold, keeping its start and its hash."""
    hasher = hashlib.sha256()
    num_bytes, chunk = 0, start
    while chunk:
        num_bytes += len(chunk)
        hasher.update(chunk.removesuffix(b"\n"))
        if chunk.endswith(b"\n"):
            break
        chunk = stream.readline(_BUFFER_BYTES)
    return _Line(
        content=start[:MAX_EXCERPT_BYTES],
        num_bytes=num_bytes,
        is_complete=chunk.endswith(b"\n"),
        sha256=hasher.hexdigest(),
    )


def _read_row(line: _Line, number: int) -> RawRow:
    content: dict[str, Any] | Finding
    if line.sha256 is not None:
        content = Finding("LINE_TOO_LONG", None, f"{line.num_bytes:,} bytes")
    else:
        try:
            content = _decode_row(line.content)
        except RowFault as fault:
            content = fault.finding
            if not line.is_complete:
                content = content._replace(
                    detail=f"{content.detail}; the file ends in this line and may be truncated"
                )
    return RawRow(number=number, content=content, raw=line.content, sha256=line.sha256)


def _decode_row(content: bytes) -> dict[str, Any]:
    value = decode_strictly(content)
    if not isinstance(value, dict):
        raise RowFault("JSON_NOT_OBJECT", None, f"found {ascii(value)[:80]}")
    return value


def _read_parquet(split: Split) -> Iterator[RawRow]:
    number = split.first_row
    with _named_damage(split.file):
        batches = _open_parquet(split.file).iter_batches(
            batch_size=_BATCH_ROWS,
            row_groups=list(range(split.begin, split.end)),
            use_threads=False,
        )
        for batch in batches:
            for row in _batch_rows(batch):
                content: dict[str, Any] | Finding
                try:
                    content = {name: _plain(value, name) for name, value in row.items()}
                    raw = b""
                except RowFault as fault:
                    content = fault.finding
                    raw = repr(row).encode()
                yield RawRow(number=number, content=content, raw=raw)
                number += 1


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Give a batch as dicts; its text as bytes if some of it is not UTF-8, which Arrow allows."""
    try:
        return cast(list[dict[str, Any]], batch.to_pylist())
    except UnicodeDecodeError:
        schema = pa.schema([(field.name, _as_binary(field.type)) for field in batch.schema])
        table = pa.Table.from_batches([batch]).cast(schema)
        return cast(list[dict[str, Any]], table.to_pylist())


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
    if pa.types.is_list(type_):
        return pa.list_(_as_binary(type_.value_type))
    return type_


def _plain(value: Any, path: str) -> Any:
    """Turn a Parquet value into what JSON could have held.

    Raises:
        RowFault: bytes that are not UTF-8.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {name: _plain(item, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}.{at}") for at, item in enumerate(value)]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RowFault("ENCODING_INVALID", path, describe_bad_byte(error)) from None
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _split_row_groups(file: InputFile, split_bytes: int) -> list[Split]:
    metadata = _open_parquet(file).metadata
    splits: list[Split] = []
    begin, first_row, num_rows, num_bytes = 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        num_rows += metadata.row_group(group).num_rows
        num_bytes += metadata.row_group(group).total_byte_size
        if num_bytes >= split_bytes or group == metadata.num_row_groups - 1:
            splits.append(
                Split(
                    file=file,
                    container="parquet",
                    begin=begin,
                    end=group + 1,
                    first_row=first_row,
                    max_rows=num_rows,
                )
            )
            begin, first_row, num_rows, num_bytes = group + 1, first_row + num_rows, 0, 0
    return splits


def _limit_row_groups(splits: Sequence[Split], max_rows: int) -> tuple[list[Split], int]:
    kept: list[Split] = []
    num_left = max_rows
    for split in splits:
        assert split.max_rows is not None
        num_taken = min(split.max_rows, num_left)
        if num_taken > 0:
            kept.append(replace(split, max_rows=num_taken))
            num_left -= num_taken
    return kept, max_rows - num_left


def _find_end_of_rows(split: Split, max_rows: int) -> tuple[int, int]:
    """Count up to `max_rows` rows from a file's start, and say at which byte the last one ends."""
    num_rows, position = 0, 0
    with _open_stream(split.file, split.container) as stream:
        for line in _read_lines(stream, is_file_start=True):
            position += line.num_bytes
            num_rows += not line.is_blank
            if num_rows == max_rows:
                break
    return num_rows, position


def _open_parquet(file: InputFile) -> pq.ParquetFile:
    with _named_damage(file):
        return pq.ParquetFile(file.path)


@contextmanager
def _named_damage(file: InputFile) -> Iterator[None]:
    """Say which file Arrow could not read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name} is truncated or damaged ({str(error).strip()}). "
            "Fetch or write it again, or remove it from stages.validate.inputs."
        ) from error


@contextmanager
def _open_stream(file: InputFile, container: Container) -> Iterator[BinaryIO]:
    """Open JSONL for reading, decompressed; gzip with several members and zstd frames included."""
    with _named_damage(file):
        if container == "jsonl":
            stream = open(file.path, "rb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        else:
            source = pa.input_stream(file.path, compression=container)
            stream = io.BufferedReader(source, _BUFFER_BYTES)
        with stream:
            yield stream


def _refuse_other_content(file: InputFile, start: bytes) -> None:
    if start.startswith(_LFS_START):
        raise DataError(
            f"{file.name} is a Git LFS pointer, not the data. "
            "Run `git lfs pull` in the repository that it came from."
        )
    if start.startswith(_UTF16_STARTS):
        raise DataError(
            f"{file.name} is UTF-16, but JSONL is UTF-8. "
            f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > converted.jsonl"
        )
    if start.startswith(b"PAR1"):
        raise DataError(f"{file.name} is Parquet inside gzip or zstd. Decompress it first.")
