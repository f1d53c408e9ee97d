"""The objective: the weighted sum of the losses, including those that couple a batch's pairs.

A loss that couples pairs is a function L of a and b, the summed log-ratios of all pairs in the
batch. Its gradient with respect to the weights is that of Σ (∂L/∂a_i a_i + ∂L/∂b_i b_i) with the
derivatives held constant. A pass without a gradient therefore gathers a and b from all workers,
each worker computes the same derivatives, and the pass with a gradient runs micro-batch by
micro-batch.

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
"""This worker's micro-batches of a batch, with the policy's log-probs."""

_NUM_SUMS = 4
"""Values gathered per pair: a, b, the reference's margin and the weight."""


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Weighted values and derivatives of a loss that couples pairs, in the batch's order."""

    loss: CoupledLoss
    losses_N: Tensor
    """float32."""
    by_chosen_N: Tensor
    """float32: derivative of the summed losses with respect to each pair's a."""
    by_rejected_N: Tensor
    """float32: derivative with respect to each pair's b."""

    def surrogate(self, logps: PairLogps, places_B: Tensor) -> Tensor:
        """Return the losses of some pairs, with the right gradient through their a and b."""
        chosen_B, rejected_B = self.loss.log_ratios(logps)
        return (
            self.losses_N[places_B]
            + self.by_chosen_N[places_B] * (chosen_B - chosen_B.detach())
            + self.by_rejected_N[places_B] * (rejected_B - rejected_B.detach())
        )


def couples_pairs(losses: Sequence[Loss]) -> bool:
    """Whether a batch needs a pass without a gradient before the one with it."""
    return any(loss.couples_pairs for loss in losses)


def needs_log_collision(losses: Sequence[Loss]) -> bool:
    """Whether the policy must also return its log collision probability at every token."""
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
    """Compute the losses that couple the pairs of a batch.

    Args:
        losses: all losses of the sum; those that do not couple pairs are skipped.
        computed: all micro-batches of this worker.
        num_pairs: pairs in the whole batch.
        before: metrics of the previous step, which include the state of losses that keep one.
        world: the workers, which all get the same result.
        generator: for random draws, in the same state on all workers; None in an evaluation, where
            nothing is drawn and states do not change.
    Returns:
        The couplings, and the losses' new state, by metric column.
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
    """Sum the losses of each pair, times its weight: float32 [B], 0 for a filler."""
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
    """Gather a, b, the reference's margin and the weight of every pair: float64 [N] each, on CPU.

    Only one worker has a value for each pair, so summing it with the others' zeros is exact.
    """
    sums = torch.zeros(_NUM_SUMS, num_pairs, dtype=torch.float64, device=world.device)
    for microbatch, logps in computed:
        if not microbatch.is_filler:
            values = (*loss.log_ratios(logps), loss.ref_margins(logps), microbatch.weights_B)
            places_B = torch.as_tensor(microbatch.places, device=world.device)
            sums[:, places_B] = torch.stack([value.detach().double() for value in values])
    return world.sum(sums).cpu().unbind()
