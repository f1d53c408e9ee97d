"""Evaluate stage: compare the trained policy with the reference on held-out pairs.

If training used no reference, neither does evaluation: rewards are then those of the loss, from the
policy alone, and displacement is null.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from schemas.config import config_class
from schemas.manifest import Counts, FileRecord, Manifest, ShardRecord
from schemas.rows import EVALUATION, GENERATION, REJECTED
from stages.cost import (
    FLOPS_PER_CORE,
    Measured,
    Workload,
    measure_shards,
    score_flops,
    size_pinned_model,
)
from stages.evaluate.generations import GenerationJob, GenerationTask
from stages.evaluate.trained import Trained
from stages.models.resolve import ModelPin
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import (
    ENCODED_COLUMNS,
    SIDES,
    SequenceLogps,
    SideLogps,
    join_side,
    list_groups,
    reject_faults,
    score_sequences,
)
from stages.scorers.protocol import (
    Scorer,
    ScorerSettings,
    ScoringExecution,
    plan_scorer,
)
from stages.stage import (
    AlignedShards,
    Cost,
    Display,
    ShardWorker,
    Stage,
    StageContext,
    StageResult,
    StageView,
    align_shards,
    count_aligned_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, read_file, write_table

GENERATIONS = "generations.parquet"
REF_COLUMNS = ("ref_chosen_logp", "ref_rejected_logp")


@config_class
class EvaluateConfig:
    """Settings of the evaluation on held-out pairs."""

    num_generations: int = Field(default=4, ge=0)
    """Held-out prompts answered by the policy before and after training, for people to read."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Largest number of tokens in each answer."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Reward of an answer, as train's loss defines it."""

    of: Literal["log_ratio", "logp", "mean_logp"]
    """Policy minus reference log-prob, the policy's log-prob, or its mean over loss-mask tokens."""
    scale: float
    """Factor of the reward, such as beta."""

    def __call__(self, side: SideLogps, ref_logps: pa.Array) -> pa.Array:
        """Compute the rewards of one side of B pairs, float64 [B].

        Args:
            side: log-probs of the policy.
            ref_logps: float64 [B], nats, log-probs of the reference; null without a reference.
        """
        logps = pa.array(side.logps)
        of: pa.Array = {
            "log_ratio": lambda: pc.subtract(logps, ref_logps),
            "logp": lambda: logps,
            "mean_logp": lambda: pc.divide(logps, pa.array(side.num_tokens, pa.float64())),
        }[self.of]()
        return pc.multiply(of, self.scale)


def make_rows(held_out: pa.Table, logps: SequenceLogps, *, reward: Reward) -> pa.Table:
    """Make the evaluation rows from the log-probs of policy and reference.

    Args:
        held_out: encoded rows without faults, with the reference's summed log-probs, null without a
            reference.
        logps: log-probs of the policy, by sequence_id.
        reward: reward of an answer.
    """
    columns: dict[str, Any] = {
        name: held_out[name].combine_chunks()
        for name in EVALUATION.arrow.names
        if name in held_out.column_names
    }
    for side in SIDES:
        of_side = join_side(held_out, side, logps)
        columns[f"policy_{side}_logp"] = pa.array(of_side.logps)
        columns[f"reward_{side}"] = reward(of_side, columns[f"ref_{side}_logp"])
    columns["margin"] = pc.subtract(columns["reward_chosen"], columns["reward_rejected"])
    columns["correct"] = pc.greater(columns["margin"], 0)
    columns["displaced"] = pc.and_(
        *(pc.less(columns[f"policy_{side}_logp"], columns[f"ref_{side}_logp"]) for side in SIDES)
    )
    return pa.table({name: columns[name] for name in EVALUATION.arrow.names})


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """Picklable settings of a worker; calling it in the worker's process makes the worker."""

    inputs: Mapping[str, StageOutput]
    out: StageDir
    trained: Trained
    settings: ScorerSettings
    reward: Reward

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardEvaluator(job=self)

    def read_held_out(self, task: AlignedShards) -> pa.Table:
        """Read the held-out pairs of a shard that the reference scored, with its summed
        log-probs."""
        encoded = self.inputs["encode"].read(
            task.records["encode"], columns=[*ENCODED_COLUMNS, "source", "split"]
        )
        if "score" not in self.inputs:
            nothing = pa.nulls(encoded.num_rows, pa.float64())
            for name in REF_COLUMNS:
                encoded = encoded.append_column(name, nothing)
            return encoded.filter(pc.equal(encoded["split"], "eval"))
        scored = self.inputs["score"].read(task.records["score"], columns=["pair_id", *REF_COLUMNS])
        joined = encoded.take(
            pc.index_in(scored["pair_id"], value_set=encoded["pair_id"].combine_chunks())
        )
        for name in REF_COLUMNS:
            joined = joined.append_column(name, scored[name])
        return joined.filter(pc.equal(joined["split"], "eval"))


@dataclass(kw_only=True)
class ShardEvaluator:
    """Evaluates shards; the policy is opened for the first shard with held-out pairs."""

    job: EvaluationJob
    _scorer: Scorer | None = None
    _opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __call__(self, task: AlignedShards) -> ShardRecord:
        held_out = self.job.read_held_out(task)
        logps: SequenceLogps = {}
        if held_out.num_rows:
            logps = score_sequences(self._open_scorer(), list_groups(held_out))
        kept, rejected = reject_faults(held_out, logps, whose="POLICY")
        roles = {"data": EVALUATION, "rejected": REJECTED}
        with self.job.out.write_shard(task.index, roles) as shard:
            shard.write("data", make_rows(kept, logps, reward=self.job.reward))
            shard.write_rows("rejected", rejected)
            return shard.commit(
                Counts(
                    num_in=held_out.num_rows,
                    num_out=kept.num_rows,
                    reasons=dict(Counter(row["code"] for row in rejected)),
                )
            )

    def _open_scorer(self) -> Scorer:
        if self._scorer is None:
            path = self._opened.enter_context(self.job.trained.fetch())
            self._scorer = open_scorer(path, self.job.settings)
        return self._scorer


def run(config: EvaluateConfig, ctx: StageContext) -> StageResult:
    """Score the held-out pairs with the trained policy; shards correspond 1:1 to encode's and
    score's."""
    execution, training = ctx.execution, ctx.inputs["train"].manifest
    assert isinstance(execution, ScoringExecution)
    pairs = {name: ctx.inputs[name] for name in ("encode", "score") if name in ctx.inputs}
    # Use the engine and dtype of the reference if there is one, else those of training.
    engine = {"backend": "transformers", **training.config}
    if "score" in pairs:
        engine = pairs["score"].manifest.config
    trained = Trained(folder=ctx.inputs["train"].folder.child("model"))
    settings = plan_scorer(
        execution,
        ctx.resources,
        # The engine that computed imported values is unknown.
        backend="transformers" if engine["backend"] == "import" else engine["backend"],
        dtype=engine["dtype"],
        max_length=ctx.inputs["encode"].manifest.config["max_length"],
    )
    job = EvaluationJob(
        inputs=pairs,
        out=ctx.out,
        trained=trained,
        settings=settings,
        reward=Reward(**training.summary["reward"]),
    )
    shards = ctx.map_shards(job, align_shards(ctx.inputs, list(pairs)))
    summary = summarize(read_margins(ctx.out, shards))
    num_generations = config.num_generations if summary["num_pairs"] else 0
    generations = generate(
        ctx,
        GenerationJob(
            encoded=ctx.inputs["encode"],
            out=ctx.out.work("generations"),
            start=msgspec.convert(training.summary["start_model"], ModelPin),
            trained=trained,
            settings=settings,
            num_generations=num_generations,
            max_new_tokens=config.max_new_tokens,
        ),
    )
    summary["num_generations"] = generations.num_rows
    return StageResult(shards=shards, files=[generations], summary=summary)


def generate(ctx: StageContext, job: GenerationJob) -> FileRecord:
    """Generate answers in one worker, and write them beside the shards."""
    rows = GENERATION.arrow.empty_table()
    if job.num_generations:
        [record] = ctx.map_shards(
            job,
            [GenerationTask()],
            into=job.out,
            resources=replace(ctx.resources, num_workers=1),
            label="generations",
        )
        rows = read_file(job.out.folder, record.files["data"])
    return write_table(ctx.out, GENERATIONS, rows, GENERATION)


def read_margins(out: StageDir, shards: Sequence[ShardRecord]) -> Iterable[pa.Table]:
    """Read the columns of the summary, shard by shard."""
    for record in shards:
        yield read_file(
            out.folder,
            record.files["data"],
            columns=["source", "margin", "correct", "displaced"],
        )


def summarize(shards: Iterable[pa.Table]) -> dict[str, Any]:
    """Compute accuracy, mean margin and the share of displaced pairs, by source and overall.

    Without held-out pairs only a count of 0 is returned; without a reference the share of displaced
    pairs is None.
    """
    totals: dict[str, Counter[str]] = {}
    for rows in shards:
        sums = rows.group_by("source").aggregate(
            [
                ("margin", "count"),
                ("margin", "sum"),
                ("correct", "sum"),
                ("displaced", "count"),
                ("displaced", "sum"),
            ]
        )
        for row in sums.to_pylist():
            source = row.pop("source")
            row["displaced_sum"] = row["displaced_sum"] or 0  # Null without a reference.
            totals.setdefault(source, Counter()).update(row)
    overall: Counter[str] = Counter()
    for of_source in totals.values():
        overall.update(of_source)  # Unlike +, update keeps sums below 0.
    return {
        **describe_totals(overall),
        "by_source": {source: describe_totals(totals[source]) for source in sorted(totals)},
    }


def describe_totals(totals: Mapping[str, float]) -> dict[str, Any]:
    num_pairs = totals["margin_count"]
    if not num_pairs:
        return {"num_pairs": 0}
    return {
        "num_pairs": num_pairs,
        "accuracy": totals["correct_sum"] / num_pairs,
        "mean_margin": totals["margin_sum"] / num_pairs,
        "share_displaced": (
            totals["displaced_sum"] / num_pairs if totals["displaced_count"] else None
        ),
    }


def list_highlights(manifest: Manifest) -> list[tuple[str, str]]:
    """Summarize the evaluation in lines: accuracy and margin."""
    found = manifest.summary
    if not found["num_pairs"]:
        return [("held-out pairs", "none: set stages.validate.eval_fraction")]
    return [
        (
            "held-out preference accuracy",
            f"{found['accuracy']:.1%} of {found['num_pairs']} pairs, by implicit reward",
        ),
        ("held-out reward margin", f"{found['mean_margin']:.3f}"),
    ]


def _count_held_out(stage: StageView, load: Workload) -> float:
    share: float = stage.recipe.config("validate").eval_fraction
    return share * load.num_pairs


def _count_work(stage: StageView, load: Workload) -> float:
    start = stage.recipe.pin("train", "model")
    assert isinstance(start, ModelPin)
    return score_flops(size_pinned_model(start), load.lengths, _count_held_out(stage, load))


def _measure(manifest: Manifest, store: Folder) -> Measured | None:
    return measure_shards(manifest, work=manifest.counts.num_in, stores_rows=False)


STAGE = Stage(
    name="evaluate",
    version=2,
    needs=lambda config: ("encode", "train"),
    reads_if_there=("score",),
    config=EvaluateConfig,
    execution=ScoringExecution,
    run=run,
    row_name="held-out pairs",
    numeric_packages=("torch", "transformers", "vllm"),
    cost=Cost(
        unit="flops",
        count_work=_count_work,
        rate_per_core=FLOPS_PER_CORE,
        count_bytes=lambda stage, load: 150 * _count_held_out(stage, load),
        max_workers=count_aligned_shards,
        measure=_measure,
        rate_of="score",
    ),
    display=Display(list_highlights=list_highlights),
)
