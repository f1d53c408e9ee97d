"""Exact duplicates, label conflicts, equal prompts in both splits, and preference cycles.

Rows of different shards are compared by keys: a few hundred bytes of digests for each row, whatever
the length of its text. Equal keys mean text that reads the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import polars as pl
import pyarrow as pa

from schemas.rows import Column, RowSchema
from stages.dedupe.config import (
    DUP_EXACT,
    LABEL_CONFLICT,
    PREFERENCE_CYCLE,
    SPLIT_LEAK,
    ConflictPolicy,
)
from stages.dedupe.messages import Messages, cut_batches, digest_texts, spell_field
from stages.dedupe.partitions import ROW_ORDER

_PLACE_COLUMNS = (
    Column("prompt_id", pa.string(), "Identity of the row's prompt.", nullable=False),
    Column("pair_id", pa.string(), "Identity of the pair.", nullable=False),
    Column("source_file", pa.string(), "Input file.", nullable=False),
    Column("source_row", pa.int64(), "Row in it.", nullable=False),
    Column("copy", pa.int64(), "Numbers equal pairs of one input row, from 0.", nullable=False),
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
"""One row for each row of the pairs table; equal keys mean text that reads the same."""

DROPS = RowSchema(
    "dedupe-drops",
    2,
    (
        *_PLACE_COLUMNS,
        Column("code", pa.string(), "Why it goes.", nullable=False),
        Column("kept_pair_id", pa.string(), "The pair that is kept instead."),
        Column("detail", pa.string(), "The row that it equals.", nullable=False),
    ),
)

WARNINGS = RowSchema(
    "dedupe-warnings",
    1,
    (*_PLACE_COLUMNS, Column("code", pa.string(), "What is doubtful.", nullable=False)),
)

_PAIR = ("prompt_key", "chosen_key", "rejected_key")

_ANSWERS = ("prompt_key", "low_key", "high_key")
"""A pair without its label."""


def compute_keys(rows: pa.Table) -> Iterator[pa.Table]:
    """Compute the keys of rows of the pairs table, as columns of KEYS."""
    for batch in cut_batches(rows):
        carried = {name: batch[name] for name in KEYS.arrow.names if name in batch.column_names}
        keys = pa.table({**_digest_rows(batch), **carried})
        yield keys.select(KEYS.arrow.names).cast(KEYS.arrow)


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
        prompt_keys.append(
            digest_texts(texts if offered is None else [*texts, spell_field("tools", offered)])
        )
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


def rank_sources(source_priority: Sequence[str]) -> pl.Expr:
    """Return each row's index in the list of sources; sources that are not listed come last."""
    ranks = {source: rank for rank, source in enumerate(source_priority)}
    return pl.col("source").replace_strict(ranks, default=len(ranks), return_dtype=pl.Int64)


def sort_best_first(rows: pl.DataFrame, source_priority: Sequence[str]) -> pl.DataFrame:
    """Sort rows by the order in which they survive, and add `size`, the |margin|.

    The order is by the priority of the source, then the larger absolute margin (unknown last), then
    pair_id, then input file and row; it never depends on the order of arrival.
    """
    return (
        rows.with_columns(rank=rank_sources(source_priority), size=pl.col("margin").abs())
        .sort(
            ["rank", "size", "pair_id", "source_file", "source_row", "copy"],
            descending=[False, True, False, False, False, False],
            nulls_last=True,
        )
        .drop("rank")
    )


def decide_exact(
    keys: pl.DataFrame,
    *,
    source_priority: Sequence[str],
    conflict_policy: ConflictPolicy,
    seeks_leaks: bool,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Choose the rows to drop: losers of label conflicts, leaks, and all but one of equal rows.

    The steps run in this order: a conflict counts the rows of both splits; among the remaining rows
    a training row is dropped if its prompt is held out; among the rest the first of equal rows is
    kept.

    Args:
        keys: columns of KEYS; all rows of every talk_key in it.
        source_priority: names of sources, the best first.
        conflict_policy: which direction of a conflict is kept.
        seeks_leaks: whether to drop training rows whose prompt is held out.
    Returns:
        Columns of DROPS, and of WARNINGS (pairs on a preference cycle), in order of prompt_id.
    """
    ordered = sort_best_first(keys, source_priority).with_columns(
        low_key=pl.min_horizontal("chosen_key", "rejected_key"),
        high_key=pl.max_horizontal("chosen_key", "rejected_key"),
        is_forward=pl.col("chosen_key") <= pl.col("rejected_key"),
    )
    judged = (
        ordered.with_columns(is_losing=_find_losers(conflict_policy))
        .with_columns(is_leaking=_find_leaks() if seeks_leaks else pl.lit(False))
        .with_columns(is_left=~pl.col("is_losing") & ~pl.col("is_leaking"))
    )
    conflicts = judged.filter("is_losing")
    winners = judged.filter("is_left").group_by(_ANSWERS).agg(kept_pair_id=pl.first("pair_id"))
    held_out = judged.filter((pl.col("split") == "eval") & ~pl.col("is_losing"))
    held_out = held_out.group_by("talk_key").agg(kept_pair_id=pl.first("pair_id"))
    left = judged.filter("is_left").with_columns(
        kept_pair_id=pl.col("pair_id").first().over(_PAIR),
        is_first=pl.int_range(pl.len()).over(_PAIR) == 0,
        first_place=pl.format("{} row {}", "source_file", "source_row").first().over(_PAIR),
    )
    drops = [
        _describe(
            conflicts.join(winners, on=_ANSWERS, how="left"),
            LABEL_CONFLICT,
            pl.lit("the same two answers to this prompt stand with opposite labels elsewhere"),
        ),
        _describe(
            judged.filter("is_leaking").join(held_out, on="talk_key"),
            SPLIT_LEAK,
            pl.lit("the same prompt is held out"),
        ),
        _describe(
            left.filter(~pl.col("is_first")),
            DUP_EXACT,
            pl.format("same prompt and answers as {}", "first_place"),
        ),
    ]
    circling = _find_cycles(left.filter("is_first"))
    return pl.concat(drops).sort(ROW_ORDER), circling.sort(ROW_ORDER)


def _find_losers(policy: ConflictPolicy) -> pl.Expr:
    """Select the rows that lose a conflict; rows without a conflict never do."""
    forward = pl.col("is_forward")
    num_forward, num_rows = forward.sum().over(_ANSWERS), pl.len().over(_ANSWERS)
    in_conflict = (num_forward > 0) & (num_forward < num_rows)
    if policy == "drop_all":
        return in_conflict
    if policy == "majority":
        strength = num_forward.cast(pl.Int64), (num_rows - num_forward).cast(pl.Int64)
    else:
        strength = (
            pl.col("size").filter(forward).max().over(_ANSWERS),
            pl.col("size").filter(~forward).max().over(_ANSWERS),
        )
    wins = pl.when(forward).then(strength[0] > strength[1]).otherwise(strength[1] > strength[0])
    return in_conflict & ~wins.fill_null(False)


def _find_leaks() -> pl.Expr:
    is_held_out = ((pl.col("split") == "eval") & ~pl.col("is_losing")).any().over("talk_key")
    return is_held_out & (pl.col("split") != "eval") & ~pl.col("is_losing")


def _describe(rows: pl.DataFrame, code: str, detail: pl.Expr) -> pl.DataFrame:
    described = rows.with_columns(code=pl.lit(code), detail=detail)
    return described.select(column.name for column in DROPS.columns)


def _find_cycles(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs on a cycle of preferences among the answers to one prompt."""
    suspects = pairs
    while True:
        losers = suspects.select("prompt_key", chosen_key="rejected_key")
        winners = suspects.select("prompt_key", rejected_key="chosen_key")
        fewer = suspects.join(losers, on=["prompt_key", "chosen_key"], how="semi")
        fewer = fewer.join(winners, on=["prompt_key", "rejected_key"], how="semi")
        if fewer.height == suspects.height:
            break
        suspects = fewer
    circling: list[bool] = []
    suspects = suspects.sort(_PAIR)
    for _, group in suspects.group_by("prompt_key", maintain_order=True):
        edges = list(zip(group["chosen_key"], group["rejected_key"], strict=True))
        component = find_components(edges)
        circling += [component[better] == component[worse] for better, worse in edges]
    found = suspects.filter(pl.Series(circling, dtype=pl.Boolean))
    found = found.with_columns(code=pl.lit(PREFERENCE_CYCLE))
    return found.select(column.name for column in WARNINGS.columns)


def find_components(edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Number the strongly connected components of a graph; an edge inside one lies on a cycle.

    Tarjan's algorithm (1972), with an explicit stack instead of recursion.
    """
    following: dict[str, list[str]] = {}
    for better, worse in edges:
        following.setdefault(better, []).append(worse)
        following.setdefault(worse, [])
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    component: dict[str, int] = {}
    waiting: list[str] = []
    path: list[tuple[str, Iterator[str]]] = []

    def enter(node: str) -> None:
        index[node] = lowest[node] = len(index)
        waiting.append(node)
        path.append((node, iter(following[node])))

    def leave(node: str) -> None:
        path.pop()
        if path:
            before, _ = path[-1]
            lowest[before] = min(lowest[before], lowest[node])
        while lowest[node] == index[node] and node not in component:
            component[waiting.pop()] = index[node]

    for root in following:
        if root not in index:
            enter(root)
        while path:
            node, ahead = path[-1]
            nearest = next(ahead, None)
            if nearest is None:
                leave(node)
            elif nearest not in index:
                enter(nearest)
            elif nearest not in component:
                lowest[node] = min(lowest[node], index[nearest])
    return component
