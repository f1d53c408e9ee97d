"""Which of several pairs stays: the order of survivors.

By priority of the source, then the larger absolute margin (unknown last), then pair_id, then input
file and row: never by order of arrival.
"""

from collections.abc import Sequence

import polars as pl


def rank_sources(source_priority: Sequence[str]) -> pl.Expr:
    """Give each row's place in the list of sources; those not in it come after, equal."""
    ranks = {source: rank for rank, source in enumerate(source_priority)}
    return pl.col("source").replace_strict(ranks, default=len(ranks), return_dtype=pl.Int64)


def order_survivors(rows: pl.DataFrame, source_priority: Sequence[str]) -> pl.DataFrame:
    """Sort rows so that of any two the better one comes first; adds `size`, the |margin|."""
    return (
        rows.with_columns(rank=rank_sources(source_priority), size=pl.col("margin").abs())
        .sort(
            ["rank", "size", "pair_id", "source_file", "source_row", "copy"],
            descending=[False, True, False, False, False, False],
            nulls_last=True,
        )
        .drop("rank")
    )
