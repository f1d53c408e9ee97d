"""What a file's content is, without reading a big file twice."""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from stages.store.filesystems import user_cache

_CHUNK_BYTES = 1 << 22
_MEMO_FROM_BYTES = 1 << 20
"""Smaller files are hashed faster than looked up."""
_MEMO_FROM_AGE_NS = 2_000_000_000
"""A file just written may be written again within one tick of its mtime."""


def digest_file(path: str | Path) -> str:
    """Give the sha256 of a local file's content as 64 hex digits.

    Digests of big files are remembered in the user's cache under (path, size, mtime in ns): a file
    that is rewritten has another mtime and is read again.
    """
    path = os.path.realpath(path)
    status = os.stat(path)
    if status.st_size < _MEMO_FROM_BYTES:
        return _read_digest(path)
    known = {"path": path, "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    memo = user_cache() / "digests" / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
    remembered = _read_memo(memo)
    if {key: remembered.get(key) for key in known} == known:
        return str(remembered["sha256"])
    digest = _read_digest(path)
    if time.time_ns() - status.st_mtime_ns > _MEMO_FROM_AGE_NS:
        _write_memo(memo, {**known, "sha256": digest})
    return digest


def _read_digest(path: str) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _read_memo(memo: Path) -> dict[str, object]:
    """A memo that is absent or damaged only costs time."""
    try:
        content = json.loads(memo.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_memo(memo: Path, content: dict[str, object]) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    beside = memo.with_name(f".{memo.name}.{uuid.uuid4().hex}")
    beside.write_text(json.dumps(content))
    os.replace(beside, memo)
