"""Read JSONL, whole or a byte range of it.

Lines are split on the byte 0x0A only: `str.splitlines` also splits on U+2028, which JSON allows
inside strings.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from stages.validate.findings import Finding, RowFault
from stages.validate.reading.containers import (
    BUFFER_BYTES,
    MAX_EXCERPT_BYTES,
    MAX_LINE_BYTES,
    RawRow,
    Split,
    decode_object,
)
from stages.validate.reading.text_files import open_stream

_BOM = b"\xef\xbb\xbf"


def count_lines(split: Split) -> int:
    """Count the lines that start in a byte range, without decoding them.

    A line starts at byte 0 and after each newline, so the newlines from the byte before the range
    up to its last byte, exclusive, are counted.
    """
    begin = max(split.begin - 1, 0)
    num_left = split.end - 1 - begin
    num_lines = 1 if split.begin == 0 else 0
    with open(split.file.local_path, "rb") as stream:
        stream.seek(begin)
        while num_left > 0 and (chunk := stream.read(min(BUFFER_BYTES, num_left))):
            num_lines += chunk.count(b"\n")
            num_left -= len(chunk)
    return num_lines


class _Line(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    content: bytes
    """Without its newline; cut to 64 KiB if the line is too long."""
    num_bytes: int
    """Size of the line with its newline."""
    is_complete: bool
    """Whether it ends in a newline, which a file's last line may lack."""
    sha256: str | None = None
    """sha256 of the whole line without its newline, if it is too long to hold."""

    @property
    def is_blank(self) -> bool:
        return self.sha256 is None and not self.content.strip()


def read_lines(split: Split) -> Iterator[RawRow]:
    """Read the rows of a byte range or of a compressed file; blank lines are only counted."""
    with open_stream(split.file, split.container.compression) as stream:
        position = _skip_to_line_start(stream, split.begin)
        number = split.first_row
        for line in _read_lines(stream, is_file_start=position == 0):
            if split.container.is_cut_by_bytes and position >= split.end:
                return
            if not line.is_blank:
                yield _read_row(line, number)
            position += line.num_bytes
            number += 1


def _skip_to_line_start(stream: BinaryIO, begin: int) -> int:
    """Move to the first line that starts at `begin` or later; return its position."""
    if begin == 0:
        return 0
    position = begin - 1
    stream.seek(position)
    while chunk := stream.readline(BUFFER_BYTES):
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
        chunk = stream.readline(BUFFER_BYTES)
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
            content = decode_object(line.content)
        except RowFault as fault:
            content = fault.finding
            if not line.is_complete:
                content = content._replace(
                    detail=f"{content.detail}; the file ends in this line and may be truncated"
                )
    return RawRow(
        number=number, content=content, raw=line.content, line=number + 1, sha256=line.sha256
    )


def find_end_of_rows(split: Split, max_rows: int) -> tuple[int, int]:
    """Count up to `max_rows` rows from a file's start; return the count and the end of the last
    row.
    """
    num_rows, position = 0, 0
    with open_stream(split.file, split.container.compression) as stream:
        for line in _read_lines(stream, is_file_start=True):
            position += line.num_bytes
            num_rows += not line.is_blank
            if num_rows == max_rows:
                break
    return num_rows, position
