"""How is a policy trained on preferences, with no reference model at hand? One worker, to the end.

Direct preference optimisation raises the log-probability of a chosen answer over that of a rejected
one, relative to a frozen reference model. Of the reference only numbers are needed, and they are in
the scores, one for every completion token. With them and its own values the policy takes its steps
(step.py).

Everything that a step depends on is a function of the config and the step's number, or is in the
checkpoint. So a training that was killed ends with the bits of one that was not.
"""

import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from schemas.errors import DataError, StageFailed
from schemas.manifest import FileRecord
from stages.policy.memory import explained_shortage
from stages.store.shards import write_table
from stages.train.best import find_best, has_lost_patience
from stages.train.checkpoint import Checkpoints
from stages.train.config import LESS_MEMORY, TrainConfig, TrainExecution
from stages.train.drift import NUM_DRIFT_PAIRS, check_drift, measure_drift
from stages.train.export import export_model
from stages.train.job import CHECKPOINTS, Outcome, TrainJob, describe_origin, write_outcome
from stages.train.log import Drifted, Evaluated, Line, MetricsLog, Started, Stepped
from stages.train.microbatch import (
    EpochTokens,
    Layout,
    StepBatch,
    lay_out_blank,
    lay_out_pairs,
    plan_epoch,
    prefetch,
    read_batches,
)
from stages.train.order import EpochOrder, order_epoch
from stages.train.pairs import PairIndex, PairReader, index_pairs
from stages.train.policy import Policy, make_optimizer, open_policy, open_whole
from stages.train.schedule import learning_rate_at
from stages.train.sharding import gather_rows, is_sharded, shard_policy
from stages.train.step import NO_METRICS, evaluate, rehearse, take_step
from stages.train.trackers import open_trackers
from stages.train.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How many optimizer steps there are, and where in the epochs each one stands."""

    num_pairs: int
    batch_size: int
    num_epochs: int

    @property
    def in_epoch(self) -> int:
        return -(-self.num_pairs // self.batch_size)

    @property
    def total(self) -> int:
        return self.in_epoch * self.num_epochs

    def epochs_done(self, step: int) -> float:
        """Give the passes over the data after a step, with a fraction."""
        epoch, batch = divmod(step, self.in_epoch)
        return epoch + batch * self.batch_size / self.num_pairs


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one worker of a training holds, from its start to its end."""

    job: TrainJob
    world: World
    train_index: PairIndex
    eval_index: PairIndex
    steps: Steps
    policy: Policy
    layout: Layout
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    log: MetricsLog

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def last_metrics(self) -> Mapping[str, float]:
        """The metrics of the last step, among which a loss finds what it remembers."""
        steps = (line.metrics for line in reversed(self.log.lines) if isinstance(line, Stepped))
        return next(steps, NO_METRICS)

    @property
    def best_step(self) -> int | None:
        """The best step so far, where the best is wanted."""
        best = find_best(self.log.lines, self.config.keep_best)
        return best.step if best else None


@explained_shortage(
    f"{LESS_MEMORY}, or turn execution.train.gradient_checkpointing on. Run again to go on from "
    "the last checkpoint."
)
def train(job: TrainJob, world: World) -> None:
    """Train as one process of a world, from the start or the newest checkpoint to the export.

    Raises:
        DataError: encode and score do not fit each other, or there is nothing to train on.
        ConfigError: the start should give the stored reference's values, and does not; or a
            checkpoint is another training's.
        StageFailed: the loss or the gradient is not finite, or memory did not suffice.
    """
    training = open_training(job, world)
    config, steps = job.config, training.steps
    num_done = resume(training)
    epoch = plan(training, num_done)
    if num_done < steps.total:
        rehearse(
            training.policy,
            lay_out_blank(
                training.train_index, epoch.largest, layout=training.layout, device=world.device
            ),
        )
    if num_done == 0:
        if job.has_reference:
            _compare_with_reference(training)
        evaluate_after(0, training)
    is_over = num_done == steps.total or _has_lost_patience(training)
    batches = iter(()) if is_over else read_all_epochs(training, first_step=num_done + 1)
    started = time.perf_counter()
    for step, batch in enumerate(prefetch(batches), start=num_done + 1):
        learning_rate = learning_rate_at(
            step,
            peak=config.learning_rate,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            num_steps=steps.total,
        )
        metrics = take_step(
            training.policy,
            training.optimizer,
            batch,
            config,
            step=step,
            learning_rate=learning_rate,
            world=world,
            before=training.last_metrics,
        )
        training.log.append(
            Stepped(
                step=step,
                metrics={"step": step, "epoch": steps.epochs_done(step), **metrics},
                num_padded_tokens=batch.num_padded_tokens,
                seconds=time.perf_counter() - started,
                memory_bytes=_peak_memory_bytes(world.device),
            )
        )
        is_over = step == steps.total
        if is_over or (config.eval_every_steps and step % config.eval_every_steps == 0):
            evaluate_after(step, training)
            is_over = is_over or _has_lost_patience(training)
        if _is_checkpoint_due(step, training, is_over=is_over):
            training.checkpoints.save(
                step,
                training.policy.trained_parameters,
                training.optimizer,
                training.log,
                best_step=training.best_step,
                world=world,
            )
        if is_over:
            break
        started = time.perf_counter()
    finish(training)


def open_training(job: TrainJob, world: World) -> Training:
    """Find the pairs, open the policy where it starts, and plan the steps."""
    torch.set_num_threads(job.num_threads)
    config, execution = job.config, job.execution
    indexes = index_pairs(job.inputs, needs_margin=config.needs_margin)
    train_index, eval_index = indexes["train"], indexes["eval"]
    if not len(train_index):
        raise DataError("No pair of the split `train` was encoded and scored: nothing to train on.")
    if config.keep_best and not len(eval_index):
        raise DataError(
            "train.keep_best compares evaluations, but no pair is held out: set "
            "stages.validate.eval_fraction, or drop keep_best."
        )
    policy = open_policy(
        config,
        job.start,
        device=world.device,
        max_length=max(train_index.max_sequence_length, eval_index.max_sequence_length),
        max_logits=execution.max_logits,
        gradient_checkpointing=execution.gradient_checkpointing,
        is_lean=execution.parallelism != "fsdp2",
    )
    if execution.parallelism == "fsdp2":
        policy = shard_policy(policy, world)
    return Training(
        job=job,
        world=world,
        train_index=train_index,
        eval_index=eval_index,
        steps=Steps(
            num_pairs=len(train_index),
            batch_size=config.global_batch_size,
            num_epochs=config.num_epochs,
        ),
        policy=policy,
        layout=Layout(
            max_tokens=tokens_per_microbatch(execution, world.device),
            rows=world.from_first(policy.rows),
        ),
        optimizer=make_optimizer(policy, config),
        checkpoints=Checkpoints(
            folder=job.out.folder.child(CHECKPOINTS),
            num_kept=execution.num_checkpoints_kept,
            made_by=describe_origin(job),
        ),
        log=MetricsLog(
            folder=job.out.folder,
            is_written=world.is_first,
            trackers=open_trackers(job) if world.is_first else (),
        ),
    )


def resume(training: Training) -> int:
    """Go back to the newest checkpoint, if there is one, and give the number of steps done."""
    world, checkpoints = training.world, training.checkpoints
    commit = world.from_first(checkpoints.newest() if world.is_first else None)
    lines: list[Line] = []
    if commit:
        lines = checkpoints.load(commit, training.policy.trained_parameters, training.optimizer)
    training.log.replace(lines)
    return commit.step if commit else 0


def plan(training: Training, num_done: int) -> EpochTokens:
    """Count what the epoch after so many steps holds, and note how the training starts."""
    world = training.world
    epoch = plan_epoch(
        training.train_index,
        _order(training.train_index, training.config, epoch=num_done // training.steps.in_epoch),
        batch_size=training.steps.batch_size,
        layout=training.layout,
        world=world,
    )
    logger.info(
        "an epoch is %d steps of %d tokens on average and %d at most, with %.1f %% padding",
        training.steps.in_epoch,
        epoch.total // training.steps.in_epoch,
        epoch.most,
        100 * epoch.padding_share,
    )
    training.log.append(
        Started(
            step=num_done,
            num_steps=training.steps.total,
            num_train_pairs=len(training.train_index),
            num_eval_pairs=len(training.eval_index),
            num_workers=world.size,
            device=_describe_device(world.device),
            shares_prompt=training.layout.shares_prompt,
            num_epoch_tokens=epoch.total,
            epoch_padding_share=epoch.padding_share,
        )
    )
    return epoch


def evaluate_after(step: int, training: Training) -> None:
    """Evaluate the held-out pairs, if there are any, and note the result.

    Raises:
        StageFailed: the loss is not finite.
    """
    metrics = evaluate(
        training.policy,
        training.eval_index,
        training.config,
        before=training.last_metrics,
        layout=training.layout,
        world=training.world,
    )
    if metrics is None:
        return
    if not np.isfinite(metrics["loss"]):
        raise StageFailed(
            f"After step {step} the loss of the held-out pairs is {metrics['loss']}: the training "
            "has diverged. Lower learning_rate, add warmup_steps, or use dtype float32."
        )
    training.log.append(Evaluated(step=step, metrics={"step": step, **metrics}))


def _has_lost_patience(training: Training) -> bool:
    """Decide for all workers at once, so that none goes on alone."""
    is_over = has_lost_patience(training.log.lines, training.config.keep_best)
    return training.world.from_first(is_over)


def _is_checkpoint_due(step: int, training: Training, *, is_over: bool) -> bool:
    """Whether to save: every so many steps, each new best, and the end if it is to be kept."""
    if step == training.best_step:
        return True
    execution = training.job.execution
    if is_over:
        return execution.keep_checkpoints
    return step % execution.checkpoint_every_steps == 0


def finish(training: Training) -> None:
    """Export the weights that are wanted, and write what the driver waits for."""
    job, policy = training.job, training.policy
    summary = summarise(job, training.log)
    # All workers are needed to put a sharded policy together; the first one then has it.
    is_split = is_sharded(policy.trained_parameters)
    if training.world.is_first and is_split:
        policy = open_whole(policy, job.config, job.start)
    if is_split and training.best_step is None:
        is_first = training.world.is_first
        gather_rows(training.policy, into=policy if is_first else None)
    if not training.world.is_first:
        return
    if training.best_step is not None:
        training.checkpoints.load_best(training.best_step, policy.trained_parameters)
    files = [*export_model(policy, job, summary), *_write_tables(job, training.log)]
    training.log.close()
    write_outcome(job, Outcome(files=files, summary=summary))


def read_all_epochs(training: Training, *, first_step: int) -> Iterator[StepBatch]:
    """Give this worker's share of the batch of every step, from `first_step` on."""
    steps = training.steps
    first_epoch, first_batch = divmod(first_step - 1, steps.in_epoch)
    for epoch in range(first_epoch, steps.num_epochs):
        yield from read_batches(
            training.train_index,
            _order(training.train_index, training.config, epoch),
            batch_size=steps.batch_size,
            first=first_batch if epoch == first_epoch else 0,
            layout=training.layout,
            world=training.world,
        )


def _order(index: PairIndex, config: TrainConfig, epoch: int) -> EpochOrder:
    return order_epoch(
        index.num_pairs_S.tolist(),
        index.num_bytes_S.tolist(),
        seed=config.seed,
        epoch=epoch,
        window_bytes=config.shuffle_window_bytes,
    )


def _compare_with_reference(training: Training) -> None:
    """Measure the drift on the first pairs of the first epoch; every worker does it for itself."""
    job, layout = training.job, training.layout
    order = _order(training.train_index, job.config, epoch=0)
    reader = PairReader(index=training.train_index, order=order)
    drift = measure_drift(
        training.policy,
        [
            lay_out_pairs([pair], device=training.world.device, rows=layout.rows)
            for pair in reader.read(order.pairs_P[:NUM_DRIFT_PAIRS])
        ],
        beta=job.config.losses[0].reward_scale,
        is_reference=job.starts_from_reference,
        is_float32=job.is_float32,
    )
    check_drift(drift)
    training.log.append(Drifted(drift=drift))


def summarise(job: TrainJob, log: MetricsLog) -> dict[str, Any]:
    """Say in numbers how the training went, from its log alone."""
    starts = [line for line in log.lines if isinstance(line, Started)]
    steps = [line for line in log.lines if isinstance(line, Stepped)]
    evaluations = [line.metrics for line in log.lines if isinstance(line, Evaluated)]
    drift = next((line.drift for line in log.lines if isinstance(line, Drifted)), None)
    rewarded = job.config.losses[0]
    seconds = sum(line.seconds for line in steps)
    num_tokens = sum(line.metrics["num_tokens"] for line in steps)
    num_padded_tokens = sum(line.num_padded_tokens for line in steps)
    best = find_best(log.lines, job.config.keep_best)
    return {
        "num_steps": starts[-1].num_steps,
        "num_train_pairs": starts[-1].num_train_pairs,
        "num_eval_pairs": starts[-1].num_eval_pairs,
        "stopped_early": steps[-1].step < starts[-1].num_steps,
        "exported_step": best.step if best else steps[-1].step,
        "first": steps[0].metrics,
        "last": steps[-1].metrics,
        "eval_before": evaluations[0] if evaluations else None,
        "eval_best": best.metrics if best else None,
        "eval_after": evaluations[-1] if evaluations else None,
        "drift": msgspec.to_builtins(drift),
        "reward": {"of": rewarded.reward_of, "scale": rewarded.reward_scale},
        "pairs_per_second": sum(line.metrics["num_pairs"] for line in steps) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "padding_share": 1 - num_tokens / num_padded_tokens,
        "peak_memory_bytes": max(line.memory_bytes for line in steps),
        "device": starts[-1].device,
        "num_workers": starts[-1].num_workers,
        "shares_prompt": starts[-1].shares_prompt,
        "resumes": [
            {"step": line.step, "num_workers": line.num_workers} for line in starts if line.step
        ],
        "start_model": msgspec.to_builtins(job.start),
    }


def _write_tables(job: TrainJob, log: MetricsLog) -> list[FileRecord]:
    return [
        write_table(job.out, name, table, schema) for name, (table, schema) in log.tables().items()
    ]


def tokens_per_microbatch(execution: TrainExecution, device: torch.device) -> int:
    if execution.max_tokens_per_microbatch == "auto":
        return 640 if device.type == "cpu" else 8192
    return execution.max_tokens_per_microbatch


def _describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_bytes(device: torch.device) -> int:
    """Give the most that was resident in this process (CPU) or allocated on the device (GPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
