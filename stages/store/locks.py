"""Locks on a store's folders, which keep two runs from working on one stage at once.

A lock is an `flock` on a file inside the folder, so it ends with its process, however that ends.
Object stores and some network file systems have no locks: there nobody is kept out, and the commit
protocol alone keeps the store consistent.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from stages.store.filesystems import Folder


@contextlib.contextmanager
def hold_lock(folder: Folder, name: str, *, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder's lock while the block runs, against every process on every machine.

    Args:
        folder: created when missing.
        name: of the lock file, which is deleted after the block.
        on_wait: called before waiting for another process, with its host and process id.
    """
    if not folder.is_local:
        yield
        return
    folder.create()
    path = folder.file(name)
    with contextlib.ExitStack() as stack:
        while True:
            stream = stack.enter_context(_open_lock_file(path))
            if not _lock(stream, on_wait):
                break
            locked = os.fstat(stream.fileno())
            if os.path.exists(path) and os.path.samestat(os.stat(path), locked):
                break
            # The former holder deleted the file meanwhile, so this lock would keep nobody out.
        Path(path).write_text(f"{socket.gethostname()}:{os.getpid()}")
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def find_lock_holder(folder: Folder, name: str) -> str | None:
    """Return host and process id of a lock's holder, or None if it is free or cannot be read."""
    if not folder.is_local:
        return None
    with contextlib.suppress(OSError), open(folder.file(name)) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read()
    return None


def _open_lock_file(path: str) -> TextIO:
    """Open a lock file for reading, so that its disk can still be remounted read-only.

    NFS locks only files that are open for writing; there it is opened for appending instead.
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
    """Lock an open file, waiting if necessary; return False if its file system has no locks."""
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
