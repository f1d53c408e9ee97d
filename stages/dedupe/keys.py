"""Which keys say that two rows read the same?

Only decisions need rows of different shards side by side, and they need no text: some hundred bytes
of keys a row travel, whatever the length of the texts.
"""

from collections.abc import Iterator
from itertools import pairwise

import polars as pl
import pyarrow as pa

from schemas.rows import Column, RowSchema
from stages.dedupe.messages import Messages, cut_batches, digest_texts

PLACE = ("source_file", "source_row", "pair_id", "copy")
"""Tells every row of the pairs table from every other."""
ROW_ORDER = ("prompt_id", "pair_id", "source_file", "source_row", "copy")
"""In which rows stand in the shards of every later stage."""

_PLACE_COLUMNS = (
    Column("prompt_id", pa.string(), "Identity of the row's prompt.", nullable=False),
    Column("pair_id", pa.string(), "Identity of the pair.", nullable=False),
    Column("source_file", pa.string(), "Input file.", nullable=False),
    Column("source_row", pa.int64(), "Row in it.", nullable=False),
    Column("copy", pa.int64(), "Counts equal pairs of one input row, from 0.", nullable=False),
)

KEYS = RowSchema(
    "dedupe-keys",
    2,
    (
        Column("talk_key", pa.string(), "Prompt without system messages.", nullable=False),
        Column("prompt_key", pa.string(), "Prompt and tools.", nullable=False),
        Column("chosen_key", pa.string(), "Chosen answer.", nullable=False),
        Column("rejected_key", pa.string(), "Rejected answer.", nullable=False),
        *_PLACE_COLUMNS,
        Column("source", pa.string(), "Name of its data set.", nullable=False),
        Column("margin", pa.float64(), "score_chosen - score_rejected."),
        Column("split", pa.string(), "train or eval.", nullable=False),
    ),
)
"""The keys are equal for what reads the same; they come first in the names of their meaning."""

DROPS = RowSchema(
    "dedupe-drops",
    2,
    (
        *_PLACE_COLUMNS,
        Column("code", pa.string(), "Why it goes.", nullable=False),
        Column("kept_pair_id", pa.string(), "The pair that stays instead."),
        Column("detail", pa.string(), "What it was found equal to.", nullable=False),
    ),
)

WARNINGS = RowSchema(
    "dedupe-warnings",
    1,
    (*_PLACE_COLUMNS, Column("code", pa.string(), "What is doubtful.", nullable=False)),
)


def take_keys(rows: pa.Table) -> Iterator[pa.Table]:
    """Compute the keys of rows of the pairs table, as columns of KEYS."""
    for batch in cut_batches(rows):
        carried = {name: batch[name] for name in KEYS.arrow.names if name in batch.column_names}
        keys = pa.table({**_digest_rows(batch), **carried})
        yield keys.select(KEYS.arrow.names).cast(KEYS.arrow)


def number_copies(rows: pa.Table) -> pa.Table:
    """Add the column `copy`: how many rows before have the same place and pair_id."""
    places = pl.from_arrow(rows.select(PLACE[:-1]))
    assert isinstance(places, pl.DataFrame)
    copies = places.select(pl.int_range(pl.len()).over(PLACE[:-1]))
    return rows.append_column("copy", copies.to_series().to_arrow())


def _digest_rows(rows: pa.Table) -> dict[str, list[str]]:
    prompts = Messages.of(rows["prompt"])
    prompt_texts = prompts.canonical_texts()
    is_system = [role == "system" for role in prompts.fields["role"]]
    tools = rows["tools"].to_pylist()
    prompt_keys, talk_keys = [], []
    for (first, end), offered in zip(pairwise(prompts.bounds), tools, strict=True):
        texts = prompt_texts[first:end]
        talk = texts
        if any(is_system[first:end]):
            talk = [
                text
                for text, skipped in zip(texts, is_system[first:end], strict=True)
                if not skipped
            ]
        prompt_keys.append(digest_texts(texts if offered is None else [*texts, f"tools{offered}"]))
        talk_keys.append(
            prompt_keys[-1] if talk is texts and offered is None else digest_texts(talk)
        )
    return {
        "talk_key": talk_keys,
        "prompt_key": prompt_keys,
        "chosen_key": _digest_column(rows["chosen"]),
        "rejected_key": _digest_column(rows["rejected"]),
    }


def _digest_column(column: pa.ChunkedArray) -> list[str]:
    messages = Messages.of(column)
    texts = messages.canonical_texts()
    return [digest_texts(texts[first:end]) for first, end in pairwise(messages.bounds)]
