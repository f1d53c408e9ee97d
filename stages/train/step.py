"""One optimizer step on a batch of pairs, and the evaluation of held-out pairs.

A step has three parts:

1. compute the policy's log-prob of each completion token, with the prompt computed once for chosen
   and rejected (stages/policy);
2. turn the log-probs of policy and reference into one weighted loss per pair (losses/), divided by
   the number of pairs in the whole batch, so that workers and micro-batches change only rounding;
3. sum the gradients, clip their norm, and take an AdamW step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from schemas.errors import StageFailed
from stages.policy.batches import Batch
from stages.train.config import TrainConfig
from stages.train.dynamics import DynamicsLog, gradient_norms
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
"""Held-out pairs per batch; micro-batches are cut from it by length."""
NO_METRICS: Mapping[str, float] = {}
"""Metrics before the first step."""


def rehearse(policy: Policy, batch: Batch) -> None:
    """Dry-run the largest micro-batch so that running out of memory shows before the first step.

    On a CPU, smaller micro-batches then reuse its memory. Otherwise the heap would grow with each
    larger micro-batch and fragment, and steps would wait for new pages to be zeroed.

    Gradients are allocated first, as for all micro-batches of a step except the first.
    """
    parameters = policy.trained_parameters.values()
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with policy.training_mode():
            policy.completion_tokens(batch).logps_N.sum().backward()
    finally:
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
    dynamics: DynamicsLog | None = None,
) -> dict[str, float]:
    """Take one optimizer step on this worker's share of a batch, and return the batch's metrics.

    Args:
        before: metrics of the previous step, which include the state of losses that keep one.
        dynamics: gets the values of each pair; None drops them.
    Raises:
        StageFailed: the loss or the gradient is not finite; the policy is then unchanged.
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
        for microbatch, logps, losses_B, norms_B in gradients:
            if not microbatch.is_filler:
                sums.add(losses_B, logps, config.losses[0])
                losses.append((microbatch.pair_ids, losses_B))
                if dynamics is not None:
                    dynamics.add(
                        microbatch,
                        logps,
                        losses_B,
                        loss=config.losses[0],
                        gradient_norms_B=norms_B,
                    )
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
    if dynamics is not None:  # The device is idle: the gradient's norm was just read.
        dynamics.end_batch(batch.num_pairs)
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
) -> Iterator[tuple[MicroBatch, PairLogps, Tensor, Tensor]]:
    """Sum the gradients of this worker's pairs, optionally through one side only.

    Yields each micro-batch with its log-probs, its losses and the norms of its pairs' gradients
    (float32 [B] both).
    """
    _seed_dropout(config.seed, step, world.rank)
    for microbatch in batch.microbatches:
        logps, losses_B, norms_B = _add_gradient(
            policy, microbatch, config, couplings, num_pairs=batch.num_pairs, side=side
        )
        yield microbatch, logps, losses_B, norms_B


def _add_gradient(
    policy: Policy,
    microbatch: MicroBatch,
    config: TrainConfig,
    couplings: Sequence[Coupling],
    *,
    num_pairs: int,
    side: Side | None,
) -> tuple[PairLogps, Tensor, Tensor]:
    """Add the gradient of one micro-batch; return its log-probs, losses and norms, detached.

    Nothing keeps its graph alive: leftovers would fragment the memory that the next micro-batch
    needs.
    """
    logps = policy.pair_logps(microbatch, with_log_collision=needs_log_collision(config.losses))
    for each in (logps.chosen, logps.rejected):
        each.policy_token_logps_BT.retain_grad()
    seen = logps.with_gradient_of(side) if side else logps
    losses_B = pair_losses(config.losses, microbatch, seen, couplings)
    if losses_B.requires_grad:  # A loss may depend only on the other side.
        (losses_B.sum() / num_pairs).backward()
    return logps.detach(), losses_B.detach(), gradient_norms(logps)


def measure_sides(
    policy: Policy,
    batch: StepBatch,
    config: TrainConfig,
    couplings: Sequence[Coupling],
    *,
    step: int,
    world: World,
) -> dict[str, float]:
    """Compute the norms of the gradient through each side; the step's gradient is their sum.

    If both are large and the sum is small, the step changes the likelihood of chosen and rejected
    answers mostly in the same direction (Razin et al. 2024, arXiv:2410.08847).
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
    """Compute the losses that couple the pairs of a batch, if there are any, without a gradient."""
    if not couples_pairs(config.losses):
        return [], {}
    _seed_dropout(config.seed, step, world.rank)  # The same dropout as in the pass with a gradient.
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
    dynamics: DynamicsLog | None = None,
) -> dict[str, float] | None:
    """Compute the metrics of the held-out pairs, or None without any.

    Losses that couple pairs see `EVAL_BATCH_PAIRS` pairs at once.

    Args:
        before: metrics of the last step, which include the state of losses that keep one.
        dynamics: gets the values of each pair; None drops them.
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
                if dynamics is not None:
                    dynamics.add(microbatch, logps, losses_B, loss=config.losses[0])
        if dynamics is not None:
            dynamics.end_batch(batch.num_pairs)
    return sums.means(world)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the adapter's dropout a function of the step, so that checkpoints need no RNG state."""
    torch.manual_seed(_derive_seed(seed, step, rank))


def _derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _stop(step: int, what: str, pair_ids: list[str]) -> None:
    shown = ", ".join(pair_ids[:8]) + (f" and {len(pair_ids) - 8} more" if pair_ids[8:] else "")
    raise StageFailed(
        f"Training stopped at step {step}: {what}, in pairs {shown}. Check their scores "
        "(`run.py show RECIPE score`); if those are fine, training has diverged: lower "
        "learning_rate, add warmup_steps, or use dtype float32."
    )
