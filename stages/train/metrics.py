"""Metrics of a step or an evaluation: means over all pairs of its batch, under TRL's names.

Metrics that compare with the reference are absent if the pairs were not scored.

Shape suffixes: B pairs, T tokens of the longest completion of a side.
"""

import torch
from torch import Tensor

from stages.train.losses import Loss, PairLogps
from stages.train.world import World

_OF_PAIRS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
)
_OF_PAIRS_AND_REFERENCE = ("displacement/chosen", "displacement/both")
_OF_TOKENS_AND_REFERENCE = ("kl/k1", "kl/k3")

_MAX_EXPONENT = 80.0
"""Larger exponents would overflow float32."""


class PairSums:
    """Sums of the metrics' values over the pairs of all micro-batches and workers."""

    def __init__(self, device: torch.device, *, has_reference: bool) -> None:
        self._has_reference = has_reference
        self._names = list(_OF_PAIRS)
        if has_reference:
            self._names += [*_OF_PAIRS_AND_REFERENCE, *_OF_TOKENS_AND_REFERENCE]
        self._sums = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses_B: Tensor, logps: PairLogps, loss: Loss) -> None:
        """Add the pairs of a micro-batch.

        Args:
            losses_B: the weighted loss of each pair.
            logps: the log-probs that it was computed from.
            loss: the loss that defines the rewards.
        """
        chosen_B, rejected_B = loss.rewards(logps)
        values = [
            losses_B,
            chosen_B,
            rejected_B,
            chosen_B - rejected_B,
            (chosen_B > rejected_B).float(),
            logps.chosen.policy_logp_B,
            logps.rejected.policy_logp_B,
            logps.chosen.num_tokens_B,
            logps.rejected.num_tokens_B,
        ]
        if self._has_reference:
            values += _displacement(logps)
            values += _divergence(logps)
        values.append(torch.ones_like(losses_B))
        self._sums += torch.stack(values).double().sum(-1)

    def means(self, world: World) -> dict[str, float]:
        """Compute means over the pairs, or tokens, of all workers, and the number of pairs."""
        *sums, num_pairs = world.sum(self._sums).tolist()
        totals = dict(zip(self._names, sums, strict=True))
        num_tokens = totals["lengths/chosen"] + totals["lengths/rejected"]
        means = {
            name: total / (num_tokens if name in _OF_TOKENS_AND_REFERENCE else num_pairs)
            for name, total in totals.items()
        }
        return {**means, "num_pairs": int(num_pairs)}


def _displacement(logps: PairLogps) -> list[Tensor]:
    """Whether chosen, and whether both sides, fell below the reference: float32 [B] each."""
    chosen_fell_B = logps.chosen.log_ratio_B < 0
    both_fell_B = chosen_fell_B & (logps.rejected.log_ratio_B < 0)
    return [chosen_fell_B.float(), both_fell_B.float()]


def _divergence(logps: PairLogps) -> list[Tensor]:
    """Sum two estimates of KL(policy, reference) over a pair's completion tokens: [B] each.

    k1 = log r and k3 = 1/r - 1 + log r with r = policy / reference (Schulman 2020, "Approximating
    KL divergence"). For tokens sampled from the policy, the mean of both is the KL divergence, and
    k3 is never negative. Here the tokens are the data's, which a trained policy becomes less likely
    to write: the two measure how far the policy has moved, but are not a KL to keep small.
    """
    sums = []
    for side in (logps.chosen, logps.rejected):
        k1_BT = side.token_log_ratios_BT
        k3_BT = (-k1_BT).clamp(max=_MAX_EXPONENT).expm1() + k1_BT
        sums.append([(value_BT * side.loss_mask_BT).sum(-1) for value_BT in (k1_BT, k3_BT)])
    return [chosen_B + rejected_B for chosen_B, rejected_B in zip(*sums, strict=True)]
