"""Open text files, decompressing gzip and zstd with a limit on the expanded size."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa

from schemas.errors import DataError
from stages.validate.inputs import InputFile
from stages.validate.reading.containers import BUFFER_BYTES, Compression, named_damage

MAX_RATIO = 200
"""A file that expands by more than this factor ..."""
MAX_RATIO_BYTES = 1 << 30
"""... and to more than this many bytes is refused as a decompression bomb."""


@contextmanager
def open_stream(file: InputFile, compression: Compression | None) -> Iterator[BinaryIO]:
    """Open a text file for reading, decompressed; gzip may have several members, zstd several
    frames.

    Raises:
        DataError: while reading: the file is truncated, or expands beyond the limit.
    """
    with named_damage(file):
        if compression is None:
            stream: BinaryIO = open(file.local_path, "rb", buffering=BUFFER_BYTES)  # noqa: SIM115
        else:
            source = pa.input_stream(file.local_path, compression=compression)
            stream = io.BufferedReader(_Decompressed(source, file), BUFFER_BYTES)
        with stream:
            yield stream


class _Decompressed(io.RawIOBase):
    """Counts decompressed bytes, and stops a decompression bomb."""

    def __init__(self, source: pa.NativeFile, file: InputFile) -> None:
        self._source = source
        self._file = file
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        num_read = int(self._source.readinto(buffer))
        self._num_bytes += num_read
        if self._num_bytes > max(MAX_RATIO_BYTES, MAX_RATIO * self._file.num_bytes):
            raise DataError(
                f"{self._file.name} has {self._file.num_bytes:,} bytes and more than "
                f"{self._num_bytes:,} when decompressed: over {MAX_RATIO}:1, as data that only "
                "fills a disk has. If it is meant, decompress it first."
            )
        return num_read

    def close(self) -> None:
        self._source.close()
        super().close()
