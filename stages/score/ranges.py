"""Which prompts do rows, files and row groups hold, so that what holds none of them is not read?"""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PromptRange = tuple[str, str]
"""The lowest and the highest prompt_id."""


def find_range(rows: pa.Table) -> PromptRange | None:
    """Give the lowest and the highest prompt_id; None where there are no rows."""
    if rows.num_rows == 0:
        return None
    ends = pc.min_max(rows["prompt_id"]).as_py()
    return ends["min"], ends["max"]


def overlap(one: PromptRange, other: PromptRange | None) -> bool:
    """Say whether two ranges share an id; a range that is not known may be any."""
    return other is None or (one[0] <= other[1] and other[0] <= one[1])


def range_of_group(metadata: pq.FileMetaData, group: int) -> PromptRange | None:
    """Read from the footer which prompts a row group holds; None where it does not say."""
    columns = metadata.row_group(group)
    for place in range(columns.num_columns):
        column = columns.column(place)
        if column.path_in_schema == "prompt_id":
            statistics = column.statistics
            if statistics is None or not statistics.has_min_max:
                return None
            return statistics.min, statistics.max
    return None
