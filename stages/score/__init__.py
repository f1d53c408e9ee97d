"""Score stage: log-probability of every completion token under the frozen reference model.

Values that an earlier score stage computed for the same reference and tokens are joined in
(stages/score/reuse.py); only the rest is scored.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from schemas.fingerprint import ReferenceIdentity
from schemas.manifest import Counts, Manifest
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
from stages.models.layers import require_fit, require_known
from stages.models.resolve import (
    AdapterPin,
    ModelPin,
    TokenizerPin,
    join_adapter,
    pin_adapter,
    pin_model,
)
from stages.models.vocabulary import require_same_vocabulary
from stages.score.checks import list_checks, summarize_checks, summarize_sharing
from stages.score.config import REASONS, WARNINGS, ScoreConfig, ScoreExecution
from stages.score.progress import shown_parts
from stages.score.reuse import (
    REFERENCES,
    EarlierScore,
    ScoreEntry,
    ScoreReader,
    find_earlier_scores,
    merge_versions,
    write_entry,
)
from stages.score.summary import Pace, summarize_reuse, summarize_shards
from stages.score.table import pin_table
from stages.score.table_worker import import_table
from stages.score.worker import ScoreJob
from stages.scorers.pairs import ENCODED_COLUMNS
from stages.scorers.protocol import plan_scorer
from stages.scorers.reference import (
    identify_reference,
    pick_versions,
    require_fixed_rope,
    require_positions,
)
from stages.stage import (
    Cost,
    Display,
    EarlierOutput,
    Pin,
    RecipeView,
    Reuse,
    Stage,
    StageContext,
    StageResult,
    StageView,
    align_shards,
    auto_dtype,
    count_aligned_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput


def run(config: ScoreConfig, ctx: StageContext) -> StageResult:
    """Score every pair; shards correspond 1:1 to those of encode.

    Raises:
        ConfigError: the model has fewer positions than encode's max_length, its rope is one that
            vLLM computes differently, or a replica's GPUs do not match its processes.
        DataError: imported values belong to another model or to other data.
    """
    model, execution = pin_reference(ctx.pins), ctx.execution
    assert isinstance(execution, ScoreExecution)
    assert config.dtype != "auto"
    max_length: int = ctx.inputs["encode"].manifest.config["max_length"]
    require_positions(model, max_length)
    require_fixed_rope(model, backend=config.backend, max_length=max_length)
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
    """Combine score's pins into the reference: the model, with its adapter if any."""
    model, adapter = pins["model"], pins.get("adapter")
    assert isinstance(model, ModelPin)
    if adapter is None:
        return model
    assert isinstance(adapter, AdapterPin)
    return join_adapter(model, adapter)


def find_reusable(
    store: Folder,
    reference: ReferenceIdentity,
    execution: ScoreExecution,
    *,
    out: StageDir,
    attempt: int,
) -> list[EarlierScore]:
    """List the earlier scores whose values may be joined in; none after `--again`."""
    if attempt > 1:
        return []
    return find_earlier_scores(store, reference, others=execution.reuse_from, besides=out.folder)


def complete(config: ScoreConfig, recipe: RecipeView) -> ScoreConfig:
    """Resolve `dtype: auto` by the device."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype=auto_dtype(recipe))


def check(stage: StageView) -> None:
    """Refuse a reference that cannot be opened, has another vocabulary, or another's adapter.

    Raises:
        ConfigError: see there.
    """
    reference, tokenizer = pin_reference(stage.pins), stage.recipe.pin("encode", "tokenizer")
    assert isinstance(tokenizer, TokenizerPin)
    require_known(reference, key="stages.score.model")
    require_same_vocabulary(reference, tokenizer, key="stages.score.model")
    if reference.adapter is not None:
        require_fit(reference, reference.adapter, key="stages.score.adapter")


# --- the fields of the stage's record -----------------------------------------------------------


def find_planned_reference(stage: StageView) -> ReferenceIdentity:
    """Identify the reference of a planned score stage."""
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
    """Measure the share of one shard's sequences that earlier scores hold.

    Shards are ranges of a hash, so one shard is a sample of all.
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
    """Read the package versions that computed the values reused by a complete score stage."""
    versions: list[dict[str, str]] = manifest.summary["reused_versions"]
    return versions


def describe_reused(counts: Counts) -> str:
    num_scored, num_reused = (counts.more[f"num_sequences_{what}"] for what in ("scored", "reused"))
    return f"{num_reused:,} of {num_scored + num_reused:,} sequences" if num_reused else ""


def describe_value(counts: Counts) -> str:
    num_scored = counts.more.get("num_sequences_scored", 0)
    return f"the log-probs of {num_scored:,} sequences" if num_scored else ""


def list_highlights(manifest: Manifest) -> list[tuple[str, str]]:
    """Summarize scoring in lines: its rate, and the sequences reused or imported."""
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
    check=check,
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
