"""Read a JSON array of objects, holding one object at a time.

A byte scanner that knows strings, escapes and nesting finds the end of each element; the element is
then decoded like a line of JSONL.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

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
        scanner = _Scanner(split.file.name)
        for number, element in enumerate(scanner.scan(stream)):
            yield element.decode(number)


def is_closed_array(text: bytes) -> bool:
    """Return whether a text that starts with a bracket is one array and nothing more."""
    scanner = _Scanner("")
    try:
        for _ in scanner.scan(io.BytesIO(text)):
            pass
    except DataError:
        return False
    return True


class _Element:
    """The bytes of one element; if it is too long, only its start and hash."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.num_bytes = 0
        self._hasher = hashlib.sha256()
        self._is_long = False

    def add(self, piece: bytes) -> None:
        if not self.num_bytes:
            piece = piece.lstrip(_SPACE)
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
            raw = bytes(self.content)
            return RawRow(number=number, content=found, raw=raw, sha256=self._hasher.hexdigest())
        raw = bytes(self.content).rstrip(_SPACE)
        try:
            return RawRow(number=number, content=decode_object(raw), raw=raw)
        except RowFault as fault:
            return RawRow(number=number, content=fault.finding, raw=raw)


class _Scanner:
    """Tracks the brackets of an array, chunk by chunk."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open = bytearray()
        """The closing brackets still expected, the array's own first."""
        self._in_string = False
        self._is_escaped = False
        self._element = _Element()
        self._num_elements = 0
        self._is_closed = False

    def scan(self, stream: BinaryIO) -> Iterator[_Element]:
        is_start = True
        while chunk := stream.read(BUFFER_BYTES):
            yield from self._scan_chunk(chunk.removeprefix(_BOM) if is_start else chunk)
            is_start = False
        if not self._is_closed:
            raise DataError(
                f"{self._name} is a JSON array that does not end: it is truncated, or a quote or "
                f"bracket is missing in or after its row {self._num_elements}. "
                "Fetch or write it again, or mend it there."
            )

    def _scan_chunk(self, chunk: bytes) -> Iterator[_Element]:
        at = begin = 0
        while at < len(chunk):
            if self._is_closed:
                self._refuse_rest(chunk[at:])
                return
            if self._in_string:
                at = self._skip_string(chunk, at)
                continue
            pattern = _INSIDE_ELEMENT if len(self._open) > 1 else _BETWEEN_ELEMENTS
            match = pattern.match(chunk, at)
            if match is None:
                break
            at = match.end()
            mark = match[1]
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                self._open += _CLOSERS[mark]
                if len(self._open) == 1:
                    begin = at
            elif mark != b"," and mark[0] != self._open[-1]:
                raise self._lost_track()
            elif len(self._open) == 1:
                self._element.add(chunk[begin : at - 1])
                self._is_closed = mark == b"]"
                # An empty array has no element between its brackets.
                if self._element.num_bytes or self._num_elements or not self._is_closed:
                    yield self._element
                    self._num_elements += 1
                self._element = _Element()
                begin = at
            else:
                self._open.pop()
        if not self._is_closed:
            self._element.add(chunk[begin:])

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
        return DataError(
            f"{self._name} is a JSON array whose brackets don't match in row "
            f"{self._num_elements}, so that its other rows cannot be found. Fix that row."
        )
