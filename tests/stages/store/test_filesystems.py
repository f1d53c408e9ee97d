"""Does a folder that is held keep others out, for as long as its holder lives?"""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import pytest

from stages.store.filesystems import Folder

ROOT = Path(__file__).parents[3]

HOLDER = """
import sys, time
from stages.store.filesystems import Folder
with Folder(sys.argv[1]).hold("_lock", on_wait=print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_holders_come_one_after_the_other_and_leave_nothing(tmp_path: Path) -> None:
    """Forty threads, ten at a time between taking the lock, failing, and deleting its file."""
    folder, at_work, num_done, overlaps = Folder(str(tmp_path / "f")), 0, 0, 0
    counting = threading.Lock()

    def work(number: int) -> None:
        nonlocal at_work, num_done, overlaps
        with (
            contextlib.suppress(ValueError),
            folder.hold("_lock", on_wait=lambda holder: None),
        ):
            with counting:
                at_work += 1
                overlaps += at_work > 1
            time.sleep(0.002)
            with counting:
                at_work -= 1
                num_done += 1
            if number % 3 == 0:
                raise ValueError

    threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (num_done, overlaps) == (40, 0)
    assert list((tmp_path / "f").iterdir()) == []


def test_who_waits_is_told_for_whom_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    holders: list[str] = []

    def kill(holder: str) -> None:
        holders.append(holder)
        os.kill(process.pid, signal.SIGKILL)

    with Folder(str(tmp_path)).hold("_lock", on_wait=kill):
        assert process.wait(10) == -signal.SIGKILL
    [holder] = holders
    assert holder.endswith(f":{process.pid}")


def test_where_there_are_no_locks_nobody_is_kept_out() -> None:
    folder = Folder("memory://held")
    with folder.hold("_lock", on_wait=print), folder.hold("_lock", on_wait=print):
        pass
    assert folder.walk() == []


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


def test_a_file_system_that_locks_only_what_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS, which has no exclusive lock for a file that is open for reading."""
    flock = fcntl.flock

    def flock_like_nfs(stream: TextIO, operation: int) -> None:
        if fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", flock_like_nfs)
    test_holders_come_one_after_the_other_and_leave_nothing(tmp_path)


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
    """Each attempt finds a new file in it, and the last one says so."""
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
