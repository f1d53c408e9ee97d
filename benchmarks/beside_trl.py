"""Speed and peak memory of our scoring and training beside TRL's on the same pairs.

python -m benchmarks.beside_trl --pairs hh.jsonl.gz --name hh

Each row of the tables is measured in its own process. Our rows alternate with TRL's, so that a
machine that slows down affects both. Rows are appended to results/NAME.jsonl as they finish; an
interrupted run continues from there.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks.machine import OthersWatch, describe_machine, list_versions
from benchmarks.measurement import Backend, Dtype, Measurement, Reference, Row, Setting
from benchmarks.pairs import RUN, prepare_pairs
from benchmarks.table import Record, RunHeader, read_results, render
from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model
from stages.store.caches import digest_file

RESULTS = Path(__file__).resolve().parent / "results"
CHECKOUT = RESULTS.parent.parent

LEARNING_RATE = 5e-6
BETA = 0.1

MAX_OTHER_CORES = 0.2
"""Average cores kept busy by other processes above which a row is measured again."""
MAX_ATTEMPTS = 3
QUIET_SECONDS = 3.0
MAX_WAIT_SECONDS = 300.0
"""Longest wait for other processes to become idle before a row."""

app = typer.Typer(pretty_exceptions_enable=False)


def list_rows(micro_batch_sizes: Sequence[int], repeats: int) -> list[Row]:
    """Return all rows in the order in which they are measured."""
    scoring = [
        Row(work="score", program="trl", micro_batch_size=size) for size in micro_batch_sizes
    ]
    rows = []
    for _ in range(repeats):
        rows += _alternate(
            [Row(work="score", program="ours", backend=name) for name in _BACKENDS], scoring
        )
    for _ in range(repeats):
        rows += _alternate(
            [Row(work="train", program="ours")], _list_trl_training(micro_batch_sizes)
        )
        rows.append(Row(work="train", program="ours", gradient_checkpointing=True))
    return rows


def _alternate(ours: Sequence[Row], trl: Sequence[Row]) -> list[Row]:
    """Insert our rows before every two of TRL's."""
    rows: list[Row] = []
    for start in range(0, len(trl), 2):
        rows += [*ours, *trl[start : start + 2]]
    return rows


_BACKENDS: tuple[Backend, ...] = ("transformers", "vllm")
_VARIANTS: tuple[tuple[Reference, bool], ...] = (
    ("in memory", False),
    ("precomputed", True),
    ("in memory", True),
)


def _list_trl_training(micro_batch_sizes: Sequence[int]) -> list[Row]:
    """Return TRL's rows: the fastest of each size first, then its other options.

    The smallest micro-batch, TRL's fastest on a CPU, is measured three times, because every other
    row is compared with it and the speed of a machine varies.
    """
    variants: list[tuple[int, Reference, bool]] = [
        (size, *variant) for size in micro_batch_sizes for variant in _VARIANTS
    ]
    fastest: tuple[int, Reference, bool] = (micro_batch_sizes[0], "precomputed", False)
    half = len(variants) // 2
    kinds: list[tuple[int, Reference, bool]] = [
        *((size, "precomputed", False) for size in micro_batch_sizes),
        *(fastest, *variants[:half]),
        *(fastest, *variants[half:]),
    ]
    return [
        Row(
            work="train",
            program="trl",
            micro_batch_size=size,
            reference=reference,
            gradient_checkpointing=checkpointing,
        )
        for size, reference, checkpointing in kinds
    ]


@app.command()
def main(
    pairs: Annotated[
        str,
        typer.Option(help="Input that validate reads, such as HH transcripts in .jsonl.gz."),
    ] = "pipeline/sample",
    num_pairs: Annotated[int, typer.Option(help="Use this many of the first usable pairs.")] = 32,
    model: Annotated[
        str, typer.Option(help="A folder, a Hugging Face id, or sample:NAME, as in a recipe.")
    ] = "sample:smollm2-135m-instruct",
    global_batch_size: Annotated[int, typer.Option(help="Pairs in an optimizer step.")] = 8,
    micro_batch_sizes: Annotated[str, typer.Option(help="TRL's, in pairs.")] = "1,2,4,8",
    dtype: Annotated[Dtype, typer.Option(help="Of matrix products.")] = "float32",
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Train an adapter on all linear layers instead of all weights."),
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(help="Threads of each process; default: one per core.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each row.")] = 1,
    name: Annotated[str, typer.Option(help="Name of the files in benchmarks/results/.")] = "run",
) -> None:
    """Measure every row, then print the tables."""
    sizes = [int(size) for size in micro_batch_sizes.split(",")]
    if num_pairs % global_batch_size or any(global_batch_size % size for size in sizes):
        raise SystemExit(
            "--num-pairs must be a multiple of --global-batch-size, which must be a multiple of "
            "each micro-batch size."
        )
    pin = pin_model(model)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            store=f"{scratch}/store",
            run=RUN,
            model=fetch_model(pin),
            scratch=scratch,
            num_pairs=num_pairs,
            global_batch_size=global_batch_size,
            dtype=dtype,
            num_threads=num_threads or len(os.sched_getaffinity(0)),
            learning_rate=LEARNING_RATE,
            beta=BETA,
            lora_rank=lora_rank,
        )
        header = RunHeader(
            pairs=Path(pairs).name,
            pairs_sha256=digest_file(pairs) if Path(pairs).is_file() else None,
            num_pairs=num_pairs,
            model=Path(model).name,
            model_digest=pin.weights,
            global_batch_size=global_batch_size,
            dtype=dtype,
            num_threads=setting.num_threads,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            lora_rank=lora_rank,
            rows=list_rows(sizes, repeats),
            machine=describe_machine(),
            versions=list_versions(),
        )
        results = RESULTS / f"{name}.jsonl"
        records = _open_results(results, header)
        todo = header.rows[len(records) :]
        if todo:
            prepare_pairs(
                pairs, num_pairs, model=setting.model, dtype=dtype, store=Path(setting.store)
            )
        for row in todo:
            records.append(measure_row(setting, row))
            with results.open("ab") as stream:
                stream.write(msgspec.json.encode(records[-1]) + b"\n")
            results.with_suffix(".md").write_text(render(header, records))
    print(render(header, records))


def _open_results(path: Path, header: RunHeader) -> list[Record]:
    """Start a results file, or return the records of an interrupted run.

    Raises:
        SystemExit: the file is from a run with other settings or on another machine.
    """
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.encode(header) + b"\n")
        return []
    found, records = read_results(path)
    if found != header:
        raise SystemExit(f"{path} is from another run: choose another --name, or delete it.")
    return records


def measure_row(setting: Setting, row: Row) -> Record:
    """Measure a row, again if other processes were busy; return the least disturbed measurement."""
    attempts: list[Record] = []
    while len(attempts) < MAX_ATTEMPTS:
        wait_until_quiet()
        attempts.append(_measure_once(setting, row))
        if attempts[-1].other_cores <= MAX_OTHER_CORES:
            break
    return min(attempts, key=lambda record: record.other_cores)


def wait_until_quiet(max_seconds: float = MAX_WAIT_SECONDS) -> None:
    """Wait until other processes are idle, for a limited time."""
    give_up = time.monotonic() + max_seconds
    while time.monotonic() < give_up:
        watch = OthersWatch()
        time.sleep(QUIET_SECONDS)
        if watch.cores() <= MAX_OTHER_CORES:
            return


def _measure_once(setting: Setting, row: Row) -> Record:
    worker = "benchmarks.our_worker" if row.program == "ours" else "benchmarks.trl_worker"
    answer = Path(setting.scratch, "answer.json")
    answer.unlink(missing_ok=True)
    task = [msgspec.json.encode(setting).decode(), msgspec.json.encode(row).decode(), str(answer)]
    load_before, watch = os.getloadavg()[0], OthersWatch()
    started_at = time.time()
    done = subprocess.run(
        [sys.executable, "-m", worker, *task],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(setting.num_threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = msgspec.json.decode(answer.read_bytes(), type=Measurement) if answer.exists() else None
    record = Record(
        row=row,
        measurement=found,
        error=None if found else f"exit code {done.returncode}: {done.stderr[-2000:]}",
        startup_seconds=found.began_at - started_at if found else None,
        started_at=datetime.fromtimestamp(started_at, UTC).isoformat(timespec="seconds"),
        load_before=load_before,
        load_after=os.getloadavg()[0],
        other_cores=round(watch.cores(), 3),
    )
    took = f"{found.seconds:.1f} s" if found else "failed"
    print(f"{record.started_at} {row}: {took}", file=sys.stderr)
    return record


if __name__ == "__main__":
    app()
