"""How files are reached, whatever holds them: a local path, or a URI of pyarrow's or fsspec's."""

import functools
import hashlib
import os
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from schemas.errors import ConfigError

_HASH_CHUNK_BYTES = 1 << 22


@functools.cache
def _open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        import fsspec

        scheme = uri.split("://", 1)[0]
        if scheme not in fsspec.available_protocols():
            raise ConfigError(
                f"{uri}: neither pyarrow nor fsspec opens {scheme}://. "
                "Use a local path, s3://, gs://, or install the fsspec package for it."
            ) from error
        opened, path = fsspec.core.url_to_fs(uri)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(opened))
    return filesystem, path.rstrip("/")


@dataclass(frozen=True)
class Folder:
    """A directory named by a path or URI. It pickles as its name; workers open their own handle."""

    uri: str

    @property
    def filesystem(self) -> pafs.FileSystem:
        return _open_filesystem(self.uri)[0]

    @property
    def path(self) -> str:
        """The directory's path inside its filesystem."""
        return _open_filesystem(self.uri)[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def file(self, name: str) -> str:
        """Give a file's path inside the filesystem."""
        return f"{self.path}/{name}"

    def create(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.file(name)).type == pafs.FileType.File

    def list_files(self, name: str = "") -> list[str]:
        """List the files directly inside (or inside a child), sorted by name; absent means none."""
        base = self.file(name) if name else self.path
        selector = pafs.FileSelector(base, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)

    def list_folders(self, name: str = "") -> list[str]:
        """List the directories directly inside (or inside a child), sorted by name."""
        base = self.file(name) if name else self.path
        selector = pafs.FileSelector(base, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def walk(self, name: str = "") -> list["StoredFile"]:
        """List all files inside (or inside a child), at any depth, sorted; absent means none."""
        base = self.file(name) if name else self.path
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=True)
        found = [
            StoredFile(
                name=os.path.relpath(info.path, self.path),
                num_bytes=int(info.size or 0),
                modified=info.mtime,
            )
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        ]
        return sorted(found, key=lambda file: file.name)

    def num_bytes(self, name: str) -> int:
        return int(self.filesystem.get_file_info(self.file(name)).size)

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a file at once: a reader sees the old content or the new, never a part."""
        if not self.is_local:  # A finished PUT is atomic.
            with self.filesystem.open_output_stream(self.file(name)) as stream:
                stream.write(content)
            return
        beside = self._write_beside(name, content)
        os.replace(beside, self.file(name))
        sync_directory(os.path.dirname(self.file(name)))

    def create_file(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists, and say whether this call wrote it.

        Object stores opened through pyarrow know no conditional PUT: there the last writer wins,
        which is safe for commit records because each is consistent in itself.
        """
        if not self.is_local:
            if self.exists(name):
                return False
            self.write_bytes(name, content)
            return True
        beside = self._write_beside(name, content)
        try:
            os.link(beside, self.file(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(beside)
        sync_directory(os.path.dirname(self.file(name)))
        return True

    def move(self, source: str, target: str) -> None:
        """Rename a file; on POSIX atomic, replacing the target."""
        self.filesystem.move(self.file(source), self.file(target))

    def delete_file(self, name: str) -> None:
        self.filesystem.delete_file(self.file(name))

    def delete_folder(self, name: str) -> None:
        """Delete a directory below this one and all that is in it; absent is fine."""
        if self.filesystem.get_file_info(self.file(name)).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.file(name))

    def sha256(self, name: str) -> str:
        hasher = hashlib.sha256()
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest()

    def _write_beside(self, name: str, content: bytes) -> str:
        directory, base = os.path.split(self.file(name))
        os.makedirs(directory, exist_ok=True)
        beside = f"{directory}/.{base}.{uuid.uuid4().hex}"
        with open(beside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return beside


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as a listing shows it."""

    name: str
    """Path below the folder that was listed."""
    num_bytes: int
    modified: datetime | None
    """UTC, by the storage's clock; None where the storage does not say."""


def sync_file(path: str) -> None:
    """Make a local file's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str) -> None:
    """Make the names in a local directory survive a power cut."""
    sync_file(path)


def user_cache() -> Path:
    """Give the user's cache directory of this project, made on demand."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "offline-dpo"
    path.mkdir(parents=True, exist_ok=True)
    return path
