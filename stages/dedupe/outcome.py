"""What does a range say of the rows that go, and of those that stay with a doubt?"""

import polars as pl
import pyarrow as pa

from schemas.rows import REJECTED
from stages.dedupe.codes import DUP_EXACT, PROMPT_CAP
from stages.dedupe.keys import PLACE, ROW_ORDER


def describe_rejected(exact: pl.DataFrame, near: pl.DataFrame, capped: pl.DataFrame) -> pa.Table:
    """Give the columns of REJECTED for all rows that go, in the order of the range."""
    is_copy = pl.col("code") == DUP_EXACT
    no_name, no_number = pl.lit(None, dtype=pl.String), pl.lit(None, dtype=pl.Float64)
    columns = [*ROW_ORDER, "code", "detail", "kept_pair_id", "similarity"]
    if "detail" not in capped.columns:
        capped = capped.with_columns(detail=pl.lit(""))
    parts = [
        exact.with_columns(similarity=pl.when(is_copy).then(1.0)),
        near,
        capped.with_columns(code=pl.lit(PROMPT_CAP), kept_pair_id=no_name, similarity=no_number),
    ]
    rows = pl.concat([part.select(columns) for part in parts]).sort(ROW_ORDER)
    rows = rows.with_columns(
        codes=pl.concat_list("code"),
        field=no_name,
        raw=pl.lit(None, dtype=pl.Binary),
        raw_sha256=no_name,
    )
    return rows.select(REJECTED.arrow.names).to_arrow().cast(REJECTED.arrow)


def list_warnings(
    left: pl.DataFrame, judged: pl.DataFrame, circling: pl.DataFrame
) -> dict[int, list[str]]:
    """Give the codes that kept rows are to carry, by their place among the kept."""
    kept = left.select(*PLACE, "position").with_row_index("place")
    near = kept.join(judged.filter(~pl.col("is_drop")), on="position")
    found = pl.concat(
        [
            kept.join(circling.select(*PLACE, "code"), on=list(PLACE)).select("place", "code"),
            near.select("place", "code"),
        ]
    )
    codes: dict[int, list[str]] = {}
    for place, code in found.sort("place", "code").iter_rows():
        codes.setdefault(place, []).append(code)
    return codes


def add_warnings(kept: pa.Table, warnings: dict[int, list[str]]) -> pa.Table:
    """Write the codes into the rows that they belong to."""
    if not warnings:
        return kept
    column = kept["warnings"].to_pylist()
    for place, codes in warnings.items():
        column[place] = [*column[place], *codes]
    index = kept.column_names.index("warnings")
    return kept.set_column(index, "warnings", pa.array(column, kept["warnings"].type))
