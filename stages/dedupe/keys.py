"""Which rows count as the same: keys over lightly normalised text, and what they decide.

Only the decision needs to see rows of different shards side by side, and it needs no text: some
hundred bytes of keys a row travel, whatever the length of the texts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.ids import digest
from schemas.normalise import normalise_messages
from schemas.rows import Column, RowSchema

KEYS = RowSchema(
    "dedupe-keys",
    1,
    (
        Column("prompt_key", pa.string(), "Equal for prompts that read the same.", nullable=False),
        Column("conflict_key", pa.string(), "Prompt and both answers, unordered.", nullable=False),
        Column("exact_key", pa.string(), "Prompt, chosen, rejected, in order.", nullable=False),
        Column("pair_id", pa.string(), "Identity of the pair.", nullable=False),
        Column("prompt_id", pa.string(), "Identity of its prompt.", nullable=False),
        Column("source", pa.string(), "Name of its data set.", nullable=False),
        Column("margin", pa.float64(), "score_chosen - score_rejected."),
        Column("source_file", pa.string(), "Input file.", nullable=False),
        Column("source_row", pa.int64(), "Row in it.", nullable=False),
    ),
)

DROPS = RowSchema(
    "dedupe-drops",
    1,
    (
        Column("prompt_id", pa.string(), "Identity of the dropped pair's prompt.", nullable=False),
        Column("pair_id", pa.string(), "Identity of the dropped pair.", nullable=False),
        Column("source_file", pa.string(), "Input file of the dropped pair.", nullable=False),
        Column("source_row", pa.int64(), "Row in it.", nullable=False),
        Column("code", pa.string(), "DUP_EXACT or LABEL_CONFLICT.", nullable=False),
        Column("kept_pair_id", pa.string(), "The pair that stays instead."),
        Column("detail", pa.string(), "What it was found equal to.", nullable=False),
    ),
)


def make_keys(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the keys of one pair.

    Args:
        pair: a row of the pairs table.
    Returns:
        A row of KEYS.
    """
    prompt, chosen, rejected = (
        digest(normalise_messages(pair[side])) for side in ("prompt", "chosen", "rejected")
    )
    prompt_key = digest([prompt, pair["tools"]])
    return {
        "prompt_key": prompt_key,
        "conflict_key": digest([prompt_key, sorted([chosen, rejected])]),
        "exact_key": digest([prompt_key, chosen, rejected]),
        **{name: pair[name] for name in ("pair_id", "prompt_id", "source", "margin")},
        **{name: pair[name] for name in ("source_file", "source_row")},
    }


def find_drops(keys: pl.DataFrame, *, source_priority: Sequence[str]) -> pl.DataFrame:
    """Decide which rows go: both sides of a label conflict, and all but one of equal rows.

    The survivor is chosen by source priority, the larger absolute margin, pair_id, and then by
    file and row: never by order of arrival.

    Args:
        keys: columns of KEYS; all rows of every prompt_key that occurs.
        source_priority: names of sources, the best first; others come after them, equal.
    Returns:
        Columns of DROPS, sorted by prompt_id, pair_id, source_file, source_row.
    """
    ranks = {source: rank for rank, source in enumerate(source_priority)}
    ordered = keys.with_columns(
        rank=pl.col("source").replace_strict(ranks, default=len(ranks), return_dtype=pl.Int64),
        size=pl.col("margin").abs().fill_null(-1.0),
    ).sort(
        ["rank", "size", "pair_id", "source_file", "source_row"],
        descending=[False, True, False, False, False],
    )
    judged = ordered.with_columns(
        in_conflict=pl.col("exact_key").n_unique().over("conflict_key") > 1,
        is_first=pl.int_range(pl.len()).over("exact_key") == 0,
        first_pair_id=pl.col("pair_id").first().over("exact_key"),
        first_place=pl.format("{} row {}", "source_file", "source_row").first().over("exact_key"),
    )
    conflicts = judged.filter("in_conflict").with_columns(
        code=pl.lit("LABEL_CONFLICT"),
        kept_pair_id=pl.lit(None, dtype=pl.String),
        detail=pl.lit("the same two answers to this prompt stand with opposite labels elsewhere"),
    )
    duplicates = judged.filter(~pl.col("in_conflict") & ~pl.col("is_first")).with_columns(
        code=pl.lit("DUP_EXACT"),
        kept_pair_id=pl.col("first_pair_id"),
        detail=pl.format("same prompt and answers as {}", "first_place"),
    )
    columns = [column.name for column in DROPS.columns]
    drops = pl.concat([conflicts.select(columns), duplicates.select(columns)])
    return drops.sort(["prompt_id", "pair_id", "source_file", "source_row"])
