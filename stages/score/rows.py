"""Rows of the scores table, and the range of prompt_ids that a file covers."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.manifest import Counts, ShardRecord
from schemas.rows import SCORE
from stages.scorers.pairs import SIDES, SequenceLogps, join_side, reject_faults
from stages.store.shards import ShardWriter

OUTLIER_NATS = -15.0
"""Mean nats a token below which an answer counts as an outlier: mostly the template or the
tokenizer belongs to another model."""


def make_rows(encoded: pa.Table, logps: SequenceLogps) -> pa.Table:
    """Make the rows of the scores table from encoded rows without a fault."""
    columns = {name: encoded[name] for name in SCORE.arrow.names if name in encoded.column_names}
    for side in SIDES:
        values = join_side(encoded, side, logps)
        columns[f"ref_{side}_token_logps"] = values.token_logps
        columns[f"ref_{side}_logp"] = pa.array(values.logps)
    return pa.table({name: columns[name] for name in SCORE.arrow.names})


def count_outliers(rows: pa.Table) -> dict[str, int]:
    """Count the pairs with an answer whose mean log-prob is below OUTLIER_NATS."""
    is_outlier = pa.array(np.zeros(rows.num_rows, np.bool_))
    for side in SIDES:
        mean = pc.divide(rows[f"ref_{side}_logp"], rows[f"num_{side}_tokens"])
        is_outlier = pc.or_(is_outlier, pc.less(mean, OUTLIER_NATS))
    num_outliers = pc.sum(is_outlier).as_py() or 0
    return {"REF_OUTLIER": num_outliers} if num_outliers else {}


def commit_scores(
    shard: ShardWriter, encoded: pa.Table, logps: SequenceLogps, *, more: Mapping[str, int]
) -> ShardRecord:
    """Write the scored and the rejected rows of a shard, and commit it."""
    kept, rejected = reject_faults(encoded, logps, whose="REF")
    rows = make_rows(kept, logps)
    shard.write("data", rows)
    shard.write_rows("rejected", rejected)
    return shard.commit(
        Counts(
            num_in=encoded.num_rows,
            num_out=kept.num_rows,
            reasons=dict(Counter(row["code"] for row in rejected)),
            warnings=count_outliers(rows),
            more={"num_sequences": 2 * encoded.num_rows, **more},
        ),
        prompt_range=find_range(kept),
    )


PromptRange = tuple[str, str]
"""The lowest and the highest prompt_id."""


def find_range(rows: pa.Table) -> PromptRange | None:
    """Find the lowest and the highest prompt_id; None without rows."""
    if rows.num_rows == 0:
        return None
    ends = pc.min_max(rows["prompt_id"]).as_py()
    return ends["min"], ends["max"]


def overlap(one: PromptRange, other: PromptRange | None) -> bool:
    """Whether two ranges may share an id; an unknown range (None) overlaps every other."""
    return other is None or (one[0] <= other[1] and other[0] <= one[1])


def range_of_group(metadata: pq.FileMetaData, group: int) -> PromptRange | None:
    """Read the prompt range of a row group from the footer; None without statistics."""
    columns = metadata.row_group(group)
    for place in range(columns.num_columns):
        column = columns.column(place)
        if column.path_in_schema == "prompt_id":
            statistics = column.statistics
            if statistics is None or not statistics.has_min_max:
                return None
            return statistics.min, statistics.max
    return None
