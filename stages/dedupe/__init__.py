"""Stage dedupe: which pairs are worth training on once, and in which shard lives every prompt?

Nine passes with files between them, each over resumable shards. Text moves once, into its range of
prompt_id; what rows of different shards are compared by is digests.

1. *spread*, by input shard: rows sorted by prompt, and keys of what reads the same.
2. *decide*, by range of prompts' keys: exact duplicates, label conflicts, equal prompts in both
   splits, cycles of preferences.
3. *sign*, by range of prompt_id: of the rows left, shingles and bands; benchmarks' texts.
4. *match*, by range of bands: which rows are worth comparing.
5. *verify*, by range of rows: how similar they are, exactly.
6. *group*, in one piece, of numbers alone: which similar rows hang together.
7. *assign*, by range of rows: what leaks or is contaminated; the others, to where their group is
   decided.
8. *resolve*, by range of groups: which of the similar rows stay.
9. *gather*, by range of prompt_id: the rows without what goes; caps. What follows keeps its cut.

The third to eighth are left out where nothing asks for them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from schemas.manifest import Manifest
from stages.cost import Measured, count_workers, measure_shards
from stages.dedupe.codes import CODES
from stages.dedupe.config import DedupeConfig
from stages.dedupe.contamination import BenchmarkFiles, pin_benchmarks
from stages.dedupe.minhash import ALGORITHM
from stages.dedupe.passes import (
    Assign,
    Decide,
    Gather,
    Group,
    InputShard,
    Match,
    Resolve,
    Sign,
    Spread,
    Verify,
)
from stages.dedupe.ranges import HashRange, Pass
from stages.stage import (
    Cost,
    Execution,
    MakeWorker,
    ShardTask,
    Stage,
    StageContext,
    StageResult,
    count_aligned_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir

T = TypeVar("T", bound=ShardTask)


def run(config: DedupeConfig, ctx: StageContext) -> StageResult:
    """Remove what should not be trained on (twice), and lay out the shards of every later stage."""
    pairs = ctx.inputs["validate"]
    benchmarks = ctx.pins["benchmarks"]
    assert isinstance(benchmarks, BenchmarkFiles)
    num_rows = pairs.manifest.counts.num_out
    ranges = _cut(max(1, math.ceil(num_rows / config.rows_per_shard)))
    passes = _Passes(ctx)

    inputs = [InputShard(index=record.index, record=record) for record in pairs.manifest.shards]
    spread = passes.run(
        "spread", lambda out: Spread(source=pairs.folder, num_ranges=len(ranges), out=out), inputs
    )
    decided = passes.run(
        "decide", lambda out: Decide(config=config, spread=spread, out=out), ranges
    )
    num_eval = sum(record.counts.more["num_eval"] for record in spread.shards)
    seeks_leaks = config.leaks is not None and 0 < num_eval < num_rows
    judged: list[Pass] = []
    summary = {}
    if config.near or seeks_leaks or benchmarks.files:
        signed = passes.run(
            "sign",
            lambda out: Sign(
                config=config,
                spread=spread,
                decided=decided,
                benchmarks=benchmarks,
                seeks_leaks=seeks_leaks,
                out=out,
            ),
            ranges,
        )
        matched = passes.run("match", lambda out: Match(signed=signed, out=out), ranges)
        verified = passes.run(
            "verify",
            lambda out: Verify(config=config, signed=signed, matched=matched, out=out),
            ranges,
        )
        grouped = passes.run(
            "group", lambda out: Group(signed=signed, verified=verified, out=out), _cut(1)
        )
        assigned = passes.run(
            "assign",
            lambda out: Assign(signed=signed, verified=verified, grouped=grouped, out=out),
            ranges,
        )
        resolved = passes.run(
            "resolve", lambda out: Resolve(config=config, assigned=assigned, out=out), ranges
        )
        judged = [assigned, resolved]
        summary = {
            "algorithm": ALGORITHM,
            "num_compared": sum(record.counts.num_in for record in verified.shards),
            "num_similar": sum(record.counts.num_out for record in verified.shards),
        }
    gather = Gather(config=config, spread=spread, decided=decided, judged=judged, out=ctx.out)
    return StageResult(shards=ctx.map_shards(gather, ranges, label="gather"), summary=summary)


def _cut(num_ranges: int) -> list[HashRange]:
    return [HashRange(index=index, num_ranges=num_ranges) for index in range(num_ranges)]


@dataclass(frozen=True)
class _Passes:
    """Runs the passes of the stage, each into a directory of its name."""

    ctx: StageContext

    def run(self, name: str, make: Callable[[StageDir], MakeWorker[T]], tasks: Sequence[T]) -> Pass:
        out = self.ctx.out.work(name)
        shards = self.ctx.map_shards(make(out), tasks, into=out, label=name)
        return Pass(folder=out.folder, shards=shards)


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
