"""How files are reached, whatever holds them: a local path, or a URI of pyarrow's or fsspec's."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pyarrow as pa
import pyarrow.fs as pafs

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from botocore.client import BaseClient

_HASH_CHUNK_BYTES = 1 << 22
_BESIDE = re.compile(r"\..+\.[0-9a-f]{32}")
_MAX_ATTEMPTS = 10
"""Of each request to S3 while the server is busy, failing or cut off: half a minute or so."""
_DELETE_AGAIN_SECONDS = (0.1, 0.3, 1.0, 3.0)
"""Between attempts to delete a directory that somebody still writes to."""


def _open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Give the filesystem that holds a path or URI, and the path inside it.

    Raises:
        ConfigError: nothing opens such a URI, or it carries a password or a query.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    scheme, rest = uri.split("://", 1)
    host = rest.split("/", 1)[0]
    if "?" in uri or ":" in host.rpartition("@")[0]:
        # Names of stores are written to recipes, manifests and logs. The secret is not repeated.
        raise ConfigError(
            f"{scheme}://{host.rpartition('@')[2].split('?')[0]}: a store's URI holds neither a "
            "password nor a `?query`. Credentials, endpoint and region come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION) or from what "
            "the machine is configured with."
        )
    if scheme == "s3":
        return _open_bucket(host), rest.rstrip("/")
    return _open_uri(uri)


@functools.cache
def _open_bucket(bucket: str) -> pafs.S3FileSystem:
    """Open a bucket: one connection pool for all folders, and patience with a busy server."""
    # from_uri finds out where the bucket lies, but takes no retry strategy; the class takes one,
    # but does not look for the endpoint.
    return pafs.S3FileSystem(
        region=pafs.FileSystem.from_uri(f"s3://{bucket}")[0].region,
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL"),
        allow_delayed_open=True,  # A small object is then one request instead of three.
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS),
    )


@functools.cache
def _open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
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


@functools.cache
def _s3_client() -> "BaseClient":
    """Give a client for the one request that pyarrow cannot make: a conditional PUT."""
    import botocore.config
    import botocore.session

    settings = botocore.config.Config(
        retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        # Servers that only resemble S3 refuse checksums that they do not know.
        request_checksum_calculation="when_required",
    )
    return botocore.session.get_session().create_client("s3", config=settings)


def _put_if_absent(path: str, content: bytes) -> bool | None:
    """Create an object unless there is one; None where the server knows no conditional PUT.

    A repeated request, whose first answer was lost, finds its own object and says False.

    Raises:
        OSError: the server refuses, or cannot be reached.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = path.split("/", 1)
    for _ in range(_MAX_ATTEMPTS):
        try:
            _s3_client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
            return True
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == HTTPStatus.PRECONDITION_FAILED:
                return False
            if status == HTTPStatus.NOT_IMPLEMENTED:
                return None
            # Another request for the same key was on its way: ask who was first.
            if status != HTTPStatus.CONFLICT:
                raise OSError(f"s3://{path} cannot be written: {error}") from error
        except BotoCoreError as error:
            raise OSError(f"s3://{path} cannot be written: {error}") from error
    raise OSError(f"s3://{path} cannot be written: others keep writing it")


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

    @property
    def _is_s3(self) -> bool:
        return isinstance(self.filesystem, pafs.S3FileSystem)

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def file(self, name: str) -> str:
        """Give a file's path inside the filesystem."""
        return f"{self.path}/{name}"

    def locate(self, name: str) -> str:
        """Give a file's name for a reader: an absolute path, or a URI."""
        return self.file(name) if self.is_local else f"{self.uri.rstrip('/')}/{name}"

    def create(self) -> None:
        """Make the directory and those above it, where the store knows such things."""
        if not self._is_s3:  # There a prefix exists with its first object.
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
        with self._written_beside(name, content) as beside:
            os.replace(beside, self.file(name))
        sync_directory(os.path.dirname(self.file(name)))

    def create_file(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists, and say whether this call wrote it.

        On S3 by a conditional PUT. Where a server knows none, and on other object stores, the last
        of several writers at the same moment wins, which is safe for commit records because each is
        consistent in itself.
        """
        if self._is_s3:
            is_created = _put_if_absent(self.file(name), content)
            if is_created is not None:
                return is_created
        if not self.is_local:
            if self.exists(name):
                return False
            self.write_bytes(name, content)
            return True
        with self._written_beside(name, content) as beside:
            try:
                os.link(beside, self.file(name))
            except FileExistsError:
                return False
        sync_directory(os.path.dirname(self.file(name)))
        return True

    @contextlib.contextmanager
    def hold(self, name: str, *, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Keep others that hold the same name out while the block runs, on whatever machine.

        By a lock on a file of that name, which ends with its process however that ends. Object
        stores have no locks, nor have some network file systems: there nobody is kept out.

        Args:
            name: of the file; it is gone after the block.
            on_wait: called before waiting, with host and process of who holds it.
        """
        if not self.is_local:
            yield
            return
        self.create()
        path = self.file(name)
        with contextlib.ExitStack() as stack:
            while True:
                stream = stack.enter_context(_open_lock(path))
                if not _lock(stream, on_wait):
                    break
                found = os.fstat(stream.fileno())
                if os.path.exists(path) and os.path.samestat(os.stat(path), found):
                    break
                # Who held it has deleted it: this is a lock of nothing.
            Path(path).write_text(f"{socket.gethostname()}:{os.getpid()}")
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def holder(self, name: str) -> str | None:
        """Give host and process of who holds a name, None where nobody does or none can tell."""
        if not self.is_local:
            return None
        with contextlib.suppress(OSError), open(self.file(name)) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return stream.read()
        return None

    def move(self, source: str, target: str) -> None:
        """Rename a file; on POSIX atomic, replacing the target."""
        self.filesystem.move(self.file(source), self.file(target))

    def delete_file(self, name: str) -> None:
        self.filesystem.delete_file(self.file(name))

    def delete_folder(self, name: str) -> None:
        """Delete a directory below this one and all that is in it; absent is fine.

        Where a process of an earlier run is still dying, it may add to it meanwhile: then it is
        deleted once more.
        """
        path = self.file(name)
        for wait in [*_DELETE_AGAIN_SECONDS, None]:
            if self.filesystem.get_file_info(path).type != pafs.FileType.Directory:
                return
            try:
                self.filesystem.delete_dir(path)
                return
            except OSError as error:
                if wait is None or error.errno != errno.ENOTEMPTY:
                    raise
                time.sleep(wait)

    def sha256(self, name: str) -> str:
        hasher = hashlib.sha256()
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest()

    @contextlib.contextmanager
    def _written_beside(self, name: str, content: bytes) -> Iterator[str]:
        """Give a durable file with the content, to be moved or linked; what is left of it goes."""
        directory, base = os.path.split(self.file(name))
        os.makedirs(directory, exist_ok=True)
        beside = f"{directory}/.{base}.{uuid.uuid4().hex}"
        try:
            with open(beside, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            yield beside
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)


def is_half_written(name: str) -> bool:
    """Say whether a file is what is left of a small one whose writer was killed."""
    return bool(_BESIDE.fullmatch(os.path.basename(name)))


def _open_lock(path: str) -> TextIO:
    """Open a file to lock it: for reading, so that its disk can still be made read-only.

    NFS locks only what is open for writing.
    """
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT, 0o644))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EBADF:
            stream.close()
            return open(path, "a+")
    return stream


def _lock(stream: TextIO, on_wait: Callable[[str], None]) -> bool:
    """Lock an open file, waiting if need be; False where its file system has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        on_wait(stream.read())
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP):
            return False
        raise
    return True


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
