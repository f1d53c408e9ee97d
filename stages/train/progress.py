"""How does the driver know how far the workers are? It looks at the log that one of them writes."""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.stage import Progress
from stages.store.filesystems import Folder
from stages.store.worker_logs import polling
from stages.train.log import METRICS_LOG, Started, Stepped, read_lines

_POLL_SECONDS = 1.0
_LOOK_BYTES = 1 << 14
"""Of either end of the log; a line takes less than 1 KiB."""


@contextmanager
def shown_progress(folder: Folder, progress: Progress) -> Iterator[None]:
    """Report the steps of a training while the block runs it."""
    if folder.exists(METRICS_LOG):  # Of a run that was killed; the checkpoints have their own.
        folder.delete_file(METRICS_LOG)
    follower = LogFollower(folder, progress)
    try:
        with polling(follower.catch_up, every_seconds=_POLL_SECONDS):
            yield
    finally:
        follower.catch_up()


class LogFollower:
    """Reports the newest step of a training's log; one that is made again counts once."""

    def __init__(self, folder: Folder, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._step: int | None = None

    def catch_up(self) -> None:
        """Report the steps logged since the last call."""
        started, newest = read_progress(self._folder)
        if self._step is None and started:
            self._progress.start("training", total=started.num_steps, unit="steps")
            self._step = 0
        if self._step is not None and newest and newest.step > self._step:
            self._progress.advance(newest.step - self._step, describe_step(newest))
            self._step = newest.step


def read_progress(folder: Folder) -> tuple[Started | None, Stepped | None]:
    """Read how a training's log begins, and its newest step; None where there is none yet."""
    if not folder.exists(METRICS_LOG):
        return None, None
    with folder.filesystem.open_input_file(folder.file(METRICS_LOG)) as stream:
        num_bytes = stream.size()
        head = bytes(stream.read(_LOOK_BYTES))
        stream.seek(max(0, num_bytes - _LOOK_BYTES))
        tail = bytes(stream.read(_LOOK_BYTES))
    if num_bytes > _LOOK_BYTES:
        tail = tail[tail.find(b"\n") + 1 :]
    first = next(iter(read_lines(head)), None)
    steps = [line for line in read_lines(tail) if isinstance(line, Stepped)]
    return first if isinstance(first, Started) else None, steps[-1] if steps else None


def describe_step(line: Stepped) -> str:
    """Say what a step gave, and how fast."""
    metrics = line.metrics
    return (
        f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.3f}, "
        f"accuracy {metrics['rewards/accuracies']:.0%}, "
        f"{metrics['num_tokens'] / line.seconds:,.0f} tokens/s, "
        f"{metrics['num_pairs'] / line.seconds:,.1f} pairs/s"
    )
