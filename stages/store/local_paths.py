"""Local paths for code that cannot open a store: downloads of its files, uploads into it."""

import functools
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from schemas.errors import DataError
from schemas.manifest import FileRecord
from stages.store.caches import digest_file, user_cache
from stages.store.filesystems import Folder, sync_directory, sync_file

_CHUNK_BYTES = 1 << 22
_CACHED_FROM_AGE_NS = 2_000_000_000
"""Object stores report whole seconds: a younger object may be rewritten with an equal mtime."""


@functools.lru_cache
def fetch_object(uri: str, *, sha256: str | None = None) -> str:
    """Download an object into the user's cache, unless it is there, and return its local path.

    Args:
        uri: the object.
        sha256: of the expected content; None accepts the present content.
    Raises:
        DataError: the object does not exist, or its content is not the expected one.
        OSError: the store cannot be reached.
    """
    source = Folder(uri)
    info = source.filesystem.get_file_info(source.path)
    if info.type != pafs.FileType.File:
        raise DataError(f"{uri} does not exist.")
    state = f"{uri} {info.size} {info.mtime_ns}"
    copy = user_cache() / "objects" / hashlib.sha256(state.encode()).hexdigest()
    is_settled = info.mtime_ns is not None and time.time_ns() - info.mtime_ns > _CACHED_FROM_AGE_NS
    if not is_settled or not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        temporary = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
        try:
            _download(source.filesystem, source.path, temporary)
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
    if sha256 is not None and digest_file(copy) != sha256:
        raise DataError(f"{uri} has changed since the run was planned. Run again.")
    return str(copy)


@contextmanager
def readable_path(folder: Folder, names: Sequence[str]) -> Iterator[Path]:
    """Yield a local directory that holds the named files of a folder."""
    if folder.is_local:
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            _download(folder.filesystem, folder.file(name), Path(scratch) / name)
        yield Path(scratch)


@contextmanager
def writable_path(folder: Folder) -> Iterator[Path]:
    """Yield a local directory; its files are durably in the folder when the block ends."""
    if folder.is_local:
        folder.create()
        yield Path(folder.path)
        for path in _list_files_below(Path(folder.path)):
            sync_file(str(path))
        sync_directory(folder.path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for path in _list_files_below(Path(scratch)):
            name = folder.file(path.relative_to(scratch).as_posix())
            with open(path, "rb") as source, folder.filesystem.open_output_stream(name) as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)


def describe_file(directory: Path, name: str, *, prefix: str = "") -> FileRecord:
    """Make the record of a file below a local directory.

    Args:
        directory: where the file lies.
        name: path below the directory.
        prefix: put before the name in the record, such as "model/".
    """
    path = directory / name
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(name=prefix + name, num_bytes=path.stat().st_size, sha256=sha256)


def describe_files(directory: Path, *, prefix: str = "") -> list[FileRecord]:
    """Make the records of all files below a local directory, sorted by name."""
    return [
        describe_file(directory, path.relative_to(directory).as_posix(), prefix=prefix)
        for path in _list_files_below(directory)
    ]


def _download(filesystem: pafs.FileSystem, path: str, target: Path) -> None:
    with filesystem.open_input_stream(path) as source, open(target, "wb") as stream:
        shutil.copyfileobj(source, stream, _CHUNK_BYTES)


def _list_files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
