"""Joins a run's pairs into one LazyFrame: text, tokens, reference and policy values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
from polars.io.plugins import register_io_source

from schemas.errors import ConfigError
from stages.store.shards import StageOutput


def _keep(*names: str) -> dict[str, pl.Expr]:
    return {name: pl.col(name) for name in names}


_COLUMNS: Mapping[str, Mapping[str, pl.Expr]] = {
    "dedupe": {
        **_keep("pair_id", "prompt_id", "split", "source", "prompt", "chosen", "rejected"),
        **_keep("tools", "score_chosen", "score_rejected"),
        "score_margin": pl.col("margin"),
        **_keep("weight", "source_file", "source_row", "source_id", "warnings", "extra"),
    },
    "encode": {
        **_keep("pair_id", "prompt_id", "split", "source"),
        **_keep("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens", "truncated"),
        **_keep("prompt_ids", "chosen_ids", "rejected_ids"),
        **_keep("chosen_loss_mask", "rejected_loss_mask"),
        **_keep("chosen_sequence_id", "rejected_sequence_id"),
    },
    "score": {
        **_keep("pair_id", "ref_chosen_logp", "ref_rejected_logp"),
        "ref_margin": pl.col("ref_chosen_logp") - pl.col("ref_rejected_logp"),
        **_keep("ref_chosen_token_logps", "ref_rejected_token_logps"),
    },
    "evaluate": {
        **_keep("pair_id", "policy_chosen_logp", "policy_rejected_logp"),
        "policy_margin": pl.col("policy_chosen_logp") - pl.col("policy_rejected_logp"),
        **_keep("reward_chosen", "reward_rejected"),
        "reward_margin": pl.col("margin"),
        **_keep("correct", "displaced"),
    },
}
"""Columns by stage, in order. A column of several stages is read from the first."""


@dataclass(frozen=True, kw_only=True)
class _PairReader:
    """Reads pairs shard by shard, joining only the stages that have wanted columns."""

    columns: Mapping[str, tuple[str, pl.Expr]]
    """By column of the frame: its stage, and its expression over that stage's columns."""
    shards: Mapping[str, Mapping[int, str]]
    """Parquet file by stage, in order, and by shard index."""

    @property
    def indexes(self) -> list[int]:
        return list(next(iter(self.shards.values())))

    def join_shard(self, index: int, wanted: Sequence[str]) -> pl.LazyFrame:
        joined: pl.LazyFrame | None = None
        for stage, files in self.shards.items():
            own = {"pair_id": pl.col("pair_id")}
            for name in wanted:
                owner, expression = self.columns[name]
                if owner == stage:
                    own[name] = expression
            if joined is None:
                joined = pl.scan_parquet(files[index]).select(**own)
            elif len(own) > 1:
                rows = pl.scan_parquet(files[index]).select(**own)
                joined = joined.join(rows, on="pair_id", how="left", maintain_order="left")
        assert joined is not None
        return joined.select(wanted)

    def schema(self) -> pl.Schema:
        return self.join_shard(self.indexes[0], list(self.columns)).collect_schema()

    def read(
        self,
        wanted: list[str] | None,
        predicate: pl.Expr | None,
        num_rows: int | None,
        batch_rows: int | None,
    ) -> Iterator[pl.DataFrame]:
        """Yield one joined shard after the other; polars pushes columns, filter and limit down."""
        for index in self.indexes:
            rows = self.join_shard(index, list(self.columns) if wanted is None else wanted)
            if predicate is not None:
                rows = rows.filter(predicate)
            if num_rows is not None:
                rows = rows.head(num_rows)
            found = rows.collect(engine="streaming")
            yield found
            if num_rows is not None:
                num_rows -= found.height
                if num_rows <= 0:
                    return


def scan_pairs(outputs: Mapping[str, StageOutput]) -> pl.LazyFrame:
    """Scan the pairs of the complete stages; `pipeline.runs.Run.pairs` lists the columns.

    dedupe, encode, score and evaluate have the same shards, so they are joined shard by shard. A
    custom reader does so because polars keeps one side of every join in memory: a join of whole
    tables, or a concatenation of one join per shard, needs memory in proportion to the data.

    Raises:
        ConfigError: neither validate, dedupe nor encode is complete.
    """
    by_stage = _COLUMNS
    if not outputs.keys() & {"dedupe", "encode"}:
        # validate's shards differ from those of later stages, which do not exist yet.
        by_stage = {"validate": _COLUMNS["dedupe"]}
    stages = [stage for stage in by_stage if stage in outputs]
    if not stages:
        raise ConfigError("There are no pairs: neither validate, dedupe nor encode is complete.")
    columns: dict[str, tuple[str, pl.Expr]] = {}
    for stage in stages:
        for name, expression in by_stage[stage].items():
            columns.setdefault(name, (stage, expression))
    reader = _PairReader(
        columns=columns, shards={stage: _list_shards(outputs[stage]) for stage in stages}
    )
    return register_io_source(reader.read, schema=reader.schema, is_pure=True, explain_name="pairs")


def _list_shards(output: StageOutput) -> dict[int, str]:
    return {
        shard.index: f"{output.folder.uri}/{shard.files['data'].name}"
        for shard in output.manifest.shards
    }
