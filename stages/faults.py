"""Limit on the share of rows that a stage may reject for faults."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import pyarrow.compute as pc

from schemas.errors import DataError
from schemas.manifest import Counts, ShardRecord
from stages.store.shards import StageDir, read_file


def refuse_faulty_rows(
    shards: Sequence[ShardRecord],
    out: StageDir,
    *,
    max_reject_fraction: float,
    describe_code: Callable[[str], str],
    advise: Callable[[Counter[str], float], str],
    not_faults: Collection[str] = (),
) -> None:
    """Fail a stage if more rows than allowed have faults; show the most frequent ones.

    Args:
        shards: all of the stage's shards.
        out: where they lie.
        max_reject_fraction: largest share of rows with faults, 0 to 1.
        describe_code: returns the meaning of a code, in one sentence.
        advise: says how to go on, given the faults and the fraction that would allow them.
        not_faults: codes that describe the data rather than a fault in it.
    Raises:
        DataError: there are more.
    """
    total = Counts.total(shard.counts for shard in shards)
    faults = Counter({c: n for c, n in total.reasons.items() if c not in not_faults})
    if faults.total() <= max_reject_fraction * total.num_in:
        return
    lines = [
        f"  {code}: {count:,} row{'s' if count > 1 else ''}. {describe_code(code)}\n"
        f"    {_find_example(shards, code, out)}"
        for code, count in faults.most_common(5)
    ]
    share = faults.total() / total.num_in
    raise DataError(
        f"{faults.total():,} of {total.num_in:,} rows have faults "
        f"({share:.1%}; allowed are {max_reject_fraction:.1%}). "
        "The most frequent:\n" + "\n".join(lines) + "\n" + advise(faults, _round_up(share))
    )


def _round_up(share: float) -> float:
    """Return the smallest whole percentage that is not below a share."""
    return math.ceil(round(share * 100, 6)) / 100


def _find_example(shards: Sequence[ShardRecord], code: str, out: StageDir) -> str:
    shard = next(shard for shard in shards if code in shard.counts.reasons)
    columns = ["code", "field", "detail", "source_file", "source_row"]
    table = read_file(out.folder, shard.files["rejected"], columns=columns)
    row = table.filter(pc.equal(table["code"], code)).slice(0, 1).to_pylist()[0]
    place = f"{row['source_file']} row {row['source_row']}"
    return f"{place}{', ' + row['field'] if row['field'] else ''}: {row['detail']}"
