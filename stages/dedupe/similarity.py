"""Exact similarity of two rows, and whether one is the other with its labels swapped.

A row is compared by its *sketch*: the shingles of prompt, chosen and rejected, and their guards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.rows import Column, RowSchema
from stages.dedupe.partitions import Pass, split_refs
from stages.dedupe.text import I64, U32, U64, Shingles, sort_unique, take_segments

F64 = npt.NDArray[np.float64]

SKETCHES = RowSchema(
    "dedupe-sketches",
    2,
    (
        Column(
            "sketch",
            pa.binary(),
            "32-bit numbers, little endian: the numbers of shingles of prompt and chosen, three "
            "64-bit guards (prompt, chosen, rejected), the shingles of prompt, chosen, rejected.",
            nullable=False,
        ),
    ),
)
"""Row k belongs to position k of its range. All values share one column, because a read of few rows
takes Parquet about as long for each column as a read of many."""
SKETCH_ROWS_PER_GROUP = 128
"""Comparing reads single rows: small row groups avoid reading others with them; still smaller ones
take longer to open than to read."""
SKETCH_HEADER = 8
"""Number of 32-bit numbers before the shingles."""

PAIR_EDGES = RowSchema(
    "dedupe-pair-edges",
    1,
    (
        Column("member", pa.uint64(), "The row expected to be the worse.", nullable=False),
        Column("leader", pa.uint64(), "The other row.", nullable=False),
        Column("similarity", pa.float64(), "Jaccard similarity, 0 to 1.", nullable=False),
        Column("is_swapped", pa.bool_(), "Whether the labels are opposite.", nullable=False),
        Column("is_guarded", pa.bool_(), "Whether numbers or operators differ.", nullable=False),
    ),
)

PROMPT_EDGES = RowSchema(
    "dedupe-prompt-edges",
    1,
    (
        Column("member", pa.uint64(), "First row of a training prompt.", nullable=False),
        Column("leader", pa.uint64(), "First row of a held-out prompt.", nullable=False),
        Column("similarity", pa.float64(), "Jaccard similarity, 0 to 1.", nullable=False),
    ),
)

_EDGES_AT_ONCE = 8192
_PROMPT, _CHOSEN, _REJECTED = 0, 1, 2


def pack_sketches(shingles: Shingles, guards: U64) -> pa.Table:
    """Pack the shingles and guards of every three texts (a row) as one sketch."""
    bounds = shingles.bounds[::3]
    num_rows = len(bounds) - 1
    header = np.empty((num_rows, SKETCH_HEADER), "<u4")
    header[:, 0] = shingles.bounds[1::3] - shingles.bounds[0:-1:3]
    header[:, 1] = shingles.bounds[2::3] - shingles.bounds[1::3]
    header[:, 2:] = guards.reshape(num_rows, 3).astype("<u8").view("<u4")
    starts = bounds + SKETCH_HEADER * np.arange(num_rows + 1)
    numbers = np.empty(starts[-1], "<u4")
    in_header = (starts[:-1, None] + np.arange(SKETCH_HEADER)).ravel()
    is_shingle = np.ones(len(numbers), np.bool_)
    is_shingle[in_header] = False
    numbers[in_header] = header.ravel()
    numbers[is_shingle] = shingles.hashes
    buffers = [None, pa.py_buffer((4 * starts).astype(np.int32)), pa.py_buffer(numbers)]
    packed = pa.Array.from_buffers(pa.binary(), num_rows, buffers)
    return pa.table([packed], schema=SKETCHES.arrow)


class Sets(NamedTuple):
    """The sets of R rows; row k's is members[starts[k]:ends[k]], ascending and never empty."""

    members: U32
    starts: I64
    ends: I64


@dataclass(frozen=True)
class Sketches:
    """The shingles and guards of R rows, looked up by ref."""

    refs: U64
    """Ascending."""
    parts: tuple[Sets, Sets, Sets]
    """Prompt, chosen, rejected."""
    unions: Sets
    """Prompt and answers as one set."""
    guards: U64
    """[R, 3]"""

    @classmethod
    def of(cls, refs: U64, table: pa.Table) -> "Sketches":
        packed = table["sketch"].to_pylist()
        numbers = np.frombuffer(b"".join(packed), "<u4")
        ends = np.cumsum([len(sketch) // 4 for sketch in packed], dtype=np.int64)
        starts = np.append(0, ends[:-1])
        header = numbers[starts[:, None] + np.arange(SKETCH_HEADER)]
        chosen = starts + SKETCH_HEADER + header[:, 0]
        rejected = chosen + header[:, 1]
        parts = (
            Sets(numbers, starts + SKETCH_HEADER, chosen),
            Sets(numbers, chosen, rejected),
            Sets(numbers, rejected, ends),
        )
        guards = np.ascontiguousarray(header[:, 2:]).view("<u8")
        return cls(refs, parts, _unite_parts(parts), guards)

    def find(self, refs: U64) -> I64:
        return np.searchsorted(self.refs, refs)


def read_sketches(signed: Pass, refs: U64) -> Sketches:
    """Read the sketches of some rows of any shards.

    Args:
        signed: the pass that wrote them.
        refs: ascending and distinct.
    """
    tables = []
    shards, positions = split_refs(refs)
    for shard in np.unique(shards):
        wanted = positions[shards == shard]
        path = signed.folder.file(signed.shards[shard].files["sketches"].name)
        with pq.ParquetFile(path, filesystem=signed.folder.filesystem) as file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            group = np.searchsorted(ends, wanted, side="right")
            groups, at = np.unique(group, return_inverse=True)
            found = file.read_row_groups(groups.tolist(), use_threads=False)
        num_before = np.cumsum([0, *(sizes[k] for k in groups)])
        tables.append(found.take(num_before[at] + wanted - (ends[group] - np.take(sizes, group))))
    return Sketches.of(refs, pa.concat_tables(tables))


def measure_pairs(
    members: U64,
    leaders: U64,
    read: Callable[[U64], Sketches],
    *,
    threshold: float,
    answer_threshold: float,
) -> pa.Table:
    """Compare rows, and keep the pairs that are similar enough.

    Answers are compared both ways; the labels count as swapped where that fits better
    (J(c1, c2) + J(r1, r2) < J(c1, r2) + J(r1, c2)).

    Args:
        members: refs of one row of each comparison.
        leaders: refs of the other, ascending, so that few sketches are in memory at once.
        read: returns the sketches of refs.
        threshold: minimum similarity of prompt and answers together.
        answer_threshold: minimum similarity of each answer to its counterpart.
    Returns:
        Columns of PAIR_EDGES.
    """
    edges = [PAIR_EDGES.arrow.empty_table()]
    for first in range(0, len(members), _EDGES_AT_ONCE):
        member, leader = (refs[first : first + _EDGES_AT_ONCE] for refs in (members, leaders))
        sketches = read(sort_unique(np.concatenate([member, leader])))
        one, other = sketches.find(member), sketches.find(leader)
        near, similarity = _find_near(sketches.unions, one, other, threshold)
        member, leader, one, other = member[near], leader[near], one[near], other[near]

        def compare(
            a: int, b: int, sketches: Sketches = sketches, one: I64 = one, other: I64 = other
        ) -> F64:
            return jaccard(sketches.parts[a], one, other, against=sketches.parts[b])

        same = compare(_CHOSEN, _CHOSEN), compare(_REJECTED, _REJECTED)
        crossed = compare(_CHOSEN, _REJECTED), compare(_REJECTED, _CHOSEN)
        is_swapped = same[0] + same[1] < crossed[0] + crossed[1]
        least = np.where(is_swapped, np.minimum(*crossed), np.minimum(*same))
        guards, others = sketches.guards[one], sketches.guards[other].copy()
        others[is_swapped] = others[is_swapped][:, [_PROMPT, _REJECTED, _CHOSEN]]
        is_guarded = (guards != others).any(axis=1)
        columns = [member, leader, similarity, is_swapped, is_guarded]
        found = pa.table([pa.array(column) for column in columns], schema=PAIR_EDGES.arrow)
        edges.append(found.filter(pa.array(least >= answer_threshold)))
    return pa.concat_tables(edges)


def measure_prompts(
    members: U64, leaders: U64, read: Callable[[U64], Sketches], *, threshold: float
) -> pa.Table:
    """Compare prompts; return the columns of PROMPT_EDGES for those that are similar enough."""
    edges = [PROMPT_EDGES.arrow.empty_table()]
    for first in range(0, len(members), _EDGES_AT_ONCE):
        member, leader = (refs[first : first + _EDGES_AT_ONCE] for refs in (members, leaders))
        sketches = read(sort_unique(np.concatenate([member, leader])))
        one, other = sketches.find(member), sketches.find(leader)
        near, similarity = _find_near(sketches.parts[_PROMPT], one, other, threshold)
        columns = [pa.array(column) for column in (member[near], leader[near], similarity)]
        edges.append(pa.table(columns, schema=PROMPT_EDGES.arrow))
    return pa.concat_tables(edges)


def _find_near(sets: Sets, one: I64, other: I64, threshold: float) -> tuple[I64, F64]:
    """Return the indices of comparisons that are similar enough, and their similarities."""
    sizes = sets.ends - sets.starts
    smaller = np.minimum(sizes[one], sizes[other])
    larger = np.maximum(sizes[one], sizes[other])
    # The intersection is at most the smaller set: sizes alone rule out about half.
    possible = np.flatnonzero(smaller / larger >= threshold)
    similarity = jaccard(sets, one[possible], other[possible])
    is_near = similarity >= threshold
    return possible[is_near], similarity[is_near]


def jaccard(sets: Sets, one: I64, other: I64, *, against: Sets | None = None) -> F64:
    """Compute |A and B| / |A or B| for pairs of sets.

    Args:
        sets: the collection of the first sets.
        one: indices of the first sets.
        other: indices of the second sets.
        against: the collection of the second sets; `sets` unless given.
    """
    against = against or sets
    first, first_bounds = _take(sets, one)
    second, second_bounds = _take(against, other)
    keys = np.sort(np.concatenate([_key(first, first_bounds), _key(second, second_bounds)]))
    in_both = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
    shared = np.bincount(in_both.astype(np.int64), minlength=len(one))
    total = np.diff(first_bounds) + np.diff(second_bounds) - shared
    return shared / total


def _take(sets: Sets, which: I64) -> tuple[U32, I64]:
    return take_segments(sets.members, sets.starts[which], sets.ends[which])


def _key(flat: U32, bounds: I64) -> U64:
    owners = np.repeat(np.arange(len(bounds) - 1, dtype=np.uint64), np.diff(bounds))
    return (owners << np.uint64(32)) | flat


def _unite_parts(parts: tuple[Sets, ...]) -> Sets:
    num_rows = len(parts[0].starts)
    keys = [_key(*_take(part, np.arange(num_rows))) for part in parts]
    members = sort_unique(np.concatenate(keys))
    borders = np.arange(num_rows + 1, dtype=np.uint64) << np.uint64(32)
    bounds = np.searchsorted(members, borders)
    return Sets(members.astype(np.uint32), bounds[:-1], bounds[1:])
