"""Read objects of JSON that are spread over lines, holding one object at a time.

They are the elements of one array, or stand one after another. A byte scanner that knows strings,
escapes and nesting finds the end of each; it is then decoded like a line of JSONL.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from schemas.errors import DataError
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

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BETWEEN_ELEMENTS = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb')*+(["\[\]{},])', re.DOTALL)
_INSIDE_ELEMENT = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb')*+(["\[\]{}])', re.DOTALL)
"""Match up to the next structural byte, or a quote whose string continues in the next chunk."""
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_CLOSERS = {b"[": b"]", b"{": b"}"}
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


def read_array(split: Split) -> Iterator[RawRow]:
    """Read the elements of an array; a damaged one is rejected alone if its end can be found.

    Raises:
        DataError: an element or the array has no end, or something follows the array.
    """
    with open_stream(split.file, split.container.compression) as stream:
        scanner = _Scanner(split.file.name, is_array=True)
        for number, element in enumerate(scanner.scan(stream)):
            yield element.decode(number)


def read_objects(split: Split) -> Iterator[RawRow]:
    """Read objects that follow one another; a damaged one is rejected alone if its end can be
    found.

    Raises:
        DataError: an object has no end.
    """
    with open_stream(split.file, split.container.compression) as stream:
        scanner = _Scanner(split.file.name, is_array=False)
        for number, element in enumerate(scanner.scan(stream)):
            yield element.decode(number)


def is_closed_array(text: bytes) -> bool:
    """Return whether a text that starts with a bracket is one array and nothing more."""
    scanner = _Scanner("", is_array=True)
    try:
        for _ in scanner.scan(io.BytesIO(text)):
            pass
    except DataError:
        return False
    return True


def cut_first_object(text: bytes) -> bytes | None:
    """Return the first object of a text; None if it does not end in it."""
    scanner = _Scanner("", is_array=False)
    try:
        first = next(scanner.scan(io.BytesIO(text)), None)
    except DataError:
        return None
    return None if first is None else bytes(first.content)


class _Element:
    """The bytes of one element; if it is too long, only its start and hash."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.num_bytes = 0
        self.line = 0
        """Line of the file, from 1, where it begins."""
        self._hasher = hashlib.sha256()
        self._is_long = False

    def add(self, piece: bytes, line: int) -> None:
        """Add bytes that begin in a line of the file."""
        if not self.num_bytes:
            num_bytes = len(piece)
            stripped = piece.lstrip(_SPACE)
            self.line = line + piece.count(b"\n", 0, num_bytes - len(stripped))
            piece = stripped
        self.num_bytes += len(piece)
        if self._is_long:
            self._hasher.update(piece)
            return
        self.content += piece
        if len(self.content) > MAX_LINE_BYTES:
            self._is_long = True
            self._hasher.update(self.content)
            del self.content[MAX_EXCERPT_BYTES:]

    def decode(self, number: int) -> RawRow:
        if self._is_long:
            found = Finding("LINE_TOO_LONG", None, f"{self.num_bytes:,} bytes")
            return RawRow(
                number=number,
                content=found,
                raw=bytes(self.content),
                line=self.line,
                sha256=self._hasher.hexdigest(),
            )
        raw = bytes(self.content).rstrip(_SPACE)
        content: dict[str, Any] | Finding
        try:
            content = decode_object(raw)
        except RowFault as fault:
            content = fault.finding
        return RawRow(number=number, content=content, raw=raw, line=self.line)


class _Scanner:
    """Tracks the brackets of an array, or of objects one after another, chunk by chunk."""

    def __init__(self, name: str, *, is_array: bool) -> None:
        self._name = name
        self._is_array = is_array
        self._open = bytearray()
        """The closing brackets still expected, the array's own first."""
        self._in_string = False
        self._is_escaped = False
        self._element = _Element()
        self._num_elements = 0
        self._line = 1
        self._is_closed = False
        """Whether the array has ended."""

    def scan(self, stream: BinaryIO) -> Iterator[_Element]:
        is_start = True
        while chunk := stream.read(BUFFER_BYTES):
            yield from self._scan_chunk(chunk.removeprefix(_BOM) if is_start else chunk)
            is_start = False
        if self._is_array:
            if not self._is_closed:
                raise DataError(
                    f"{self._name} is a JSON array that does not end: it is truncated, or a quote "
                    f"or bracket is missing in or after its row {self._num_elements}. "
                    "Fetch or write it again, or mend it there."
                )
        elif self._open or self._in_string:
            raise DataError(
                f"{self._name} holds JSON objects over several lines, and one does not end: the "
                "file is truncated, or a quote or bracket is missing in or after its row "
                f"{self._num_elements} (line {self._element.line}). "
                "Fetch or write it again, or mend it there."
            )
        elif self._element.num_bytes:
            yield self._element

    def _scan_chunk(self, chunk: bytes) -> Iterator[_Element]:
        at = begin = 0
        num_outside = 1 if self._is_array else 0
        while at < len(chunk):
            if self._is_closed:
                self._refuse_rest(chunk[at:])
                return
            if self._in_string:
                at = self._skip_string(chunk, at)
                continue
            pattern = _INSIDE_ELEMENT if len(self._open) > num_outside else _BETWEEN_ELEMENTS
            match = pattern.match(chunk, at)
            if match is None:
                break
            at = match.end()
            mark = match[1]
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                self._open += _CLOSERS[mark]
                if self._is_array and len(self._open) == 1:
                    self._line += chunk.count(b"\n", 0, at)
                    begin = at
            elif mark != b"," and mark != self._open[-1:]:
                raise self._lost_track()
            elif len(self._open) == 1 and self._is_array:
                self._add(chunk[begin : at - 1])
                self._is_closed = mark == b"]"
                # An empty array has no element between its brackets.
                if self._element.num_bytes or self._num_elements or not self._is_closed:
                    yield self._end_element()
                begin = at
            elif mark != b",":
                self._open.pop()
                if not self._open:
                    self._add(chunk[begin:at])
                    yield self._end_element()
                    begin = at
        if not self._is_closed:
            self._add(chunk[begin:])

    def _add(self, piece: bytes) -> None:
        self._element.add(piece, self._line)
        self._line += piece.count(b"\n")

    def _end_element(self) -> _Element:
        ended, self._element = self._element, _Element()
        self._num_elements += 1
        return ended

    def _skip_string(self, chunk: bytes, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            at += 1
        rest = _STRING_REST.match(chunk, at)
        assert rest is not None
        at = rest.end()
        if at < len(chunk):
            # The pattern stops at a quote, or a backslash that is the chunk's last byte.
            self._is_escaped = chunk[at : at + 1] == b"\\"
            self._in_string = self._is_escaped
            at += 1
        return at

    def _refuse_rest(self, rest: bytes) -> None:
        if rest.strip(_SPACE):
            raise DataError(
                f"{self._name} is a JSON array, but something follows its end: "
                f"{rest.strip(_SPACE)[:40]!a}. Only one array per file is read; JSONL has no array "
                "around its rows."
            )

    def _lost_track(self) -> DataError:
        found = "is a JSON array" if self._is_array else "holds JSON objects over several lines,"
        return DataError(
            f"{self._name} {found} whose brackets don't match in row {self._num_elements}, so that "
            "its other rows cannot be found. Fix that row."
        )
