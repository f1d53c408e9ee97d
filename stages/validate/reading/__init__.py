"""Read input files as raw rows, whatever their container.

A file's container is recognised by its first bytes, never by its name. This module chooses the
reader and cuts files into parts.

To add a container, write its reader in a module here, its line in _READERS and its first bytes in
`sniff_container`.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from schemas.errors import DataError
from stages.validate.findings import RowFault
from stages.validate.inputs import InputFile
from stages.validate.reading.columnar import (
    count_rows_of_batches,
    open_parquet,
    read_arrow_file,
    read_arrow_stream,
    read_parquet,
    read_rejected,
    sniff_parquet,
)
from stages.validate.reading.containers import (
    JSONL,
    Compression,
    Container,
    Kind,
    RawRow,
    Sample,
    Split,
    decode_object,
)
from stages.validate.reading.delimited import read_delimited, sniff_delimiter
from stages.validate.reading.json_arrays import (
    cut_first_object,
    is_closed_array,
    read_array,
    read_objects,
)
from stages.validate.reading.json_tables import (
    find_rows,
    read_table,
    read_whole_object,
)
from stages.validate.reading.jsonl import count_lines, find_end_of_rows, read_lines
from stages.validate.reading.text_files import open_stream

_START_BYTES = 64 << 10
_BOM = b"\xef\xbb\xbf"
_UTF16_STARTS = (b"\xff\xfe", b"\xfe\xff")
_RETURN_ALONE = re.compile(rb"\r(?!\n|\Z)")
_OBJECT_START = re.compile(rb'\s*\{\s*"')
_LFS_START = b"version https://git-lfs"
_FOREIGN_STARTS = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\xfd7zXZ\0": "compressed with xz",
    b"BZh91AY&SY": "compressed with bzip2",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"SQLite format 3\0": "an SQLite database",
    b"Obj\x01": "an Avro file",
    b"ORC\n": "an ORC file",
    b"FEA1\0": "a Feather file of version 1",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x80\x04\x95": "a Python pickle",
    b"\x80\x05\x95": "a Python pickle",
}
_TAR_MARK = b"ustar"
_PARQUET_START = b"PAR1"
_ARROW_FILE_START = b"ARROW1"
_ARROW_STREAM_START = b"\xff\xff\xff\xff"

_READERS: dict[Kind, Callable[[Split], Iterator[RawRow]]] = {
    "jsonl": read_lines,
    "json array": read_array,
    "json objects": read_objects,
    "json table": read_table,
    "csv": read_delimited,
    "parquet": read_parquet,
    "rejected": read_rejected,
    "arrow file": read_arrow_file,
    "arrow stream": read_arrow_stream,
}


def sniff_container(file: InputFile) -> Container:
    """Recognise a file's container by its first bytes.

    Raises:
        ConfigError: it holds rows that another stage rejected.
        DataError: the file is empty, a Git LFS pointer, UTF-16, damaged, or binary data inside gzip
            or zstd.
    """
    with open(file.local_path, "rb") as stream:
        start = stream.read(_START_BYTES)
    if not start:
        raise DataError(f"{file.name} is empty (0 bytes). Remove it from stages.validate.inputs.")
    if start.startswith(_PARQUET_START):
        return sniff_parquet(file)
    if start.startswith(_ARROW_FILE_START):
        return Container(kind="arrow file")
    if start.startswith(_ARROW_STREAM_START):
        return Container(kind="arrow stream")
    if start.startswith(b"\x1f\x8b"):
        return _sniff_compressed(file, Container(kind="jsonl", compression="gzip"))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return _sniff_compressed(file, Container(kind="jsonl", compression="zstd"))
    return _sniff_text(file, start, JSONL)


def split_file(file: InputFile, container: Container, *, split_bytes: int) -> list[Split]:
    """Cut a file into parts that can be read independently.

    Args:
        file: the file.
        container: the file's container.
        split_bytes: plain JSONL: size of a byte range; Parquet and Arrow files: row groups or
            record batches are joined until they have this many bytes.
    """
    if container.kind in ("parquet", "rejected"):
        metadata = open_parquet(file).metadata
        groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        return _gather(file, container, sizes, split_bytes)
    if container.kind == "arrow file":
        rows = count_rows_of_batches(file)
        row_bytes = file.num_bytes / max(sum(rows), 1)
        return _gather(file, container, [(num, num * row_bytes) for num in rows], split_bytes)
    if not container.is_cut_by_bytes:
        return [whole_file(file, container)]
    cuts = [*range(0, file.num_bytes, split_bytes), file.num_bytes]
    return [
        Split(file=file, container=container, begin=begin, end=end)
        for begin, end in itertools.pairwise(cuts)
    ]


def whole_file(file: InputFile, container: Container) -> Split:
    """Return a file as one part."""
    end = file.num_bytes
    if container.kind in ("parquet", "rejected"):
        end = open_parquet(file).num_row_groups
    elif container.kind == "arrow file":
        end = len(count_rows_of_batches(file))
    return Split(file=file, container=container, begin=0, end=end)


def limit_rows(splits: Sequence[Split], max_rows: int) -> tuple[list[Split], int]:
    """Keep only the first rows of a file; of JSONL, no more bytes are read than they need.

    Args:
        splits: the parts of one file, from its start.
        max_rows: rows wanted, at least 1.
    Returns:
        The parts that hold these rows, and the number of the rows.
    """
    if not splits:
        return [], 0
    if splits[0].max_rows is not None:
        return _limit_counted(splits, max_rows)
    if splits[0].container.kind == "jsonl":
        num_rows, end = find_end_of_rows(splits[0], max_rows)
        if splits[0].container.is_cut_by_bytes:
            return [replace(s, end=min(s.end, end)) for s in splits if s.begin < end], num_rows
    else:
        num_rows = sum(1 for _ in itertools.islice(read_rows(splits[0]), max_rows))
    return [replace(splits[0], max_rows=num_rows)], num_rows


def read_rows(split: Split) -> Iterator[RawRow]:
    """Read a part of a file, row by row; of a sampled input, only the sample.

    Blank lines are skipped, but counted in the row numbers. Memory is bounded by the longest
    accepted line (16 MiB) or, for Parquet and Arrow, by one row group or record batch.

    Raises:
        DataError: the file is truncated or damaged; the message names it.
    """
    rows = itertools.islice(_READERS[split.container.kind](split), split.max_rows)
    sample = split.sample
    if sample is None:
        return rows
    return (row for row in rows if sample_key(row, sample.seed) <= sample.max_key)


def sample_key(row: RawRow, seed: int) -> int:
    """Return 64 bits that depend on a row's content and a seed alone, not on its position."""
    _, sha256 = row.excerpt()
    return int.from_bytes(hashlib.sha256(f"{seed} {sha256}".encode()).digest()[:8], "big")


def _gather(
    file: InputFile, container: Container, sizes: Sequence[tuple[int, float]], split_bytes: int
) -> list[Split]:
    """Join row groups or record batches, given their rows and bytes, up to `split_bytes`."""
    splits: list[Split] = []
    begin, first_row, num_rows, num_bytes = 0, 0, 0, 0.0
    for at, (rows, size) in enumerate(sizes):
        num_rows += rows
        num_bytes += size
        if num_bytes >= split_bytes or at == len(sizes) - 1:
            splits.append(
                Split(
                    file=file,
                    container=container,
                    begin=begin,
                    end=at + 1,
                    first_row=first_row,
                    max_rows=num_rows,
                )
            )
            begin, first_row, num_rows, num_bytes = at + 1, first_row + num_rows, 0, 0.0
    return splits


def _limit_counted(splits: Sequence[Split], max_rows: int) -> tuple[list[Split], int]:
    kept: list[Split] = []
    num_left = max_rows
    for split in splits:
        assert split.max_rows is not None
        num_taken = min(split.max_rows, num_left)
        if num_taken > 0:
            kept.append(replace(split, max_rows=num_taken))
            num_left -= num_taken
    return kept, max_rows - num_left


def _sniff_compressed(file: InputFile, container: Container) -> Container:
    with open_stream(file, container.compression) as stream:
        start = stream.read(_START_BYTES)
    binary = (_PARQUET_START, _ARROW_FILE_START, _ARROW_STREAM_START)
    if start.startswith(binary):
        kind = "Parquet" if start.startswith(_PARQUET_START) else "Arrow"
        raise DataError(f"{file.name} is {kind} inside gzip or zstd. Decompress it first.")
    return _sniff_text(file, start, container)


def _sniff_text(file: InputFile, start: bytes, container: Container) -> Container:
    _refuse_unreadable(file, start)
    text = start.removeprefix(_BOM).lstrip()
    if text.startswith(b"["):
        return replace(container, kind="json array") if _is_array(text) else container
    if text.startswith(b"{"):
        return replace(container, kind=_sniff_objects(file, text, container.compression))
    delimiter = sniff_delimiter(start)
    # A damaged first line of JSONL may look like a header; no writer of CSV leaves `{"` unquoted.
    if delimiter is not None and not _OBJECT_START.match(text.partition(b"\n")[2]):
        if _RETURN_ALONE.search(start) and b"\n" not in start:
            raise DataError(
                f"{file.name} ends its lines with a carriage return alone, as old Macs did. "
                f"Convert it: tr '\\r' '\\n' < {file.name} > converted.csv"
            )
        return replace(container, kind="csv", delimiter=delimiter)
    return container


def _refuse_unreadable(file: InputFile, start: bytes) -> None:
    if start.startswith(_LFS_START):
        raise DataError(
            f"{file.name} is a Git LFS pointer, not the data. "
            "Run `git lfs pull` in the repository that it came from."
        )
    found = next((text for mark, text in _FOREIGN_STARTS.items() if start.startswith(mark)), None)
    if start[257:].startswith(_TAR_MARK):
        found = "a tar archive"
    if found is not None:
        raise DataError(
            f"{file.name} is {found}, which is not read. Unpack it, or write it again as JSONL, "
            "CSV, Parquet or Arrow; gzip and zstd may be around the first two."
        )
    # Every other byte of Western text in UTF-16 is 0.
    zeros = {start[at:2000:2].count(0) for at in (0, 1)}
    is_halved = min(zeros) == 0 and max(zeros) * 4 > len(start[:2000])
    if start.startswith(_UTF16_STARTS) or is_halved:
        raise DataError(
            f"{file.name} is UTF-16, but JSON and CSV are read as UTF-8. "
            f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > converted{_suffix_of(file)}"
        )


def _suffix_of(file: InputFile) -> str:
    return PurePosixPath(file.name).suffix


def _sniff_objects(file: InputFile, text: bytes, compression: Compression | None) -> Kind:
    """Distinguish JSONL, objects spread over lines, and one object around a table.

    Args:
        text: the file's start, from the first brace on.
    """
    first, newline, below = text.partition(b"\n")
    has_more_lines = bool(newline and below.strip())
    if has_more_lines and (_decode(first) is not None or not _is_spread(text, first, below)):
        return "jsonl"
    cut = cut_first_object(text)
    if has_more_lines and cut is not None and text[len(cut) :].strip():
        return "json objects"
    # A single object, or one that does not end within the start of the file.
    whole = read_whole_object(file, compression)
    if whole is not None and find_rows(whole, file=file.name) is not None:
        return "json table"
    return "json objects" if has_more_lines else "jsonl"


def _is_spread(text: bytes, first: bytes, below: bytes) -> bool:
    """Distinguish an object spread over lines from a damaged first line of JSONL."""
    cut = cut_first_object(text)
    if cut is not None and _decode(cut) is not None:
        return b"\n" in cut
    last, following = first.rstrip()[-1:], below.lstrip()[:1]
    if last == b"{":
        return following in (b'"', b"}")
    return last == b"[" or (last in (b",", b":") and following != b"{")


def _decode(content: bytes) -> dict[str, Any] | None:
    try:
        return decode_object(content)
    except RowFault:
        return None


def _is_array(text: bytes) -> bool:
    """Distinguish a JSON array from JSONL whose first line is an array.

    It is JSONL if more lines follow a closed array, or if an object follows where an open array
    allows none: in JSON an object can follow only `[`, `,` or `:`.

    Args:
        text: the file's start, from the first bracket on.
    """
    first, _, below = text.partition(b"\n")
    following = below.lstrip()[:1]
    if not following:
        return True
    return not is_closed_array(first) and (following != b"{" or first.rstrip()[-1:] in b"[,:")


__all__ = [
    "JSONL",
    "Container",
    "RawRow",
    "Sample",
    "Split",
    "count_lines",
    "limit_rows",
    "read_rows",
    "sample_key",
    "sniff_container",
    "split_file",
    "whole_file",
]
