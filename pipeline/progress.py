"""Progress display of long work: a bar on a terminal, plain lines anywhere else."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

import rich.progress
from rich.console import Console

from stages.stage import Progress

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


MakeProgress = Callable[[str], Progress]
"""Makes a stage's progress in an open display, given what the stage is called there."""


@contextlib.contextmanager
def open_progress(stage: str) -> Iterator[Progress]:
    """Open the progress display of a stage, on stderr."""
    with open_display() as make_progress:
        yield make_progress(stage)


@contextlib.contextmanager
def open_display() -> Iterator[MakeProgress]:
    """Open one display for stages that run at the same time in threads, on stderr."""
    if not sys.stderr.isatty():
        yield _LineProgress
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[unit]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as display:
        yield lambda stage: _BarProgress(stage, display)


class _BarProgress:
    def __init__(self, stage: str, display: rich.progress.Progress) -> None:
        self._stage = stage
        self._display = display
        self._task: rich.progress.TaskID | None = None
        self._done = 0

    def start(self, label: str, total: int, unit: str) -> None:
        self._done = 0
        description = f"{self._stage} {label}".strip()
        self._task = self._display.add_task(description, total=total, unit=unit, note="")

    def advance(self, amount: int, note: str = "") -> None:
        assert self._task is not None, "call start first"
        self._done += amount
        self._display.update(self._task, completed=self._done, note=note)

    def show_parts(self, amount: float, note: str) -> None:
        assert self._task is not None, "call start first"
        self._display.update(self._task, completed=self._done + amount, note=note)


class _LineProgress:
    """Logs a line at most every ten seconds while something moves, and one at the end."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.start("", total=0, unit="")

    def start(self, label: str, total: int, unit: str) -> None:
        self._label = f"{self._stage} {label}".strip()
        self._total, self._unit, self._done = total, unit, 0
        self._started = self._last_line = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._show(self._done, note)

    def show_parts(self, amount: float, note: str) -> None:
        self._show(self._done + amount, note)

    def _show(self, done: float, note: str) -> None:
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        elapsed = now - self._started
        left = elapsed / done * (self._total - done) if done else 0.0
        logger.info(
            "%s: %s/%s %s, %.0f s, about %.0f s left%s",
            self._label,
            self._done,
            self._total,
            self._unit,
            elapsed,
            left,
            f"; {note}" if note else "",
        )
