"""Cost of scoring the reference here and in TRL: once, with its surroundings, and in a sweep.

python -m benchmarks.score --pairs hh.jsonl.gz --name score-hh

Rows alternate: both of our backends run before every two of TRL's. TRL's micro-batches above two,
which get slower and slower, run on a quarter of the pairs. The surroundings of scoring and the
sweep are measured on few pairs in their own store. 200 pairs take about a quarter of an hour. Each
row is a process whose memory includes all processes that it starts. Rows are appended to
results/NAME.jsonl as they finish, and the tables go to results/NAME.md; an interrupted run
continues from there.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer
import yaml

from benchmarks.beside_trl import BETA, CHECKOUT, LEARNING_RATE, RESULTS, wait_until_quiet
from benchmarks.machine import OthersWatch, describe_machine, list_versions
from benchmarks.measurement import Backend, Measurement, Row, Setting
from benchmarks.pairs import RUN, prepare_pairs
from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model

BACKENDS: tuple[Backend, ...] = ("transformers", "vllm")
LARGEST_WHOLE_BATCH = 2
"""TRL's largest micro-batch, in pairs, that runs on all pairs."""
NUM_PAIRS_AROUND = 16
MAX_WAIT_SECONDS = 20.0
"""Longest wait for other processes to become idle before a row."""
SAMPLE_SECONDS = 0.25
"""Interval between measurements of the memory of a row's processes."""

SWEEP = [
    {"stages.train.loss.beta": beta, "stages.train.learning_rate": rate}
    if kind == "sigmoid"
    else {"stages.train.loss": {"kind": kind, "beta": beta}, "stages.train.learning_rate": rate}
    for kind in ("sigmoid", "ipo")
    for beta in (0.05, 0.1, 0.3)
    for rate in (5e-7, 1e-6)
]
"""Twelve configurations."""

app = typer.Typer(pretty_exceptions_enable=False)


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """One measured row: a line of a results file."""

    row: Row
    measurement: Measurement
    startup_seconds: float
    peak_memory_bytes: int
    """All processes together; pages that they share count once."""
    other_cores: float
    """Average cores kept busy by other processes."""


class Around(msgspec.Struct, frozen=True, kw_only=True):
    """Time spent around scoring, in seconds."""

    num_pairs: int
    local_seconds: float
    """Duration of `run.py … --only score --local`, from start to end of the process."""
    ray_seconds: float
    """Duration of the same through Ray."""
    shard_seconds: float
    """The single shard in `local_seconds`, with the checks of its sample and its write."""
    write_seconds: float
    """Making, writing and committing `num_written` rows, as many as in a shard of default size."""
    num_written: int


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """What a second run scores again, here and in TRL."""

    num_configurations: int
    num_scored_again: int
    """Our configurations whose plan runs score again."""
    plan_seconds: float
    """Duration of all our plans."""
    trl: dict[str, int]
    """Pairs whose reference TRL computed again, by the setting that was changed."""
    num_trl_pairs: int


@app.command()
def main(
    pairs: Annotated[str, typer.Option(help="Any input that validate reads.")] = "pipeline/sample",
    num_pairs: Annotated[int, typer.Option(help="Use this many of the first usable pairs.")] = 200,
    model: Annotated[
        str, typer.Option(help="Model, as in a recipe.")
    ] = "sample:smollm2-135m-instruct",
    micro_batch_sizes: Annotated[str, typer.Option(help="TRL's, in pairs.")] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(help="Measurements of each row.")] = 1,
    name: Annotated[str, typer.Option(help="Name of the files in benchmarks/results/.")] = "score",
) -> None:
    """Measure every row, the surroundings and the sweep; print the tables."""
    folder = fetch_model(pin_model(model))
    rows = list_rows([int(size) for size in micro_batch_sizes.split(",")], repeats, num_pairs)
    results = RESULTS / f"{name}.jsonl"
    lines = results.read_bytes().splitlines() if results.exists() else []
    scored = [msgspec.json.decode(line, type=Scored) for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            store=f"{scratch}/store",
            run=RUN,
            model=folder,
            scratch=scratch,
            num_pairs=num_pairs,
            global_batch_size=8,
            dtype="float32",
            num_threads=len(os.sched_getaffinity(0)),
            learning_rate=LEARNING_RATE,
            beta=BETA,
        )
        prepare_pairs(
            pairs,
            num_pairs,
            model=folder,
            dtype="float32",
            store=Path(setting.store),
            until="encode",
        )
        for row in rows[len(scored) :]:
            scored.append(measure_row(setting, row))
            with results.open("ab") as stream:
                stream.write(msgspec.json.encode(scored[-1]) + b"\n")
        few = Path(scratch, "few")
        num_few = min(NUM_PAIRS_AROUND, num_pairs)
        recipe = prepare_pairs(pairs, num_few, model=folder, dtype="float32", store=few)
        around = measure_around(recipe, few, num_few)
        sweep = measure_sweep(setting, recipe)
    text = render(num_pairs, Path(pairs).name, model, scored, around, sweep)
    results.with_suffix(".md").write_text(text)
    print(text)


def list_rows(micro_batch_sizes: Sequence[int], repeats: int, num_pairs: int) -> list[Row]:
    ours = [Row(work="score", program="ours", backend=backend) for backend in BACKENDS]
    trl = [
        Row(
            work="score",
            program="trl",
            micro_batch_size=size,
            num_pairs=None if size <= LARGEST_WHOLE_BATCH else max(size, num_pairs // 4),
        )
        for size in micro_batch_sizes
    ]
    once = [row for start in range(0, len(trl), 2) for row in [*ours, *trl[start : start + 2]]]
    return once * repeats


def measure_row(setting: Setting, row: Row) -> Scored:
    wait_until_quiet(MAX_WAIT_SECONDS)
    worker = "benchmarks.our_worker" if row.program == "ours" else "benchmarks.trl_worker"
    answer = Path(setting.scratch, "answer.json")
    answer.unlink(missing_ok=True)
    task = [msgspec.json.encode(each).decode() for each in (setting, row)]
    watch, started_at = OthersWatch(), time.time()
    errors = Path(setting.scratch, "stderr.txt")
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", worker, *task, str(answer)],
            cwd=CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(setting.num_threads)},
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
        peak = watch_memory(process)
    if process.returncode:
        stderr = errors.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{row} failed with exit code {process.returncode}:\n{stderr}")
    found = msgspec.json.decode(answer.read_bytes(), type=Measurement)
    print(f"{row}: {found.seconds:.1f} s", file=sys.stderr)
    return Scored(
        row=row,
        measurement=found,
        startup_seconds=found.began_at - started_at,
        peak_memory_bytes=max(peak, found.peak_memory_bytes),
        other_cores=round(watch.cores(), 3),
    )


def watch_memory(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process; return the peak memory of it and its descendants together, in bytes."""
    peak = 0
    done = threading.Event()
    threading.Thread(target=lambda: (process.wait(), done.set()), daemon=True).start()
    while not done.wait(SAMPLE_SECONDS):
        peak = max(peak, sum(map(resident_bytes, list_family(process.pid))))
    return peak


def list_family(pid: int) -> list[int]:
    family, queue = [], [pid]
    while queue:
        parent = queue.pop()
        family.append(parent)
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                queue += map(int, path.read_text().split())
            except OSError:
                continue
    return family


def resident_bytes(pid: int) -> int:
    """Return a process's proportional set size, or 0 after it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure_around(recipe: Path, store: Path, num_pairs: int) -> Around:
    """Time the score stage as users run it, and the write of a shard of the default size."""
    wait_until_quiet(MAX_WAIT_SECONDS)
    local = time_stage(recipe, "--local")
    [manifest] = sorted(store.glob("score/*/manifest.json"), key=os.path.getmtime)[-1:]
    shard_seconds = sum(shard["seconds"] for shard in json.loads(manifest.read_bytes())["shards"])
    through_ray = time_stage(recipe)
    num_written, write_seconds = time_write(manifest.parent)
    return Around(
        num_pairs=num_pairs,
        local_seconds=local,
        ray_seconds=through_ray,
        shard_seconds=shard_seconds,
        write_seconds=write_seconds,
        num_written=num_written,
    )


def time_stage(recipe: Path, *arguments: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, "run.py", "run", str(recipe), "--only", "score", "--again", "score"]
    done = subprocess.run(
        [*command, *arguments, "--name", RUN], cwd=CHECKOUT, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return time.perf_counter() - start


def time_write(folder: Path) -> tuple[int, float]:
    """Write a stage's rows repeatedly until they are as many as in a default shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from schemas.manifest import Counts
    from schemas.rows import REJECTED, SCORE
    from stages.dedupe.config import DedupeConfig
    from stages.store.filesystems import Folder
    from stages.store.shards import open_stage_dir

    rows = pa.concat_tables(pq.read_table(path) for path in folder.glob("data/*.parquet"))
    wanted = DedupeConfig().rows_per_shard
    many = pa.concat_tables([rows] * -(-wanted // rows.num_rows)).slice(0, wanted)
    with tempfile.TemporaryDirectory() as scratch:
        out = open_stage_dir(Folder(scratch), "score", "0" * 12, 1)
        out.write_layout(["all"])
        start = time.perf_counter()
        with out.write_shard(0, {"data": SCORE, "rejected": REJECTED}) as shard:
            shard.write("data", many)
            shard.write_rows("rejected", [])
            shard.commit(Counts(num_in=wanted, num_out=wanted))
        return wanted, time.perf_counter() - start


def measure_sweep(setting: Setting, recipe: Path) -> Sweep:
    """Plan twelve configurations over one store; run TRL's trainer with one setting changed."""
    start = time.perf_counter()
    states = [plan_score(recipe, configuration) for configuration in SWEEP]
    seconds = time.perf_counter() - start
    answer = Path(setting.scratch, "sweep.json")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_sweep", setting.model, setting.scratch, str(answer)],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    found = json.loads(answer.read_bytes())
    return Sweep(
        num_configurations=len(SWEEP),
        num_scored_again=sum(state != "done" for state in states),
        plan_seconds=seconds,
        trl=found["computed"],
        num_trl_pairs=found["num_pairs"],
    )


def plan_score(recipe: Path, configuration: dict[str, object]) -> str:
    """Return what `run.py plan` reports for the score stage."""
    settings = [
        word
        for key, value in configuration.items()
        for word in (
            "--set",
            f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}",
        )
    ]
    done = subprocess.run(
        [sys.executable, "run.py", "plan", str(recipe), "--json", *settings],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    stages = {stage["stage"]: stage for stage in json.loads(done.stdout)}
    state: str = stages["score"]["state"]
    return state


def render(
    num_pairs: int,
    pairs: str,
    model: str,
    scored: Sequence[Scored],
    around: Around,
    sweep: Sweep,
) -> str:
    machine, versions = describe_machine(), list_versions()
    names = ("python", "torch", "transformers", "vllm", "trl")
    head = (
        f"{num_pairs} pairs of {pairs}, {model}, float32, {machine['cores']} threads on "
        f"{machine['processor']}; "
        + ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        + f". Other processes took at most {max(each.other_cores for each in scored):.2f} cores."
    )
    by_row = {
        row: [each for each in scored if each.row == row]
        for row in dict.fromkeys(each.row for each in scored)
    }
    speed = {
        row: (row.num_pairs or num_pairs) / median(each.measurement.seconds for each in found)
        for row, found in by_row.items()
    }
    best = max(value for row, value in speed.items() if row.program == "trl")
    trl_best = next(row for row, value in speed.items() if value == best)
    trl_memory = max(each.peak_memory_bytes for each in by_row[trl_best])
    table = [
        "|  | pairs/s | to TRL's best | tokens computed of submitted | peak memory, all processes "
        "| to TRL's best | CPU seconds per 1,000 pairs | start-up |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, found in sorted(by_row.items(), key=lambda item: item[0].program):
        first = found[0].measurement
        memory = max(each.peak_memory_bytes for each in found)
        num_measured = row.num_pairs or num_pairs
        cpu = median(each.measurement.cpu_seconds for each in found) / num_measured * 1000
        startup = median(each.startup_seconds for each in found)
        label = (
            f"**ours, {row.backend}**"
            if row.program == "ours"
            else f"TRL, micro-batch {row.micro_batch_size}"
        )
        if row.num_pairs is not None:
            label += f" (first {row.num_pairs} pairs)"
        table.append(
            f"| {label} | {speed[row]:.2f} | {speed[row] / best:.2f} | "
            f"{first.num_tokens_computed:,} of {first.num_tokens_submitted:,} | "
            f"{memory / 1e9:.2f} GB | {memory / trl_memory:.2f} | {cpu:,.0f} s | {startup:.0f} s |"
        )
    changes = ", ".join(f"{what}: {number}" for what, number in sweep.trl.items())
    ours = max(value for row, value in speed.items() if row.program == "ours")
    times = sweep.num_configurations
    return "\n".join(
        [
            head,
            "",
            *table,
            "",
            f"With {around.num_pairs} pairs and the transformers backend, the whole stage took "
            f"{around.local_seconds:.1f} s in one process and {around.ray_seconds:.1f} s through "
            f"Ray; {around.shard_seconds:.1f} s of the former were its only shard. Writing and "
            f"committing a shard of {around.num_written:,} pairs took {around.write_seconds:.2f} "
            "s.",
            "",
            f"In a sweep of {times} configurations of loss, beta and learning rate, "
            f"{sweep.num_scored_again} of ours score again (by `plan`, {sweep.plan_seconds:.0f} s "
            f"for all), so the sweep costs one scoring: {num_pairs / ours:.0f} s for these pairs. "
            f"Of {sweep.num_trl_pairs} pairs, TRL computed the reference again after a change of "
            f"one setting as follows: {changes}. Where it computes all of them, {times} "
            f"configurations cost {times} precomputes, {times * num_pairs / best:.0f} s for these "
            f"pairs at its best row: {times * ours / best:.0f} times as much.",
            "",
        ]
    )


if __name__ == "__main__":
    app()
