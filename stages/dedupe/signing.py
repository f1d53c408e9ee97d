"""What stands for a row when it is compared with others: sets of shingles, guards, bands."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.rows import Column, RowSchema
from stages.dedupe.hashing import U32, U64
from stages.dedupe.keys import PLACE
from stages.dedupe.messages import Messages, cut_batches
from stages.dedupe.minhash import PAIR_BANDS, PROMPT_BANDS, make_band_keys, sign_sets
from stages.dedupe.order import rank_sources
from stages.dedupe.shingles import Shingles, find_shingles
from stages.dedupe.words import find_words

SKETCH_ROWS_PER_GROUP = 128
"""Comparing reads single rows: small row groups keep it from reading many others; smaller ones take
longer to open than to read."""
SIGNED_COLUMNS = ("prompt", "chosen", "rejected", "tools", "source", "margin", "split")

SKETCHES = RowSchema(
    "dedupe-sketches",
    2,
    (
        Column(
            "sketch",
            pa.binary(),
            "32-bit numbers, little endian: how many shingles prompt and chosen have, three 64-bit "
            "guards (prompt, chosen, rejected), the shingles of prompt, chosen and rejected.",
            nullable=False,
        ),
    ),
)
"""Row k belongs to position k of its range. One column, because Parquet takes as long for one of a
single row as for one of many."""

SKETCH_HEADER = 8
"""32-bit numbers before the shingles."""

_NODE_COLUMNS = (
    Column("pair_id", pa.string(), "Identity of the pair.", nullable=False),
    Column("source", pa.string(), "Name of its data set.", nullable=False),
    Column("source_file", pa.string(), "Input file.", nullable=False),
    Column("source_row", pa.int64(), "Row in it.", nullable=False),
    Column("copy", pa.int64(), "Counts equal pairs of one input row.", nullable=False),
    Column("margin", pa.float64(), "score_chosen - score_rejected."),
    Column("is_held_out", pa.bool_(), "Whether its split is eval.", nullable=False),
)

NODES = RowSchema(
    "dedupe-nodes",
    1,
    (
        *_NODE_COLUMNS,
        Column("first", pa.uint32(), "Position of its prompt's first row.", nullable=False),
    ),
)
"""Row k belongs to position k of its range."""

GROUPED_NODES = RowSchema(
    "dedupe-grouped-nodes",
    1,
    (
        *_NODE_COLUMNS,
        Column("ref", pa.uint64(), "The row, as shard and position.", nullable=False),
        Column("root", pa.uint64(), "The first row of its group.", nullable=False),
    ),
)
"""Rows that resemble another; sorted by root."""

BANDS = RowSchema(
    "dedupe-bands",
    1,
    (
        Column("band_key", pa.uint64(), "Equal where a band of two rows is equal.", nullable=False),
        Column("priority", pa.uint64(), "The smaller, the better the row.", nullable=False),
        Column("position", pa.uint32(), "Of the row, or the prompt's first row.", nullable=False),
    ),
)


class Signed(NamedTuple):
    sketches: pa.Table
    bands: pa.Table
    """Sorted by band_key."""
    prompt_bands: pa.Table
    """One prompt's bands once; sorted by band_key; held-out prompts have priority 0."""


def describe_nodes(rows: pa.Table) -> pa.Table:
    """Give the columns of NODES for the rows of a range."""
    ids = rows["prompt_id"].to_numpy()
    is_first = _starts_of_runs(ids)
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1] if len(ids) else np.zeros(0, "u4")
    nodes = rows.select([*PLACE, "source", "margin"])
    nodes = nodes.append_column("is_held_out", pc.equal(rows["split"], "eval"))
    return nodes.append_column("first", pa.array(first.astype(np.uint32)))


def sign_rows(
    rows: pa.Table, *, source_priority: Sequence[str], seeks_near: bool, seeks_leaks: bool
) -> Signed:
    """Make the sketches and bands of the rows of a range.

    Args:
        rows: columns SIGNED_COLUMNS, prompt_id and pair_id, sorted by prompt_id.
        source_priority: names of sources, the best first.
        seeks_near: whether bands of pairs are wanted.
        seeks_leaks: whether bands of prompts are wanted; held-out rows then come first.
    """
    priorities = _prioritise(rows, source_priority, puts_held_out_first=seeks_leaks)
    is_first = _starts_of_runs(rows["prompt_id"].to_numpy())
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
    return Signed(
        sketches=pa.concat_tables([SKETCHES.arrow.empty_table(), *sketches]),
        bands=_sort_bands(bands),
        prompt_bands=_sort_bands(prompt_bands),
    )


def part_texts(rows: pa.Table) -> Iterator[str]:
    """Give each row's three texts: prompt without system messages, chosen, rejected."""
    columns = [list(_side_texts(rows[name])) for name in ("prompt", "chosen", "rejected")]
    for texts in zip(*columns, strict=True):
        yield from texts


def _side_texts(column: pa.ChunkedArray) -> Iterator[str]:
    messages = Messages.of(column)
    texts = messages.texts()
    roles = messages.fields["role"]
    has_system = "system" in roles
    for first, end in pairwise(messages.bounds):
        if end == first + 1 and not has_system:
            yield texts[first]
        else:
            yield "\n".join(texts[k] for k in range(first, end) if roles[k] != "system")


def _sketch(rows: pa.Table) -> tuple[pa.Table, U32, U32]:
    """Sketch some rows; also the signatures of whole pairs and of prompts."""
    words = find_words(list(part_texts(rows)))
    shingles = find_shingles(words)
    prompt_and_answers = np.append(
        np.stack([shingles.bounds[:-1:3], shingles.bounds[1::3]], axis=1).ravel(),
        shingles.bounds[-1],
    )
    signatures = sign_sets(shingles.hashes, prompt_and_answers)
    prompts, answers = signatures[0::2], signatures[1::2]
    return _pack(shingles, words.guards), np.minimum(prompts, answers), prompts


def _pack(shingles: Shingles, guards: U64) -> pa.Table:
    """Write the sets and guards of every three texts as one sketch."""
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


def _salt_contexts(rows: pa.Table) -> U64:
    """Hash system messages and tools: pairs that differ in them are never compared."""
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
            context.append(f"tools{tools[number]}")
        if context:
            digest = hashlib.sha256("|".join(context).encode()).digest()
            salts[number] = int.from_bytes(digest[:8], "little")
    return salts


_RANK_BITS, _SIZE_BITS, _ID_BITS = 11, 32, 20


def _prioritise(
    rows: pa.Table, source_priority: Sequence[str], *, puts_held_out_first: bool
) -> U64:
    """Press the order of survivors into 64 bits: nearly that order, and enough to choose whom the
    members of a crowded bucket are compared with."""
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


def _starts_of_runs(values: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return is_first


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
