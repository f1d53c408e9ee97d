"""Which rows hang together, directly or through others, so that each such group is decided apart?

A group is a connected component of the verified similarities. It is named by its first row: the
least ref in it, whatever the order in which similarities are joined.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from schemas.rows import Column, RowSchema
from stages.dedupe.hashing import U32, U64
from stages.dedupe.ranges import make_refs, split_refs

ROOTS = RowSchema(
    "dedupe-roots",
    1,
    (
        Column("ref", pa.uint64(), "A row with similarities, as shard and position.", False),
        Column("root", pa.uint64(), "The first row of its group.", False),
    ),
)


class Groups:
    """Joins rows to groups: five bytes a row, whether it resembles another or not.

    Args:
        num_rows: of each shard, in order.
    """

    def __init__(self, num_rows: Sequence[int]) -> None:
        self._starts = np.cumsum([0, *num_rows])
        assert self._starts[-1] < 1 << 32, "rows are numbered with 32 bits here"
        # A row points at an earlier one of its group, the first one at itself.
        self._above: U32 = np.arange(self._starts[-1], dtype=np.uint32)
        self._is_joined = np.zeros(self._starts[-1], np.bool_)

    def join(self, members: U64, leaders: U64) -> None:
        """Put each member into the group of its leader, and the other way round."""
        ones, others = self._number(members), self._number(leaders)
        self._is_joined[ones] = True
        self._is_joined[others] = True
        while len(ones):
            ones, others = self._find_first(ones), self._find_first(others)
            apart = ones != others
            earlier = np.minimum(ones[apart], others[apart])
            later = np.maximum(ones[apart], others[apart])
            # Of several rows that `later` is to point at one wins; the next round joins the rest.
            self._above[later] = earlier
            ones, others = earlier, later

    def roots(self) -> Iterator[pa.Table]:
        """Give the columns of ROOTS by shard, sorted by ref."""
        for shard, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            positions = np.flatnonzero(self._is_joined[start:end])
            firsts = self._find_first((start + positions).astype(np.uint32)).astype(np.int64)
            shards = np.searchsorted(self._starts, firsts, side="right") - 1
            roots = make_refs(shards, firsts - self._starts[shards])
            columns = [pa.array(make_refs(shard, positions)), pa.array(roots)]
            yield pa.table(columns, schema=ROOTS.arrow)

    def _number(self, refs: U64) -> U32:
        shards, positions = split_refs(refs)
        return (self._starts[shards] + positions).astype(np.uint32)

    def _find_first(self, rows: U32) -> U32:
        """Follow the pointers to the end, and shorten the way for the next time."""
        firsts = self._above[rows]
        while True:
            further = self._above[firsts]
            if np.array_equal(further, firsts):
                break
            firsts = further
        self._above[rows] = firsts
        return firsts
