"""Which tables does the page read, and how are those that belong together joined?"""

import polars as pl

from pipeline.runs import Run
from schemas.manifest import ShardRecord
from stages.store.shards import StageOutput

SPLITS = ("train", "eval")


def has_stages(run: Run, *stages: str) -> bool:
    """Say whether all of these stages are complete in a run."""
    return all(stage in run.outputs for stage in stages)


def has_table(run: Run, stage: str, table: str) -> bool:
    """Say whether a stage wrote a table beside its shards."""
    return stage in run.outputs and any(
        file.name == f"{table}.parquet" for file in run.manifest(stage).files
    )


def scan_scored(run: Run) -> pl.LazyFrame:
    """Join the scores with what encode knows of the same pairs: source, split, prompt tokens.

    Shards are joined one by one, because they are 1:1: so memory is a shard's, not the table's.
    """
    encoded, scores = run.outputs["encode"], run.outputs["score"]
    encoded_shards = {shard.index: shard for shard in encoded.manifest.shards}
    parts = [
        _scan_shard(scores, shard)
        .select(
            "pair_id",
            "ref_chosen_logp",
            "ref_rejected_logp",
            "num_chosen_tokens",
            "num_rejected_tokens",
        )
        .join(
            _scan_shard(encoded, encoded_shards[shard.index]).select("pair_id", "source", "split"),
            on="pair_id",
        )
        for shard in scores.manifest.shards
    ]
    return pl.concat(parts)


def count_by(frame: pl.LazyFrame, column: str) -> dict[str, int]:
    """Count rows by the values of a text column; the most frequent come first."""
    counts = frame.group_by(column).len().collect(engine="streaming")
    rows = counts.sort(["len", column], descending=[True, False]).rows()
    return {str(value): int(amount) for value, amount in rows}


def _scan_shard(output: StageOutput, shard: ShardRecord) -> pl.LazyFrame:
    return pl.scan_parquet(f"{output.folder.uri}/{shard.files['data'].name}")
