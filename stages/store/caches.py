"""The user's cache directory, and the digests of big files that are remembered in it."""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

_CHUNK_BYTES = 1 << 22
_REMEMBERED_FROM_BYTES = 1 << 20
"""Hashing a smaller file is faster than looking up its digest."""
_REMEMBERED_FROM_AGE_NS = 2_000_000_000
"""A younger file may be rewritten within one tick of its mtime."""


def user_cache() -> Path:
    """Return this project's directory in the user's cache; it is created on demand."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "offline-dpo"
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest_file(path: str | Path) -> str:
    """Return the sha256 of a local file's content as 64 hex digits.

    Digests of big files are remembered in the user's cache under (path, size, mtime in ns). A file
    that is rewritten gets another mtime and is read again.
    """
    path = os.path.realpath(path)
    status = os.stat(path)
    if status.st_size < _REMEMBERED_FROM_BYTES:
        return _compute_digest(path)
    key = {"path": path, "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    entry = user_cache() / "digests" / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
    remembered = _read_entry(entry)
    if {name: remembered.get(name) for name in key} == key:
        return str(remembered["sha256"])
    digest = _compute_digest(path)
    if time.time_ns() - status.st_mtime_ns > _REMEMBERED_FROM_AGE_NS:
        _write_entry(entry, {**key, "sha256": digest})
    return digest


def _compute_digest(path: str) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _read_entry(entry: Path) -> dict[str, object]:
    """Read a cache entry; a missing or damaged one counts as empty and costs only time."""
    try:
        content = json.loads(entry.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_entry(entry: Path, content: dict[str, object]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, entry)
