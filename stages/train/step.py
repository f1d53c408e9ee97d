"""What does the policy learn from a batch? One optimizer step; or the loss alone, if held out.

A step is:

1. compute the policy's log-probability of each completion token, chosen and rejected beside one
   computation of their prompt (stages/policy);
2. turn policy's and reference's values into one loss a pair (losses/), weighted, and divided by
   the number of pairs in the whole batch, so that workers and micro-batches change only rounding;
3. add up the gradients, clip their norm, and let AdamW step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from schemas.errors import StageFailed
from stages.policy.batches import Batch
from stages.train.config import TrainConfig
from stages.train.losses.logps import PairLogps, Side
from stages.train.metrics import PairSums
from stages.train.microbatch import Layout, MicroBatch, StepBatch, prefetch, read_batches
from stages.train.objective import (
    Coupling,
    couple_pairs,
    couples_pairs,
    needs_log_collision,
    pair_losses,
)
from stages.train.order import keep_order
from stages.train.pairs import PairIndex
from stages.train.policy import Policy
from stages.train.sharding import clip_gradients, gradient_norm
from stages.train.world import World

EVAL_BATCH_PAIRS = 256
"""Held-out pairs that are sorted by length together."""
NO_METRICS: Mapping[str, float] = {}
"""Those of the step before the first."""


def rehearse(policy: Policy, batch: Batch) -> None:
    """Compute a gradient of what could be a micro-batch, and forget it: its memory is then found.

    If there is none for the largest micro-batch, that is known before the first step, and not in
    the middle of an epoch. And on a CPU the smaller ones then lie where the largest has lain; a
    heap that grows with each that is larger than those before has holes, and the system clears its
    new pages while a step waits.

    Gradients are there from the start, as they are for all micro-batches of a step but the first.
    """
    parameters = policy.trained_parameters.values()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with policy.training_mode():
        policy.completion_tokens(batch).logps_N.sum().backward()
    for parameter in parameters:
        parameter.grad = None


def take_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    config: TrainConfig,
    *,
    step: int,
    learning_rate: float,
    world: World,
    before: Mapping[str, float] = NO_METRICS,
) -> dict[str, float]:
    """Make one optimizer step on this worker's share of a batch, and give the batch's metrics.

    Args:
        before: the metrics of the step before, among which a loss finds what it remembers.
    Raises:
        StageFailed: the loss or the gradient is not finite; nothing was changed then.
    """
    parameters = list(policy.trained_parameters.values())
    sums = PairSums(world.device, has_reference=config.needs_reference)
    losses = []
    side_norms: dict[str, float] = {}
    with policy.training_mode():
        couplings, remembered = _couple_pairs(
            policy, batch, config, step=step, before=before, world=world
        )
        if config.side_norms_every_steps and step % config.side_norms_every_steps == 0:
            side_norms = measure_sides(policy, batch, config, couplings, step=step, world=world)
        gradients = _add_gradients(policy, batch, config, couplings, step=step, world=world)
        for microbatch, logps, losses_B in gradients:
            if not microbatch.is_filler:
                sums.add(losses_B, logps, config.losses[0])
                losses.append((microbatch.pair_ids, losses_B))
    metrics = sums.means(world)
    if not np.isfinite(metrics["loss"]):
        bad = [
            pair_id
            for pair_ids, losses_B in losses
            for pair_id, is_finite in zip(pair_ids, losses_B.isfinite().tolist(), strict=True)
            if not is_finite
        ]
        _stop(step, f"loss {metrics['loss']}", [id_ for ids in world.gather(bad) for id_ in ids])
    world.sum_gradients(parameters)
    grad_norm = clip_gradients(parameters, max_norm=config.max_grad_norm)
    if not np.isfinite(grad_norm):
        ids = [pair_id for pair_ids, _ in losses for pair_id in pair_ids]
        _stop(step, f"gradient norm {grad_norm}", [i for part in world.gather(ids) for i in part])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        **metrics,
        **remembered,
        "grad_norm": grad_norm,
        **side_norms,
        "learning_rate": learning_rate,
        "num_tokens": batch.num_tokens,
    }


def _add_gradients(
    policy: Policy,
    batch: StepBatch,
    config: TrainConfig,
    couplings: Sequence[Coupling],
    *,
    step: int,
    world: World,
    side: Side | None = None,
) -> Iterator[tuple[MicroBatch, PairLogps, Tensor]]:
    """Add up the gradients of this worker's pairs, or only what reaches them through one side.

    Gives each micro-batch with what was computed for it, and its losses (float32 [B]).
    """
    _seed_dropout(config.seed, step, world.rank)
    for microbatch in batch.microbatches:
        logps, losses_B = _add_gradient(
            policy, microbatch, config, couplings, num_pairs=batch.num_pairs, side=side
        )
        yield microbatch, logps, losses_B


def _add_gradient(
    policy: Policy,
    microbatch: MicroBatch,
    config: TrainConfig,
    couplings: Sequence[Coupling],
    *,
    num_pairs: int,
    side: Side | None,
) -> tuple[PairLogps, Tensor]:
    """Add the gradient of one micro-batch, and give its values and losses as constants.

    No part of its graph stays: in memory it would lie scattered where the tensors of the next
    micro-batch are to find room.
    """
    logps = policy.pair_logps(microbatch, with_log_collision=needs_log_collision(config.losses))
    seen = logps.with_gradient_of(side) if side else logps
    losses_B = pair_losses(config.losses, microbatch, seen, couplings)
    if losses_B.requires_grad:  # A loss may depend on the other side alone.
        (losses_B.sum() / num_pairs).backward()
    return logps.detach(), losses_B.detach()


def measure_sides(
    policy: Policy,
    batch: StepBatch,
    config: TrainConfig,
    couplings: Sequence[Coupling],
    *,
    step: int,
    world: World,
) -> dict[str, float]:
    """Give the norms of the two gradients that a step's gradient is the sum of, by side.

    Where both are large and their sum is small, most of what the step does to the likelihood of the
    chosen answers it also does to that of the rejected ones (Razin et al. 2024, arXiv:2410.08847).
    """
    parameters = list(policy.trained_parameters.values())
    norms = {}
    for side in get_args(Side):
        for _ in _add_gradients(
            policy, batch, config, couplings, step=step, world=world, side=side
        ):
            pass
        world.sum_gradients(parameters)
        norms[f"grad_norm/{side}"] = gradient_norm(parameters)
        for parameter in parameters:
            parameter.grad = None
    return norms


@torch.no_grad()
def _couple_pairs(
    policy: Policy,
    batch: StepBatch,
    config: TrainConfig,
    *,
    step: int,
    before: Mapping[str, float],
    world: World,
) -> tuple[list[Coupling], dict[str, float]]:
    """Look at all pairs of a batch at once, for the losses that couple them, if there are any."""
    if not couples_pairs(config.losses):
        return [], {}
    _seed_dropout(config.seed, step, world.rank)  # As in the pass with a gradient.
    return couple_pairs(
        config.losses,
        [(microbatch, policy.pair_logps(microbatch)) for microbatch in batch.microbatches],
        num_pairs=batch.num_pairs,
        before=before,
        world=world,
        generator=torch.Generator().manual_seed(_derive_seed(config.seed, step)),
    )


@torch.no_grad()
def evaluate(
    policy: Policy,
    index: PairIndex,
    config: TrainConfig,
    *,
    before: Mapping[str, float] = NO_METRICS,
    layout: Layout,
    world: World,
) -> dict[str, float] | None:
    """Give the held-out pairs' loss and implicit rewards, or None where there are none.

    Losses that couple pairs see `EVAL_BATCH_PAIRS` of them at once.

    Args:
        before: the metrics of the last step, among which a loss finds what it remembers.
    """
    if not len(index):
        return None
    sums = PairSums(world.device, has_reference=config.needs_reference)
    batches = read_batches(
        index,
        keep_order(index.num_pairs_S.tolist()),
        batch_size=EVAL_BATCH_PAIRS,
        layout=layout,
        world=world,
    )
    for batch in prefetch(batches):
        computed = [
            (
                microbatch,
                policy.pair_logps(
                    microbatch, with_log_collision=needs_log_collision(config.losses)
                ),
            )
            for microbatch in batch.microbatches
        ]
        couplings, _ = couple_pairs(
            config.losses,
            computed,
            num_pairs=batch.num_pairs,
            before=before,
            world=world,
            generator=None,
        )
        for microbatch, logps in computed:
            if not microbatch.is_filler:
                losses_B = pair_losses(config.losses, microbatch, logps, couplings)
                sums.add(losses_B, logps, config.losses[0])
    return sums.means(world)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the adapter's dropout a function of the step, so that no generator has to be saved."""
    torch.manual_seed(_derive_seed(seed, step, rank))


def _derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _stop(step: int, what: str, pair_ids: list[str]) -> None:
    shown = ", ".join(pair_ids[:8]) + (f" and {len(pair_ids) - 8} more" if pair_ids[8:] else "")
    raise StageFailed(
        f"Training stopped at step {step}: {what}, in pairs {shown}. Look at their scores "
        "(`run.py show RECIPE score`); if they are in order, the training has diverged: lower "
        "learning_rate, add warmup_steps, or use dtype float32."
    )
