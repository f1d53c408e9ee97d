"""Estimates what a recipe will take: hours, GPU-hours and bytes.

Each stage counts its work, in rows or floating-point operations (stages/cost.py has the formulas),
and the work is divided by a rate. Rates come from complete stages of the store. That other models,
lengths and numbers of workers reach the same rate is an assumption; so is a rate where nothing was
measured. The estimate names which it is.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import Field
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.plan import Plan, PlannedStage
from pipeline.ray.session import Capacity, resolve_resources
from schemas.config import config_class, parse_config
from schemas.errors import ConfigError, DataError
from schemas.fingerprint import attempt_folder
from schemas.manifest import Manifest
from stages.cost import Lengths, Measured, Workload
from stages.stage import Cost, Resources, Stage
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput, read_manifest

_PEAK_FLOPS = {"a100": 312e12, "l40s": 362e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16 peaks, from the makers' data sheets."""
_UTILISATION = 0.3
"""Assumed share of a GPU's peak that is reached; nothing was measured on one yet."""


@config_class
class Assumptions:
    """Values of `--assume`, which replace what would be found."""

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
    """Kind of the GPUs; rates are then a share of its peak, whatever was measured elsewhere."""
    utilisation: float = Field(default=_UTILISATION, gt=0, le=1)
    """Share of the peak that is reached."""


def parse_assumptions(given: Sequence[str]) -> Assumptions:
    """Parse the `key=value` words given to `--assume`.

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


# --- what was measured --------------------------------------------------------------------------


def measure(store: Folder, stage: Stage[Any]) -> Measured | None:
    """Measure the latest complete output of a stage that can be measured; None if there is none."""
    manifests = _list_manifests(store, stage.name)
    for manifest in sorted(manifests, key=lambda each: each.started_at, reverse=True):
        try:
            found = stage.cost.measure(manifest, store)
        except (ConfigError, DataError, OSError):  # Its model or its input was deleted.
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
    num_tokens: float
    """What a model computes in it at most, where the stage counts tokens; else 0."""
    basis: str
    """Where the rate comes from."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the rest of a recipe will take."""

    num_pairs: float
    lengths: Lengths
    stages: list[StageEstimate]
    """In order."""
    num_prompt_tokens_saved: float
    """Tokens that computing a prompt once for each of its answers would add."""
    share_reused: float | None
    """Share of the sequences, 0 to 1; None while it is unknown."""
    num_tokens_reused: float


def make_estimate(plan: Plan, capacity: Capacity, assumed: Assumptions) -> Estimate:
    """Estimate what is left to do of a plan.

    Args:
        plan: made for the store whose stages are measured.
        capacity: of the machines at hand.
        assumed: replaces what is found.
    Raises:
        ConfigError: pairs or lengths are not known yet, or the model's size is unknown.
    """
    machines = dataclasses.replace(
        capacity,
        num_cpus=assumed.num_cpus or capacity.num_cpus,
        num_gpus=assumed.num_gpus or capacity.num_gpus,
    )
    num_pairs = assumed.num_pairs or _count_pairs(plan)
    lengths = _find_lengths(plan, assumed)
    shares = {stage.name: _find_share_reused(plan, stage) for stage in plan.stages}
    measured = {stage.name: measure(plan.store, stage) for stage in plan.recipe.stage_list}
    estimates, num_prompt_tokens_saved = [], 0.0
    for stage in plan.stages:
        cost, view = stage.resolved.stage.cost, plan.view(stage)
        manifest = stage.out.manifest() if stage.state == "done" else None
        load = Workload(
            num_pairs=num_pairs,
            lengths=lengths,
            share_reused=shares[stage.name] or 0.0,
            num_shards=len(manifest.shards) if manifest else None,
        )
        resources = resolve_resources(plan.recipe.execution[stage.name], machines)
        rated = cost.rate_of or stage.name
        rate, basis = _find_rate(rated, cost, measured.get(rated), resources, assumed)
        own = measured[stage.name]
        start_seconds = own.start_seconds if own else cost.start_seconds
        share = 1.0 if assumed.num_pairs else _find_share_left(stage)
        num_workers = min(resources.num_workers, max(1, int(cost.max_workers(view, load))))
        seconds = share * (start_seconds + cost.count_work(view, load) / (rate * num_workers))
        if own is not None and own.bytes_per_pair is not None:
            num_bytes = own.bytes_per_pair * num_pairs
        else:
            num_bytes = cost.count_bytes(view, load)
        tokens = cost.count_tokens(view, load)
        num_prompt_tokens_saved += tokens.num_prompt_tokens_saved
        estimates.append(
            StageEstimate(
                stage=stage.name,
                hours=seconds / 3600,
                gpu_hours=seconds / 3600 * num_workers * resources.num_gpus,
                num_workers=num_workers,
                num_bytes=share * num_bytes,
                num_tokens=tokens.num_computed,
                basis=basis if share else "done",
            )
        )
    share_reused = next((share for share in shares.values() if share is not None), None)
    return Estimate(
        num_pairs=num_pairs,
        lengths=lengths,
        stages=estimates,
        num_prompt_tokens_saved=num_prompt_tokens_saved,
        share_reused=share_reused,
        num_tokens_reused=(share_reused or 0.0) * num_pairs * lengths.answers,
    )


def _count_pairs(plan: Plan) -> float:
    """Count the pairs in the last complete stage that prepares them."""
    first = plan.stages[0].name
    for stage in reversed(plan.stages):
        record = stage.resolved.stage
        if record.cost.unit != "rows" or record.row_name != "pairs":
            continue
        manifest = stage.out.manifest() if stage.state == "done" else None
        if manifest is not None:
            return manifest.counts.num_out
    raise ConfigError(
        f"The number of pairs is not known before {first} has run. Run it, which takes a CPU and "
        f"minutes (run.py run RECIPE --until {first}), or add --assume num_pairs=NUMBER."
    )


def _find_lengths(plan: Plan, assumed: Assumptions) -> Lengths:
    prompt, chosen, rejected = (
        assumed.prompt_tokens,
        assumed.chosen_tokens,
        assumed.rejected_tokens,
    )
    if prompt is not None and chosen is not None and rejected is not None:
        return Lengths(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            prompts_per_pair=1.0,
            source="--assume",
        )
    found = _measure_lengths(plan)
    return dataclasses.replace(
        found,
        prompt=found.prompt if prompt is None else prompt,
        chosen=found.chosen if chosen is None else chosen,
        rejected=found.rejected if rejected is None else rejected,
    )


def _measure_lengths(plan: Plan) -> Lengths:
    """Measure the lengths of this recipe's pairs, or of the latest other ones in the store."""
    for stage in plan.stages:
        measure_lengths = stage.resolved.stage.cost.measure_lengths
        if measure_lengths is None:
            continue
        manifests = _list_manifests(plan.store, stage.name)
        latest = max(manifests, key=lambda each: each.started_at, default=None)
        if stage.state == "done":
            latest = stage.out.manifest()
        if latest is None:
            raise ConfigError(
                f"The lengths of the pairs are not known before {stage.name} has run. Run it on a "
                f"sample (run.py run RECIPE --until {stage.name} "
                f"--set stages.{plan.stages[0].name}.max_pairs=1000), or add --assume "
                "prompt_tokens=… --assume chosen_tokens=… --assume rejected_tokens=…."
            )
        folder = attempt_folder(latest.fingerprint, latest.attempt)
        output = StageOutput(folder=plan.store.child(stage.name).child(folder), manifest=latest)
        return measure_lengths(output)
    raise ConfigError("No stage of this recipe measures lengths: add them with --assume.")


def _find_share_reused(plan: Plan, stage: PlannedStage) -> float | None:
    """Find which share of its values a stage takes from earlier outputs; None while unknown."""
    reuse = stage.resolved.stage.reuse
    if reuse is None or stage.state == "done":
        return None
    inputs = {}
    for name in stage.inputs:
        before = plan.stage(name)
        manifest = before.out.manifest() if before.state == "done" else None
        if manifest is None:
            return None
        inputs[name] = StageOutput(folder=before.out.folder, manifest=manifest)
    return reuse.measure_share(plan.view(stage), plan.reusable.get(stage.name, ()), inputs)


def _find_share_left(stage: PlannedStage) -> float:
    if stage.state == "done":
        return 0.0
    layout = stage.out.layout() if stage.state == "resume" else None
    if layout is None or not layout.shards:
        return 1.0
    return 1 - len(stage.out.committed()) / len(layout.shards)


def _find_rate(
    stage: str, cost: Cost, measured: Measured | None, resources: Resources, assumed: Assumptions
) -> tuple[float, str]:
    """Find a worker's rate, in units of the cost a second, and where it comes from."""
    if cost.unit == "rows":
        if measured is not None:
            return measured.rate, f"{measured.rate:,.0f} rows/s a worker, as {measured.source}"
        rate = cost.rate_per_core * resources.num_cpus
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
            f"No {stage} was measured in this store. Name the kind of GPU: --assume gpu="
            f"{' | '.join(_PEAK_FLOPS)}."
        )
    rate = cost.rate_per_core * resources.num_cpus
    return rate, f"{rate / 1e9:,.0f} GFLOP/s a worker, assumed"


# --- how it is shown ----------------------------------------------------------------------------


def estimate_to_dict(estimate: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(estimate)


def show_estimate(estimate: Estimate) -> RenderableType:
    """Show what each stage will take, and what is saved by sharing prompts and by reuse."""
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
    hours = sum(stage.hours for stage in estimate.stages)
    gpu_hours = sum(stage.gpu_hours for stage in estimate.stages)
    num_bytes = sum(stage.num_bytes for stage in estimate.stages)
    table.add_row("all", "", _number(hours), _number(gpu_hours), _number(num_bytes / 1e9), "")
    lengths = estimate.lengths
    lines = [
        f"{estimate.num_pairs:,.0f} pairs of {lengths.prompt:.0f} + {lengths.chosen:.0f} and "
        f"{lengths.rejected:.0f} tokens ({lengths.source}).",
        *(
            f"{stage.stage} computes at most {stage.num_tokens:,.0f} tokens."
            for stage in estimate.stages
            if stage.num_tokens
        ),
        f"Computing each prompt once saves {estimate.num_prompt_tokens_saved:,.0f} tokens of "
        "scoring and training.",
        "The share that is reused is not known yet."
        if estimate.share_reused is None
        else f"{estimate.share_reused:.0%} of the sequences are reused, "
        f"{estimate.num_tokens_reused:,.0f} completion tokens.",
    ]
    return Group(table, Text("\n" + "\n".join(lines)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
