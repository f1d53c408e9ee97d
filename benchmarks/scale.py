"""Time and memory of plan, resume, verify and prune on a store of 10^8 pairs.

    python -m benchmarks.scale --pairs 100000000

The store is simulated: it has the layouts, commit records and manifests of 4,000 shards a stage,
and its data files are links to one small Parquet file with as many rows as a shard. That measures
everything that grows with the number of shards. On a real store verify also hashes the files, at
1.7 GB a second and core.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.plan import Plan, PlannedStage, make_plan
from pipeline.recipe import load_recipe
from schemas.manifest import (
    Counts,
    FileRecord,
    Layout,
    Manifest,
    RunRecord,
    ShardRecord,
    encode_record,
)

ROOT = Path(__file__).parents[1]
ROWS_PER_SHARD = 25_000
STAGES = ("validate", "dedupe", "encode", "score")
ACTIONS = ("plan", "plan, another seed", "resume", "verify", "prune")


def write_recipe(folder: Path, model: Path) -> Path:
    """Write a recipe over one pair, whose fingerprints are those of the simulated store."""
    answer = [{"role": "assistant", "content": "Yes."}], [{"role": "assistant", "content": "No."}]
    pair = {
        "prompt": [{"role": "user", "content": "Well?"}],
        "chosen": answer[0],
        "rejected": answer[1],
    }
    (folder / "pairs.jsonl").write_bytes(msgspec.json.encode(pair) + b"\n")
    recipe = {
        "name": "simulated",
        "store": str(folder / "store"),
        "stages": {
            "validate": {"inputs": [str(folder / "pairs.jsonl")]},
            "score": {"model": str(model), "backend": "transformers", "dtype": "float32"},
        },
    }
    path = folder / "simulated.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def simulate_store(recipe: Path, num_pairs: int) -> None:
    """Fill a recipe's store as the stages up to score would; score is half done."""
    plan = make_plan(load_recipe(str(recipe)), has_gpus=False)
    store = Path(plan.store.path)
    store.mkdir()
    num_shards = -(-num_pairs // ROWS_PER_SHARD)
    full, empty = (_write_rows(store / f"rows-{n}.parquet", n) for n in (ROWS_PER_SHARD, 0))
    for name in STAGES:
        stage = plan.stage(name)
        shards = [_make_shard(name, index, full, empty) for index in range(num_shards)]
        is_half = name == "score"
        _write_stage(stage, shards[: num_shards // 2] if is_half else shards, num_shards, full)
        if not is_half:
            manifest = _make_manifest(stage, shards)
            Path(stage.out.folder.file("manifest.json")).write_bytes(encode_record(manifest))
    record = RunRecord(
        name="simulated",
        recipe=str(recipe),
        stages={name: plan.stage(name).ref for name in STAGES[:3]},
        begun={"score": plan.stage("score").ref},
    )
    (store / "runs").mkdir()
    (store / "runs" / "simulated.json").write_bytes(encode_record(record))


def _write_rows(path: Path, num_rows: int) -> FileRecord:
    pq.write_table(pa.table({"row": pa.array([0] * num_rows, pa.int8())}), path)
    content = path.read_bytes()
    return FileRecord(
        name=str(path),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        num_rows=num_rows,
    )


def _make_shard(stage: str, index: int, full: FileRecord, empty: FileRecord) -> ShardRecord:
    files = {
        role: msgspec.structs.replace(
            file, name=f"{role}/part-{index:05d}-{file.sha256[:8]}.parquet"
        )
        for role, file in (("data", full), ("rejected", empty))
    }
    more = {"num_rows_kept": ROWS_PER_SHARD} if stage == "validate" else {"num_tokens": 12_345_678}
    if stage == "score":
        more = {
            "num_sequences": 2 * ROWS_PER_SHARD,
            "num_sequences_scored": 2 * ROWS_PER_SHARD,
            "num_sequences_reused": 0,
            "num_tokens_submitted": 12_345_678,
            "num_tokens_computed": 9_876_543,
        }
    low, high = (f"{index:08x}{digit * 24}" for digit in "0f")
    return ShardRecord(
        index=index,
        files=files,
        counts=Counts(num_in=ROWS_PER_SHARD, num_out=ROWS_PER_SHARD, more=more),
        seconds=61.234,
        writer=f"node-{index % 1000:04d}:12345",
        prompt_range=(low, high) if stage == "score" else None,
    )


def _write_stage(
    stage: PlannedStage, shards: list[ShardRecord], num_shards: int, full: FileRecord
) -> None:
    folder = Path(stage.out.folder.path)
    for name in ("data", "rejected", "_commits"):
        (folder / name).mkdir(parents=True)
    descriptions = [f"dedupe/data/part-{index:05d}-0123abcd.parquet" for index in range(num_shards)]
    (folder / "_layout.json").write_bytes(encode_record(Layout(shards=descriptions)))
    rows = Path(full.name).parent
    for shard in shards:
        for file in shard.files.values():
            os.link(rows / f"rows-{file.num_rows}.parquet", folder / file.name)
        record = folder / "_commits" / f"part-{shard.index:05d}.json"
        record.write_bytes(encode_record(shard, is_indented=False))


def _make_manifest(stage: PlannedStage, shards: list[ShardRecord]) -> Manifest:
    return Manifest(
        stage=stage.name,
        version=stage.resolved.stage.version,
        fingerprint=stage.fingerprint,
        attempt=1,
        inputs=dict(stage.inputs),
        config=stage.resolved.identity,
        settings={},
        shards=shards,
        files=[],
        counts=Counts.total(shard.counts for shard in shards),
        summary={},
        versions={},
        host="node-0000",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=3600.0,
    )


# --- Measured actions ---------------------------------------------------------------------------


def plan_again(recipe: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(str(recipe), overrides=overrides), has_gpus=False)


def resume(recipe: Path) -> int:
    """Do what a run does before its first shard: plan, and list the remaining shards of score."""
    from pipeline.execute import read_output
    from stages.stage import align_shards

    plan = plan_again(recipe)
    encode = read_output(plan.stage("encode"))
    tasks = align_shards({"encode": encode}, ["encode"])
    done = plan.stage("score").out.committed()
    return len([task for task in tasks if task.index not in done])


def verify(recipe: Path) -> int:
    from pipeline.commands.verify import find_faults

    verdict = find_faults(plan_again(recipe))
    assert verdict.faults == [], verdict.faults[:3]
    return verdict.num_files


def prune(recipe: Path) -> int:
    from pipeline.commands.prune import find_leftovers

    plan = plan_again(recipe)
    return len(find_leftovers(plan.store, min_age_hours=24).found)


CALLS: dict[str, Callable[[Path], object]] = {
    "plan": plan_again,
    "plan, another seed": lambda recipe: plan_again(recipe, "stages.dedupe.rows_per_shard=9999"),
    "resume": resume,
    "verify": verify,
    "prune": prune,
}


def measure(recipe: Path, action: str) -> tuple[float, float]:
    """Run one action in its own process; return its CPU seconds and its peak memory in GB."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--action",
        action,
        "--recipe",
        str(recipe),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def _peak_bytes() -> int:
    """Return this process's peak memory; ru_maxrss also covers the process that it forked from."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--action", choices=ACTIONS)
    parser.add_argument("--recipe", type=Path)
    arguments = parser.parse_args()
    if arguments.action:
        before = time.process_time()
        CALLS[arguments.action](arguments.recipe)
        print(f"{time.process_time() - before:.2f} {_peak_bytes() / 1e9:.3f}")
        return
    from tests.tiny_models import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), make_tiny_model(Path(folder) / "model"))
        simulate_store(recipe, arguments.pairs)
        for action in ACTIONS:
            seconds, memory = measure(recipe, action)
            print(f"| {action} | {arguments.pairs:,} | {seconds:.1f} s | {memory:.2f} GB |")


if __name__ == "__main__":
    main()
