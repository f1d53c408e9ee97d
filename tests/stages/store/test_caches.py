"""Digests of big files are remembered, and forgotten as soon as the file may have changed."""

import hashlib
import os
from pathlib import Path

import pytest

from stages.store import caches
from stages.store.caches import digest_file

NUM_BYTES = 1 << 20
LONG_AGO = 1_600_000_000


@pytest.fixture
def big_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "big"
    path.write_bytes(b"a" * NUM_BYTES)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_big_file_is_read_once(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest_file(big_file) == sha256(b"a" * NUM_BYTES)
    monkeypatch.setattr(caches, "_compute_digest", lambda path: pytest.fail("read again"))
    assert digest_file(big_file) == sha256(b"a" * NUM_BYTES)


def test_other_content_with_another_mtime_is_read_again(big_file: Path) -> None:
    digest_file(big_file)
    big_file.write_bytes(b"b" * NUM_BYTES)
    os.utime(big_file, (LONG_AGO + 1, LONG_AGO + 1))
    assert digest_file(big_file) == sha256(b"b" * NUM_BYTES)


def test_a_file_just_written_is_not_remembered(big_file: Path) -> None:
    """It may be rewritten at the same size within one tick of its mtime."""
    os.utime(big_file)
    status = os.stat(big_file)
    digest_file(big_file)
    big_file.write_bytes(b"b" * NUM_BYTES)
    os.utime(big_file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert digest_file(big_file) == sha256(b"b" * NUM_BYTES)


def test_a_damaged_cache_entry_costs_time_only(big_file: Path, tmp_path: Path) -> None:
    digest_file(big_file)
    [entry] = (tmp_path / "cache/offline-dpo/digests").iterdir()
    entry.write_text('{"path": 3')
    assert digest_file(big_file) == sha256(b"a" * NUM_BYTES)
