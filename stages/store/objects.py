"""Which objects of a store does a URI mean, and how do they come to this machine?"""

import functools
import hashlib
import os
import re
import shutil
import time
import uuid

import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from schemas.errors import DataError
from stages.store.digests import digest_file
from stages.store.filesystems import Folder, user_cache

_CHUNK_BYTES = 1 << 22
_GLOB_LETTER = re.compile(r"[*?\[]")
_KEPT_FROM_AGE_NS = 2_000_000_000
"""Stores tell whole seconds: an object just written may be written again with an equal mtime."""


def is_uri(path: str) -> bool:
    """Say whether a path names an object, not a local file."""
    return "://" in path


def is_glob(uri: str) -> bool:
    """Say whether a URI is a pattern."""
    return _GLOB_LETTER.search(uri) is not None


def find_objects(pattern: str) -> list[str]:
    """Find the objects that a URI means, sorted; none is fine.

    Args:
        pattern: the URI of one object, of a folder (all below it, hidden ones left out), or a glob
            with `*`, `?`, `[...]` and `**`.
    Raises:
        ConfigError: nothing opens such a URI.
        OSError: the store cannot be reached.
    """
    glob = _GLOB_LETTER.search(pattern)
    base = Folder(pattern[: glob.start()].rpartition("/")[0] if glob else pattern.rstrip("/"))
    if not glob and base.filesystem.get_file_info(base.path).type == pafs.FileType.File:
        return [base.uri]
    selector = pafs.FileSelector(base.path, recursive=True, allow_not_found=True)
    infos = base.filesystem.get_file_info(selector)
    names = [info.path[len(base.path) :] for info in infos if info.type == pafs.FileType.File]
    if glob:
        wanted = re.compile(glob_translate(pattern))
        return sorted(base.uri + name for name in names if wanted.match(base.uri + name))
    return sorted(base.uri + name for name in names if "/." not in name)


@functools.lru_cache
def fetch_object(uri: str, *, sha256: str | None = None) -> str:
    """Make sure that an object lies in this machine's cache, and say where.

    Args:
        uri: the object.
        sha256: of the content that is wanted; None means as it is now.
    Raises:
        DataError: it is gone, or has other content than what is wanted.
        OSError: the store cannot be reached.
    """
    object_ = Folder(uri)
    info = object_.filesystem.get_file_info(object_.path)
    if info.type != pafs.FileType.File:
        raise DataError(f"{uri} does not exist.")
    state = f"{uri} {info.size} {info.mtime_ns}"
    copy = user_cache() / "objects" / hashlib.sha256(state.encode()).hexdigest()
    is_settled = info.mtime_ns is not None and time.time_ns() - info.mtime_ns > _KEPT_FROM_AGE_NS
    if not is_settled or not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        beside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
        try:
            with (
                object_.filesystem.open_input_stream(object_.path) as source,
                open(beside, "wb") as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            os.replace(beside, copy)
        finally:
            beside.unlink(missing_ok=True)
    if sha256 is not None and digest_file(copy) != sha256:
        raise DataError(f"{uri} has changed since the run was planned. Run again.")
    return str(copy)
