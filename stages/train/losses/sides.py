"""Losses that depend on each side's log-ratio, and not only on their difference.

Notation: a and b are the log-ratios of policy to reference, summed over the chosen and the rejected
completion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from schemas.config import config_class
from stages.train.losses.base import SeparableLoss, log_sigmoid
from stages.train.losses.logps import PairLogps

if TYPE_CHECKING:
    from torch import Tensor


@config_class
class NcaPairLoss(SeparableLoss):
    """NCA for pairs: raises the chosen answer's own likelihood, and keeps both rewards near 0.

    -log sigmoid(βa) - ½ log sigmoid(-βa) - ½ log sigmoid(-βb)

    Chen et al. 2024, arXiv:2402.05369, for two answers.
    """

    kind: Literal["nca_pair"] = "nca_pair"
    """Name of the loss."""

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        chosen_B, rejected_B = self.beta * chosen_B, self.beta * rejected_B
        held_B = log_sigmoid(-chosen_B) + log_sigmoid(-rejected_B)
        return -log_sigmoid(chosen_B) - 0.5 * held_B


@config_class
class SppoHardLoss(SeparableLoss):
    """SPPO when the chosen answer always wins: each side has a target log-ratio.

    (a - 1 / (2β))² + (b + 1 / (2β))²

    Wu et al. 2024, arXiv:2405.00675, equation 4.7 with probabilities 1 and 0, β for their 1/η.
    """

    kind: Literal["sppo_hard"] = "sppo_hard"
    """Name of the loss."""

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        aim = 1 / (2 * self.beta)
        return (chosen_B - aim).square() + (rejected_B + aim).square()


@config_class
class ApoZeroLoss(SeparableLoss):
    """APO-zero, for chosen answers better than the model's own: chosen up, rejected down.

    1 - sigmoid(βa) + sigmoid(βb)

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7.
    """

    kind: Literal["apo_zero"] = "apo_zero"
    """Name of the loss."""

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        return (-self.beta * chosen_B).sigmoid() + (self.beta * rejected_B).sigmoid()


@config_class
class ApoDownLoss(SeparableLoss):
    """APO-down, for chosen answers worse than the model's own: both down, rejected further.

    sigmoid(βa) + 1 - sigmoid(β (a - b))

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8.
    """

    kind: Literal["apo_down"] = "apo_down"
    """Name of the loss."""

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        apart_B = self.beta * (rejected_B - chosen_B)
        return (self.beta * chosen_B).sigmoid() + apart_B.sigmoid()


@config_class
class DpopLoss(SeparableLoss):
    """DPO-Positive: DPO with a penalty if chosen is less likely than under the reference.

    -log sigmoid(β (a - b - λ max(0, -a)))

    Pal et al. 2024, Smaug, arXiv:2402.13228.
    """

    kind: Literal["dpop"] = "dpop"
    """Name of the loss."""
    penalty: float = Field(default=50.0, ge=0)
    """λ: penalty per nat that the chosen answer loses."""

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        lost_B = (-chosen_B).relu()
        return -log_sigmoid(self.beta * (chosen_B - rejected_B - self.penalty * lost_B))
