"""How do files that libraries write to and read from local paths reach a store of any kind?"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from schemas.manifest import FileRecord
from stages.store.filesystems import Folder, sync_directory, sync_file

_CHUNK_BYTES = 1 << 22


@contextmanager
def writable_path(folder: Folder) -> Iterator[Path]:
    """Give a local directory whose files are durably in the folder when the block ends."""
    if folder.is_local:
        folder.create()
        yield Path(folder.path)
        for path in _files_below(Path(folder.path)):
            sync_file(str(path))
        sync_directory(folder.path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for path in _files_below(Path(scratch)):
            name = folder.file(path.relative_to(scratch).as_posix())
            with open(path, "rb") as source, folder.filesystem.open_output_stream(name) as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)


@contextmanager
def readable_path(folder: Folder, names: Sequence[str]) -> Iterator[Path]:
    """Give a local directory that holds these files of the folder."""
    if folder.is_local:
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            source_name = folder.file(name)
            with (
                folder.filesystem.open_input_stream(source_name) as source,
                open(Path(scratch) / name, "wb") as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        yield Path(scratch)


def describe_file(directory: Path, name: str, *, prefix: str = "") -> FileRecord:
    """Describe a file below a local directory.

    Args:
        prefix: what to put before the name in the record, such as "model/".
    """
    path = directory / name
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(name=prefix + name, num_bytes=path.stat().st_size, sha256=sha256)


def describe_files(directory: Path, *, prefix: str = "") -> list[FileRecord]:
    """Describe all files below a local directory, sorted by name."""
    return [
        describe_file(directory, path.relative_to(directory).as_posix(), prefix=prefix)
        for path in _files_below(directory)
    ]


def _files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
