"""Training loop of one worker: read cached reference log-probs, take optimizer steps, export.

DPO raises the log-probability of a chosen answer over that of a rejected one, relative to a frozen
reference model. Training needs only the stored reference log-probs, one per completion token, so no
reference model is loaded.

All that a step depends on is a function of the config and the step's number, or is stored in the
checkpoint. A training that was killed and resumed therefore ends with the same bits as one that was
not.
"""

import gc
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from schemas.errors import ConfigError, DataError, StageFailed
from stages.policy.memory import explained_shortage
from stages.scorers.devices import choose_device
from stages.stage import Stop
from stages.store.shards import write_table
from stages.train.checkpoint import Checkpoints, describe_origin
from stages.train.config import (
    CHECKPOINTS,
    LESS_MEMORY,
    Outcome,
    TrainConfig,
    TrainJob,
    write_outcome,
    write_stop,
)
from stages.train.dynamics import DynamicsLog, open_dynamics
from stages.train.export import export_model
from stages.train.log import (
    Drift,
    Drifted,
    Evaluated,
    Line,
    MetricsLog,
    Started,
    Stepped,
    find_best,
    has_lost_patience,
    summarise,
)
from stages.train.losses import SideLogps
from stages.train.microbatch import (
    EpochTokens,
    Layout,
    MicroBatch,
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
from stages.train.probe import compute_probe, take_probe
from stages.train.publish import open_trackers
from stages.train.sharding import (
    discard_pass,
    free_gathered,
    gather_rows,
    holds_shards,
    open_sharded,
)
from stages.train.step import NO_METRICS, evaluate, rehearse, take_step
from stages.train.world import World

logger = logging.getLogger(__name__)

NUM_DRIFT_PAIRS = 32
"""Pairs that the drift gate compares with the reference: 64 sequences."""

MAX_TOKEN_DIFFERENCE = 1e-3
"""Nats. Float32 engines running one model stay within 4e-5 of each other."""
MAX_MEAN_DIFFERENCE = 0.02
"""Nats per token, where either side computes in bfloat16: rounding has no direction."""
MAX_TIMES_USUAL = 3.0
"""How many times the median that scoring's own check recorded is usual in bfloat16. Rounding of two
engines explains 1.4 times."""


@explained_shortage(
    f"{LESS_MEMORY}, or turn execution.train.gradient_checkpointing on. Run again to go on from "
    "the last checkpoint."
)
def train(job: TrainJob, world: World) -> None:
    """Train as one process of a world, from the start or the newest checkpoint to the export.

    Raises:
        DataError: encode and score do not match, or there is nothing to train on.
        ConfigError: the start should reproduce the stored reference values and does not, or a
            checkpoint belongs to another training.
        StageFailed: the loss or the gradient is not finite, or memory ran out.
    """
    with world.joined() if job.execution.shards(world.device.type) else nullcontext():
        open_trainer(job, world).run()


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The optimizer steps of a training and their positions in the epochs."""

    num_pairs: int
    batch_size: int
    num_epochs: int

    @property
    def in_epoch(self) -> int:
        return -(-self.num_pairs // self.batch_size)

    @property
    def total(self) -> int:
        return self.in_epoch * self.num_epochs

    def epoch_of(self, step: int) -> int:
        """Return the pass over the data, from 1, that a step belongs to."""
        return 1 + (step - 1) // self.in_epoch

    def epochs_done(self, step: int) -> float:
        """Return the passes over the data completed after a step, as a fraction."""
        epoch, batch = divmod(step, self.in_epoch)
        return epoch + batch * self.batch_size / self.num_pairs


@dataclass(kw_only=True)
class Trainer:
    """One worker of a training: its data, policy, optimizer, checkpoints and log."""

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
    dynamics: Mapping[str, DynamicsLog]
    """By split."""

    def run(self) -> None:
        """Resume or start, take the remaining steps, and export; or stop before, if told to."""
        config, steps = self.config, self.steps
        num_done = self.resume()
        epoch = self.rehearse(num_done) if num_done < steps.total else self.plan(num_done)
        self.log_start(num_done, epoch)
        if num_done == 0:
            if self.job.has_reference:
                self.compare_with_reference()
            self.evaluate_after(0)
        is_over = num_done == steps.total or self.has_lost_patience()
        is_stopped = num_done >= self.stop_step
        batches = (
            iter(()) if is_over or is_stopped else self.read_all_epochs(first_step=num_done + 1)
        )
        started = time.perf_counter()
        for step, batch in enumerate(prefetch(batches), start=num_done + 1):
            self.dynamics["train"].begin_step(step, epoch=steps.epoch_of(step))
            metrics = take_step(
                self.policy,
                self.optimizer,
                batch,
                config,
                step=step,
                learning_rate=config.learning_rate_at(step, num_steps=steps.total),
                world=self.world,
                before=self.last_metrics,
                dynamics=self.dynamics["train"],
            )
            self.log.append(
                Stepped(
                    step=step,
                    metrics={"step": step, "epoch": steps.epochs_done(step), **metrics},
                    num_padded_tokens=batch.num_padded_tokens,
                    seconds=time.perf_counter() - started,
                    memory_bytes=_peak_memory_bytes(self.world.device),
                )
            )
            is_over = step == steps.total
            if is_over or (config.eval_every_steps and step % config.eval_every_steps == 0):
                self.evaluate_after(step)
                is_over = is_over or self.has_lost_patience()
            num_done, is_stopped = step, step == self.stop_step
            if self.is_checkpoint_due(step, is_over=is_over) or (is_stopped and not is_over):
                self.save_checkpoint(step)
            if is_over or is_stopped:
                break
            started = time.perf_counter()
        if is_over:
            self.finish()
        else:
            self.stop(num_done)

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def stop_step(self) -> int:
        """Step to stop after: the last one, unless an earlier one is asked for."""
        fraction = self.job.execution.stop_after
        return self.steps.total if fraction is None else math.ceil(fraction * self.steps.total)

    @property
    def last_metrics(self) -> Mapping[str, float]:
        """Metrics of the last step, which include the state of losses that keep one."""
        steps = (line.metrics for line in reversed(self.log.lines) if isinstance(line, Stepped))
        return next(steps, NO_METRICS)

    @property
    def best_step(self) -> int | None:
        """The best step so far; None without keep_best or before the first evaluation."""
        best = find_best(self.log.lines, self.config.keep_best)
        return best.step if best else None

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the number of steps done."""
        world, checkpoints = self.world, self.checkpoints
        commit = world.from_first(checkpoints.newest() if world.is_first else None)
        lines: list[Line] = []
        for log in self.dynamics.values():
            log.replace(commit.dynamics.get(log.schema.name, ()) if commit else ())
        if commit:
            lines = checkpoints.load(commit, self.policy.trained_parameters, self.optimizer)
        self.log.replace(lines)
        return commit.step if commit else 0

    def rehearse(self, num_done: int) -> EpochTokens:
        """Plan the epoch that follows `num_done` steps, and dry-run its largest micro-batch.

        Running out of memory then shows at once. On a GPU, an automatic
        `max_tokens_per_microbatch` is halved until there is room.
        """
        while True:
            epoch = self.plan(num_done)
            largest = epoch.largest
            batch = lay_out_blank(
                self.train_index, largest, layout=self.layout, device=self.world.device
            )
            has_room = True
            try:
                rehearse(self.policy, batch)
            except torch.OutOfMemoryError:
                # With fsdp2, the other workers wait for this one in the middle of their layers.
                is_fixed = self.job.execution.max_tokens_per_microbatch != "auto"
                waits = self.world.size > 1 and holds_shards(self.policy)
                if is_fixed or waits or len(largest) == 1:
                    raise
                discard_pass(self.policy)
                has_room = False
            if all(self.world.gather(has_room)):
                return epoch
            self.layout = replace(self.layout, max_tokens=self.layout.max_tokens // 2)
            logger.warning(
                "no memory for the largest micro-batch: now at most %d tokens",
                self.layout.max_tokens,
            )

    def plan(self, num_done: int) -> EpochTokens:
        """Count the tokens of the epoch that follows `num_done` steps."""
        return plan_epoch(
            self.train_index,
            self._order(num_done // self.steps.in_epoch),
            batch_size=self.steps.batch_size,
            layout=self.layout,
            world=self.world,
        )

    def log_start(self, num_done: int, epoch: EpochTokens) -> None:
        """Log how the training starts, and the tokens of its first epoch."""
        logger.info(
            "%d steps per epoch with %d tokens on average and %d at most, %.1f %% padding",
            self.steps.in_epoch,
            epoch.total // self.steps.in_epoch,
            epoch.most,
            100 * epoch.padding_share,
        )
        self.log.append(
            Started(
                step=num_done,
                num_steps=self.steps.total,
                num_train_pairs=len(self.train_index),
                num_eval_pairs=len(self.eval_index),
                num_left_out=self.train_index.num_left_out,
                num_workers=self.world.size,
                device=_describe_device(self.world.device),
                shares_prompt=self.layout.shares_prompt,
                num_epoch_tokens=epoch.total,
                epoch_padding_share=epoch.padding_share,
            )
        )

    def compare_with_reference(self) -> None:
        """Run the drift gate on the first pairs of the first epoch, on every worker.

        Raises:
            ConfigError: the start should reproduce the reference and does not.
        """
        order = self._order(epoch=0)
        reader = PairReader(index=self.train_index, order=order)
        drift = measure_drift(
            self.policy,
            [
                lay_out_pairs([pair], device=self.world.device, rows=self.layout.rows)
                for pair in reader.read(order.pairs_P[:NUM_DRIFT_PAIRS])
            ],
            beta=self.config.losses[0].reward_scale,
            is_reference=self.job.starts_from_reference,
            is_float32=self.job.is_float32,
        )
        check_drift(drift, usual_median=self.job.scoring_median)
        self.log.append(Drifted(drift=drift))

    def evaluate_after(self, step: int) -> None:
        """Evaluate the held-out pairs, if there are any, and log the result.

        Raises:
            StageFailed: the loss is not finite.
        """
        self.dynamics["eval"].begin_step(step)
        metrics = self.measure_held_out(step, dynamics=self.dynamics["eval"])
        if metrics is not None:
            self.log.append(Evaluated(step=step, metrics={"step": step, **metrics}))

    def stop(self, step: int) -> None:
        """Leave the training unfinished after a step, whose checkpoint is written.

        The values of the held-out pairs are no part of the logs, which stay those of a training
        that never stopped.

        Raises:
            StageFailed: the loss is not finite.
        """
        metrics = self.measure_held_out(step, dynamics=None)
        assert metrics is not None, "open_trainer refuses to stop without held-out pairs"
        self.log.close()
        if self.world.is_first:
            stop = Stop(step=step, num_steps=self.steps.total, metrics=metrics)
            write_stop(self.job.out, stop)

    def measure_held_out(
        self, step: int, *, dynamics: DynamicsLog | None
    ) -> dict[str, float] | None:
        """Compute the metrics of the held-out pairs after a step; None without any.

        Args:
            dynamics: gets the values of each pair; None drops them.
        Raises:
            StageFailed: the loss is not finite.
        """
        metrics = evaluate(
            self.policy,
            self.eval_index,
            self.config,
            before=self.last_metrics,
            layout=self.layout,
            world=self.world,
            dynamics=dynamics,
        )
        if metrics is not None and not np.isfinite(metrics["loss"]):
            raise StageFailed(
                f"After step {step} the loss on the held-out pairs is {metrics['loss']}: training "
                "has diverged. Lower learning_rate, add warmup_steps, or use dtype float32."
            )
        return metrics

    def has_lost_patience(self) -> bool:
        """Whether to stop early. The first worker decides, so that all of them stop together."""
        is_over = has_lost_patience(self.log.lines, self.config.keep_best)
        return self.world.from_first(is_over)

    def is_checkpoint_due(self, step: int, *, is_over: bool) -> bool:
        """Whether to save: at regular steps, at each new best, and at the end if it is kept."""
        if step == self.best_step:
            return True
        execution = self.job.execution
        if is_over:
            return execution.keep_checkpoints
        return step % execution.checkpoint_every_steps == 0

    def save_checkpoint(self, step: int) -> None:
        for log in self.dynamics.values():
            log.flush()
        self.checkpoints.save(
            step,
            self.policy.trained_parameters,
            self.optimizer,
            self.log,
            {log.schema.name: log.parts for log in self.dynamics.values()},
            best_step=self.best_step,
            world=self.world,
        )

    def finish(self) -> None:
        """Export the chosen step's weights, and write the outcome that the driver waits for."""
        job, policy = self.job, self.policy
        for log in self.dynamics.values():
            log.flush()
        is_split = holds_shards(policy)
        if not self.world.is_first and not is_split:
            return
        if self.best_step is not None:
            self.checkpoints.load_best(self.best_step, policy.trained_parameters)
            free_gathered(policy)
        self.optimizer.state.clear()  # Its memory is the probe's.
        on_rounded_base = None
        if job.config.rounds_base:
            on_rounded_base = compute_probe(policy, self.train_index)
        has_float32 = not job.config.rounds_base and not policy.gathers_rounded
        probe = take_probe(policy, self.train_index) if has_float32 else None
        if is_split or job.config.rounds_base:
            # The first worker gathers what was trained on a whole start in float32.
            whole = open_whole(policy, job.config, job.start) if self.world.is_first else None
            gather_rows(policy, into=whole)
            if whole is None:
                return
            self.policy = policy = whole
            if self.world.device.type == "cuda":
                _move_where_there_is_room(policy.model)
        probe = probe or take_probe(policy, self.train_index)
        summary = summarise(job, self.log.lines)
        files, export = export_model(policy, job, summary, probe, on_rounded_base=on_rounded_base)
        summary["export"] = msgspec.to_builtins(export)
        for name, (table, schema) in self.log.tables().items():
            files.append(write_table(job.out, name, table, schema))
        files += [log.write_table() for log in self.dynamics.values()]
        self.log.close()
        write_outcome(job, Outcome(files=files, summary=summary))

    def read_all_epochs(self, *, first_step: int) -> Iterator[StepBatch]:
        """Yield this worker's share of each step's batch, from `first_step` on."""
        first_epoch, first_batch = divmod(first_step - 1, self.steps.in_epoch)
        for epoch in range(first_epoch, self.steps.num_epochs):
            yield from read_batches(
                self.train_index,
                self._order(epoch),
                batch_size=self.steps.batch_size,
                first=first_batch if epoch == first_epoch else 0,
                layout=self.layout,
                world=self.world,
            )

    def _order(self, epoch: int) -> EpochOrder:
        return order_epoch(
            self.train_index.num_pairs_S.tolist(),
            self.train_index.num_bytes_S.tolist(),
            seed=self.config.seed,
            epoch=epoch,
            window_bytes=self.config.shuffle_window_bytes,
        )


def open_trainer(job: TrainJob, world: World) -> Trainer:
    """Index the pairs, open the policy at its start, and plan the steps.

    Raises:
        DataError: encode and score do not match, or there is nothing to train on.
    """
    torch.set_num_threads(job.num_threads)
    config, execution = job.config, job.execution
    indexes = index_pairs(job.inputs, needs_margin=config.needs_margin, selection=config.selection)
    train_index, eval_index = indexes["train"], indexes["eval"]
    if train_index.num_left_out and not len(train_index):
        raise DataError(
            f"stages.train.where: {config.where!r} leaves out all "
            f"{train_index.num_left_out:,} training pairs. Ask for less; "
            "open_run(…).pairs() has the values of its columns."
        )
    if not len(train_index):
        raise DataError("No pair of the split `train` was encoded and scored: nothing to train on.")
    if config.keep_best and not len(eval_index):
        raise DataError(
            "train.keep_best compares evaluations, but no pair is held out: set "
            "stages.validate.eval_fraction, or drop keep_best."
        )
    if execution.stop_after is not None and not len(eval_index):
        raise DataError(
            "A training that stops early is judged by held-out pairs, but no pair is held out: set "
            "stages.validate.eval_fraction, or drop execution.train.stop_after (sweep --halving)."
        )
    max_length = max(train_index.max_sequence_length, eval_index.max_sequence_length)
    if execution.shards(world.device.type):
        policy = open_sharded(config, execution, job.start, world=world, max_length=max_length)
    else:
        policy = open_policy(
            config, execution, job.start, device=world.device, max_length=max_length
        )
    return Trainer(
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
            max_tokens=execution.tokens_per_microbatch(world.device.type),
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
        dynamics=open_dynamics(job.out, world),
    )


@torch.no_grad()
def measure_drift(
    policy: Policy,
    microbatches: list[MicroBatch],
    *,
    beta: float,
    is_reference: bool,
    is_float32: bool,
) -> Drift:
    """Compare the untrained policy with the stored reference on all tokens in the loss mask."""
    differences = []
    margins = []
    for microbatch in microbatches:
        logps = policy.pair_logps(microbatch)
        differences += [_token_differences(side) for side in (logps.chosen, logps.rejected)]
        margins.append((logps.chosen.log_ratio_B - logps.rejected.log_ratio_B).double())
    signed = np.concatenate(differences)
    median, p90, p99, largest = np.quantile(np.abs(signed), [0.5, 0.9, 0.99, 1.0]).tolist()
    return Drift(
        is_reference=is_reference,
        is_float32=is_float32,
        num_sequences=2 * sum(len(margin) for margin in margins),
        num_tokens=len(signed),
        median=median,
        p90=p90,
        p99=p99,
        max=largest,
        mean=float(signed.mean()),
        engine_noise=beta * torch.cat(margins).std(correction=0).item(),
    )


def _token_differences(side: SideLogps) -> NDArray[np.float64]:
    return side.token_log_ratios_BT[side.loss_mask_BT > 0].double().cpu().numpy()


def check_drift(drift: Drift, *, usual_median: float | None) -> None:
    """Refuse to train if the start is the reference model but its log-probs differ.

    In bfloat16 a large median is warned of: how much rounding explains depends on the model.

    Args:
        usual_median: nats: how far tokens of the scoring engine are from float32 in the median;
            None if it was not compared.
    Raises:
        ConfigError: the start has the reference's digest, but gives other log-probabilities.
    """
    if not drift.is_reference:
        return
    if drift.is_float32:
        is_close = drift.max <= MAX_TOKEN_DIFFERENCE
        wanted = f"every token within {MAX_TOKEN_DIFFERENCE} nats, both being float32"
    else:
        is_close = abs(drift.mean) <= MAX_MEAN_DIFFERENCE
        wanted = f"a mean of policy - reference within {MAX_MEAN_DIFFERENCE} nats per token"
        if usual_median and drift.median > MAX_TIMES_USUAL * usual_median:
            logger.warning(
                "the policy's log-probabilities differ from the reference's by %.3g nats a token "
                "in the median; scoring's own differ from float32 by %.3g. The two engines may not "
                "compute the same: compare a few pairs with dtype: float32",
                drift.median,
                usual_median,
            )
    if not is_close:  # NaN is not close, either.
        raise ConfigError(
            "The policy starts from the model that the reference was scored with, but gives other "
            f"log-probabilities: over {drift.num_sequences} sequences |policy - reference| has "
            f"median {drift.median:.3g}, 99th percentile {drift.p99:.3g} and maximum "
            f"{drift.max:.3g}, and policy - reference has mean {drift.mean:.3g} nats per token. "
            f"Wanted: {wanted}. Scoring and training do not compute the same function; an engine "
            "setting, a package version or damaged scores can cause that. Run score again with "
            "`--again score`; if that does not help, with `stages.score.backend=transformers`, and "
            "compare."
        )


def _move_where_there_is_room(model: nn.Module) -> None:
    """Move a model to the GPU if it fits there, once all that is no longer used has been freed."""
    gc.collect()
    torch.cuda.empty_cache()
    parameters = model.parameters()
    model.to(choose_device(sum(one.numel() * one.element_size() for one in parameters)))


def _describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the peak allocated on the device (GPU) or resident in this process (CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
