"""Small files are written whole or not at all; busy folders are deleted in the end."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stages.store.filesystems import Folder


def test_a_small_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = Folder(str(tmp_path))
    folder.write_bytes("a.json", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    for write in (folder.write_bytes, folder.create_file):
        with pytest.raises(OSError, match="No space"):
            write("a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert folder.read_bytes("a.json") == b"old"


def test_folder_is_deleted_though_a_dying_process_adds_to_it(tmp_path: Path) -> None:
    folder, busy = Folder(str(tmp_path)), tmp_path / "busy"
    writer = """
import sys, itertools
for number in itertools.count():
    open(f"{sys.argv[1]}/{number}", "wb").close()
"""
    busy.mkdir()
    process = subprocess.Popen([sys.executable, "-c", writer, str(busy)], stderr=subprocess.DEVNULL)
    try:
        while not any(busy.iterdir()):
            time.sleep(0.01)
        threading.Timer(0.2, process.kill).start()
        folder.delete_folder("busy")
    finally:
        process.kill()
        process.wait()
    assert not busy.exists()


def test_folder_that_cannot_be_deleted_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt finds a new file in the folder; the last attempt raises."""
    folder, attempts = Folder(str(tmp_path)), []
    (tmp_path / "busy").mkdir()
    monkeypatch.setattr("stages.store.filesystems._DELETE_AGAIN_SECONDS", (0.0, 0.0))

    class Busy(type(folder.filesystem)):  # type: ignore[misc]
        def delete_dir(self, path: str) -> None:
            attempts.append(path)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Folder, "filesystem", Busy())
    with pytest.raises(OSError, match="not empty"):
        folder.delete_folder("busy")
    assert len(attempts) == 3


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/store").child("runs").uri == str(tmp_path / "store/runs")
