"""What will a recipe take, in hours, GPU-hours and bytes? Formulas, fed with what was measured.

Work is counted in floating-point operations and divided by a rate. A token that goes through a
transformer with N parameters that multiply takes 2 N operations forward and 4 N backward (Kaplan et
al. 2020, arXiv:2001.08361, table 1); attention takes 4 L D t forward for L layers of width D and t
tokens of context (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); t is half of the sequence
here, because attention is causal. The output layer counts where a completion token is predicted,
and the prompt of a pair once, as they are computed here.

Rates come from complete stages of the store. That other models, lengths and numbers of workers
reach the same rate is an assumption; so are rates where nothing was measured, and they are said to
be.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import Field
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.plan import Plan, PlannedStage
from pipeline.ray.session import Capacity, resolve_resources
from schemas.config import config_class, parse_config
from schemas.errors import ConfigError, DataError
from schemas.manifest import Manifest
from stages.models.fetch import read_config
from stages.models.resolve import ModelPin, pin_model
from stages.score import pin_reference
from stages.score.reuse import ScoreReader
from stages.scorers.pairs import ENCODED_COLUMNS
from stages.scorers.reference import identify_reference
from stages.stage import Resources
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput, read_manifest

_PEAK_FLOPS = {"a100": 312e12, "l40s": 362e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16, from the makers' data sheets."""
_UTILISATION = 0.3
"""Assumed share of a GPU's peak that is reached; nothing was measured on one yet."""
_FLOPS_PER_CORE = 5e10
"""Assumed of a CPU core, float32: a third of what matrix products alone reach."""
_ROWS_PER_SECOND = {"validate": 7000.0, "dedupe": 4500.0, "encode": 500.0}
"""A CPU core's, measured on pairs made from HH transcripts (docs/explanation/measurements.md)."""
_BYTES_PER_TOKEN = {"validate": 2.0, "dedupe": 2.0, "encode": 1.7, "score": 3.7}
"""Of prompt and both answers; of score's, completion tokens only (docs/explanation/scale.md)."""
_START_SECONDS = {"validate": 3.0, "dedupe": 5.0, "encode": 10.0, "score": 60.0, "train": 60.0}
"""Assumed, until the first shard is at work."""
_MAX_SAMPLED_SHARDS = 4


@config_class
class Assumptions:
    """What `--assume` says in place of what would be found."""

    num_pairs: float | None = Field(default=None, gt=0)
    """Pairs to score and train on."""
    prompt_tokens: float | None = Field(default=None, ge=0)
    """Mean tokens of a prompt."""
    chosen_tokens: float | None = Field(default=None, gt=0)
    """Mean tokens of a chosen answer."""
    rejected_tokens: float | None = Field(default=None, gt=0)
    """Mean tokens of a rejected answer."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPU cores of the machines."""
    num_gpus: int | None = Field(default=None, ge=1)
    """GPUs of the machines."""
    gpu: Literal["a100", "l40s", "h100", "h200", "b200"] | None = None
    """Their kind; rates are then a share of its peak, whatever was measured elsewhere."""
    utilisation: float = Field(default=_UTILISATION, gt=0, le=1)
    """That share."""


def parse_assumptions(given: Sequence[str]) -> Assumptions:
    """Read `key=value`s, as given to `--assume`.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    values = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--assume {word}: write it as --assume num_pairs=1e8.")
        try:
            number = float(value)
        except ValueError:
            values[key] = yaml.safe_load(value)
        else:
            values[key] = int(number) if number.is_integer() else number
    assumed: Assumptions = parse_config(Assumptions, values, path="")
    if assumed.num_gpus is not None and assumed.gpu is None:
        raise ConfigError(f"--assume num_gpus needs a kind: gpu={' | '.join(_PEAK_FLOPS)}.")
    return assumed


# --- what there is to compute -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters of a transformer that multiply."""

    body: float
    """In its layers."""
    head: float
    """In its output layer: vocabulary times width."""
    depth_width: float
    """Layers times width of attention."""


def size_model(config: Mapping[str, Any]) -> ModelSize:
    """Count the parameters of a model from its config.json; biases and norms are left out.

    Args:
        config: of a model with gated layers after attention, as Llama, Mistral, Qwen and Gemma are.
    Raises:
        ConfigError: it is laid out otherwise.
    """
    try:
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        vocabulary = config["vocab_size"]
    except KeyError as error:
        raise ConfigError(
            f"The size of a model of type {config.get('model_type')} cannot be told: its "
            f"config.json has no {error}. Estimates know Llama and models laid out like it."
        ) from error
    head_width = config.get("head_dim") or width // heads
    groups = config.get("num_key_value_heads") or heads
    attention = 2 * width * heads * head_width + 2 * width * groups * head_width
    return ModelSize(
        body=layers * (attention + 3 * width * inner),
        head=vocabulary * width,
        depth_width=layers * heads * head_width,
    )


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long pairs are in the mean, in tokens."""

    prompt: float
    chosen: float
    rejected: float
    prompts_per_pair: float
    """Distinct prompts over pairs, 1 or less."""
    source: str
    """Where the numbers are from."""

    @property
    def answers(self) -> float:
        return self.chosen + self.rejected


def forward_flops(
    size: ModelSize, lengths: Lengths, *, num_prompts: float, num_pairs: float
) -> float:
    """Count the operations that one forward pass over pairs takes, prompts computed once."""
    num_completion_tokens = num_pairs * lengths.answers
    num_tokens = num_prompts * lengths.prompt + num_completion_tokens
    context = (lengths.prompt + lengths.answers / 2) / 2
    per_token = 2 * size.body + 4 * size.depth_width * context
    return num_tokens * per_token + num_completion_tokens * 2 * size.head


def score_flops(size: ModelSize, lengths: Lengths, num_pairs: float) -> float:
    """Count the operations of scoring; pairs of one prompt share its computation."""
    num_prompts = num_pairs * lengths.prompts_per_pair
    return forward_flops(size, lengths, num_prompts=num_prompts, num_pairs=num_pairs)


def train_flops(
    size: ModelSize, lengths: Lengths, num_pairs: float, *, is_adapter: bool, recomputes: bool
) -> float:
    """Count the operations of training on pairs: forward, backward, forward again if recomputed.

    Backward is twice forward; without gradients of the weights, as for an adapter, once.
    """
    forward = forward_flops(size, lengths, num_prompts=num_pairs, num_pairs=num_pairs)
    return forward * (1 + recomputes + (1 if is_adapter else 2))


# --- what was measured --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a complete stage tells about others of its kind."""

    rate: float
    """Of one worker: rows a second, or floating-point operations a second."""
    start_seconds: float
    """Before and after its shards or steps."""
    bytes_per_row: float
    source: str


def measure(store: Folder, stage: str) -> Measured | None:
    """Measure the latest complete stage of a kind whose rate can be told, or give None."""
    manifests = _list_manifests(store, stage)
    for manifest in sorted(manifests, key=lambda each: each.started_at, reverse=True):
        try:
            found = _measure(store, manifest)
        except (ConfigError, DataError, OSError):  # Its model or its input is not there any more.
            continue
        if found is not None:
            return found
    return None


def _list_manifests(store: Folder, stage: str) -> list[Manifest]:
    found = []
    for name in store.list_folders(stage):
        try:
            manifest = read_manifest(store.child(stage).child(name))
        except DataError:
            continue
        if manifest is not None:
            found.append(manifest)
    return found


def _measure(store: Folder, manifest: Manifest) -> Measured | None:
    busy_seconds = sum(shard.seconds for shard in manifest.shards)
    num_workers = len({shard.writer for shard in manifest.shards}) or 1
    num_rows, work = manifest.counts.num_in, float(manifest.counts.num_in)
    seconds = busy_seconds
    if manifest.stage == "dedupe":  # Most of its work is in passes, which leave no records.
        seconds = busy_seconds = manifest.seconds * num_workers
    elif manifest.stage == "score":
        num_scored = manifest.summary["num_sequences_scored"]
        share = num_scored / max(1, num_scored + manifest.summary["num_sequences_reused"])
        size = _size_of(str(manifest.settings["model"]))
        work = share * score_flops(size, _lengths_before(store, manifest), num_rows)
    elif manifest.stage == "train":
        found, config = manifest.summary, manifest.config
        num_rows = found["num_train_pairs"]
        num_workers = found["num_workers"]
        num_pairs = num_rows * config["num_epochs"]
        busy_seconds = num_pairs / found["pairs_per_second"]
        seconds = busy_seconds * num_workers
        size = _size_of(found["start_model"]["spec"])
        is_adapter = config["lora"] is not None
        work = train_flops(
            size,
            _lengths_before(store, manifest),
            num_pairs,
            is_adapter=is_adapter,
            recomputes=False,
        )
    if seconds <= 0 or work <= 0:
        return None
    files = [file for shard in manifest.shards for file in shard.files.values()]
    waited = busy_seconds if manifest.stage == "train" else busy_seconds / num_workers
    return Measured(
        rate=work / seconds,
        start_seconds=max(0.0, manifest.seconds - waited),
        bytes_per_row=sum(file.num_bytes for file in files) / max(1, manifest.counts.num_out),
        source=f"{manifest.stage}/{manifest.fingerprint}",
    )


def _size_of(spec: str) -> ModelSize:
    return size_model(read_config(pin_model(spec)))


def _lengths_before(store: Folder, manifest: Manifest) -> Lengths:
    folder = store.child("encode").child(manifest.inputs["encode"].folder)
    encoded = read_manifest(folder)
    if encoded is None:
        raise DataError(f"{folder.uri} is not there any more.")
    return measure_lengths(StageOutput(folder=folder, manifest=encoded))


def measure_lengths(encoded: StageOutput) -> Lengths:
    """Measure the lengths of encoded pairs on up to four shards.

    Shards are ranges of prompt_id, which is a hash: each of them is a random sample of prompts.
    """
    names = [f"num_{what}_tokens" for what in ("prompt", "chosen", "rejected")]
    shards = encoded.manifest.shards[:_MAX_SAMPLED_SHARDS]
    tables = [
        encoded.read(shard, columns=["prompt_id", *names], is_checked=False) for shard in shards
    ]
    rows = pa.concat_tables(tables)
    if not rows.num_rows:
        raise DataError(f"{encoded.folder.uri} holds no pairs.")
    prompt, chosen, rejected = (float(pc.mean(rows[name]).as_py()) for name in names)
    return Lengths(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompts_per_pair=len(rows["prompt_id"].unique()) / rows.num_rows,
        source=f"encode/{encoded.manifest.fingerprint}",
    )


# --- the estimate -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage will take."""

    stage: str
    hours: float
    gpu_hours: float
    num_workers: int
    num_bytes: float
    """What it adds to the store."""
    basis: str
    """Where the rate is from."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a recipe will take from here on."""

    num_pairs: float
    lengths: Lengths
    stages: list[StageEstimate]
    """In order."""
    num_score_tokens: float
    num_prompt_tokens_saved: float
    """Of scoring and training: what a prompt computed for each answer would take more."""
    share_reused: float | None
    """Of the sequences; None while it is not known."""
    num_tokens_reused: float


def make_estimate(plan: Plan, capacity: Capacity, assumed: Assumptions) -> Estimate:
    """Estimate what is left to do of a plan.

    Args:
        plan: made for the store whose stages are measured.
        capacity: of the machines at hand.
        assumed: what to take in place of what is found.
    Raises:
        ConfigError: pairs or lengths are not known yet, or the model's size cannot be told.
    """
    machines = dataclasses.replace(
        capacity,
        num_cpus=assumed.num_cpus or capacity.num_cpus,
        num_gpus=assumed.num_gpus or capacity.num_gpus,
    )
    num_pairs = assumed.num_pairs or _count_pairs(plan)
    lengths = _find_lengths(plan, assumed)
    share_reused = _find_reuse(plan)
    estimates = []
    for stage in plan.stages:
        measured = measure(plan.store, stage.name)
        resources = resolve_resources(plan.recipe.execution[stage.name], machines)
        work = _work(plan, stage.name, num_pairs, lengths, share_reused or 0.0)
        rate, basis = _rate(stage.name, measured, resources, assumed)
        if stage.name == "evaluate":
            scored = measure(plan.store, "score")
            rate, basis = _rate("score", scored, resources, assumed)
        start = measured.start_seconds if measured else _START_SECONDS.get(stage.name, 60.0)
        share = 1.0 if assumed.num_pairs else _share_left(stage)
        num_workers = min(resources.num_workers, _max_workers(plan, stage.name, num_pairs))
        seconds = share * (start + work / (rate * num_workers))
        estimates.append(
            StageEstimate(
                stage=stage.name,
                hours=seconds / 3600,
                gpu_hours=seconds / 3600 * num_workers * resources.num_gpus,
                num_workers=num_workers,
                num_bytes=share * _bytes(plan, stage.name, num_pairs, lengths, measured),
                basis=basis if share else "done",
            )
        )
    train = plan.stage("train").resolved.config
    num_shared = num_pairs * (2 - lengths.prompts_per_pair) + num_pairs * train.num_epochs
    return Estimate(
        num_pairs=num_pairs,
        lengths=lengths,
        stages=estimates,
        num_score_tokens=num_pairs * (lengths.prompts_per_pair * lengths.prompt + lengths.answers),
        num_prompt_tokens_saved=num_shared * lengths.prompt,
        share_reused=share_reused,
        num_tokens_reused=(share_reused or 0.0) * num_pairs * lengths.answers,
    )


def _max_workers(plan: Plan, stage: str, num_pairs: float) -> int:
    """Say how many workers find something to do: no more than there are shards."""
    if stage == "train":
        return int(plan.recipe.stages["train"].global_batch_size)
    if stage == "validate":
        manifest = plan.stage(stage).out.manifest() if plan.stage(stage).state == "done" else None
        return len(manifest.shards) if manifest else int(num_pairs)
    return max(1, math.ceil(num_pairs / plan.recipe.stages["dedupe"].rows_per_shard))


def _count_pairs(plan: Plan) -> float:
    for name in ("encode", "dedupe", "validate"):
        stage = plan.stage(name)
        manifest = stage.out.manifest() if stage.state == "done" else None
        if manifest is not None:
            return manifest.counts.num_out
    raise ConfigError(
        "How many pairs there are is not known before validate has run. Run it (it takes a CPU "
        "and minutes: run.py run RECIPE --until dedupe), or add --assume num_pairs=NUMBER."
    )


def _find_lengths(plan: Plan, assumed: Assumptions) -> Lengths:
    given = {name: getattr(assumed, f"{name}_tokens") for name in ("prompt", "chosen", "rejected")}
    if None not in given.values():
        return Lengths(**given, prompts_per_pair=1.0, source="--assume")
    encode = plan.stage("encode")
    manifests = _list_manifests(plan.store, "encode")
    latest = max(manifests, key=lambda each: each.started_at, default=None)
    if encode.state == "done":
        latest = encode.out.manifest()
    if latest is None:
        raise ConfigError(
            "How long pairs are is not known before encode has run. Run it on a sample (run.py run "
            "RECIPE --until encode --set stages.validate.max_pairs=1000), or add --assume "
            "prompt_tokens=… --assume chosen_tokens=… --assume rejected_tokens=…."
        )
    folder = plan.store.child("encode").child(latest.fingerprint)
    if latest.attempt > 1:
        folder = plan.store.child("encode").child(f"{latest.fingerprint}.{latest.attempt}")
    found = measure_lengths(StageOutput(folder=folder, manifest=latest))
    return dataclasses.replace(found, **{k: v for k, v in given.items() if v is not None})


def _find_reuse(plan: Plan) -> float | None:
    """Find which share of a shard's sequences earlier scores hold: ids are hashes, so of all."""
    if not any(stage.name == "score" for stage in plan.stages):
        return None
    encode, score = plan.stage("encode"), plan.stage("score")
    config = score.resolved.config
    manifest = encode.out.manifest() if encode.state == "done" else None
    shards = [shard for shard in manifest.shards if shard.counts.num_out] if manifest else []
    if manifest is None or not shards or score.state == "done" or config.backend == "import":
        return None
    reference = identify_reference(
        pin_reference(score.resolved.pins),
        engine=config.backend,
        dtype=config.dtype,
        max_length=encode.resolved.config.max_length,
    )
    output = StageOutput(folder=encode.out.folder, manifest=manifest)
    encoded = output.read(shards[0], columns=ENCODED_COLUMNS)
    reader = ScoreReader(scores=plan.earlier_scores, reference=reference.fingerprint)
    names = {
        *encoded["chosen_sequence_id"].to_pylist(),
        *encoded["rejected_sequence_id"].to_pylist(),
    }
    return len(reader.find(encoded).logps) / len(names)


def _share_left(stage: PlannedStage) -> float:
    if stage.state == "done":
        return 0.0
    layout = stage.out.layout() if stage.state == "resume" else None
    if layout is None or not layout.shards:
        return 1.0
    return 1 - len(stage.out.committed()) / len(layout.shards)


def _work(plan: Plan, stage: str, num_pairs: float, lengths: Lengths, share_reused: float) -> float:
    """Say how much a stage has to do: rows, or floating-point operations."""
    if stage in _ROWS_PER_SECOND:
        return num_pairs
    model = plan.stage("train").resolved.pins["model"]
    if stage == "score":
        if plan.recipe.stages["score"].backend == "import":
            return 0.0
        model = pin_reference(plan.stage("score").resolved.pins)
    assert isinstance(model, ModelPin)
    size = size_model(read_config(model))
    held_out = plan.recipe.stages["validate"].eval_fraction
    if stage == "score":
        return (1 - share_reused) * score_flops(size, lengths, num_pairs)
    if stage == "evaluate":
        return score_flops(size, lengths, held_out * num_pairs)
    config, execution = plan.recipe.stages["train"], plan.recipe.execution["train"]
    return config.num_epochs * train_flops(
        size,
        lengths,
        (1 - held_out) * num_pairs,
        is_adapter=config.lora is not None,
        recomputes=execution.gradient_checkpointing,
    )


def _rate(
    stage: str, measured: Measured | None, resources: Resources, assumed: Assumptions
) -> tuple[float, str]:
    """Give a worker's rate, and where it is from."""
    if stage in _ROWS_PER_SECOND:
        if measured is not None:
            return measured.rate, f"{measured.rate:,.0f} rows/s a worker, as {measured.source}"
        rate = _ROWS_PER_SECOND[stage] * resources.num_cpus
        return rate, f"{rate:,.0f} rows/s a worker, assumed"
    if assumed.gpu is not None:
        rate = _PEAK_FLOPS[assumed.gpu] * assumed.utilisation * max(resources.num_gpus, 1)
        share = f"{assumed.utilisation:.0%} of {assumed.gpu}'s peak"
        return rate, f"{rate / 1e12:,.0f} TFLOP/s a worker, assumed: {share}"
    if measured is not None:
        rate = measured.rate
        return rate, f"{rate / 1e9:,.1f} GFLOP/s a worker, as {measured.source}"
    if resources.num_gpus:
        raise ConfigError(
            f"No {stage} was measured in this store. Say which GPUs: --assume gpu="
            f"{' | '.join(_PEAK_FLOPS)}."
        )
    rate = _FLOPS_PER_CORE * resources.num_cpus
    return rate, f"{rate / 1e9:,.0f} GFLOP/s a worker, assumed"


def _bytes(
    plan: Plan, stage: str, num_pairs: float, lengths: Lengths, measured: Measured | None
) -> float:
    """Say how much a stage adds to the store."""
    if stage == "train":
        model = plan.stage("train").resolved.pins["model"]
        assert isinstance(model, ModelPin)
        size = size_model(read_config(model))
        return 4 * (size.body + size.head)  # The exported model, float32.
    if stage == "evaluate":
        return 150 * plan.recipe.stages["validate"].eval_fraction * num_pairs
    if measured is not None:
        return measured.bytes_per_row * num_pairs
    num_tokens = lengths.answers + (0 if stage == "score" else lengths.prompt)
    return _BYTES_PER_TOKEN[stage] * num_tokens * num_pairs


# --- how it looks -------------------------------------------------------------------------------


def estimate_to_dict(estimate: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(estimate)


def show_estimate(estimate: Estimate) -> RenderableType:
    """Show what each stage will take, and what is saved."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "workers", "hours", "GPU-hours", "GB stored", "rate"):
        is_text = heading in ("stage", "rate")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for stage in estimate.stages:
        table.add_row(
            stage.stage,
            str(stage.num_workers),
            _number(stage.hours),
            _number(stage.gpu_hours),
            _number(stage.num_bytes / 1e9),
            stage.basis,
        )
    hours, gpu_hours, num_bytes = (
        sum(getattr(stage, name) for stage in estimate.stages)
        for name in ("hours", "gpu_hours", "num_bytes")
    )
    table.add_row("all", "", _number(hours), _number(gpu_hours), _number(num_bytes / 1e9), "")
    lengths = estimate.lengths
    lines = [
        f"{estimate.num_pairs:,.0f} pairs of {lengths.prompt:.0f} + {lengths.chosen:.0f} and "
        f"{lengths.rejected:.0f} tokens ({lengths.source}).",
        f"Scoring goes over {estimate.num_score_tokens:,.0f} tokens at most.",
        f"Prompts that are computed once save {estimate.num_prompt_tokens_saved:,.0f} tokens of "
        "scoring and training.",
        "Which share is reused is known when encode is done."
        if estimate.share_reused is None
        else f"{estimate.share_reused:.0%} of the sequences are reused, "
        f"{estimate.num_tokens_reused:,.0f} completion tokens.",
    ]
    return Group(table, Text("\n" + "\n".join(lines)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
