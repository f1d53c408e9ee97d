"""Where does one read what a worker said about one shard? In a log of its own, if asked for."""

import contextlib
import io
import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from schemas.manifest import ShardRecord
from stages.store.filesystems import Folder

LOGS = "_logs"
"""Below a stage's directory."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class LoggedWorkers:
    """Makes a pass's workers, with logs: of each one's start, and of each shard."""

    make_worker: Callable[[], Callable[[Any], ShardRecord]]
    folder: Folder
    label: str
    """Of the pass; empty for a stage of one."""

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
    """Append what this process logs while the block runs, from INFO on, and how it fails.

    On a local store line by line, so that a killed process leaves its last words; an object store
    gets them when the block ends.
    """
    folder.create()
    earlier = b"" if folder.is_local or not folder.exists(name) else folder.read_bytes(name)
    with open(folder.file(name), "a") if folder.is_local else io.StringIO() as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(_FORMAT))
        root = logging.getLogger()
        loggers = [root, *_silent_loggers()]
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


def _silent_loggers() -> list[logging.Logger]:
    """Give the loggers whose records do not reach the root, such as vLLM's."""
    known = logging.Logger.manager.loggerDict.values()
    return [one for one in known if isinstance(one, logging.Logger) and not one.propagate]
