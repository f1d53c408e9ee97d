"""Folders on any filesystem: local paths, and URIs that pyarrow or fsspec can open."""

import contextlib
import errno
import functools
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs as pafs

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from botocore.client import BaseClient

_HASH_CHUNK_BYTES = 1 << 22
_GLOB_CHARACTER = re.compile(r"[*?\[]")
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}")
_MAX_ATTEMPTS = 10
"""Attempts at each S3 request while the server is busy, failing or cut off: about half a minute."""
_DELETE_AGAIN_SECONDS = (0.1, 0.3, 1.0, 3.0)
"""Waits between attempts to delete a directory that another process still writes to."""


def _open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or URI, and the path inside it.

    Raises:
        ConfigError: no library opens this kind of URI, or it carries a password or a query.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    scheme, rest = uri.split("://", 1)
    host = rest.split("/", 1)[0]
    if "?" in uri or ":" in host.rpartition("@")[0]:
        # Store names end up in recipes, manifests and logs, so the message omits the secret too.
        raise ConfigError(
            f"{scheme}://{host.rpartition('@')[2].split('?')[0]}: a store's URI may hold neither "
            "a password nor a `?query`. Credentials, endpoint and region come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION) or from what "
            "the machine is configured with."
        )
    if scheme == "s3":
        return _open_bucket(host), rest.rstrip("/")
    return _open_uri(uri)


@functools.cache
def _open_bucket(bucket: str) -> pafs.S3FileSystem:
    """Open a bucket, with one connection pool for all folders and retries for a busy server."""
    # from_uri finds the bucket's region but accepts no retry strategy; the class accepts one but
    # ignores the environment's endpoint.
    return pafs.S3FileSystem(
        region=pafs.FileSystem.from_uri(f"s3://{bucket}")[0].region,
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL"),
        allow_delayed_open=True,  # Writes a small object in one request instead of three.
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
                "Use a local path, s3:// or gs://, or install the fsspec package for it."
            ) from error
        opened, path = fsspec.core.url_to_fs(uri)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(opened))
    return filesystem, path.rstrip("/")


@functools.cache
def _s3_client() -> "BaseClient":
    """Return a client for the one request that pyarrow cannot make: a conditional PUT."""
    import botocore.config
    import botocore.session

    settings = botocore.config.Config(
        retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        # Some S3-compatible servers refuse the newer checksum headers.
        request_checksum_calculation="when_required",
    )
    return botocore.session.get_session().create_client("s3", config=settings)


def _put_if_absent(path: str, content: bytes) -> bool | None:
    """Create an object unless it exists, and return whether this call created it.

    A retry after a lost answer finds its own object and returns False.

    Returns:
        None if the server does not support conditional PUT.
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
            # A concurrent request for the same key is in progress: retry to learn which one won.
            if status != HTTPStatus.CONFLICT:
                raise OSError(f"s3://{path} cannot be written: {error}") from error
        except BotoCoreError as error:
            raise OSError(f"s3://{path} cannot be written: {error}") from error
    raise OSError(f"s3://{path} cannot be written: other writers keep writing it")


@dataclass(frozen=True)
class Folder:
    """A directory named by a path or URI. It pickles as its name; workers open their own handle."""

    uri: str
    """A local path, relative or absolute, or a URI; ~ at its beginning becomes the home folder."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", os.path.expanduser(self.uri))

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem; remote ones are opened once a process."""
        return _open_filesystem(self.uri)[0]

    @property
    def path(self) -> str:
        """The directory's path inside its filesystem."""
        return _open_filesystem(self.uri)[1]

    @property
    def is_local(self) -> bool:
        """Whether the directory is on a mounted filesystem."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def _is_s3(self) -> bool:
        return isinstance(self.filesystem, pafs.S3FileSystem)

    def child(self, name: str) -> "Folder":
        """Return the directory of this name inside this one."""
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def file(self, name: str) -> str:
        """Return a file's path inside the filesystem."""
        return f"{self.path}/{name}"

    def locate(self, name: str) -> str:
        """Return a file's absolute path or URI, for people and other programs."""
        return self.file(name) if self.is_local else f"{self.uri.rstrip('/')}/{name}"

    def create(self) -> None:
        """Create the directory and its parents."""
        if not self._is_s3:  # An S3 prefix exists as soon as it holds an object.
            self.filesystem.create_dir(self.path, recursive=True)

    def exists(self, name: str) -> bool:
        """Return whether a file of this name exists."""
        return self.filesystem.get_file_info(self.file(name)).type == pafs.FileType.File

    def list_files(self, name: str = "") -> list[str]:
        """List the files directly inside this directory or a child of it, sorted by name.

        A missing directory holds no files.
        """
        base = self.file(name) if name else self.path
        selector = pafs.FileSelector(base, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)

    def list_folders(self, name: str = "") -> list[str]:
        """List the directories directly inside this directory or a child of it, sorted by name."""
        base = self.file(name) if name else self.path
        selector = pafs.FileSelector(base, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def walk(self, name: str = "") -> list["StoredFile"]:
        """List the files at any depth below this directory or a child of it, sorted by name.

        A missing directory holds no files.
        """
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
        """Return a file's size."""
        return int(self.filesystem.get_file_info(self.file(name)).size)

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a file atomically: a reader sees the old content or the new, never a part."""
        if not self.is_local:  # A finished PUT is atomic.
            with self.filesystem.open_output_stream(self.file(name)) as stream:
                stream.write(content)
            return
        with self._temporary_file(name, content) as temporary:
            os.replace(temporary, self.file(name))
        sync_directory(os.path.dirname(self.file(name)))

    def create_file(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists, and return whether this call wrote it.

        On S3 this is a conditional PUT. On servers without it, and on other object stores, the last
        of several simultaneous writers wins; that is safe for commit records, because each of them
        is consistent in itself.
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
        with self._temporary_file(name, content) as temporary:
            try:
                os.link(temporary, self.file(name))
            except FileExistsError:
                return False
        sync_directory(os.path.dirname(self.file(name)))
        return True

    def move(self, source: str, target: str) -> None:
        """Rename a file, replacing the target; atomic on POSIX."""
        self.filesystem.move(self.file(source), self.file(target))

    def delete_file(self, name: str) -> None:
        """Delete a file, which must exist."""
        self.filesystem.delete_file(self.file(name))

    def delete_folder(self, name: str) -> None:
        """Delete a directory below this one with everything in it, if it exists.

        A dying process of an earlier run may still add files: then the deletion is retried.
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
        """Read a whole file and return its sha256 as 64 hex digits."""
        hasher = hashlib.sha256()
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest()

    @contextlib.contextmanager
    def _temporary_file(self, name: str, content: bytes) -> Iterator[str]:
        """Yield the path of a durable file in the same directory, to be renamed or linked."""
        directory, base = os.path.split(self.file(name))
        os.makedirs(directory, exist_ok=True)
        temporary = f"{directory}/.{base}.{uuid.uuid4().hex}"
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def is_half_written(name: str) -> bool:
    """Return whether a file is a temporary one, which a killed writer leaves behind."""
    return bool(_TEMPORARY_NAME.fullmatch(os.path.basename(name)))


def is_uri(path: str) -> bool:
    """Return whether a path is a URI and not a local path."""
    return "://" in path


def is_glob(uri: str) -> bool:
    """Return whether a URI is a glob pattern."""
    return _GLOB_CHARACTER.search(uri) is not None


def find_objects(pattern: str) -> list[str]:
    """List the URIs of the objects that a URI names, sorted; there may be none.

    Args:
        pattern: the URI of one object, of a folder (everything below it except hidden names), or a
            glob with `*`, `?`, `[...]` and `**`.
    Raises:
        ConfigError: no library opens this kind of URI.
        OSError: the store cannot be reached.
    """
    glob = _GLOB_CHARACTER.search(pattern)
    base = Folder(pattern[: glob.start()].rpartition("/")[0] if glob else pattern.rstrip("/"))
    if not glob and base.filesystem.get_file_info(base.path).type == pafs.FileType.File:
        return [base.uri]
    selector = pafs.FileSelector(base.path, recursive=True, allow_not_found=True)
    infos = base.filesystem.get_file_info(selector)
    names = [info.path[len(base.path) :] for info in infos if info.type == pafs.FileType.File]
    if glob:
        from fsspec.utils import glob_translate

        wanted = re.compile(glob_translate(pattern))
        return sorted(base.uri + name for name in names if wanted.match(base.uri + name))
    return sorted(base.uri + name for name in names if "/." not in name)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One entry of a listing."""

    name: str
    """Path below the listed folder."""
    num_bytes: int
    modified: datetime | None
    """UTC, by the storage's clock; None if the storage does not report it."""


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
