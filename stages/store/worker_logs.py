"""Logs that workers write into the store, and polling of files that workers write there."""

import contextlib
import io
import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from schemas.manifest import ShardRecord
from stages.store.filesystems import Folder

LOGS = "_logs"
"""Name of the log folder below a stage's directory."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class LoggedWorkers:
    """Wraps a pass's `make_worker` so that each start and each shard is logged to its own file."""

    make_worker: Callable[[], Callable[[Any], ShardRecord]]
    folder: Folder
    label: str
    """Name of the pass; empty for a stage of one pass."""

    def __call__(self) -> Callable[[Any], ShardRecord]:
        with written_log(self.folder, self._name(f"start-{socket.gethostname()}-{os.getpid()}")):
            worker = self.make_worker()

        def work(task: Any) -> ShardRecord:
            with written_log(self.folder, self._name(f"part-{task.index:05d}")):
                return worker(task)

        return work

    def _name(self, name: str) -> str:
        return f"{self.label.replace(' ', '-')}-{name}.log" if self.label else f"{name}.log"


@contextlib.contextmanager
def written_log(folder: Folder, name: str) -> Iterator[None]:
    """Append this process's log records of level INFO and above to a file while the block runs.

    An exception is appended with its traceback. On a local store each line is written at once, so
    that a killed process leaves its last lines; on an object store the file is written when the
    block ends.
    """
    folder.create()
    earlier = b"" if folder.is_local or not folder.exists(name) else folder.read_bytes(name)
    with (
        open(folder.file(name), "a", encoding="utf-8") if folder.is_local else io.StringIO()
    ) as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(_FORMAT))
        root = logging.getLogger()
        loggers = [root, *_list_silent_loggers()]
        level = root.level
        root.setLevel(min(level, logging.INFO))
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=stream)
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            root.setLevel(level)
            if isinstance(stream, io.StringIO):
                folder.write_bytes(name, earlier + stream.getvalue().encode())


def _list_silent_loggers() -> list[logging.Logger]:
    """List the loggers whose records do not reach the root logger, such as vLLM's."""
    known = logging.Logger.manager.loggerDict.values()
    return [one for one in known if isinstance(one, logging.Logger) and not one.propagate]


@contextlib.contextmanager
def polling(look: Callable[[], None], *, every_seconds: float) -> Iterator[None]:
    """Call a function every `every_seconds` in a thread of its own while the block runs.

    The last call has returned when the block is left, however it is left.
    """
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(every_seconds):
            look()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
