"""What is minimised? The weighted sum of the losses, also of those that couple the batch's pairs.

A loss that couples pairs is a function L of a and b, the sums of log-ratios of every pair of the
whole batch. Its gradient by the weights is that of Σ (∂L/∂a_i a_i + ∂L/∂b_i b_i) with the
derivatives held fixed. So a pass without a gradient gathers a and b from all workers, every worker
works out the same derivatives, and the pass with a gradient goes micro-batch by micro-batch.

Shape suffixes: B pairs of a micro-batch, N pairs of a whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.train.losses import Loss, PairLogps
from stages.train.losses.coupled import BatchRatios, CoupledLoss
from stages.train.microbatch import MicroBatch
from stages.train.world import World

Computed = Sequence[tuple[MicroBatch, PairLogps]]
"""This worker's micro-batches of a batch, and what the policy gives for them."""

_NUM_SUMS = 4
"""a, b, the reference's margin and the weight of a pair."""


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What a loss that couples the pairs of a batch comes to, weighted, in the batch's order."""

    loss: CoupledLoss
    losses_N: Tensor
    """float32."""
    by_chosen_N: Tensor
    """float32: the derivative of the losses' sum by each pair's a."""
    by_rejected_N: Tensor
    """float32: by each pair's b."""

    def surrogate(self, logps: PairLogps, places_B: Tensor) -> Tensor:
        """Give the losses of some of the pairs, with the derivatives by these pairs' a and b."""
        chosen_B, rejected_B = self.loss.log_ratios(logps)
        return (
            self.losses_N[places_B]
            + self.by_chosen_N[places_B] * (chosen_B - chosen_B.detach())
            + self.by_rejected_N[places_B] * (rejected_B - rejected_B.detach())
        )


def couples_pairs(losses: Sequence[Loss]) -> bool:
    """Say whether a batch is to be computed once without a gradient, before it is trained on."""
    return any(loss.couples_pairs for loss in losses)


def needs_log_collision(losses: Sequence[Loss]) -> bool:
    """Say whether the policy is to give its log collision probability at every token, too."""
    return any(loss.needs_log_collision for loss in losses)


def couple_pairs(
    losses: Sequence[Loss],
    computed: Computed,
    *,
    num_pairs: int,
    before: Mapping[str, float],
    world: World,
    generator: torch.Generator | None,
) -> tuple[list[Coupling], dict[str, float]]:
    """Work out the losses that couple the pairs of a batch.

    Args:
        losses: all that are added up.
        computed: every micro-batch of this worker.
        num_pairs: of the whole batch.
        before: the metrics of the step before, in which a loss finds what it remembers.
        world: the workers, who all get the same result.
        generator: for what is drawn, in the same state on all workers; None in an evaluation, where
            nothing is drawn and nothing learned.
    Returns:
        The couplings, and what the losses remember, by metric column.
    """
    couplings: list[Coupling] = []
    remembered: dict[str, float] = {}
    for loss in losses:
        if not isinstance(loss, CoupledLoss):
            continue
        chosen_N, rejected_N, ref_margins_N, weights_N = _gather(loss, computed, num_pairs, world)
        state = {name: before[name] for name in loss.state_columns if name in before}
        with torch.enable_grad():
            leaves = (chosen_N.requires_grad_(), rejected_N.requires_grad_())
            ratios = BatchRatios(
                chosen_B=chosen_N, rejected_B=rejected_N, ref_margins_B=ref_margins_N
            )
            losses_N, state_after = loss.of_batch(ratios, state, generator)
            losses_N = loss.weight * weights_N * losses_N
            results = (losses_N.detach(), *torch.autograd.grad(losses_N.sum(), leaves))
        losses_N, by_chosen_N, by_rejected_N = (
            result.to(world.device, torch.float32) for result in results
        )
        couplings.append(
            Coupling(
                loss=loss, losses_N=losses_N, by_chosen_N=by_chosen_N, by_rejected_N=by_rejected_N
            )
        )
        remembered.update(state_after)
    return couplings, remembered


def pair_losses(
    losses: Sequence[Loss],
    microbatch: MicroBatch,
    logps: PairLogps,
    couplings: Sequence[Coupling] = (),
) -> Tensor:
    """Add up the losses of each pair, times its weight: float32 [B], 0 for a filler."""
    total_B = torch.zeros_like(microbatch.weights_B)
    for loss in losses:
        if not isinstance(loss, CoupledLoss):
            total_B = total_B + loss.weight * microbatch.weights_B * loss(logps)
    places_B = torch.as_tensor(microbatch.places, device=total_B.device)
    for coupling in couplings:
        losses_B = coupling.surrogate(logps, places_B)
        total_B = total_B + (0 * losses_B if microbatch.is_filler else losses_B)
    return total_B


def _gather(
    loss: CoupledLoss, computed: Computed, num_pairs: int, world: World
) -> tuple[Tensor, ...]:
    """Collect a, b, the reference's margin and the weight of every pair: float64 [N] each, on CPU.

    Each pair is one worker's alone, so that adding up the workers' zeros changes no digit.
    """
    sums = torch.zeros(_NUM_SUMS, num_pairs, dtype=torch.float64, device=world.device)
    for microbatch, logps in computed:
        if not microbatch.is_filler:
            values = (*loss.log_ratios(logps), loss.ref_margins(logps), microbatch.weights_B)
            places_B = torch.as_tensor(microbatch.places, device=world.device)
            sums[:, places_B] = torch.stack([value.detach().double() for value in values])
    return world.sum(sums).cpu().unbind()
