"""What is written down while training runs, and which tables become of it?

`metrics.jsonl` holds one line a happening: a start, the drift gate, a step, an evaluation. The
checkpoints carry a copy of it, so that a resumed training goes on from exactly the lines that
belong to its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Protocol

import msgspec
import pyarrow as pa

from schemas.rows import EVAL_METRICS, METRICS, TIMINGS, RowSchema
from stages.store.filesystems import Folder

METRICS_LOG = "metrics.jsonl"


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How far the policy's start is from the stored reference, over a sample of the pairs."""

    is_reference: bool
    """Whether the start has the reference's digest, so that the distance should be rounding."""
    is_float32: bool
    """Whether both were computed in float32."""
    num_sequences: int
    num_tokens: int
    median: float
    """Of |policy - reference|, in nats a token; likewise the next three."""
    p90: float
    p99: float
    max: float
    mean: float
    """Of policy - reference, with its sign, in nats a token."""
    engine_noise: float
    """beta times the standard deviation of policy margin minus reference margin over the pairs: how
    much of a reward margin is rounding, or where the start is another model, how far it is."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """A process group began to train, or went on from a checkpoint."""

    step: int
    """Steps done before."""
    num_steps: int
    num_train_pairs: int
    num_eval_pairs: int
    num_workers: int
    device: str
    shares_prompt: bool
    num_epoch_tokens: int
    """That the epoch will compute, padding left out."""
    epoch_padding_share: float
    """Of what the epoch will compute, padding included."""


class Drifted(msgspec.Struct, frozen=True, kw_only=True, tag="drift"):
    """The start was compared with the stored reference."""

    drift: Drift


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """An optimizer step was made."""

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
    """Where else the metrics are shown while training runs."""

    def begin(self, lines: Sequence[Line]) -> None:
        """Show these lines and no others: a resumed training goes back to its checkpoint."""

    def follow(self, line: Line) -> None:
        """Show one more line."""

    def end(self) -> None:
        """Write out what is still held."""


@dataclass(kw_only=True)
class MetricsLog:
    """The growing log of a training. All processes keep it, since it decides when to stop.

    Only the first writes it: on a local store each line is flushed; an object store knows no
    appending, there the whole log is uploaded with every start and evaluation.
    """

    folder: Folder
    is_written: bool
    """Whether this is the process that writes."""
    trackers: Sequence[Tracker] = ()
    """Who else is told."""
    lines: list[Line] = field(default_factory=list)
    _stream: IO[bytes] | None = None

    def replace(self, lines: Sequence[Line]) -> None:
        """Begin the file anew with these lines.

        A process of an earlier attempt that is still dying keeps writing to the old file, unseen.
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
        """Make the tables that stay, by file name."""
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
    """Decode whole lines; the last may still be half written."""
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
