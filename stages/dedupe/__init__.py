"""Stage dedupe: remove pairs that should not be trained on, and lay out the shards that follow.

Nine passes with files between them, each over resumable shards. Text is written twice, by *spread*
and by *gather*; rows of different shards are compared by digests only.

1. *spread*, by input shard: sort rows by prompt; compute keys that are equal for equal text.
2. *decide*, by range of prompt keys: exact duplicates, label conflicts, equal prompts in both
   splits, preference cycles.
3. *sign*, by range of prompt_id: shingles and MinHash bands of the remaining rows; benchmark texts.
4. *match*, by range of band keys: candidate pairs of rows that share a band.
5. *verify*, by range of rows: the exact similarity of the candidates.
6. *group*, in one task, from row numbers alone: connected components of similar rows.
7. *assign*, by range of rows: reject leaking and contaminated rows; send the other similar rows to
   the range that resolves their group.
8. *resolve*, by range of groups: choose which similar rows stay.
9. *gather*, by range of prompt_id: write kept and rejected rows; cap the pairs of a prompt. The
   later stages keep this layout.

Passes 3 to 8 are skipped where near-duplicates, leaks and benchmarks are all off.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from schemas.manifest import Manifest, ShardRecord
from stages.cost import Measured, count_workers, measure_shards
from stages.dedupe import passes
from stages.dedupe.config import CODES, DedupeConfig
from stages.dedupe.contamination import BenchmarkFiles, pin_benchmarks
from stages.dedupe.minhash import ALGORITHM
from stages.dedupe.partitions import HashRange, Pass
from stages.dedupe.passes import InputShard
from stages.stage import (
    Cost,
    Execution,
    ShardTask,
    ShardWorker,
    Stage,
    StageContext,
    StageResult,
    count_aligned_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir

T = TypeVar("T", bound=ShardTask)


def run(config: DedupeConfig, ctx: StageContext) -> StageResult:
    """Remove duplicates, conflicts, leaks and contaminated pairs, and lay out the later shards."""
    pairs = ctx.inputs["validate"]
    benchmarks = ctx.pins["benchmarks"]
    assert isinstance(benchmarks, BenchmarkFiles)
    num_rows = pairs.manifest.counts.num_out
    ranges = _cut(max(1, math.ceil(num_rows / config.rows_per_shard)))
    runner = _PassRunner(ctx)

    inputs = [InputShard(index=record.index, record=record) for record in pairs.manifest.shards]
    spread = runner.run(
        "spread", partial(passes.spread, source=pairs.folder, num_ranges=len(ranges)), inputs
    )
    decided = runner.run("decide", partial(passes.decide, config=config, spread_out=spread), ranges)
    num_eval = sum(record.counts.more["num_eval"] for record in spread.shards)
    seeks_leaks = config.leaks is not None and 0 < num_eval < num_rows
    judged: list[Pass] = []
    summary = {}
    if config.near or seeks_leaks or benchmarks.files:
        make_sign_worker = partial(
            passes.make_sign_worker,
            config=config,
            spread_out=spread,
            decided=decided,
            benchmarks=benchmarks,
            seeks_leaks=seeks_leaks,
        )
        signed = runner.run_with_setup("sign", make_sign_worker, ranges)
        matched = runner.run("match", partial(passes.match, signed=signed), ranges)
        verified = runner.run(
            "verify", partial(passes.verify, config=config, signed=signed, matched=matched), ranges
        )
        grouped = runner.run(
            "group", partial(passes.group, signed=signed, verified=verified), _cut(1)
        )
        assigned = runner.run(
            "assign",
            partial(passes.assign, signed=signed, verified=verified, grouped=grouped),
            ranges,
        )
        resolved = runner.run(
            "resolve", partial(passes.resolve, config=config, assigned=assigned), ranges
        )
        judged = [assigned, resolved]
        summary = {
            "algorithm": ALGORITHM,
            "num_compared": sum(record.counts.num_in for record in verified.shards),
            "num_similar": sum(record.counts.num_out for record in verified.shards),
        }
    gather = partial(
        passes.gather,
        config=config,
        spread_out=spread,
        decided=decided,
        judged=judged,
    )
    shards = ctx.map_shards(partial(_bind_out, gather, out=ctx.out), ranges, label="gather")
    return StageResult(shards=shards, summary=summary)


def _cut(num_ranges: int) -> list[HashRange]:
    return [HashRange(index=index, num_ranges=num_ranges) for index in range(num_ranges)]


@dataclass(frozen=True)
class _PassRunner:
    """Runs passes, each into a work directory of its name."""

    ctx: StageContext

    def run(self, name: str, worker: Callable[..., ShardRecord], tasks: Sequence[T]) -> Pass:
        """Run a pass whose worker needs no setup: `worker(task, out=…)` writes one shard."""
        return self.run_with_setup(name, partial(_bind_out, worker), tasks)

    def run_with_setup(
        self, name: str, make_worker: Callable[..., ShardWorker[T]], tasks: Sequence[T]
    ) -> Pass:
        """Run a pass; each process calls `make_worker(out=…)` once to get its worker."""
        out = self.ctx.out.work(name)
        shards = self.ctx.map_shards(partial(make_worker, out=out), tasks, into=out, label=name)
        return Pass(folder=out.folder, shards=shards)


def _bind_out(worker: Callable[..., ShardRecord], *, out: StageDir) -> ShardWorker[Any]:
    return partial(worker, out=out)


def _measure(manifest: Manifest, store: Folder) -> Measured | None:
    # Most of the work is in passes, which leave no records.
    busy_seconds = manifest.seconds * count_workers(manifest)
    return measure_shards(manifest, work=manifest.counts.num_in, busy_seconds=busy_seconds)


STAGE = Stage(
    name="dedupe",
    version=2,
    needs=lambda config: ("validate",),
    config=DedupeConfig,
    execution=Execution,
    run=run,
    pins={"benchmarks": pin_benchmarks},
    codes=CODES,
    row_name="pairs",
    reads_every_row=True,
    cost=Cost(
        rate_per_core=4500.0,  # Measured: docs/explanation/measurements.md.
        start_seconds=5.0,
        # Bytes a token, measured: docs/explanation/scale.md.
        count_bytes=lambda stage, load: 2.0 * load.num_tokens,
        max_workers=count_aligned_shards,
        measure=_measure,
    ),
)
