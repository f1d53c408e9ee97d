"""Locks: one holder at a time, for as long as the holder lives."""

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
from stages.store.locks import find_lock_holder, hold_lock

ROOT = Path(__file__).parents[3]

HOLDER = """
import sys, time
from stages.store.filesystems import Folder
from stages.store.locks import hold_lock
with hold_lock(Folder(sys.argv[1]), "_lock", on_wait=print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_holders_come_one_after_the_other_and_leave_nothing(tmp_path: Path) -> None:
    """Forty threads lock, work, sometimes fail, and delete the lock file in every interleaving."""
    folder, at_work, num_done, overlaps = Folder(str(tmp_path / "f")), 0, 0, 0
    counting = threading.Lock()

    def work(number: int) -> None:
        nonlocal at_work, num_done, overlaps
        with (
            contextlib.suppress(ValueError),
            hold_lock(folder, "_lock", on_wait=lambda holder: None),
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


def test_a_waiter_is_told_the_holder_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    folder = Folder(str(tmp_path))
    assert (find_lock_holder(folder, "_lock") or "").endswith(f":{process.pid}")
    holders: list[str] = []

    def kill(holder: str) -> None:
        holders.append(holder)
        os.kill(process.pid, signal.SIGKILL)

    with hold_lock(folder, "_lock", on_wait=kill):
        assert process.wait(10) == -signal.SIGKILL
    [holder] = holders
    assert holder.endswith(f":{process.pid}")
    assert find_lock_holder(folder, "_lock") is None


def test_where_there_are_no_locks_nobody_is_kept_out() -> None:
    folder = Folder("memory://held")
    with hold_lock(folder, "_lock", on_wait=print), hold_lock(folder, "_lock", on_wait=print):
        pass
    assert folder.walk() == []


def test_a_file_system_that_locks_only_files_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS has no exclusive lock for a file that is open for reading."""
    flock = fcntl.flock

    def flock_like_nfs(stream: TextIO, operation: int) -> None:
        if fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", flock_like_nfs)
    test_holders_come_one_after_the_other_and_leave_nothing(tmp_path)
