"""How likely does the frozen reference model find every answer, token by token?"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
from huggingface_hub import hf_hub_download

from schemas.config import config_class
from schemas.errors import ConfigError, DataError
from schemas.fingerprint import ReferenceIdentity
from schemas.manifest import Counts, FileRecord, ShardRecord
from schemas.rows import REJECTED, SCORE
from stages.base import (
    AlignedShards,
    ShardWorker,
    Stage,
    StageContext,
    StageResult,
    align_shards,
)
from stages.folders import Folder
from stages.models import ModelPin, fetch_model
from stages.policy.groups import Group
from stages.scoring.pairs import (
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
from stages.scoring.protocol import (
    Backend,
    FloatArray,
    Scorer,
    ScorerSettings,
    ScoringExecution,
    open_scorer,
    plan_scorer,
)
from stages.shards import StageDir, read_file, write_file_record

CHECKS = "checks"
NUM_RECOMPUTED = 32
"""Sequences that each worker recomputes before its first commit."""
FLOAT32_TOLERANCE_NATS = 1e-3
"""How far a token may be off in float32. Two correct engines differ by less than 1e-4."""

POSITION_KEYS = ("max_position_embeddings", "n_positions")


@config_class
class ScoreConfig:
    """Which model is the reference, and how it computes."""

    model: str = "sample:smollm2-135m-instruct"
    """The reference: a Hugging Face id with an optional @revision, a folder, or sample:NAME."""
    backend: Backend = "vllm"
    """The engine: vllm, or transformers (the code that trains)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto = bfloat16 on GPUs, float32 on CPUs."""


class Recomputation(msgspec.Struct, frozen=True, kw_only=True):
    """How far the scores of one worker's sample lie from a plain float32 computation, in nats."""

    num_sequences: int
    num_tokens: int
    token_median: float
    token_p99: float
    token_max: float
    sequence_median: float
    """Of the differences of sums over a completion."""
    sequence_max: float


def choose_sample(groups: Sequence[SequenceGroup]) -> dict[str, Group]:
    """Choose what is recomputed: the shortest sequences, which cost least, and the longest.

    The longest is there for what breaks with length, such as scaled positions.

    Returns:
        At most NUM_RECOMPUTED groups of one completion, by sequence_id.
    """
    singles = [single for sequences in groups for single in sequences.split()]
    ordered = sorted(singles, key=lambda single: (single[1].num_tokens, single[0]))
    return dict([*ordered[: NUM_RECOMPUTED - 1], *ordered[-1:]])


def compare_sample(expected: Mapping[str, FloatArray], logps: SequenceLogps) -> Recomputation:
    """Compare scores with recomputed ones; sequences that could not be scored are left out."""
    found = {name: logps[name] for name in expected}
    differences = [
        values.astype(np.float64) - expected[name]
        for name, values in found.items()
        if not isinstance(values, Fault)
    ]
    by_token = np.abs(np.concatenate([np.zeros(1), *differences]))
    by_sequence = np.abs([0.0, *(values.sum() for values in differences)])
    return Recomputation(
        num_sequences=len(differences),
        num_tokens=len(by_token) - 1,
        token_median=float(np.median(by_token)),
        token_p99=float(np.quantile(by_token, 0.99)),
        token_max=float(by_token.max()),
        sequence_median=float(np.median(by_sequence)),
        sequence_max=float(by_sequence.max()),
    )


def make_rows(encoded: pa.Table, logps: SequenceLogps) -> pa.Table:
    """Give the rows of the scores table for encoded rows without a fault."""
    columns = {name: encoded[name] for name in SCORE.arrow.names if name in encoded.column_names}
    for side in SIDES:
        values = join_side(encoded, side, logps)
        columns[f"ref_{side}_token_logps"] = values.token_logps
        columns[f"ref_{side}_logp"] = pa.array(values.logps)
    return pa.table({name: columns[name] for name in SCORE.arrow.names})


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """What a worker needs to know; calling it in the worker's process makes the worker."""

    encoded: Folder
    out: StageDir
    model: ModelPin
    settings: ScorerSettings

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardScorer(job=self, model_path=fetch_model(self.model))


@dataclass(kw_only=True)
class ShardScorer:
    """Scores shard after shard with one engine. No value depends on the shards before it."""

    job: ScoreJob
    model_path: str
    _scorer: Scorer | None = None
    _is_checked: bool = False

    def __call__(self, task: AlignedShards) -> ShardRecord:
        job = self.job
        encoded = read_file(
            job.encoded, task.records["encode"].files["data"], columns=ENCODED_COLUMNS
        )
        groups = list_groups(encoded)
        expected = {} if self._is_checked else self._recompute(choose_sample(groups))
        scorer = self._open_scorer()
        before = scorer.statistics
        with job.out.write_shard(task.index, {"data": SCORE, "rejected": REJECTED}) as shard:
            logps = score_sequences(scorer, groups)
            if expected:
                self._check(task.index, compare_sample(expected, logps))
            kept, rejected = reject_faults(encoded, logps, whose="REF")
            shard.write("data", make_rows(kept, logps))
            shard.write_rows("rejected", rejected)
            return shard.commit(
                Counts(
                    num_in=encoded.num_rows,
                    num_out=kept.num_rows,
                    reasons=dict(Counter(row["code"] for row in rejected)),
                    more={
                        "num_sequences": 2 * encoded.num_rows,
                        "num_sequences_scored": len(logps),
                        **dataclasses.asdict(scorer.statistics.since(before)),
                    },
                )
            )

    def _open_scorer(self) -> Scorer:
        if self._scorer is None:
            self._scorer = open_scorer(self.model_path, self.job.settings)
        return self._scorer

    def _recompute(self, sample: Mapping[str, Group]) -> dict[str, FloatArray]:
        """Score sequences in float32 with stages/policy, while no engine holds memory."""
        if not sample:
            return {}
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        plain = dataclasses.replace(self.job.settings, backend="transformers", dtype="float32")
        scorer = open_scorer(self.model_path, plain)
        scored = scorer.score(list(sample.values()))
        scorer.close()
        return {name: values for name, (values,) in zip(sample, scored, strict=True)}

    def _check(self, index: int, found: Recomputation) -> None:
        """Record how the engine compares; in float32, refuse one that computes something else.

        Raises:
            DataError: in float32, a token is off by more than rounding explains.
        """
        if self.job.settings.dtype == "float32" and not found.token_max <= FLOAT32_TOLERANCE_NATS:
            raise DataError(
                f"{self.job.settings.backend} is off by up to {found.token_max:.3g} nats a token "
                f"from a plain float32 computation of {found.num_sequences} sequences; rounding "
                f"explains less than {FLOAT32_TOLERANCE_NATS:g}. It does not compute this model "
                "as transformers does: set stages.score.backend to transformers, or use another "
                "version of it."
            )
        folder = self.job.out.folder
        folder.child(CHECKS).create()
        folder.write_bytes(f"{CHECKS}/part-{index:05d}.json", msgspec.json.encode(found))
        self._is_checked = True


def run(config: ScoreConfig, ctx: StageContext) -> StageResult:
    """Score every pair; 1:1 with encode's shards.

    Raises:
        ConfigError: the model has fewer positions than encode's max_length, or a replica's GPUs do
            not match its processes.
    """
    model, execution = ctx.pins["model"], ctx.execution
    assert isinstance(model, ModelPin)
    assert isinstance(execution, ScoringExecution)
    assert config.dtype != "auto"
    max_length: int = ctx.inputs["encode"].manifest.config["max_length"]
    require_positions(model, max_length)
    reference = identify_reference(model, config)
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
    )
    shards = ctx.map_shards(job, align_shards(ctx.inputs, ["encode"]))
    checks = list_checks(ctx.out.folder)
    return StageResult(
        shards=shards,
        files=checks,
        summary={
            "reference": reference.fingerprint,
            **summarize_shards(shards, num_workers=ctx.resources.num_workers),
            "recomputed": summarize_checks(ctx.out.folder, checks),
        },
    )


def identify_reference(model: ModelPin, config: ScoreConfig) -> ReferenceIdentity:
    return ReferenceIdentity(
        weights=model.weights,
        config=model.config,
        dtype=config.dtype,
        engine=config.backend,
    )


def require_positions(model: ModelPin, max_length: int) -> None:
    """Refuse a model that cannot see as many tokens as encode allows.

    Raises:
        ConfigError: it has fewer positions.
    """
    num_positions = count_positions(read_model_config(model))
    if num_positions is not None and num_positions < max_length:
        raise ConfigError(
            f"{model.spec} has {num_positions:,} positions, but stages.encode.max_length is "
            f"{max_length:,}. Lower max_length, or use a model with a longer context."
        )


def read_model_config(model: ModelPin) -> dict[str, Any]:
    """Read a model's config.json; of a hub model nothing else is fetched."""
    if model.commit:
        path = hf_hub_download(model.spec, "config.json", revision=model.commit)
    else:
        path = f"{fetch_model(model)}/config.json"
    content: dict[str, Any] = json.loads(Path(path).read_bytes())
    return content


def count_positions(config: Mapping[str, Any]) -> int | None:
    """Count the positions that a model's config.json allows; None where it sets no limit."""
    text_config = config.get("text_config", config)
    limits = [text_config[key] for key in POSITION_KEYS if text_config.get(key)]
    if not limits:
        return None
    rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
    # Some kinds of scaling state the limit after it, some before: the larger is not refused here.
    return int(min(limits) * max(1.0, rope.get("factor") or 1.0))


def summarize_shards(shards: Sequence[ShardRecord], *, num_workers: int) -> dict[str, Any]:
    """Add up what was scored, and how fast: without start-up, all workers together."""
    counts = Counts.total(shard.counts for shard in shards)
    busy_seconds = sum(shard.seconds for shard in shards)
    num_busy = min(num_workers, len(shards))
    return {
        "pairs_per_second": round(counts.num_in * num_busy / max(busy_seconds, 1e-3), 3),
        **counts.more,
    }


def list_checks(folder: Folder) -> list[FileRecord]:
    return [write_file_record(folder, f"{CHECKS}/{name}") for name in folder.list_files(CHECKS)]


def summarize_checks(folder: Folder, checks: Sequence[FileRecord]) -> dict[str, Any]:
    """Join the workers' checks: counts are added up, of each difference the largest stays."""
    found = [
        msgspec.json.decode(folder.read_bytes(check.name), type=Recomputation) for check in checks
    ]
    return {
        name: (sum if name.startswith("num_") else max)(getattr(each, name) for each in found)
        for name in Recomputation.__struct_fields__
        if found
    }


STAGE = Stage(
    name="score",
    version=1,
    needs=lambda config: ("encode",),
    config=ScoreConfig,
    execution=ScoringExecution,
    run=run,
    pins={"model": "model"},
)
