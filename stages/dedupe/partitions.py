"""Partitions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from schemas.manifest import ShardRecord
from stages.dedupe.text import I64, U64
from stages.store.filesystems import Folder

PLACE = ("source_file", "source_row", "pair_id", "copy")
"""Tells every row of the pairs table from every other."""

ROW_ORDER = ("prompt_id", "pair_id", "source_file", "source_row", "copy")
"""In which rows stand in the shards of every later stage."""

_HEX_DIGITS = 8
"""A range of ids is told by their first 32 bits."""
_POSITION_BITS = 32


@dataclass(frozen=True, kw_only=True)
class HashRange:
    """The k-th of n equal ranges of hashes, all of which hold about as many rows."""

    index: int
    num_ranges: int

    @property
    def description(self) -> str:
        return f"ids from {self.first_id} to before {self.end_id}"

    @property
    def first_id(self) -> str:
        return self._border_id(self.index)

    @property
    def end_id(self) -> str:
        """The first id behind the range; the last range ends behind all hex digits."""
        return self._border_id(self.index + 1) if self.index + 1 < self.num_ranges else "g"

    @property
    def first_number(self) -> int:
        return math.ceil((self.index << 64) / self.num_ranges) if self.index else 0

    @property
    def last_number(self) -> int:
        """The last 64-bit number in the range."""
        return -(-(self.index + 1 << 64) // self.num_ranges) - 1

    def _border_id(self, index: int) -> str:
        return f"{math.ceil((index << 32) / self.num_ranges):0{_HEX_DIGITS}x}"


_LEAST_ROWS_PER_GROUP = 64
_MOST_ROWS_PER_GROUP = 8192


def size_row_groups(num_rows: int, num_ranges: int) -> int:
    """Choose rows a row group, so that who reads one range of a sorted file decodes little else.

    With n shards and n ranges each range opens n files: fine up to some hundreds, beyond which
    larger shards serve better than more of them.
    """
    return min(max(num_rows // num_ranges, _LEAST_ROWS_PER_GROUP), _MOST_ROWS_PER_GROUP)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a finished pass left behind."""

    folder: Folder
    shards: Sequence[ShardRecord]

    def read(
        self,
        role: str,
        *,
        where: pc.Expression | None = None,
        columns: Sequence[str] | None = None,
        only: int | None = None,
    ) -> pa.Table:
        """Read rows of all shards, or of one; of files sorted by what `where` asks, only a part."""
        shards = [shard for shard in self.shards if only is None or shard.index == only]
        paths = [self.folder.file(shard.files[role].name) for shard in shards]
        dataset = pads.dataset(paths, format="parquet", filesystem=self.folder.filesystem)
        table = dataset.to_table(
            filter=where, columns=None if columns is None else list(columns), use_threads=False
        )
        return table.replace_schema_metadata(None)


def ids_within(column: str, ids: HashRange) -> pc.Expression:
    return (pc.field(column) >= ids.first_id) & (pc.field(column) < ids.end_id)


def numbers_within(column: str, first: int, last: int) -> pc.Expression:
    """Select the 64-bit numbers from the first to the last."""
    field = pc.field(column)
    return (field >= pa.scalar(first, pa.uint64())) & (field <= pa.scalar(last, pa.uint64()))


def refs_within(column: str, shard: int) -> pc.Expression:
    """Select the refs of one shard."""
    first = shard << _POSITION_BITS
    return numbers_within(column, first, first + (1 << _POSITION_BITS) - 1)


def make_refs(shard: int | I64, positions: U64 | I64) -> U64:
    """Number rows across shards: the shard, then the row's position in it, 32 bits each."""
    first = np.asarray(shard, np.uint64) << np.uint64(_POSITION_BITS)
    return first | positions.astype(np.uint64)


def split_refs(refs: U64) -> tuple[I64, I64]:
    """Give shards and positions."""
    shards = refs >> np.uint64(_POSITION_BITS)
    return shards.astype(np.int64), (refs & np.uint64(0xFFFFFFFF)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class RangeRows:
    """The rows of one range of prompt_id, sorted by prompt and pair."""

    rows: pa.Table
    """All of them, with the column `copy`."""
    left: I64
    """Which of them exact comparison leaves; the place in this list is the position in refs."""
    drops: pa.Table
    """Columns of DROPS."""
    warnings: pa.Table
    """Columns of WARNINGS."""


def read_range(
    spread: Pass, decided: Pass, ids: HashRange, *, columns: Sequence[str] | None = None
) -> RangeRows:
    """Gather the rows of a range from all input shards, and take off what was decided to go."""
    inside = ids_within("prompt_id", ids)
    wanted = None if columns is None else sorted({"prompt_id", *PLACE[:-1], *columns})
    rows = spread.read("rows", where=inside, columns=wanted)
    rows = number_copies(rows.sort_by([(name, "ascending") for name in ROW_ORDER[:-1]]))
    drops = decided.read("drops", where=inside)
    warnings = decided.read("warnings", where=inside)
    return RangeRows(rows=rows, left=_find_left(rows, drops), drops=drops, warnings=warnings)


def take_rows(rows: pa.Table, wanted: I64) -> pa.Table:
    """Take rows in ascending order; all of them need no copy."""
    return rows if len(wanted) == rows.num_rows else rows.take(pa.array(wanted))


def _find_left(rows: pa.Table, drops: pa.Table) -> I64:
    """Give the positions of the rows that stay."""
    found, going = (pl.from_arrow(table.select(PLACE)) for table in (rows, drops))
    assert isinstance(found, pl.DataFrame)
    assert isinstance(going, pl.DataFrame)
    left = found.with_row_index("position").join(going, on=list(PLACE), how="anti")
    assert found.height - left.height == going.height, "a drop names no row, or several"
    return left["position"].sort().to_numpy().astype(np.int64)


def number_copies(rows: pa.Table) -> pa.Table:
    """Add the column `copy`: how many rows before have the same place and pair_id."""
    places = pl.from_arrow(rows.select(PLACE[:-1]))
    assert isinstance(places, pl.DataFrame)
    copies = places.select(pl.int_range(pl.len()).over(PLACE[:-1]))
    return rows.append_column("copy", copies.to_series().to_arrow())


def starts_of_runs(values: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return is_first
