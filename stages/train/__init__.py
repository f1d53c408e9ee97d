"""The train stage: run a training (trainer.py) under Ray Train or in this process."""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import replace

from schemas.errors import PipelineError, StageFailed
from stages.models.resolve import ModelPin
from stages.stage import Resources, Stage, StageContext, StageResult
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
)
from stages.train.log import METRICS_LOG, shown_progress
from stages.train.publish import check_trackers, prepare_repository, publish_model

__all__ = ["STAGE", "BestSettings", "LoraSettings", "TrainConfig", "TrainExecution", "run"]

logger = logging.getLogger(__name__)

MAX_LOST_PROCESSES = 3
"""Times that a training resumes from its newest checkpoint after losing a worker process."""


def run(config: TrainConfig, ctx: StageContext) -> StageResult:
    """Train the policy, or adopt the result of a training that finished without a manifest."""
    start = ctx.pins["model"]
    assert isinstance(start, ModelPin)
    job = _with_absolute_paths(
        TrainJob(
            config=config,
            execution=ctx.execution,
            start=start,
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
    assert outcome is not None, "the first worker writes it before it returns"
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
        name: replace(output, folder=_absolute(output.folder))
        for name, output in job.inputs.items()
    }
    return replace(job, inputs=inputs, out=replace(job.out, folder=_absolute(job.out.folder)))


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


STAGE = Stage(
    name="train",
    version=3,
    needs=lambda config: ("encode", "score") if config.needs_reference else ("encode",),
    config=TrainConfig,
    execution=TrainExecution,
    run=run,
    pins={"model": "model"},
)
