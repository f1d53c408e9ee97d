"""Measured rows as Markdown tables: `python -m benchmarks.table RESULTS.jsonl`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from benchmarks.measurement import Measurement, Row


class RunHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Settings and machine of a run: the first line of a results file."""

    pairs: str
    pairs_sha256: str | None
    """None for a folder."""
    num_pairs: int
    model: str
    model_digest: str
    """sha256 over the weights."""
    global_batch_size: int
    dtype: str
    num_threads: int
    learning_rate: float
    beta: float
    lora_rank: int | None = None
    """None means that all weights are trained."""
    rows: list[Row]
    """In the order in which they are measured."""
    machine: dict[str, str | int]
    versions: dict[str, str]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One measured row: a line of a results file."""

    row: Row
    measurement: Measurement | None
    """None where the process failed."""
    error: str | None
    startup_seconds: float | None
    started_at: str
    load_before: float
    load_after: float
    other_cores: float
    """Average cores kept busy by other processes."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """All measurements of one row."""

    row: Row
    records: Sequence[Record]
    num_pairs: int

    @property
    def found(self) -> list[Measurement]:
        return [record.measurement for record in self.records if record.measurement]

    @property
    def speeds(self) -> list[float]:
        """Pairs per second."""
        return [self.num_pairs / measurement.seconds for measurement in self.found]

    @property
    def speed(self) -> float:
        return median(self.speeds)

    @property
    def memory(self) -> int:
        """Peak memory, in bytes."""
        return max(measurement.peak_memory_bytes for measurement in self.found)

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed per second, padding included."""
        return median(found.num_tokens_computed / found.seconds for found in self.found)

    def share_of_peak(self, model_flops: float) -> float:
        """Return the share of the machine's matmul peak that went into necessary operations."""
        peak = median(found.peak_flops_per_second for found in self.found)
        return model_flops / median(found.seconds for found in self.found) / peak

    @property
    def startup(self) -> float:
        return median(
            record.startup_seconds or 0.0 for record in self.records if record.measurement
        )

    @property
    def name(self) -> str:
        row = self.row
        if row.program == "ours":
            what = row.backend or ("checkpointing" if row.gradient_checkpointing else None)
            return f"**ours, {what}**" if what else "**ours**"
        if row.work == "score":
            return f"TRL, micro-batch {row.micro_batch_size}"
        checkpointing = ", checkpointing" if row.gradient_checkpointing else ""
        return f"TRL, micro-batch {row.micro_batch_size}, reference {row.reference}{checkpointing}"


def read_results(path: Path) -> tuple[RunHeader, list[Record]]:
    """Read a results file, finished or not."""
    first, *rest = path.read_bytes().splitlines()
    header = msgspec.json.decode(first, type=RunHeader)
    return header, [msgspec.json.decode(line, type=Record) for line in rest]


def render(header: RunHeader, records: Sequence[Record]) -> str:
    """Return both tables, with the settings and the machine."""
    parts = [_describe(header, records)]
    for work, title in (("train", "Training"), ("score", "Scoring the reference")):
        lines = list(collect(header, [record for record in records if record.row.work == work]))
        if lines:
            parts += [f"### {title}", _table(lines), _compare(lines)]
    return "\n\n".join(parts) + "\n"


def collect(header: RunHeader, records: Sequence[Record]) -> Iterator[Line]:
    """Group the measurements of equal rows, ours first."""
    rows = dict.fromkeys(record.row for record in records)
    for row in sorted(rows, key=lambda row: row.program):
        yield Line(
            row=row,
            records=[record for record in records if record.row == row],
            num_pairs=header.num_pairs,
        )


def _describe(header: RunHeader, records: Sequence[Record]) -> str:
    machine, versions = header.machine, header.versions
    days = sorted({record.started_at[:10] for record in records})
    names = ("python", "torch", "transformers", "vllm", "trl", "accelerate", "datasets")
    gpu = f", {machine['gpu']}" if machine["gpu"] != "none" else ""
    others = max((record.other_cores for record in records), default=0.0)
    trained = f"LoRA of rank {header.lora_rank}" if header.lora_rank else "full fine-tuning"
    return (
        f"{header.num_pairs} pairs of {header.pairs}, {header.model}, {header.dtype}, "
        f"{trained}, global batch {header.global_batch_size} (so "
        f"{header.num_pairs // header.global_batch_size} steps), constant learning rate "
        f"{header.learning_rate:g}, {header.num_threads} threads on {machine['processor']} "
        f"({machine['cores']} cores, {machine['memory_gb']} GB{gpu}); "
        f"{' to '.join(sorted({days[0], days[-1]})) if days else 'not begun'}; "
        + ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        + f". Other processes took at most {others:.2f} cores during a row."
    )


def _table(lines: Sequence[Line]) -> str:
    best, base = _fastest_trl(lines), _first_trl(lines)
    is_training = lines[0].row.work == "train"
    unit = "a step's mean" if is_training else "a sequence"
    columns = [
        *("", "pairs/s", "to TRL's best", "peak memory", "to TRL's best", "tokens computed"),
        *(("tokens/s", "of the matmul peak") if is_training else ()),
        *("start-up", *(["max. Δ loss"] if is_training else []), f"max. Δ log-prob, {unit}"),
    ]
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for line in lines:
        if not line.found:
            rows.append([line.name, "failed", *[""] * (len(columns) - 2)])
            continue
        first = line.found[0]
        rows.append(
            [
                line.name,
                _speed(line),
                f"{line.speed / best.speed:.2f}" if best else "",
                f"{line.memory / 1e9:.2f} GB",
                f"{line.memory / best.memory:.2f}" if best else "",
                f"{first.num_tokens_computed:,}",
                *([f"{line.tokens_per_second:,.0f}", _share(lines, line)] if is_training else []),
                f"{line.startup:.0f} s",
                *([_largest(base, line, "losses")] if is_training else []),
                f"{_largest(base, line, 'logps')} nats",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _share(lines: Sequence[Line], line: Line) -> str:
    """Return the matmul-peak share of a row; the necessary operations are the same for all rows."""
    flops = next(
        (found.model_flops for one in lines for found in one.found if found.model_flops), 0
    )
    is_known = flops and line.found[0].peak_flops_per_second
    return f"{line.share_of_peak(flops):.0%}" if is_known else ""


def _speed(line: Line) -> str:
    if len(line.speeds) == 1:
        return f"{line.speed:.2f}"
    return f"{line.speed:.2f} ({min(line.speeds):.2f} to {max(line.speeds):.2f})"


def _largest(base: Line | None, line: Line, what: str) -> str:
    """Return the largest difference from TRL's first row, over all measurements."""
    if base is None:
        return ""
    wanted = np.array(getattr(base.found[0], what))
    differences = [np.abs(np.array(getattr(found, what)) - wanted).max() for found in line.found]
    return f"{max(differences):.1e}"


def _compare(lines: Sequence[Line]) -> str:
    """Return the ratios to TRL's fastest row, and to that of its largest micro-batch."""
    best = _fastest_trl(lines)
    if best is None:
        return ""
    of_largest = max(line.row.micro_batch_size or 0 for line in lines)
    largest = _fastest_trl([line for line in lines if line.row.micro_batch_size == of_largest])
    sentences = []
    for line in lines:
        if line.row.program == "ours" and line.found:
            sentences += [
                f"{line.name} against {other.name.replace('TRL', what)}: "
                f"{line.speed / other.speed:.2f} times its speed, "
                f"{line.memory / other.memory:.2f} times its memory."
                for what, other in (("TRL's fastest row", best), ("TRL's fastest", largest))
                if other
            ]
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _first_trl(lines: Sequence[Line]) -> Line | None:
    return next((line for line in lines if line.row.program == "trl" and line.found), None)


def _fastest_trl(lines: Sequence[Line]) -> Line | None:
    measured = [line for line in lines if line.row.program == "trl" and line.found]
    return max(measured, key=lambda line: line.speed, default=None)


if __name__ == "__main__":
    print(render(*read_results(Path(sys.argv[1]))))
