"""Which rows meet in a band, and which of them are compared?"""

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from schemas.rows import Column, RowSchema
from stages.dedupe.hashing import I64, U64, sort_unique

CANDIDATES = RowSchema(
    "dedupe-candidates",
    1,
    (
        Column("member", pa.uint64(), "The worse row, as shard and position.", nullable=False),
        Column("leader", pa.uint64(), "The better row.", nullable=False),
    ),
)

_LEADERS_PER_BUCKET = 32
"""A bucket of more rows is not compared all against all, which would grow with its square: every
row is compared with the first 32 in the order of survivors. Rows that are similar only to one
another and share all their bands with a crowd are then found by other bands or not at all."""


def link_buckets(keys: U64, priorities: U64, refs: U64) -> tuple[U64, U64]:
    """Pair up the rows that share a key.

    Args:
        keys: band keys, in any order.
        priorities: the smaller, the better the row; equal ones are told apart by their ref.
        refs: the rows.
    Returns:
        Members and leaders: each pair once, sorted by member.
    """
    order = np.argsort(keys, kind="stable")
    is_shared = np.zeros(len(keys), np.bool_)
    equal = keys[order][1:] == keys[order][:-1]
    is_shared[1:] |= equal
    is_shared[:-1] |= equal
    shared = order[is_shared]
    shared = shared[np.lexsort((refs[shared], priorities[shared], keys[shared]))]
    starts, ranks = _rank_in_runs(keys[shared])
    members, leaders = [], []
    for leader_rank in range(_LEADERS_PER_BUCKET):
        behind = np.flatnonzero(ranks > leader_rank)
        if not len(behind):
            break
        members.append(refs[shared[behind]])
        leaders.append(refs[shared[starts[behind] + leader_rank]])
    return _sort_unique(members, leaders)


def link_prompts(keys: U64, priorities: U64, refs: U64) -> tuple[U64, U64]:
    """Pair up prompts for training (members) with held-out ones (leaders) that share a key.

    Args:
        keys: band keys, in any order.
        priorities: 0 for held-out prompts, 1 for others.
        refs: first rows of the prompts.
    """
    order = np.argsort(keys, kind="stable")
    is_held_out = priorities[order] == 0
    starts, _ = _rank_in_runs(keys[order])
    num_rows = np.bincount(starts, minlength=len(keys))[starts]
    num_held_out = np.bincount(starts[is_held_out], minlength=len(keys))[starts]
    meeting = order[(num_held_out > 0) & (num_held_out < num_rows)]
    keys, priorities, refs = keys[meeting], priorities[meeting], refs[meeting]
    members, leaders = link_buckets(keys, priorities, refs)
    held_out = sort_unique(refs[priorities == 0])
    wanted = _are_among(leaders, held_out) & ~_are_among(members, held_out)
    return members[wanted], leaders[wanted]


def unite(tables: pa.Table) -> tuple[U64, U64]:
    """Give each of some candidates once, sorted by leader and member."""
    members, leaders = _sort_unique([tables["member"].to_numpy()], [tables["leader"].to_numpy()])
    order = np.lexsort((members, leaders))
    return members[order], leaders[order]


def _are_among(values: U64, ascending: U64) -> npt.NDArray[np.bool_]:
    """Say which values are among some; np.isin goes through a hash table, ten times slower."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(ascending, values)
    return ascending[np.minimum(places, len(ascending) - 1)] == values


def _rank_in_runs(keys: U64) -> tuple[I64, I64]:
    """For sorted keys: where each one's run starts, and its rank in it."""
    places = np.arange(len(keys))
    is_start = np.ones(len(keys), np.bool_)
    is_start[1:] = keys[1:] != keys[:-1]
    starts = np.maximum.accumulate(np.where(is_start, places, 0)) if len(keys) else places
    return starts, places - starts


def _sort_unique(members: list[U64], leaders: list[U64]) -> tuple[U64, U64]:
    none = np.zeros(0, np.uint64)
    pairs = pl.DataFrame(
        {
            "member": np.concatenate([none, *members]),
            "leader": np.concatenate([none, *leaders]),
        }
    )
    pairs = pairs.unique().sort(["member", "leader"])
    return pairs["member"].to_numpy(), pairs["leader"].to_numpy()
