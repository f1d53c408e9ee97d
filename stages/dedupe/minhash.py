"""MinHash signatures and banding: which rows are similar enough to be worth comparing.

Two sets of Jaccard similarity J agree in one value with probability J, in a band of r values with
J^r, and in at least one of b bands with 1 - (1 - J^r)^b
(Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3).

Rows that share a band become candidates: a *leader*, the better row, and a *member*.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.rows import Column, RowSchema
from stages.dedupe.exact import rank_sources
from stages.dedupe.messages import Messages, cut_batches, part_texts, spell_field
from stages.dedupe.partitions import starts_of_runs
from stages.dedupe.similarity import SKETCHES, pack_sketches
from stages.dedupe.text import (
    I64,
    U32,
    U64,
    find_shingles,
    find_words,
    make_constants,
    mix,
    sort_unique,
)

ALGORITHM = "minhash-affine32-1"
"""Name of the algorithm; it changes with any constant below, because signatures of different
algorithms are not comparable."""
ROWS_PER_BAND = 5
PAIR_BANDS = 25
"""Finds 0.99 of the pairs at J = 0.7, 0.9998 at J = 0.8."""
PROMPT_BANDS = 13
"""Finds 0.994 of the prompts at J = 0.8."""
_LEADERS_PER_BUCKET = 32
"""Rows in a larger bucket are compared only with its 32 best, because comparing all with all grows
with the square. Rows that resemble only one another and share all their bands with many others may
then be missed."""

_NUM_VALUES = PAIR_BANDS * ROWS_PER_BAND
_FACTORS = (make_constants(_NUM_VALUES, seed=4) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_OFFSETS = (make_constants(_NUM_VALUES, seed=5) >> np.uint64(32)).astype(np.uint32)
_SETS_AT_ONCE = 128

SIGNED_COLUMNS = ("prompt", "chosen", "rejected", "tools", "source", "margin", "split")

BANDS = RowSchema(
    "dedupe-bands",
    1,
    (
        Column("band_key", pa.uint64(), "Equal where a band of two rows is equal.", nullable=False),
        Column("priority", pa.uint64(), "Smaller for better rows.", nullable=False),
        Column("position", pa.uint32(), "The row's, or its prompt's first row's.", nullable=False),
    ),
)

CANDIDATES = RowSchema(
    "dedupe-candidates",
    1,
    (
        Column("member", pa.uint64(), "The worse row, as shard and position.", nullable=False),
        Column("leader", pa.uint64(), "The better row.", nullable=False),
    ),
)


def sign_sets(hashes: U32, bounds: I64) -> U32:
    """Compute the signatures of N sets.

    Args:
        hashes: the members of all sets, well mixed and concatenated.
        bounds: [N + 1]: set k is hashes[bounds[k]:bounds[k + 1]], never empty.
    Returns:
        [N, 125]: the minimum of each affine image of the set.
    """
    num_sets = len(bounds) - 1
    signatures = np.empty((_NUM_VALUES, num_sets), np.uint32)
    for first in range(0, num_sets, _SETS_AT_ONCE):
        end = min(first + _SETS_AT_ONCE, num_sets)
        members = hashes[bounds[first] : bounds[end]]
        starts = bounds[first:end] - bounds[first]
        images = np.empty_like(members)
        for number in range(_NUM_VALUES):
            np.multiply(members, _FACTORS[number], out=images)
            np.add(images, _OFFSETS[number], out=images)
            np.minimum.reduceat(images, starts, out=signatures[number, first:end])
    return signatures.T


def make_band_keys(signatures: U32, num_bands: int, *, salts: U64 | None = None) -> U64:
    """Hash the bands of each signature.

    Args:
        signatures: [N, 125].
        num_bands: how many bands to use, from the front.
        salts: [N]: sets with different salts never share a key.
    Returns:
        [N, num_bands]: equal in one column exactly where that band of two signatures is equal,
        up to collisions of 64 bits.
    """
    bands = np.arange(1, num_bands + 1, dtype=np.uint64)
    keys: npt.NDArray[np.uint64] = np.broadcast_to(bands, (len(signatures), num_bands)).copy()
    if salts is not None:
        keys ^= salts[:, None]
    used = signatures[:, : num_bands * ROWS_PER_BAND].astype(np.uint64)
    for row in range(ROWS_PER_BAND):
        keys = mix(keys ^ used[:, row::ROWS_PER_BAND])
    return keys


class Signatures(NamedTuple):
    sketches: pa.Table
    bands: pa.Table
    """Sorted by band_key."""
    prompt_bands: pa.Table
    """Bands of each prompt, once; sorted by band_key; held-out prompts have priority 0."""


def sign_rows(
    rows: pa.Table, *, source_priority: Sequence[str], seeks_near: bool, seeks_leaks: bool
) -> Signatures:
    """Compute the sketches and bands of the rows of a range.

    Args:
        rows: columns SIGNED_COLUMNS, prompt_id and pair_id, sorted by prompt_id.
        source_priority: names of sources, the best first.
        seeks_near: whether to compute bands of pairs.
        seeks_leaks: whether to compute bands of prompts; held-out rows then have the best priority.
    """
    priorities = _prioritise(rows, source_priority, puts_held_out_first=seeks_leaks)
    is_first = starts_of_runs(rows["prompt_id"].to_numpy())
    is_held_out = np.asarray(pc.equal(rows["split"], "eval"))
    sketches, bands, prompt_bands = [], [], []
    first = 0
    for batch in cut_batches(rows):
        sketch, of_pairs, of_prompts = _sketch(batch)
        sketches.append(sketch)
        positions = np.arange(first, first + batch.num_rows)
        if seeks_near:
            keys = make_band_keys(of_pairs, PAIR_BANDS, salts=_salt_contexts(batch))
            bands.append(_list_bands(keys, priorities[positions], positions))
        if seeks_leaks:
            positions = positions[is_first[positions]]
            keys = make_band_keys(of_prompts[positions - first], PROMPT_BANDS)
            priority = np.where(is_held_out[positions], np.uint64(0), np.uint64(1))
            prompt_bands.append(_list_bands(keys, priority, positions))
        first += batch.num_rows
    return Signatures(
        sketches=pa.concat_tables([SKETCHES.arrow.empty_table(), *sketches]),
        bands=_sort_bands(bands),
        prompt_bands=_sort_bands(prompt_bands),
    )


def _sketch(rows: pa.Table) -> tuple[pa.Table, U32, U32]:
    """Return the sketches of some rows, and the signatures of whole pairs and of prompts."""
    words = find_words(list(part_texts(rows)))
    shingles = find_shingles(words)
    prompt_and_answers = np.append(
        np.stack([shingles.bounds[:-1:3], shingles.bounds[1::3]], axis=1).ravel(),
        shingles.bounds[-1],
    )
    signatures = sign_sets(shingles.hashes, prompt_and_answers)
    prompts, answers = signatures[0::2], signatures[1::2]
    return pack_sketches(shingles, words.guards), np.minimum(prompts, answers), prompts


def _salt_contexts(rows: pa.Table) -> U64:
    """Hash system messages and tools: pairs with different ones are never compared."""
    messages = Messages.of(rows["prompt"])
    roles = messages.fields["role"]
    salts = np.zeros(rows.num_rows, np.uint64)
    if rows["tools"].null_count == rows.num_rows and "system" not in roles:
        return salts
    texts = messages.canonical_texts()
    tools = rows["tools"].to_pylist()
    for number, (first, end) in enumerate(pairwise(messages.bounds)):
        context = [texts[k] for k in range(first, end) if roles[k] == "system"]
        if tools[number] is not None:
            context.append(spell_field("tools", tools[number]))
        if context:
            digest = hashlib.sha256("|".join(context).encode()).digest()
            salts[number] = int.from_bytes(digest[:8], "little")
    return salts


_RANK_BITS, _SIZE_BITS, _ID_BITS = 11, 32, 20


def _prioritise(
    rows: pa.Table, source_priority: Sequence[str], *, puts_held_out_first: bool
) -> U64:
    """Pack the order of `sort_best_first` into 64 bits: approximate, but good enough to choose the
    leaders of a crowded bucket."""
    frame = pl.from_arrow(rows.select(["source", "margin", "pair_id", "split"]))
    assert isinstance(frame, pl.DataFrame)
    rank = frame.select(rank_sources(source_priority)).to_series().to_numpy().astype(np.uint64)
    size = np.abs(frame["margin"].fill_null(np.nan).to_numpy().astype(np.float32))
    bits = np.where(np.isnan(size), np.uint32(0), size.view(np.uint32) + np.uint32(1))
    worse = np.uint64(0xFFFFFFFF) - bits.astype(np.uint64)
    ids = frame["pair_id"].str.slice(0, _ID_BITS // 4).str.to_integer(base=16).to_numpy()
    priority = np.minimum(rank, np.uint64((1 << _RANK_BITS) - 1))
    priority = (priority << np.uint64(_SIZE_BITS)) | worse
    priority = (priority << np.uint64(_ID_BITS)) | ids.astype(np.uint64)
    if puts_held_out_first:
        is_train = (frame["split"] != "eval").to_numpy()
        priority |= is_train.astype(np.uint64) << np.uint64(63)
    return priority


def _list_bands(
    keys: U64, priorities: U64, positions: npt.NDArray[np.int64]
) -> tuple[U64, U64, npt.NDArray[np.int64]]:
    num_bands = keys.shape[1]
    return keys.ravel(), np.repeat(priorities, num_bands), np.repeat(positions, num_bands)


def _sort_bands(batches: Sequence[tuple[U64, U64, npt.NDArray[np.int64]]]) -> pa.Table:
    if not batches:
        return BANDS.arrow.empty_table()
    keys, priorities, positions = (np.concatenate(c) for c in zip(*batches, strict=True))
    order = np.argsort(keys, kind="stable")
    columns = [keys[order], priorities[order], positions[order].astype(np.uint32)]
    return pa.table([pa.array(column) for column in columns], schema=BANDS.arrow)


def pair_rows(keys: U64, priorities: U64, refs: U64) -> tuple[U64, U64]:
    """Pair up the rows that share a key.

    Args:
        keys: band keys, in any order.
        priorities: smaller for better rows; ties are broken by ref.
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


def pair_prompts(keys: U64, priorities: U64, refs: U64) -> tuple[U64, U64]:
    """Pair up training prompts (members) with held-out prompts (leaders) that share a key.

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
    members, leaders = pair_rows(keys, priorities, refs)
    held_out = sort_unique(refs[priorities == 0])
    wanted = _are_among(leaders, held_out) & ~_are_among(members, held_out)
    return members[wanted], leaders[wanted]


def unite_candidates(tables: pa.Table) -> tuple[U64, U64]:
    """Return the distinct candidates, sorted by leader and member."""
    members, leaders = _sort_unique([tables["member"].to_numpy()], [tables["leader"].to_numpy()])
    order = np.lexsort((members, leaders))
    return members[order], leaders[order]


def _are_among(values: U64, ascending: U64) -> npt.NDArray[np.bool_]:
    """Whether each value is in `ascending`; np.isin uses a hash table, ten times slower."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(ascending, values)
    return ascending[np.minimum(places, len(ascending) - 1)] == values


def _rank_in_runs(keys: U64) -> tuple[I64, I64]:
    """Return, for sorted keys, the start of each one's run of equal keys, and its rank there."""
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
