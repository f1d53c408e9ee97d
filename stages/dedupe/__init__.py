"""Which pairs are worth training on once, and in which shard every prompt lives from here on.

Three passes, with files between them: *spread* sorts each input shard by prompt and takes keys;
*decide* looks at the keys of one key range from all shards and lists what goes; *gather* writes one
range of prompt_id, so that all responses to one prompt stand side by side in whatever follows.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from schemas.config import config_class
from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED
from stages.base import Execution, ShardWorker, Stage, StageContext, StageResult
from stages.dedupe.keys import DROPS, KEYS, find_drops, make_keys
from stages.folders import Folder
from stages.shards import StageDir, read_file

_RANGE_DIGITS = 8
"""A range of ids is told by their first 32 bits."""
_ROWS_AT_ONCE = 2000


@config_class
class DedupeConfig:
    """Which pairs are the same, which of them stays, and how large the shards are."""

    rows_per_shard: int = 25_000
    """Pairs a shard holds on average; the layout of every later stage."""
    source_priority: list[str] = dataclasses.field(default_factory=list)
    """Sources whose copy of a duplicate is kept, the best first; others come after them."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError("rows_per_shard must be at least 1")


@dataclass(frozen=True, kw_only=True)
class _IdRange:
    """The k-th of n equal ranges of ids; they are hashes, so all hold about as many."""

    index: int
    num_ranges: int

    @property
    def description(self) -> str:
        return f"ids from {self.first} to before {self.end}"

    @property
    def first(self) -> str:
        return self._border(self.index)

    @property
    def end(self) -> str:
        """The first id behind the range; the last range ends behind all hex digits."""
        return self._border(self.index + 1) if self.index + 1 < self.num_ranges else "g"

    def _border(self, index: int) -> str:
        return f"{math.ceil((index << 32) / self.num_ranges):0{_RANGE_DIGITS}x}"


@dataclass(frozen=True, kw_only=True)
class _InputShard:
    """A shard of validate."""

    index: int
    record: ShardRecord

    @property
    def description(self) -> str:
        return f"validate/{self.record.files['data'].name}"


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """Makes the worker that sorts an input shard by prompt and takes the keys of its rows."""

    source: Folder
    out: StageDir

    def __call__(self) -> ShardWorker[_InputShard]:
        return self._spread

    def _spread(self, task: _InputShard) -> ShardRecord:
        rows = read_file(self.source, task.record.files["data"])
        with self.out.write_shard(task.index, {"rows": PAIR, "keys": KEYS}) as shard:
            shard.write("rows", rows.sort_by([("prompt_id", "ascending"), *_PLACE]))
            shard.write("keys", _take_keys(rows).sort_by([("prompt_key", "ascending"), *_PLACE]))
            return shard.commit(Counts(num_in=rows.num_rows, num_out=rows.num_rows))


@dataclass(frozen=True, kw_only=True)
class _Decide:
    """Makes the worker that lists what goes, from the keys of one range of prompts."""

    source: Folder
    spread: Sequence[ShardRecord]
    source_priority: Sequence[str]
    out: StageDir

    def __call__(self) -> ShardWorker[_IdRange]:
        return self._decide

    def _decide(self, task: _IdRange) -> ShardRecord:
        keys = _read_range(self.source, self.spread, "keys", "prompt_key", task)
        frame = pl.from_arrow(keys)
        assert isinstance(frame, pl.DataFrame)
        drops = find_drops(frame, source_priority=self.source_priority)
        with self.out.write_shard(task.index, {"drops": DROPS}) as shard:
            shard.write_rows("drops", drops.to_dicts())
            return shard.commit(Counts(num_in=keys.num_rows, num_out=drops.height))


@dataclass(frozen=True, kw_only=True)
class _Gather:
    """Makes the worker that writes one range of prompt_id, without what goes."""

    rows: Folder
    spread: Sequence[ShardRecord]
    drops: Folder
    decided: Sequence[ShardRecord]
    out: StageDir

    def __call__(self) -> ShardWorker[_IdRange]:
        return self._gather

    def _gather(self, task: _IdRange) -> ShardRecord:
        rows = _read_range(self.rows, self.spread, "rows", "prompt_id", task)
        rows = rows.sort_by([("prompt_id", "ascending"), ("pair_id", "ascending"), *_PLACE])
        drops = _read_range(self.drops, self.decided, "drops", "prompt_id", task)
        kept = rows.take(_indices_without(rows, drops))
        with self.out.write_shard(task.index, {"data": PAIR, "rejected": REJECTED}) as shard:
            shard.write("data", kept)
            shard.write_rows("rejected", [_rejected_row(drop) for drop in drops.to_pylist()])
            reasons = Counter(drops.column("code").to_pylist())
            counts = Counts(num_in=rows.num_rows, num_out=kept.num_rows, reasons=dict(reasons))
            assert counts.num_in == counts.num_out + counts.num_rejected
            return shard.commit(counts)


_PLACE = [("source_file", "ascending"), ("source_row", "ascending"), ("pair_id", "ascending")]
_PLACE_COLUMNS = [name for name, _ in _PLACE]


def _take_keys(rows: pa.Table) -> pa.Table:
    columns = ["prompt", "chosen", "rejected", "tools", "prompt_id", "source", "margin"]
    batches = rows.select([*columns, *_PLACE_COLUMNS]).to_batches(max_chunksize=_ROWS_AT_ONCE)
    keys = [
        pa.Table.from_pylist([make_keys(row) for row in batch.to_pylist()], schema=KEYS.arrow)
        for batch in batches
    ]
    return pa.concat_tables([KEYS.arrow.empty_table(), *keys])


def _read_range(
    folder: Folder, records: Sequence[ShardRecord], role: str, column: str, ids: _IdRange
) -> pa.Table:
    """Read the rows whose id lies in a range; of files sorted by it, only that part is read."""
    paths = [folder.file(record.files[role].name) for record in records]
    dataset = pads.dataset(paths, format="parquet", filesystem=folder.filesystem)
    inside = (pc.field(column) >= ids.first) & (pc.field(column) < ids.end)
    return dataset.to_table(filter=inside).replace_schema_metadata(None)


def _indices_without(rows: pa.Table, drops: pa.Table) -> pa.Array:
    """Give the positions of the rows that stay."""
    found = pl.from_arrow(rows.select(_PLACE_COLUMNS))
    going = pl.from_arrow(drops.select(_PLACE_COLUMNS))
    assert isinstance(found, pl.DataFrame)
    assert isinstance(going, pl.DataFrame)
    staying = found.with_row_index("position").join(going, on=_PLACE_COLUMNS, how="anti")
    return staying["position"].sort().to_arrow()


def _rejected_row(drop: Mapping[str, Any]) -> dict[str, Any]:
    is_copy = drop["code"] == "DUP_EXACT"
    return {
        "code": drop["code"],
        "codes": [drop["code"]],
        "similarity": 1.0 if is_copy else None,
        **{name: drop[name] for name in (*_PLACE_COLUMNS, "detail", "kept_pair_id")},
    }


def run(config: DedupeConfig, ctx: StageContext) -> StageResult:
    """Remove duplicates and label conflicts, and lay out the shards of every later stage."""
    pairs = ctx.inputs["validate"]
    num_rows = pairs.manifest.counts.num_out
    num_ranges = max(1, math.ceil(num_rows / config.rows_per_shard))
    ranges = [_IdRange(index=index, num_ranges=num_ranges) for index in range(num_ranges)]

    rows_dir, drops_dir = ctx.out.work("spread"), ctx.out.work("decide")
    inputs = [_InputShard(index=record.index, record=record) for record in pairs.manifest.shards]
    spread = ctx.map_shards(
        _Spread(source=pairs.folder, out=rows_dir), inputs, into=rows_dir, label="1 of 3, spread"
    )
    decide = _Decide(
        source=rows_dir.folder,
        spread=spread,
        source_priority=config.source_priority,
        out=drops_dir,
    )
    decided = ctx.map_shards(decide, ranges, into=drops_dir, label="2 of 3, decide")
    gather = _Gather(
        rows=rows_dir.folder,
        spread=spread,
        drops=drops_dir.folder,
        decided=decided,
        out=ctx.out,
    )
    return StageResult(shards=ctx.map_shards(gather, ranges, label="3 of 3, gather"))


STAGE = Stage(
    name="dedupe",
    version=1,
    needs=lambda config: ("validate",),
    config=DedupeConfig,
    execution=Execution,
    run=run,
)
