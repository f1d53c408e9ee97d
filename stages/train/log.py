"""Metrics log of a training, and what is derived from it: tables, best step, summary, progress.

`metrics.jsonl` holds one line per event: a start, the drift gate, a step, an evaluation. Each
checkpoint carries a copy, so a resumed training continues from exactly the lines that belong to its
weights, and everything derived from them is as in an uninterrupted training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import msgspec
import pyarrow as pa

from schemas.rows import EVAL_METRICS, METRICS, TIMINGS, RowSchema
from stages.stage import Progress
from stages.store.filesystems import Folder
from stages.store.worker_logs import polling
from stages.train.config import BestSettings, TrainJob

METRICS_LOG = "metrics.jsonl"

_POLL_SECONDS = 1.0
_LOOK_BYTES = 1 << 14
"""Bytes read from each end of the log for progress; a line takes less than 1 KiB."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Distance of the policy's start from the stored reference, over a sample of the pairs."""

    is_reference: bool
    """Whether the start has the reference's digest, so that any distance should be rounding."""
    is_float32: bool
    """Whether both were computed in float32."""
    num_sequences: int
    num_tokens: int
    median: float
    """Median of |policy - reference|, nats per token; likewise the next three."""
    p90: float
    p99: float
    max: float
    mean: float
    """Mean of policy - reference, signed, nats per token."""
    engine_noise: float
    """beta times the standard deviation over pairs of policy margin minus reference margin: the
    part of a reward margin that is rounding or, for another start, its distance."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The workers started training, or resumed it from a checkpoint."""

    step: int
    """Steps done before."""
    num_steps: int
    num_train_pairs: int
    num_eval_pairs: int
    num_left_out: int = 0
    """Training pairs that `where` left out."""
    num_workers: int
    device: str
    shares_prompt: bool
    num_epoch_tokens: int
    """Tokens to compute in the epoch, without padding."""
    epoch_padding_share: float
    """Fraction of the epoch's computed tokens that is padding."""


class Drifted(msgspec.Struct, frozen=True, kw_only=True, tag="drift"):
    """The start was compared with the stored reference."""

    drift: Drift


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """An optimizer step was taken."""

    step: int
    metrics: dict[str, float]
    """By column of METRICS."""
    num_padded_tokens: int
    """Tokens computed, padding included."""
    seconds: float
    memory_bytes: int


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, tag="eval"):
    """The held-out pairs were evaluated."""

    step: int
    """Steps done before."""
    metrics: dict[str, float]
    """By column of EVAL_METRICS."""


Line = Started | Drifted | Stepped | Evaluated

_decoder = msgspec.json.Decoder(Line)


class Tracker(Protocol):
    """Another place that shows the metrics during training."""

    def begin(self, lines: Sequence[Line]) -> None:
        """Show exactly these lines: a resumed training goes back to its checkpoint."""

    def follow(self, line: Line) -> None:
        """Show one more line."""

    def end(self) -> None:
        """Flush everything to disk or server."""


@dataclass(kw_only=True)
class MetricsLog:
    """The growing log of a training. Every worker keeps one, because it decides when to stop.

    Only the first worker writes it. On a local store each line is flushed; object stores cannot
    append, so there the whole log is uploaded at every start and evaluation.
    """

    folder: Folder
    is_written: bool
    """Whether this worker writes the file."""
    trackers: Sequence[Tracker] = ()
    lines: list[Line] = field(default_factory=list)
    _stream: IO[bytes] | None = None

    def replace(self, lines: Sequence[Line]) -> None:
        """Start a new file with these lines.

        A dying process of an earlier attempt keeps writing to the old, unlinked file.
        """
        self.close()
        self.lines = list(lines)
        if not self.is_written:
            return
        self.folder.create()
        self.upload()
        if self.folder.is_local:
            self._stream = open(self.folder.file(METRICS_LOG), "ab")  # noqa: SIM115
        for tracker in self.trackers:
            tracker.begin(self.lines)

    def append(self, line: Line) -> None:
        self.lines.append(line)
        if self._stream:
            self._stream.write(_encode([line]))
            self._stream.flush()
        elif self.is_written and isinstance(line, Started | Evaluated):
            self.upload()
        for tracker in self.trackers:
            tracker.follow(line)

    def content(self) -> bytes:
        return _encode(self.lines)

    def upload(self) -> None:
        self.folder.write_bytes(METRICS_LOG, self.content())

    def close(self) -> None:
        if self._stream:
            self._stream.close()
            self._stream = None
            for tracker in self.trackers:
                tracker.end()

    def tables(self) -> dict[str, tuple[pa.Table, RowSchema]]:
        """Build the stage's tables, by file name."""
        steps = [line for line in self.lines if isinstance(line, Stepped)]
        evaluations = [line for line in self.lines if isinstance(line, Evaluated)]
        rows: dict[str, tuple[Sequence[dict[str, float]], RowSchema]] = {
            "metrics.parquet": ([line.metrics for line in steps], METRICS),
            "eval_metrics.parquet": ([line.metrics for line in evaluations], EVAL_METRICS),
            "timings.parquet": ([_timing(line) for line in steps], TIMINGS),
        }
        return {
            name: (pa.Table.from_pylist(list(content), schema=schema.arrow), schema)
            for name, (content, schema) in rows.items()
        }


def read_lines(content: bytes) -> list[Line]:
    """Decode the complete lines; the last one may be only partly written."""
    whole = content[: content.rfind(b"\n") + 1]
    return [_decoder.decode(line) for line in whole.splitlines()]


def _encode(lines: Sequence[Line]) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def _timing(line: Stepped) -> dict[str, float]:
    return {
        "step": line.step,
        "seconds": line.seconds,
        "tokens_per_second": line.metrics["num_tokens"] / line.seconds,
        "pairs_per_second": line.metrics["num_pairs"] / line.seconds,
        "memory_bytes": line.memory_bytes,
    }


def find_best(lines: Sequence[Line], settings: BestSettings | None) -> Evaluated | None:
    """Find the evaluation with the best metric, the first among equals.

    The evaluation of the start is not considered: exporting it would export the start itself.

    Returns:
        None without settings, or if nothing has been evaluated after a step yet.
    """
    if settings is None:
        return None
    sign = 1 if settings.metric == "loss" else -1
    evaluations = _list_evaluations(lines)
    return min(evaluations, key=lambda line: sign * line.metrics[settings.metric], default=None)


def has_lost_patience(lines: Sequence[Line], settings: BestSettings | None) -> bool:
    """Whether `patience` evaluations in a row have brought no new best, so training should stop."""
    best = find_best(lines, settings)
    if settings is None or best is None or settings.patience == 0:
        return False
    num_since_best = sum(line.step > best.step for line in _list_evaluations(lines))
    return num_since_best >= settings.patience


def _list_evaluations(lines: Sequence[Line]) -> list[Evaluated]:
    return [line for line in lines if isinstance(line, Evaluated) and line.step > 0]


def summarise(job: TrainJob, lines: Sequence[Line]) -> dict[str, Any]:
    """Summarise a finished training in numbers."""
    starts = [line for line in lines if isinstance(line, Started)]
    steps = [line for line in lines if isinstance(line, Stepped)]
    evaluations = [line.metrics for line in lines if isinstance(line, Evaluated)]
    drift = next((line.drift for line in lines if isinstance(line, Drifted)), None)
    rewarded = job.config.losses[0]
    seconds = sum(line.seconds for line in steps)
    num_tokens = sum(line.metrics["num_tokens"] for line in steps)
    num_padded_tokens = sum(line.num_padded_tokens for line in steps)
    best = find_best(lines, job.config.keep_best)
    return {
        "num_steps": starts[-1].num_steps,
        "num_train_pairs": starts[-1].num_train_pairs,
        "num_eval_pairs": starts[-1].num_eval_pairs,
        "num_pairs_left_out": starts[-1].num_left_out,
        "stopped_early": steps[-1].step < starts[-1].num_steps,
        "exported_step": best.step if best else steps[-1].step,
        "first": steps[0].metrics,
        "last": steps[-1].metrics,
        "eval_before": evaluations[0] if evaluations else None,
        "eval_best": best.metrics if best else None,
        "eval_after": evaluations[-1] if evaluations else None,
        "drift": msgspec.to_builtins(drift),
        "reward": {"of": rewarded.reward_of, "scale": rewarded.reward_scale},
        "pairs_per_second": sum(line.metrics["num_pairs"] for line in steps) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "padding_share": 1 - num_tokens / num_padded_tokens,
        "peak_memory_bytes": max(line.memory_bytes for line in steps),
        "device": starts[-1].device,
        "num_workers": starts[-1].num_workers,
        "shares_prompt": starts[-1].shares_prompt,
        "resumes": [
            {"step": line.step, "num_workers": line.num_workers} for line in starts if line.step
        ],
        "start_model": msgspec.to_builtins(job.start),
    }


@contextmanager
def shown_progress(folder: Folder, progress: Progress) -> Iterator[None]:
    """Report a training's steps to the driver while the block runs it."""
    if folder.exists(METRICS_LOG):  # Left by a killed run; the checkpoints hold their own copies.
        folder.delete_file(METRICS_LOG)
    follower = LogFollower(folder, progress)
    try:
        with polling(follower.catch_up, every_seconds=_POLL_SECONDS):
            yield
    finally:
        follower.catch_up()


class LogFollower:
    """Reports the newest step in a training's log; a step that is taken again counts once."""

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
    """Read the first start and the newest step of a training's log; None if not logged yet."""
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
    """Describe a step's result and speed in one line."""
    metrics = line.metrics
    return (
        f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.3f}, "
        f"accuracy {metrics['rewards/accuracies']:.0%}, "
        f"{metrics['num_tokens'] / line.seconds:,.0f} tokens/s, "
        f"{metrics['num_pairs'] / line.seconds:,.1f} pairs/s"
    )
