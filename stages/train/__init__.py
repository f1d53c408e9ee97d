"""The train stage: run a training (trainer.py) under Ray Train or in this process."""

import contextlib
import dataclasses
import logging
import math
import os
import uuid
from collections.abc import Iterable, Mapping

import msgspec

from schemas.errors import ConfigError, PipelineError, StageFailed, StageStopped
from schemas.manifest import Manifest
from stages.cost import (
    FLOPS_PER_CORE,
    Measured,
    TokenCount,
    Workload,
    read_input_lengths,
    size_named_model,
    size_pinned_model,
    train_flops,
)
from stages.models.layers import ALL_LINEAR, require_known, require_layers
from stages.models.resolve import (
    AdapterPin,
    ModelPin,
    TokenizerPin,
    join_adapter,
    pin_model,
)
from stages.models.vocabulary import require_same_vocabulary
from stages.stage import (
    Cost,
    Display,
    Pin,
    RecipeView,
    Resources,
    Stage,
    StageContext,
    StageResult,
    StageView,
    TextPin,
    auto_dtype,
)
from stages.store.filesystems import Folder
from stages.store.worker_logs import LOGS, written_log
from stages.train.config import (
    CHECKPOINTS,
    LESS_MEMORY,
    BestSettings,
    LoraSettings,
    TrainConfig,
    TrainExecution,
    TrainJob,
    read_outcome,
    read_stop,
)
from stages.train.log import METRICS_LOG, describe_step, read_progress, shown_progress
from stages.train.publish import TRACKERS, check_trackers, prepare_repository, publish_model

__all__ = ["STAGE", "BestSettings", "LoraSettings", "TrainConfig", "TrainExecution", "run"]

logger = logging.getLogger(__name__)

MAX_LOST_PROCESSES = 3
"""Times that a training resumes from its newest checkpoint after losing a worker process."""


def run(config: TrainConfig, ctx: StageContext) -> StageResult:
    """Train the policy, or adopt the result of a training that finished without a manifest."""
    start, tokenizer, template = (ctx.pins[name] for name in ("model", "tokenizer", "template"))
    assert isinstance(start, ModelPin)
    assert isinstance(tokenizer, TokenizerPin)
    assert isinstance(template, TextPin)
    job = _with_absolute_paths(
        TrainJob(
            config=config,
            execution=ctx.execution,
            start=start,
            tokenizer=tokenizer,
            template=None if template.text == template.identity() else template.text,
            inputs=ctx.inputs,
            out=ctx.out,
            num_threads=max(1, int(ctx.resources.num_cpus)),
        )
    )
    if read_outcome(job) is None:
        check_trackers(job)
        if job.execution.push_to_hub:
            prepare_repository(job.execution.push_to_hub)
        with shown_progress(job.out.folder, ctx.progress):
            if ctx.is_local:
                _train_here(job, ctx.resources)
            else:
                _train_with_ray(job, ctx.resources)
    outcome = read_outcome(job)
    if outcome is None:
        stop = read_stop(job.out)
        assert stop is not None, "the first worker writes either before it returns"
        raise StageStopped(
            f"Training stopped after step {stop.step} of {stop.num_steps}, as "
            "execution.train.stop_after says. Run again without it to go on."
        )
    if job.execution.push_to_hub:
        address = publish_model(
            job.out.folder.child("model"),
            job.execution.push_to_hub,
            fingerprint=job.out.footer["dpo.fingerprint"],
        )
        logger.info("uploaded the model: %s", address)
    if not job.execution.keep_checkpoints:
        job.out.folder.delete_folder(CHECKPOINTS)
    if job.out.folder.exists(METRICS_LOG):
        job.out.folder.delete_file(METRICS_LOG)
    return StageResult(files=outcome.files, summary=outcome.summary)


def _with_absolute_paths(job: TrainJob) -> TrainJob:
    """Make every folder absolute, because workers may have another working directory."""
    inputs = {
        name: dataclasses.replace(output, folder=_absolute(output.folder))
        for name, output in job.inputs.items()
    }
    out = dataclasses.replace(job.out, folder=_absolute(job.out.folder))
    return dataclasses.replace(job, inputs=inputs, out=out)


def _absolute(folder: Folder) -> Folder:
    return Folder(os.path.abspath(folder.uri)) if "://" not in folder.uri else folder


def _train_here(job: TrainJob, resources: Resources) -> None:
    """Train as the only worker, in this process."""
    import torch

    from stages.train.trainer import train
    from stages.train.world import World

    with _kept_log(job, 0):
        train(job, World(device=torch.device("cuda" if resources.num_gpus else "cpu")))


def _kept_log(job: TrainJob, rank: int) -> contextlib.AbstractContextManager[None]:
    """Write a worker's log lines to the stage's directory if keep_logs is set."""
    if not job.execution.keep_logs:
        return contextlib.nullcontext()
    return written_log(job.out.folder.child(LOGS), f"worker-{rank:05d}.log")


def _train_with_ray(job: TrainJob, resources: Resources) -> None:
    """Train on Ray Train's workers, resuming from the newest checkpoint if a process is lost.

    Retries are ours, because Ray Train would also retry Python exceptions. So are checkpoints,
    because a run cannot continue from a damaged snapshot of Ray's.

    Raises:
        StageFailed: too many processes were lost.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from stages.train.compat import keep_sigint_handler

    for num_lost in range(MAX_LOST_PROCESSES + 1):
        scratch = job.out.work("ray").folder
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job},
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=resources.num_gpus > 0,
                resources_per_worker={"CPU": resources.num_cpus, "GPU": resources.num_gpus},
            ),
            run_config=ray.train.RunConfig(
                name=f"train-{uuid.uuid4().hex[:12]}",
                storage_path=scratch.path,
                storage_filesystem=scratch.filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=0,
                    controller_failure_limit=0,  # type: ignore[call-arg]  # Only in Ray Train V2.
                ),
            ),
        )
        keep_sigint_handler(trainer)
        try:
            trainer.fit()
            return
        except ray.train.WorkerGroupError as error:
            _raise_own_exception(error.worker_failures.values(), error)
            lost = error
        logger.warning("lost a training worker (%d): %s", num_lost + 1, lost)
    raise StageFailed(
        f"Training lost a worker process {MAX_LOST_PROCESSES + 1} times; the last time: {lost}. "
        f"Usually such a process was killed because memory ran out: {LESS_MEMORY}."
    )


def _raise_own_exception(failures: Iterable[Exception], error: Exception) -> None:
    """Raise the exception that our own code raised in a worker, unless a process was lost.

    Ray reports a dead actor or node by an exception class of its own. The other processes then fail
    in their collectives with torch's exceptions, so one exception of Ray's is decisive.
    """
    failures = list(failures)
    if any(type(failure).__module__.split(".")[0] == "ray" for failure in failures):
        return
    own = [failure for failure in failures if isinstance(failure, PipelineError)]
    raise (own or failures)[0] from error


def _work(settings: dict[str, TrainJob]) -> None:
    """Train as one of Ray Train's workers."""
    import ray.train
    import ray.train.torch

    from stages.train.trainer import train
    from stages.train.world import World

    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    with _kept_log(settings["job"], world.rank):
        train(settings["job"], world)


def complete(config: TrainConfig, recipe: RecipeView) -> TrainConfig:
    """Choose the dtype by the device, unless one is named."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype=auto_dtype(recipe))


def inherit_pins(config: TrainConfig, recipe: RecipeView) -> Mapping[str, Pin]:
    """Start from the reference, unless another start is named; export what encoded the pairs."""
    encoding = {name: recipe.pin("encode", name) for name in ("tokenizer", "template")}
    pins = {name: pin for name, pin in encoding.items() if pin is not None}
    if config.model is not None:
        return pins
    model, adapter = recipe.pin("score", "model"), recipe.pin("score", "adapter")
    assert isinstance(model, ModelPin)
    start = join_adapter(model, adapter) if isinstance(adapter, AdapterPin) else model
    return {**pins, "model": start}


def check(stage: StageView) -> None:
    """Refuse a start that cannot be opened, has another vocabulary, or lacks the named layers, and
    quantised weights that would be sharded.

    Raises:
        ConfigError: see there.
    """
    start, tokenizer = stage.pins["model"], stage.pins["tokenizer"]
    assert isinstance(start, ModelPin)
    assert isinstance(tokenizer, TokenizerPin)
    config = stage.config
    if config.model is not None or not config.needs_reference:
        # Where the start is the reference, score's own check has done this.
        key = "stages.score.model" if config.model is None else "stages.train.model"
        require_known(start, key=key)
        require_same_vocabulary(start, tokenizer, key=key)
    lora = config.lora
    if config.is_quantized and stage.execution.parallelism == "fsdp2":
        raise ConfigError(
            "stages.train.lora.quantization quantises whole weights, and "
            "execution.train.parallelism: fsdp2 splits them over workers. Leave parallelism at "
            "auto, with which each worker holds all quantised weights, or drop quantization."
        )
    if lora is not None:
        names = (ALL_LINEAR,) if lora.target_modules == ALL_LINEAR else lora.target_modules
        require_layers(start, names, key="stages.train.lora.target_modules")


# --- what the engine is told --------------------------------------------------------------------


def describe_progress(folder: Folder) -> str:
    """Describe how far an unfinished training is by its log; empty where that cannot be read."""
    # The log may be damaged, or be deleted meanwhile by the run that writes it.
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        started, newest = read_progress(folder)
        if started is not None:
            step = f"step {newest.step if newest else started.step:,} of {started.num_steps:,}"
            return f"{step}: {describe_step(newest)}" if newest else step
    return ""


def list_highlights(manifest: Manifest) -> list[tuple[str, str]]:
    """Sum up training in lines: steps, loss, margin."""
    found = manifest.summary
    first, last = found["first"], found["last"]
    left_out = found.get("num_pairs_left_out", 0)
    selected = f"{found['num_train_pairs']:,} pairs, {left_out:,} left out by where"
    return [
        ("training", f"{found['num_steps']} steps, {found['pairs_per_second']:.1f} pairs/s"),
        *([("trained on", selected)] if left_out else []),
        ("loss, first to last step", f"{first['loss']:.4f} → {last['loss']:.4f}"),
        (
            "reward margin, first to last step",
            f"{first['rewards/margins']:.3f} → {last['rewards/margins']:.3f}",
        ),
    ]


def _count_work(stage: StageView, load: Workload) -> float:
    start, config = stage.pins["model"], stage.config
    assert isinstance(start, ModelPin)
    num_pairs = (1 - stage.recipe.config("validate").eval_fraction) * load.num_pairs
    per_epoch = train_flops(
        size_pinned_model(start),
        load.lengths,
        num_pairs,
        is_adapter=config.lora is not None,
        recomputes=stage.execution.gradient_checkpointing,
    )
    return float(config.num_epochs * per_epoch)


BYTES_PER_VISIT = 40
"""Stored for each time that a pair is trained on or evaluated: 16 bytes of its random id, and four
or five float32, which hardly compress."""


def _count_bytes(stage: StageView, load: Workload) -> float:
    start, config = stage.pins["model"], stage.config
    assert isinstance(start, ModelPin)
    size = size_pinned_model(start)
    share_held_out = stage.recipe.config("validate").eval_fraction
    num_steps = math.ceil((1 - share_held_out) * load.num_pairs / config.global_batch_size)
    num_evaluations = 2.0
    if config.eval_every_steps:
        num_evaluations += config.num_epochs * num_steps // config.eval_every_steps
    visits = (1 - share_held_out) * config.num_epochs + share_held_out * num_evaluations
    # The exported model in float32, and a row each time that a pair is trained on or evaluated.
    return 4 * (size.body + size.head) + BYTES_PER_VISIT * visits * load.num_pairs


def _count_workers(stage: StageView, load: Workload) -> float:
    return float(stage.config.global_batch_size)


def _count_tokens(stage: StageView, load: Workload) -> TokenCount:
    num_pairs = load.num_pairs * stage.config.num_epochs
    return TokenCount(num_prompt_tokens_saved=num_pairs * load.lengths.prompt)


def _measure(manifest: Manifest, store: Folder) -> Measured | None:
    found, config = manifest.summary, manifest.config
    num_pairs = found["num_train_pairs"] * config["num_epochs"]
    busy_seconds = num_pairs / found["pairs_per_second"]
    work = train_flops(
        size_named_model(found["start_model"]["spec"]),
        read_input_lengths(manifest, store),
        num_pairs,
        is_adapter=config["lora"] is not None,
        recomputes=False,
    )
    if busy_seconds <= 0 or work <= 0:
        return None
    return Measured(
        rate=work / (busy_seconds * found["num_workers"]),
        start_seconds=max(0.0, manifest.seconds - busy_seconds),
        bytes_per_pair=None,
        source=f"{manifest.stage}/{manifest.fingerprint}",
    )


STAGE = Stage(
    name="train",
    version=4,
    needs=lambda config: config.needed_stages,
    config=TrainConfig,
    execution=TrainExecution,
    run=run,
    complete=complete,
    pins={"model": pin_model},
    inherit_pins=inherit_pins,
    check=check,
    numeric_packages=("torch", "transformers", "peft"),
    is_redone_whole=True,
    side_folders=(CHECKPOINTS, *TRACKERS),
    names_runs=True,
    read_stop=read_stop,
    cost=Cost(
        unit="flops",
        count_work=_count_work,
        rate_per_core=FLOPS_PER_CORE,
        count_bytes=_count_bytes,
        max_workers=_count_workers,
        measure=_measure,
        count_tokens=_count_tokens,
    ),
    display=Display(
        list_highlights=list_highlights,
        products={"model": "model"},
        describe_progress=describe_progress,
    ),
)
