"""Losses of the difference Δ between the log-ratios of chosen and rejected.

Notation: a and b are the log-ratios of policy to reference, summed over the chosen (n_c tokens) and
the rejected completion (n_r tokens), Δ = a - b, ε the label smoothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from schemas.config import config_class
from stages.train.losses.base import DifferenceLoss, log_sigmoid
from stages.train.losses.logps import PairLogps

if TYPE_CHECKING:
    from torch import Tensor


def smoothed(logits_B: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with a fraction ε of flipped labels: -(1 - ε) log σ(x) - ε log σ(-x)."""
    losses_B = -(1 - label_smoothing) * log_sigmoid(logits_B)
    return losses_B - label_smoothing * log_sigmoid(-logits_B)


@config_class
class SigmoidLoss(DifferenceLoss):
    """DPO, and cDPO with label smoothing.

    -(1 - ε) log sigmoid(βΔ) - ε log sigmoid(-βΔ)

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. The smoothing is from Mitchell 2023, "A note
    on DPO with noisy preferences and relationship to IPO", equation 3.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    """Name of the loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the fraction of labels assumed to be flipped."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return smoothed(self.beta * delta_B, self.label_smoothing)


@config_class
class SigmoidNormLoss(DifferenceLoss):
    """DPO on log-ratios divided by the lengths of the completions.

    -log sigmoid(β (a / n_c - b / n_r))

    Lambert et al. 2024, Tülu 3, arXiv:2411.15124.
    """

    kind: Literal["sigmoid_norm"] = "sigmoid_norm"
    """Name of the loss."""
    beta: float = Field(default=5.0, gt=0)
    """How strongly the policy is kept close to the reference, for log-ratios per token."""

    @property
    def divides_by_length(self) -> bool:
        return True

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return -log_sigmoid(self.beta * delta_B)


@config_class
class RobustLoss(DifferenceLoss):
    """An unbiased estimate of DPO's loss when a known fraction of labels is flipped.

    (-(1 - ε) log sigmoid(βΔ) + ε log sigmoid(-βΔ)) / (1 - 2ε)

    Chowdhury et al. 2024, arXiv:2403.00409.
    """

    kind: Literal["robust"] = "robust"
    """Name of the loss."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """ε: the fraction of labels that are flipped."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B, epsilon = self.beta * delta_B, self.label_smoothing
        right_B, flipped_B = -log_sigmoid(logits_B), -log_sigmoid(-logits_B)
        return ((1 - epsilon) * right_B - epsilon * flipped_B) / (1 - 2 * epsilon)


@config_class
class HingeLoss(DifferenceLoss):
    """SLiC's hinge loss on DPO's rewards: no gradient beyond a margin of 1.

    max(0, 1 - βΔ)

    Liu et al. 2023, RSO, arXiv:2309.06657.
    """

    kind: Literal["hinge"] = "hinge"
    """Name of the loss."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return (1 - self.beta * delta_B).relu()


@config_class
class IpoLoss(DifferenceLoss):
    """IPO: a squared loss with a fixed target margin.

    (a / n_c - b / n_r - 1 / (2β))², or without the lengths (Δ - 1 / (2β))²

    Azar et al. 2023, arXiv:2310.12036, equation 17, with β for their τ. The paper's equation has
    the sums a and b. TRL divides by the lengths; according to its comment, the paper's results did
    so, too.
    """

    kind: Literal["ipo"] = "ipo"
    """Name of the loss."""
    beta: float = Field(default=0.1, gt=0)
    """τ of the paper: the target margin is 1 / (2 beta) nats, per token if length_normalised."""
    length_normalised: bool = True
    """Divide the log-ratios by the lengths of the completions."""

    @property
    def divides_by_length(self) -> bool:
        return self.length_normalised

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return (delta_B - 1 / (2 * self.beta)).square()


@config_class
class ExoPairLoss(DifferenceLoss):
    """EXO: the reverse KL divergence from the policy's preference to the smoothed label.

    q log(q / (1 - ε)) + (1 - q) log((1 - q) / ε), q = sigmoid(βΔ)

    Ji et al. 2024, arXiv:2402.00856, equation 16 for two answers.
    """

    kind: Literal["exo_pair"] = "exo_pair"
    """Name of the loss."""
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """ε: the label's probability of the rejected answer; above 0, because of its logarithm."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B, epsilon = self.beta * delta_B, self.label_smoothing
        chosen_B = logits_B.sigmoid() * (log_sigmoid(logits_B) - math.log1p(-epsilon))
        rejected_B = (-logits_B).sigmoid() * (log_sigmoid(-logits_B) - math.log(epsilon))
        return chosen_B + rejected_B


@config_class
class DiscopopLoss(DifferenceLoss):
    """DiscoPOP, discovered by a language model: logistic for small, exponential for large margins.

    -(1 - m) log sigmoid(x) + m exp(-x), x = βΔ, m = sigmoid(x / τ)

    Lu et al. 2024, arXiv:2406.08414, equation 5.
    """

    kind: Literal["discopop"] = "discopop"
    """Name of the loss."""
    tau: float = Field(default=0.05, gt=0, lt=1)
    """τ: the margin at which the loss changes from logistic to exponential."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B = self.beta * delta_B
        logistic_B = -log_sigmoid(logits_B) * (-logits_B / self.tau).sigmoid()
        # m exp(-x) with one exponent: two factors would be 0 times infinity far below 0.
        return logistic_B + (log_sigmoid(logits_B / self.tau) - logits_B).exp()


@config_class
class OdpoLoss(DifferenceLoss):
    """DPO with an offset: the larger the data's margin, the larger the reward margin must be.

    -log sigmoid(βΔ - α f(m)), m the pair's margin in the data, f = log or f = m itself

    Amini et al. 2024, ODPO, arXiv:2402.10571.
    """

    kind: Literal["odpo"] = "odpo"
    """Name of the loss."""
    offset_alpha: float = Field(default=1.0, ge=0)
    """α: factor of the offset."""
    offset_of: Literal["log_margin", "margin"] = "log_margin"
    """f: the logarithm of the pair's margin, as in the paper, or the margin itself."""

    @property
    def needs_margin(self) -> bool:
        return True

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        assert logps.margins_B is not None
        offsets_B = logps.margins_B.log() if self.offset_of == "log_margin" else logps.margins_B
        return -log_sigmoid(self.beta * delta_B - self.offset_alpha * offsets_B)
