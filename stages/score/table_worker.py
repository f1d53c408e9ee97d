"""Worker of the score stage that takes values from a table and recomputes a sample."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.errors import DataError
from schemas.manifest import Counts, ShardRecord
from schemas.rows import REJECTED, SCORE
from stages.models.fetch import fetch_model
from stages.models.resolve import ModelPin
from stages.score.checks import (
    WorkerCheck,
    compare_sample,
    list_checks,
    recompute_sample,
    summarize_checks,
    write_check,
)
from stages.score.config import ScoreConfig
from stages.score.rows import commit_scores
from stages.score.summary import summarize_shards
from stages.score.table import TablePin, TableReader, check_differences
from stages.score.worker import leave_out
from stages.scorers.opening import open_plain
from stages.scorers.pairs import (
    ENCODED_COLUMNS,
    Fault,
    SequenceGroup,
    SequenceLogps,
    list_groups,
)
from stages.scorers.reference import identify_reference
from stages.stage import AlignedShards, ShardWorker, StageContext, StageResult, align_shards
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file

if TYPE_CHECKING:
    from stages.scorers.plain import PlainModel

IMPORTED = "imported:"
"""Prefix of `engine` in the identity of imported values; the digest of the table follows."""


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """Picklable settings of a worker that reads values from a table."""

    encoded: Folder
    out: StageDir
    model: ModelPin
    num_threads: int
    """Number of compute threads on a CPU, with which a sample is recomputed."""
    reader: TableReader

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardImporter(job=self)


@dataclass(kw_only=True)
class ShardImporter:
    """Looks up the values of each shard in a table, and recomputes a sample of them."""

    job: ImportJob
    _plain: "PlainModel | None" = None

    def __call__(self, task: AlignedShards) -> ShardRecord:
        job = self.job
        encoded = read_file(
            job.encoded, task.records["encode"].files["data"], columns=ENCODED_COLUMNS
        )
        logps = job.reader.find(encoded)
        faults = {name for name, values in logps.items() if isinstance(values, Fault)}
        groups = list(leave_out(list_groups(encoded), faults))
        with job.out.write_shard(task.index, {"data": SCORE, "rejected": REJECTED}) as shard:
            if groups:
                self._check(task.index, groups, logps)
            return commit_scores(
                shard,
                encoded,
                logps,
                more={
                    "num_sequences_imported": len(logps) - len(faults),
                    "num_sequences_scored": 0,
                    "num_sequences_reused": 0,
                },
            )

    def _check(self, index: int, groups: Sequence[SequenceGroup], logps: SequenceLogps) -> None:
        """Compare a sample with plain transformers in float32, and record the differences.

        Raises:
            DataError: the differences are larger than rounding explains.
        """
        job = self.job
        if self._plain is None:
            self._plain = open_plain(fetch_model(job.model), num_threads=job.num_threads)
        sample = recompute_sample(self._plain, groups)
        expected = sample.logps
        differences = [
            values - expected[name]
            for name in expected
            if not isinstance(values := logps[name], Fault)
        ]
        check_differences(differences, job.reader.dtype, job.reader.table.spec)
        check = WorkerCheck(recomputed=compare_sample(expected, logps))
        write_check(job.out.folder, index, check)


def import_table(
    config: ScoreConfig, ctx: StageContext, model: ModelPin, max_length: int
) -> StageResult:
    """Take every value from a table; compute none and reuse none.

    Raises:
        DataError: the values belong to another model, or none belongs to this data.
    """
    table = ctx.pins["table"]
    assert isinstance(table, TablePin)
    assert config.dtype != "auto"
    reference = identify_reference(
        model,
        engine=f"{IMPORTED}{table.identity()}",
        dtype=config.dtype,
        max_length=max_length,
    )
    footer = {**ctx.out.footer, "dpo.reference": reference.fingerprint}
    job = ImportJob(
        encoded=ctx.inputs["encode"].folder,
        out=dataclasses.replace(ctx.out, footer=footer),
        model=model,
        num_threads=max(1, int(ctx.resources.num_cpus)),
        reader=TableReader(table=table, dtype=config.dtype),
    )
    shards = ctx.map_shards(job, align_shards(ctx.inputs, ["encode"]))
    counts = Counts.total(shard.counts for shard in shards)
    if counts.num_in and not counts.num_out:
        raise DataError(
            f"{table.spec} holds values for none of the {counts.num_in:,} pairs "
            f"({describe_reasons(counts)}). Its ids must be those of this recipe's encode stage: "
            "the same data, tokenizer, template and limits."
        )
    checks = list_checks(ctx.out.folder)
    return StageResult(
        shards=shards,
        files=checks,
        summary={
            "reference": reference.fingerprint,
            **summarize_shards(shards, num_workers=ctx.resources.num_workers),
            "reused_from": {},
            "refused_in": {},
            "reused_versions": [],
            "recomputed": summarize_checks(ctx.out.folder, checks),
        },
    )


def describe_reasons(counts: Counts) -> str:
    return ", ".join(f"{code} {number:,}" for code, number in counts.reasons.items())
