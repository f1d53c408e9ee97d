"""What are a step's metrics? Means over all pairs of its batch, named as TRL's users know them."""

import torch
from torch import Tensor

from stages.train.losses import PairLogps
from stages.train.world import World

_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class PairSums:
    """Adds up what the metrics are means of, over micro-batches and workers."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_MEANS) + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses_B: Tensor, logps: PairLogps, *, beta: float) -> None:
        """Count the pairs of a micro-batch.

        Args:
            losses_B: the weighted loss of each pair.
            logps: what it was computed from.
            beta: of the rewards beta * (policy - reference).
        """
        chosen_B = beta * logps.chosen.log_ratio_B
        rejected_B = beta * logps.rejected.log_ratio_B
        values = [
            losses_B,
            chosen_B,
            rejected_B,
            chosen_B - rejected_B,
            (chosen_B > rejected_B).float(),
            logps.chosen.policy_logp_B,
            logps.rejected.policy_logp_B,
            torch.ones_like(losses_B),
        ]
        self._sums += torch.stack(values).double().sum(-1)

    def means(self, world: World) -> dict[str, float]:
        """Give the means over the pairs of all workers, and their number."""
        *sums, num_pairs = world.sum(self._sums).tolist()
        means = {name: total / num_pairs for name, total in zip(_MEANS, sums, strict=True)}
        return {**means, "num_pairs": int(num_pairs)}
