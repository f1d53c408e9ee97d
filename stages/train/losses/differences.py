"""Which losses see a pair as one number, how much further chosen moved than rejected?

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
    """-(1 - ε) log sigmoid(x) - ε log sigmoid(-x): cross-entropy where ε labels are flipped."""
    losses_B = -(1 - label_smoothing) * log_sigmoid(logits_B)
    return losses_B - label_smoothing * log_sigmoid(-logits_B)


@config_class
class SigmoidLoss(DifferenceLoss):
    """DPO, and cDPO where labels are smoothed.

    -(1 - ε) log sigmoid(βΔ) - ε log sigmoid(-βΔ)

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. The smoothing is from Mitchell 2023, "A note
    on DPO with noisy preferences and relationship to IPO", equation 3.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    """Which loss this is."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the share of labels assumed to be flipped."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return smoothed(self.beta * delta_B, self.label_smoothing)


@config_class
class SigmoidNormLoss(DifferenceLoss):
    """DPO on log-ratios divided by the completions' lengths.

    -log sigmoid(β (a / n_c - b / n_r))

    Lambert et al. 2024, Tülu 3, arXiv:2411.15124.
    """

    kind: Literal["sigmoid_norm"] = "sigmoid_norm"
    """Which loss this is."""
    beta: float = Field(default=5.0, gt=0)
    """How strongly the policy is held to the reference, for log-ratios a token."""

    @property
    def divides_by_length(self) -> bool:
        return True

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return -log_sigmoid(self.beta * delta_B)


@config_class
class RobustLoss(DifferenceLoss):
    """An unbiased estimate of DPO's loss where a known share of labels is flipped.

    (-(1 - ε) log sigmoid(βΔ) + ε log sigmoid(-βΔ)) / (1 - 2ε)

    Chowdhury et al. 2024, arXiv:2403.00409.
    """

    kind: Literal["robust"] = "robust"
    """Which loss this is."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """ε: the share of labels that are flipped."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B, epsilon = self.beta * delta_B, self.label_smoothing
        right_B, flipped_B = -log_sigmoid(logits_B), -log_sigmoid(-logits_B)
        return ((1 - epsilon) * right_B - epsilon * flipped_B) / (1 - 2 * epsilon)


@config_class
class HingeLoss(DifferenceLoss):
    """SLiC's hinge on DPO's rewards: nothing is gained beyond a margin of 1.

    max(0, 1 - βΔ)

    Liu et al. 2023, RSO, arXiv:2309.06657.
    """

    kind: Literal["hinge"] = "hinge"
    """Which loss this is."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return (1 - self.beta * delta_B).relu()


@config_class
class IpoLoss(DifferenceLoss):
    """IPO: a margin of fixed size is aimed at.

    (a / n_c - b / n_r - 1 / (2β))², or without the lengths (Δ - 1 / (2β))²

    Azar et al. 2023, arXiv:2310.12036, equation 17, with β for their τ. The paper's equation has
    the sums a and b. TRL divides by the lengths: by its comment, the paper's results did, too.
    """

    kind: Literal["ipo"] = "ipo"
    """Which loss this is."""
    beta: float = Field(default=0.1, gt=0)
    """τ of the paper: the margin aimed at is 1 / (2 beta) nats, a token where length_normalised."""
    length_normalised: bool = True
    """Whether log-ratios are divided by the completions' lengths."""

    @property
    def divides_by_length(self) -> bool:
        return self.length_normalised

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        return (delta_B - 1 / (2 * self.beta)).square()


@config_class
class ExoPairLoss(DifferenceLoss):
    """EXO: the reverse KL from the policy's preference to the smoothed label.

    q log(q / (1 - ε)) + (1 - q) log((1 - q) / ε), q = sigmoid(βΔ)

    Ji et al. 2024, arXiv:2402.00856, equation 16 for two answers.
    """

    kind: Literal["exo_pair"] = "exo_pair"
    """Which loss this is."""
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """ε: what the label leaves to the rejected answer; above 0, for its logarithm is taken."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B, epsilon = self.beta * delta_B, self.label_smoothing
        chosen_B = logits_B.sigmoid() * (log_sigmoid(logits_B) - math.log1p(-epsilon))
        rejected_B = (-logits_B).sigmoid() * (log_sigmoid(-logits_B) - math.log(epsilon))
        return chosen_B + rejected_B


@config_class
class DiscopopLoss(DifferenceLoss):
    """DiscoPOP, found by a language model: logistic for small margins, exponential for large ones.

    -(1 - m) log sigmoid(x) + m exp(-x), x = βΔ, m = sigmoid(x / τ)

    Lu et al. 2024, arXiv:2406.08414, equation 5.
    """

    kind: Literal["discopop"] = "discopop"
    """Which loss this is."""
    tau: float = Field(default=0.05, gt=0, lt=1)
    """τ: the margin at which one turns into the other."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B = self.beta * delta_B
        logistic_B = -log_sigmoid(logits_B) * (-logits_B / self.tau).sigmoid()
        # m exp(-x) with one exponent: apart, they are 0 times infinity far below 0.
        return logistic_B + (log_sigmoid(logits_B / self.tau) - logits_B).exp()


@config_class
class OdpoLoss(DifferenceLoss):
    """DPO with an offset: the better the data rates the chosen answer, the larger the margin.

    -log sigmoid(βΔ - α f(m)), m the pair's margin in the data, f = log or f = m itself

    Amini et al. 2024, ODPO, arXiv:2402.10571.
    """

    kind: Literal["odpo"] = "odpo"
    """Which loss this is."""
    offset_alpha: float = Field(default=1.0, ge=0)
    """α: what the offset is multiplied by."""
    offset_of: Literal["log_margin", "margin"] = "log_margin"
    """f: what of the pair's margin is taken; its logarithm, as in the paper, or itself."""

    @property
    def needs_margin(self) -> bool:
        return True

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        assert logps.margins_B is not None
        offsets_B = logps.margins_B.log() if self.offset_of == "log_margin" else logps.margins_B
        return -log_sigmoid(self.beta * delta_B - self.offset_alpha * offsets_B)
