"""How likely does the frozen reference model find every answer, token by token?

What an earlier score stage of this store has computed for the same reference and the same tokens is
joined in (stages/score/reuse.py says how it is found); the rest is scored.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from schemas.config import config_class
from schemas.errors import DataError
from schemas.fingerprint import ReferenceIdentity
from schemas.manifest import Counts, Manifest, ShardRecord
from schemas.rows import REJECTED, SCORE
from stages.cost import (
    FLOPS_PER_CORE,
    Measured,
    TokenCount,
    Workload,
    measure_shards,
    read_input_lengths,
    score_flops,
    size_named_model,
    size_pinned_model,
)
from stages.models.fetch import fetch_model
from stages.models.resolve import (
    AdapterPin,
    ModelPin,
    join_adapter,
    pin_adapter,
    pin_model,
)
from stages.policy.groups import Group
from stages.score.checks import (
    FLOAT32_TOLERANCE_NATS,
    SharingCheck,
    WorkerCheck,
    choose_sample,
    choose_siblings,
    compare_sample,
    compare_sharing,
    list_checks,
    summarize_checks,
    summarize_sharing,
    write_check,
)
from stages.score.imported import TablePin, TableReader, check_differences, pin_table
from stages.score.progress import PartDone, forget_part, report_part, shown_parts
from stages.score.ranges import find_range
from stages.score.reuse import (
    REFERENCES,
    EarlierScore,
    Found,
    ScoreEntry,
    ScoreReader,
    find_earlier_scores,
    merge_versions,
    write_entry,
)
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import (
    ENCODED_COLUMNS,
    SIDES,
    Fault,
    SequenceGroup,
    SequenceLogps,
    join_side,
    list_groups,
    reject_faults,
    score_sequences,
)
from stages.scorers.protocol import (
    Backend,
    FloatArray,
    Scorer,
    ScorerSettings,
    ScoreStatistics,
    ScoringExecution,
    plan_scorer,
)
from stages.scorers.reference import identify_reference, pick_versions, require_positions
from stages.stage import (
    AlignedShards,
    Cost,
    Display,
    EarlierOutput,
    Pin,
    RecipeView,
    Reuse,
    ShardWorker,
    Stage,
    StageContext,
    StageResult,
    StageView,
    align_shards,
    count_aligned_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import ShardWriter, StageDir, StageOutput, read_file

logger = logging.getLogger(__name__)

REUSED_FROM = "num_sequences_reused from "
REFUSED_IN = "num_files_refused in "
"""Beginnings of the counts by earlier score stage."""

IMPORTED = "imported:"
"""Beginning of the engine of values that were not computed here."""

NUM_PROMPTS_AT_ONCE = 256
"""Prompts that a scorer is given in one call: a minute of work on a CPU, and enough to keep a GPU
busy. Between two calls the worker says how far it is."""
OUTLIER_NATS = -15.0
"""Mean of an answer's tokens; below it, mostly template or tokenizer are another model's."""


REASONS = {
    "REF_LENGTH": "An answer got another number of values than it has tokens, also when alone.",
    "REF_NONFINITE": "A log-probability is NaN or infinite, also when scored alone.",
    "REF_POSITIVE": "A log-probability is above 0, also when scored alone.",
    "REF_MISSING": "import: the table holds no values of an answer.",
}
"""What rejects a pair, by code."""

WARNINGS = {
    "REF_OUTLIER": "The reference gives an answer less than -15 nats a token in the mean: mostly "
    "the template or the tokenizer is another model's.",
}
"""What is counted of pairs that are kept, by code."""


@config_class
class ScoreConfig:
    """Which model is the reference, and how it computes."""

    model: str = "sample:smollm2-135m-instruct"
    """The reference: a Hugging Face id with an optional @revision, a folder, or sample:NAME."""
    adapter: str | None = None
    """A LoRA adapter that is merged into the model first, such as one of supervised fine-tuning: a
    Hugging Face id or a folder. The policy starts with it merged, too."""
    backend: Backend | Literal["import"] = "vllm"
    """The engine: vllm, or transformers (the code that trains); import = the values of `table`."""
    table: str | None = None
    """import: a Parquet file or folder with the values of every completion token."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto = bfloat16 on GPUs, float32 on CPUs. import: what the values
    of the table were computed in, which must be named."""

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        if (self.backend == "import") != (self.table is not None):
            raise ValueError("backend: import and table go together")
        if self.backend == "import" and self.dtype == "auto":
            raise ValueError("backend: import needs the dtype that its values were computed in")
        return self


@config_class
class ScoreExecution(ScoringExecution):
    """How scoring the reference is spread over machines, and where else values may lie."""

    reuse_from: list[str] = Field(default_factory=list)
    """More stores, paths or URIs, whose values of the same reference are joined in."""


def make_rows(encoded: pa.Table, logps: SequenceLogps) -> pa.Table:
    """Give the rows of the scores table for encoded rows without a fault."""
    columns = {name: encoded[name] for name in SCORE.arrow.names if name in encoded.column_names}
    for side in SIDES:
        values = join_side(encoded, side, logps)
        columns[f"ref_{side}_token_logps"] = values.token_logps
        columns[f"ref_{side}_logp"] = pa.array(values.logps)
    return pa.table({name: columns[name] for name in SCORE.arrow.names})


def leave_out(groups: Iterable[SequenceGroup], found: Container[str]) -> Iterator[SequenceGroup]:
    """Give what is left of groups when sequences are found already."""
    for sequences in groups:
        left = sequences.without(found)
        if left is not None:
            yield left


def single(sequence_id: str, group: Group) -> SequenceGroup:
    return SequenceGroup(group=group, sequence_ids=(sequence_id,))


def count_found(found: Found) -> dict[str, int]:
    """Count what was reused, in all and by where it came from, and what could not be."""
    return {
        "num_sequences_reused": len(found.logps),
        **{f"{REUSED_FROM}{name}": number for name, number in found.num_by_score.items()},
        **{f"{REFUSED_IN}{name}": number for name, number in found.num_refused.items()},
    }


def count_outliers(rows: pa.Table) -> dict[str, int]:
    """Count the pairs of a scores table whose answers the reference finds next to impossible."""
    is_outlier = pa.array(np.zeros(rows.num_rows, np.bool_))
    for side in SIDES:
        mean = pc.divide(rows[f"ref_{side}_logp"], rows[f"num_{side}_tokens"])
        is_outlier = pc.or_(is_outlier, pc.less(mean, OUTLIER_NATS))
    num_outliers = pc.sum(is_outlier).as_py() or 0
    return {"REF_OUTLIER": num_outliers} if num_outliers else {}


def commit_scores(
    shard: ShardWriter, encoded: pa.Table, logps: SequenceLogps, *, more: Mapping[str, int]
) -> ShardRecord:
    """Write the rows of a shard, those that were scored and those with a fault, and commit it."""
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


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """What a worker needs to know; calling it in the worker's process makes the worker."""

    encoded: Folder
    out: StageDir
    model: ModelPin
    settings: ScorerSettings
    reference: str
    """Its fingerprint."""
    earlier: Sequence[EarlierScore]
    """Where to look for values before anything is computed."""

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardScorer(
            job=self, reader=ScoreReader(scores=self.earlier, reference=self.reference)
        )


@dataclass(kw_only=True)
class ShardScorer:
    """Scores shard after shard with one engine. No value depends on the shards before it.

    The model is fetched for the first sequence that no earlier score holds.
    """

    job: ScoreJob
    reader: ScoreReader
    _model_path: str | None = None
    _scorer: Scorer | None = None
    _is_checked: bool = False

    def __call__(self, task: AlignedShards) -> ShardRecord:
        try:
            return self._score_shard(task)
        except Exception:
            # The engine may have lost a process, or still hold requests: the next shard gets one of
            # its own, which is tried like the first.
            self._close_scorer()
            self._is_checked = False
            raise
        finally:
            forget_part(self.job.out, task.index)

    def _score_shard(self, task: AlignedShards) -> ShardRecord:
        job = self.job
        encoded = read_file(
            job.encoded, task.records["encode"].files["data"], columns=ENCODED_COLUMNS
        )
        found = self.reader.find(encoded)
        all_groups = list_groups(encoded)
        groups = list(leave_out(all_groups, found.logps))
        # What is left to score may be little; the engine is tried on as much as ever.
        sample = choose_sample(all_groups) if groups and not self._is_checked else {}
        expected = self._recompute(sample)
        sharing = self._try_sharing(choose_siblings(all_groups)) if sample else None
        num_sequences = sum(len(sequences.sequence_ids) for sequences in all_groups)
        started = time.perf_counter()

        def report(num_scored: int, statistics: ScoreStatistics) -> None:
            pairs_per_sequence = encoded.num_rows / num_sequences
            part = PartDone(
                num_pairs=encoded.num_rows,
                num_pairs_done=round((len(found.logps) + num_scored) * pairs_per_sequence),
                num_pairs_scored=round(num_scored * pairs_per_sequence),
                seconds=time.perf_counter() - started,
                statistics=statistics,
            )
            report_part(job.out, task.index, part)

        with job.out.write_shard(task.index, {"data": SCORE, "rejected": REJECTED}) as shard:
            scored, statistics = self._score(groups, report)
            if expected:
                known = [single(name, sample[name]) for name in sample if name not in scored]
                of_sample = {**scored, **self._score(known, report)[0]}
                recomputed = compare_sample(expected, of_sample)
                self._check(task.index, WorkerCheck(recomputed=recomputed, sharing=sharing))
            return commit_scores(
                shard,
                encoded,
                {**found.logps, **scored},
                more={
                    "num_sequences_scored": len(scored),
                    **count_found(found),
                    **dataclasses.asdict(statistics),
                },
            )

    def _score(
        self,
        groups: Sequence[SequenceGroup],
        report: Callable[[int, ScoreStatistics], None],
    ) -> tuple[SequenceLogps, ScoreStatistics]:
        """Score what is left to score, and report in between; without any, no engine is started."""
        if not groups:
            return {}, ScoreStatistics()
        scorer = self._open_scorer()
        before = scorer.statistics
        logps: dict[str, FloatArray | Fault] = {}
        for start in range(0, len(groups), NUM_PROMPTS_AT_ONCE):
            if start:
                report(len(logps), scorer.statistics.since(before))
            logps.update(score_sequences(scorer, groups[start : start + NUM_PROMPTS_AT_ONCE]))
        return logps, scorer.statistics.since(before)

    def _fetch_model(self) -> str:
        if self._model_path is None:
            self._model_path = fetch_model(self.job.model)
        return self._model_path

    def _open_scorer(self) -> Scorer:
        if self._scorer is None:
            self._scorer = open_scorer(self._fetch_model(), self.job.settings)
        return self._scorer

    def _close_scorer(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None

    def _recompute(self, sample: Mapping[str, Group]) -> dict[str, FloatArray]:
        """Score sequences in float32 with stages/policy, while no engine holds memory."""
        if not sample:
            return {}
        self._close_scorer()
        plain = dataclasses.replace(self.job.settings, backend="transformers", dtype="float32")
        scorer = open_scorer(self._fetch_model(), plain)
        scored = scorer.score(list(sample.values()))
        scorer.close()
        return {name: values for name, (values,) in zip(sample, scored, strict=True)}

    def _try_sharing(self, groups: Sequence[Group]) -> SharingCheck:
        """Score prompts with and without sharing them; where that matters, share none."""
        scorer = self._open_scorer()
        shared = scorer.score(groups)
        scorer.shares_prompts = False
        whole = scorer.score(groups)
        found = compare_sharing(whole, shared, groups, self.job.settings.dtype)
        scorer.shares_prompts = found.is_trusted
        return found

    def _check(self, index: int, check: WorkerCheck) -> None:
        """Record how the engine compares; in float32, refuse one that computes something else.

        Raises:
            DataError: in float32, a token is off by more than rounding explains.
        """
        found = check.recomputed
        if self.job.settings.dtype == "float32" and not found.token_max <= FLOAT32_TOLERANCE_NATS:
            raise DataError(
                f"{self.job.settings.backend} is off by up to {found.token_max:.3g} nats a token "
                f"from a plain float32 computation of {found.num_sequences} sequences; rounding "
                f"explains less than {FLOAT32_TOLERANCE_NATS:g}. It does not compute this model "
                "as transformers does: set stages.score.backend to transformers, or use another "
                "version of it."
            )
        write_check(self.job.out.folder, index, check)
        self._is_checked = True


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """What a worker needs to know that takes values from a table."""

    encoded: Folder
    out: StageDir
    model: ModelPin
    settings: ScorerSettings
    """Of the float32 computation that a sample is compared with."""
    reader: TableReader

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardImporter(job=self)


@dataclass(kw_only=True)
class ShardImporter:
    """Looks up shard after shard in a table, and recomputes a sample of each one's values."""

    job: ImportJob
    _scorer: Scorer | None = None

    def __call__(self, task: AlignedShards) -> ShardRecord:
        job = self.job
        encoded = read_file(
            job.encoded, task.records["encode"].files["data"], columns=ENCODED_COLUMNS
        )
        logps = job.reader.find(encoded)
        faults = {name for name, values in logps.items() if isinstance(values, Fault)}
        sample = choose_sample(list(leave_out(list_groups(encoded), faults)))
        with job.out.write_shard(task.index, {"data": SCORE, "rejected": REJECTED}) as shard:
            if sample:
                self._check(task.index, sample, logps)
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

    def _check(self, index: int, sample: Mapping[str, Group], logps: SequenceLogps) -> None:
        """Compare a sample with a plain float32 computation, and record how far it is off.

        Raises:
            DataError: further than rounding explains.
        """
        job = self.job
        if self._scorer is None:
            self._scorer = open_scorer(fetch_model(job.model), job.settings)
        scored = self._scorer.score(list(sample.values()))
        expected = {name: values for name, (values,) in zip(sample, scored, strict=True)}
        differences = [
            values - expected[name]
            for name in sample
            if not isinstance(values := logps[name], Fault)
        ]
        check_differences(differences, job.reader.dtype, job.reader.table.spec)
        check = WorkerCheck(recomputed=compare_sample(expected, logps))
        write_check(job.out.folder, index, check)


def run(config: ScoreConfig, ctx: StageContext) -> StageResult:
    """Score every pair; 1:1 with encode's shards.

    Raises:
        ConfigError: the model has fewer positions than encode's max_length, or a replica's GPUs do
            not match its processes.
        DataError: values that were to be imported are not of this model, or of other data.
    """
    model, execution = pin_reference(ctx.pins), ctx.execution
    assert isinstance(execution, ScoreExecution)
    assert config.dtype != "auto"
    max_length: int = ctx.inputs["encode"].manifest.config["max_length"]
    require_positions(model, max_length)
    if config.backend == "import":
        return import_table(config, ctx, model, max_length)
    reference = identify_reference(
        model, engine=config.backend, dtype=config.dtype, max_length=max_length
    )
    earlier = find_reusable(ctx.store, reference, execution, out=ctx.out, attempt=ctx.attempt)
    now = pick_versions(ctx.versions, config.backend)
    entry = write_entry(
        ctx.store,
        ctx.out,
        reference,
        ScoreEntry(
            reference=reference,
            versions=[now],
            inherited=merge_versions(*(score.versions for score in earlier)),
            started_at=ctx.started_at,
        ),
    )
    job = ScoreJob(
        encoded=ctx.inputs["encode"].folder,
        out=dataclasses.replace(
            ctx.out, footer={**ctx.out.footer, "dpo.reference": reference.fingerprint}
        ),
        model=model,
        settings=plan_scorer(
            execution,
            ctx.resources,
            backend=config.backend,
            dtype=config.dtype,
            max_length=max_length,
        ),
        reference=reference.fingerprint,
        earlier=earlier,
    )
    pace = Pace(num_workers=ctx.resources.num_workers)
    with shown_parts(ctx.out, ctx.progress):
        shards = ctx.map_shards(job, align_shards(ctx.inputs, ["encode"]), describe=pace.describe)
    checks = list_checks(ctx.out.folder)
    return StageResult(
        shards=shards,
        files=checks,
        summary={
            "reference": reference.fingerprint,
            **summarize_shards(shards, num_workers=ctx.resources.num_workers),
            **summarize_reuse(shards, earlier, entry),
            "recomputed": summarize_checks(ctx.out.folder, checks),
            "prompt_sharing": summarize_sharing(ctx.out.folder, checks),
        },
    )


def pin_reference(pins: Mapping[str, Pin]) -> ModelPin:
    """Give the reference that score's pins name: the model, with the adapter if there is one."""
    model, adapter = pins["model"], pins.get("adapter")
    assert isinstance(model, ModelPin)
    if adapter is None:
        return model
    assert isinstance(adapter, AdapterPin)
    return join_adapter(model, adapter)


def import_table(
    config: ScoreConfig, ctx: StageContext, model: ModelPin, max_length: int
) -> StageResult:
    """Take every value from a table, compute none, and reuse none.

    Raises:
        DataError: the values are not of this model, or none is of this data.
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
        settings=plan_scorer(
            ctx.execution,
            ctx.resources,
            backend="transformers",
            dtype="float32",
            max_length=max_length,
        ),
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


def find_reusable(
    store: Folder,
    reference: ReferenceIdentity,
    execution: ScoreExecution,
    *,
    out: StageDir,
    attempt: int,
) -> list[EarlierScore]:
    """List whose values may be joined in: nobody's, where `--again` asked for new ones."""
    if attempt > 1:
        return []
    return find_earlier_scores(store, reference, others=execution.reuse_from, besides=out.folder)


@dataclass(kw_only=True)
class Pace:
    """What is worth seeing while it runs, over all shards that this run has done so far."""

    num_workers: int
    _shards: list[ShardRecord] = field(default_factory=list)

    def describe(self, shard: ShardRecord) -> str:
        """Say how fast it is, and which shares of the work were reused and shared."""
        self._shards.append(shard)
        done = summarize_shards(self._shards, num_workers=self.num_workers)
        num_reused, num_scored = (done[f"num_sequences_{what}"] for what in ("reused", "scored"))
        notes = []
        if num_scored:
            share = 1 - done["num_tokens_computed"] / done["num_tokens_submitted"]
            notes += [
                f"{done['pairs_per_second']:.1f} pairs/s",
                f"{max(share, 0.0):.0%} of tokens from shared prompts",
            ]
        if num_reused:
            notes.append(f"{num_reused / (num_reused + num_scored):.0%} reused")
        return ", ".join(notes)


def summarize_reuse(
    shards: Sequence[ShardRecord], earlier: Sequence[EarlierScore], entry: ScoreEntry
) -> dict[str, Any]:
    """Say how much came from which earlier score, and which software computed it."""
    counted = Counts.total(shard.counts for shard in shards).more
    reused_from = {
        name.removeprefix(REUSED_FROM): number
        for name, number in counted.items()
        if name.startswith(REUSED_FROM)
    }
    refused_in = {
        name.removeprefix(REFUSED_IN): number
        for name, number in counted.items()
        if name.startswith(REFUSED_IN)
    }
    for name, number in refused_in.items():
        logger.warning(
            "score: %d files of %s are damaged or gone; their sequences were scored", number, name
        )
    known = {score.name: score.versions for score in earlier}
    # An attempt before this one may have reused what is gone by now.
    versions = [known.get(name, entry.inherited) for name in reused_from]
    return {
        "reused_from": reused_from,
        "refused_in": refused_in,
        "reused_versions": merge_versions(*versions),
    }


def summarize_shards(shards: Sequence[ShardRecord], *, num_workers: int) -> dict[str, Any]:
    """Add up what was scored, and how fast: without start-up, all workers together.

    A rate is over what was scored: shards that were reused as a whole are left out, and of the
    others as large a share of the pairs as of the sequences.
    """
    counts = Counts.total(shard.counts for shard in shards)
    busy = [shard for shard in shards if shard.counts.more["num_sequences_scored"]]
    num_pairs = sum(count_scored_pairs(shard.counts) for shard in busy)
    seconds = sum(shard.seconds for shard in busy)
    num_busy = min(num_workers, len(busy))
    return {
        "pairs_per_second": round(num_pairs * num_busy / max(seconds, 1e-3), 3),
        **{
            name: number
            for name, number in counts.more.items()
            if not name.startswith((REUSED_FROM, REFUSED_IN))
        },
    }


def count_scored_pairs(counts: Counts) -> float:
    """Count a shard's pairs, weighted with the share of their sequences that was scored."""
    num_scored, num_reused = (counts.more[f"num_sequences_{what}"] for what in ("scored", "reused"))
    return counts.num_in * num_scored / (num_scored + num_reused)


def complete(config: ScoreConfig, recipe: RecipeView) -> ScoreConfig:
    """Choose the dtype by the device, unless one is named."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype="bfloat16" if recipe.has_gpus else "float32")


# --- what the engine is told --------------------------------------------------------------------


def find_planned_reference(stage: StageView) -> ReferenceIdentity:
    """Identify the reference of a score stage that is planned."""
    return identify_reference(
        pin_reference(stage.pins),
        engine=stage.config.backend,
        dtype=stage.config.dtype,
        max_length=stage.recipe.config("encode").max_length,
    )


def find_reuse(stage: StageView) -> list[EarlierScore]:
    """List the earlier scores whose values a planned score stage would take."""
    if stage.config.backend == "import":
        return []
    return find_reusable(
        stage.store,
        find_planned_reference(stage),
        stage.execution,
        out=stage.out,
        attempt=stage.attempt,
    )


def measure_share_reused(
    stage: StageView, earlier: Sequence[EarlierOutput], inputs: Mapping[str, StageOutput]
) -> float | None:
    """Measure which share of the sequences of one shard earlier scores hold.

    Shards are ranges of a hash, so the share of one shard stands for all.
    """
    encoded = inputs["encode"]
    shards = [shard for shard in encoded.manifest.shards if shard.counts.num_out]
    if stage.config.backend == "import" or not shards:
        return None
    rows = encoded.read(shards[0], columns=ENCODED_COLUMNS)
    reader = ScoreReader(
        scores=[score for score in earlier if isinstance(score, EarlierScore)],
        reference=find_planned_reference(stage).fingerprint,
    )
    names = {*rows["chosen_sequence_id"].to_pylist(), *rows["rejected_sequence_id"].to_pylist()}
    return len(reader.find(rows).logps) / len(names)


def read_reused_versions(manifest: Manifest) -> list[dict[str, str]]:
    """Read which versions computed the values that a complete score stage has reused."""
    versions: list[dict[str, str]] = manifest.summary["reused_versions"]
    return versions


def describe_reused(counts: Counts) -> str:
    num_scored, num_reused = (counts.more[f"num_sequences_{what}"] for what in ("scored", "reused"))
    return f"{num_reused:,} of {num_scored + num_reused:,} sequences" if num_reused else ""


def describe_value(counts: Counts) -> str:
    num_scored = counts.more.get("num_sequences_scored", 0)
    return f"the log-probs of {num_scored:,} sequences" if num_scored else ""


def list_highlights(manifest: Manifest) -> list[tuple[str, str]]:
    """Sum up scoring in lines: its rate, and what was reused or imported."""
    found, lines = manifest.summary, []
    if found["num_sequences_scored"]:
        lines.append(("reference scoring", f"{found['pairs_per_second']:.1f} pairs/s"))
    if reused := describe_reused(manifest.counts):
        lines.append(("reference reused", reused))
    if "num_sequences_imported" in found:
        lines.append(("reference imported", f"{found['num_sequences_imported']:,} sequences"))
    return lines


def _count_work(stage: StageView, load: Workload) -> float:
    if stage.config.backend == "import":
        return 0.0
    size = size_pinned_model(pin_reference(stage.pins))
    return (1 - load.share_reused) * score_flops(size, load.lengths, load.num_pairs)


def _count_bytes(stage: StageView, load: Workload) -> float:
    # Bytes a completion token, measured on HH transcripts (docs/explanation/scale.md).
    return 3.7 * load.lengths.answers * load.num_pairs


def _count_tokens(stage: StageView, load: Workload) -> TokenCount:
    lengths = load.lengths
    per_pair = lengths.prompts_per_pair * lengths.prompt + lengths.answers
    return TokenCount(
        num_computed=load.num_pairs * per_pair,
        num_prompt_tokens_saved=load.num_pairs * (2 - lengths.prompts_per_pair) * lengths.prompt,
    )


def _measure(manifest: Manifest, store: Folder) -> Measured | None:
    num_scored = manifest.summary["num_sequences_scored"]
    share = num_scored / max(1, num_scored + manifest.summary["num_sequences_reused"])
    size = size_named_model(str(manifest.settings["model"]))
    lengths = read_input_lengths(manifest, store)
    return measure_shards(manifest, work=share * score_flops(size, lengths, manifest.counts.num_in))


STAGE = Stage(
    name="score",
    version=2,
    needs=lambda config: ("encode",),
    needed_when="Training reads score only where a loss compares with the reference.",
    config=ScoreConfig,
    execution=ScoreExecution,
    run=run,
    complete=complete,
    pins={"model": pin_model, "adapter": pin_adapter, "table": pin_table},
    codes={**REASONS, **WARNINGS},
    row_name="pairs",
    reads_every_row=True,
    numeric_packages=("torch", "transformers", "vllm"),
    reuse=Reuse(
        unit="sequences",
        index=REFERENCES,
        find=find_reuse,
        measure_share=measure_share_reused,
        read_versions=read_reused_versions,
        describe_reused=describe_reused,
        describe_value=describe_value,
    ),
    cost=Cost(
        unit="flops",
        count_work=_count_work,
        rate_per_core=FLOPS_PER_CORE,
        count_bytes=_count_bytes,
        max_workers=count_aligned_shards,
        measure=_measure,
        count_tokens=_count_tokens,
    ),
    display=Display(list_highlights=list_highlights),
)
