"""Partitioning of rows into ranges of hashes, and reading one range of a finished pass.

A row has a *ref*, a number that is unique in the data: its shard and its position there.
"""

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
"""Columns that together identify a row of the pairs table."""

ROW_ORDER = ("prompt_id", "pair_id", "source_file", "source_row", "copy")
"""Sort order of rows in the shards of this and every later stage."""

_HEX_DIGITS = 8
"""Ranges of ids are bounded by the first 32 bits of an id."""
_POSITION_BITS = 32


@dataclass(frozen=True, kw_only=True)
class HashRange:
    """The k-th of n equal ranges of hashes; all hold about the same number of rows."""

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
        """The first id after the range; for the last range, a string after all hex digits."""
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
    """Choose row groups so small that reading one range of a sorted file decodes little else.

    With n shards and n ranges, each range opens n files. That is fine for some hundreds; beyond
    that, use larger shards.
    """
    return min(max(num_rows // num_ranges, _LEAST_ROWS_PER_GROUP), _MOST_ROWS_PER_GROUP)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The output of a finished pass."""

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
        """Read rows of all shards, or of one; `where` skips row groups in files sorted by it."""
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
    """Select 64-bit numbers from `first` to `last`, both included."""
    field = pc.field(column)
    return (field >= pa.scalar(first, pa.uint64())) & (field <= pa.scalar(last, pa.uint64()))


def refs_within(column: str, shard: int) -> pc.Expression:
    """Select the refs of one shard."""
    first = shard << _POSITION_BITS
    return numbers_within(column, first, first + (1 << _POSITION_BITS) - 1)


def make_refs(shard: int | I64, positions: U64 | I64) -> U64:
    """Number rows across shards: the shard in the upper 32 bits, the position in the lower."""
    first = np.asarray(shard, np.uint64) << np.uint64(_POSITION_BITS)
    return first | positions.astype(np.uint64)


def split_refs(refs: U64) -> tuple[I64, I64]:
    """Return the shards and positions of refs."""
    shards = refs >> np.uint64(_POSITION_BITS)
    return shards.astype(np.int64), (refs & np.uint64(0xFFFFFFFF)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class RangeRows:
    """The rows of one range of prompt_id, sorted by prompt and pair."""

    rows: pa.Table
    """All rows, with the column `copy`."""
    left: I64
    """Indices of the rows that exact comparison keeps; a ref's position is a place in this list."""
    drops: pa.Table
    """Columns of DROPS."""
    warnings: pa.Table
    """Columns of WARNINGS."""


def read_range(
    spread_out: Pass, decided: Pass, ids: HashRange, *, columns: Sequence[str] | None = None
) -> RangeRows:
    """Read a range's rows from all input shards, and find those that exact comparison keeps."""
    inside = ids_within("prompt_id", ids)
    wanted = None if columns is None else sorted({"prompt_id", *PLACE[:-1], *columns})
    rows = spread_out.read("rows", where=inside, columns=wanted)
    rows = number_copies(rows.sort_by([(name, "ascending") for name in ROW_ORDER[:-1]]))
    drops = decided.read("drops", where=inside)
    warnings = decided.read("warnings", where=inside)
    return RangeRows(rows=rows, left=_find_left(rows, drops), drops=drops, warnings=warnings)


def take_rows(rows: pa.Table, wanted: I64) -> pa.Table:
    """Take rows in ascending order, without a copy where all are wanted."""
    return rows if len(wanted) == rows.num_rows else rows.take(pa.array(wanted))


def _find_left(rows: pa.Table, drops: pa.Table) -> I64:
    """Return the indices of rows without a drop."""
    found, going = (pl.from_arrow(table.select(PLACE)) for table in (rows, drops))
    assert isinstance(found, pl.DataFrame)
    assert isinstance(going, pl.DataFrame)
    left = found.with_row_index("position").join(going, on=list(PLACE), how="anti")
    assert found.height - left.height == going.height, "a drop matches no row, or several"
    return left["position"].sort().to_numpy().astype(np.int64)


def number_copies(rows: pa.Table) -> pa.Table:
    """Add the column `copy`: the number of earlier rows with the same place and pair_id."""
    places = pl.from_arrow(rows.select(PLACE[:-1]))
    assert isinstance(places, pl.DataFrame)
    copies = places.select(pl.int_range(pl.len()).over(PLACE[:-1]))
    return rows.append_column("copy", copies.to_series().to_arrow())


def starts_of_runs(values: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return is_first
