"""Losses that need no reference; with these alone, no pair is scored.

Notation: l_c and l_r are the policy's log-probs, summed over the chosen (n_c tokens) and the
rejected completion (n_r tokens).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from schemas.config import config_class
from stages.train.losses.base import PairLoss, RewardOf, log_sigmoid
from stages.train.losses.logps import PairLogps

if TYPE_CHECKING:
    from torch import Tensor

_NEARLY_CERTAIN = -1e-6
"""Nats per token; above it, the odds of an answer are not finite in float32."""


@config_class
class SftLoss(PairLoss):
    """Supervised fine-tuning on the chosen answers; in a sum with sigmoid it is RPO.

    -l_c / n_c

    Pang et al. 2024, arXiv:2404.19733, where `weight` is their α.
    """

    kind: Literal["sft"] = "sft"
    """Name of the loss."""

    reward_of: ClassVar[RewardOf] = "mean_logp"

    def __call__(self, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B]."""
        return -logps.chosen.mean_policy_logp_B


@config_class
class SimpoLoss(PairLoss):
    """SimPO: log-probs per token as rewards, with a target margin.

    -log sigmoid(β (l_c / n_c - l_r / n_r) - γ)

    Meng et al. 2024, arXiv:2405.14734, equation 6.
    """

    kind: Literal["simpo"] = "simpo"
    """Name of the loss."""
    beta: float = Field(default=2.0, gt=0)
    """Factor of the log-probs per token."""
    gamma: float = Field(default=1.0, ge=0)
    """γ: the target margin; the paper tries 0.3 to 0.6 times beta."""

    reward_of: ClassVar[RewardOf] = "mean_logp"

    @property
    def reward_scale(self) -> float:
        return self.beta

    def __call__(self, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B]."""
        apart_B = logps.chosen.mean_policy_logp_B - logps.rejected.mean_policy_logp_B
        return -log_sigmoid(self.beta * apart_B - self.gamma)


@config_class
class OrpoLoss(PairLoss):
    """ORPO: fine-tuning on the chosen answer, plus a penalty on the odds of the rejected one.

    -l_c / n_c - β log sigmoid(log(odds_c / odds_r)), odds = p / (1 - p), p = exp(l / n)

    Hong et al. 2024, arXiv:2403.07691, equations 6 and 7, with β for their λ.
    """

    kind: Literal["orpo"] = "orpo"
    """Name of the loss."""
    beta: float = Field(default=0.1, gt=0)
    """λ of the paper: weight of the penalty relative to the fine-tuning."""

    reward_of: ClassVar[RewardOf] = "mean_logp"

    @property
    def reward_scale(self) -> float:
        return self.beta

    def __call__(self, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B]."""
        chosen_B = logps.chosen.mean_policy_logp_B
        odds_B = _log_odds(chosen_B) - _log_odds(logps.rejected.mean_policy_logp_B)
        return -chosen_B - self.beta * log_sigmoid(odds_B)


def _log_odds(mean_logp_B: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) of p = exp(mean log-prob)."""
    return mean_logp_B - (-mean_logp_B.clamp(max=_NEARLY_CERTAIN).expm1()).log()


@config_class
class SlicLoss(PairLoss):
    """SLiC-HF: a hinge loss on the log-probs, plus fine-tuning on the chosen answer.

    max(0, δ - l_c + l_r) - λ l_c

    Zhao et al. 2023, arXiv:2305.10425, the chosen answer being the target.
    """

    kind: Literal["slic"] = "slic"
    """Name of the loss."""
    delta: float = Field(default=1.0, gt=0)
    """δ: the margin in nats beyond which the hinge loss is 0."""
    regularisation: float = Field(default=0.1, ge=0)
    """λ: weight of the fine-tuning relative to the hinge loss."""

    reward_of: ClassVar[RewardOf] = "logp"

    def __call__(self, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B]."""
        chosen_B, rejected_B = logps.chosen.policy_logp_B, logps.rejected.policy_logp_B
        return (self.delta - chosen_B + rejected_B).relu() - self.regularisation * chosen_B
