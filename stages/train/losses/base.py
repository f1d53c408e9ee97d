"""Base classes of the losses, with the modifiers that each family supports.

A class has only the parameters that apply to it, so a recipe cannot ask for a combination that does
not exist.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.config import config_class
from stages.train.losses.logps import PairLogps, SideLogps

if TYPE_CHECKING:
    from torch import Tensor

RewardOf = Literal["log_ratio", "logp", "mean_logp"]
"""Quantity that a reward is a multiple of: the sum of log-ratios to the reference, the policy's
summed log-prob, or its log-prob per token."""

_MAX_EXPONENT = 40.0
"""Larger exponents, squared as by IPO, overflow float32. TRL bounds one of the two, at 80."""


@config_class
class PairLoss:
    """A loss: one number per pair, which training weights, sums and averages."""

    kind: str
    """Name of the loss."""
    weight: float = Field(default=1.0, gt=0)
    """Factor of the loss in a sum of several."""

    needs_reference: ClassVar[bool] = False
    couples_pairs: ClassVar[bool] = False
    """Whether a pair's loss depends on the other pairs of the batch."""
    reward_of: ClassVar[RewardOf] = "log_ratio"

    @property
    def reward_scale(self) -> float:
        """Factor of the rewards in the metrics."""
        return 1.0

    @property
    def needs_margin(self) -> bool:
        """Whether it uses the data's margin between chosen and rejected."""
        return False

    @property
    def needs_log_collision(self) -> bool:
        """Whether it uses the policy's log collision probability at every token."""
        return False

    def __call__(self, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B]."""
        raise NotImplementedError

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """Compute the implicit rewards of the chosen and the rejected sides, float32 [B] each."""
        return self._reward(logps.chosen), self._reward(logps.rejected)

    def _reward(self, side: SideLogps) -> Tensor:
        if self.reward_of == "log_ratio":
            return self.reward_scale * side.log_ratio_B
        logp_B = side.policy_logp_B if self.reward_of == "logp" else side.mean_policy_logp_B
        return self.reward_scale * logp_B


@config_class
class ReferenceLoss(PairLoss):
    """A loss of a and b, the policy's log-ratios to the reference, summed over each completion.

    Modifiers change how the tokens' log-ratios are summed:

    - LD-DPO (Liu et al. 2024, arXiv:2409.06411): tokens beyond the length of the shorter side have
      weight `ld_alpha` instead of 1.
    - Token clamping (Ethayarajh et al. 2025, "humanline", arXiv:2509.24207): each token's log-ratio
      is clamped to two bounds, and has no gradient beyond them.
    """

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """LD-DPO: weight of tokens beyond the shorter side's length; 1: the same as all others."""
    ld_side: Literal["both", "policy"] = "both"
    """LD-DPO: whose log-probs ld_alpha weights, policy's and reference's or only the policy's."""
    token_clamp: tuple[float, float] | None = None
    """Lowest and highest log-ratio of a token in nats, such as [-1, 1.5]; absent: no clamping."""

    needs_reference: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_modifiers(self) -> ReferenceLoss:
        if self.ld_side == "policy" and self.ld_alpha == 1:
            raise ValueError(
                "ld_side has no effect unless ld_alpha weights the tail; set ld_alpha below 1, too"
            )
        if self.token_clamp is not None:
            if not self.token_clamp[0] < 0 < self.token_clamp[1]:
                raise ValueError("token_clamp needs a bound below 0 and one above, in this order")
            if self.ld_side == "policy":
                raise ValueError(
                    "token_clamp bounds policy minus reference, but ld_side: policy weights them "
                    "differently; use ld_side: both"
                )
        return self

    @property
    def reward_scale(self) -> float:
        return self.beta

    def log_ratios(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """Sum the tokens' log-ratios under the modifiers: a and b, float32 [B] each, nats."""
        if self.ld_alpha == 1 and self.token_clamp is None:
            return logps.chosen.log_ratio_B, logps.rejected.log_ratio_B
        shared_B = _shared_length(logps)
        return self._log_ratio(logps.chosen, shared_B), self._log_ratio(logps.rejected, shared_B)

    def ref_margins(self, logps: PairLogps) -> Tensor:
        """Compute the reference's log-prob of chosen minus rejected, under the modifiers: [B]."""
        shared_B = _shared_length(logps)
        sums = []
        for side in (logps.chosen, logps.rejected):
            assert side.ref_token_logps_BT is not None
            _, ref_weights_BT = self._token_weights(side, shared_B)
            sums.append((side.ref_token_logps_BT * ref_weights_BT).sum(-1))
        return sums[0] - sums[1]

    def _log_ratio(self, side: SideLogps, shared_B: Tensor) -> Tensor:
        weights_BT, ref_weights_BT = self._token_weights(side, shared_B)
        if self.ld_side == "policy":
            assert side.ref_token_logps_BT is not None
            return (
                side.policy_token_logps_BT * weights_BT - side.ref_token_logps_BT * ref_weights_BT
            ).sum(-1)
        log_ratios_BT = side.token_log_ratios_BT
        if self.token_clamp is not None:
            log_ratios_BT = log_ratios_BT.clamp(*self.token_clamp)
        return (log_ratios_BT * weights_BT).sum(-1)

    def _token_weights(self, side: SideLogps, shared_B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the weights of the tokens' log-probs, of policy and reference: [B, T] each."""
        mask_BT = side.loss_mask_BT
        is_tail_BT = mask_BT.cumsum(-1) > shared_B[:, None]
        weights_BT = mask_BT.where(~is_tail_BT, self.ld_alpha * mask_BT)
        return weights_BT, weights_BT if self.ld_side == "both" else mask_BT


def _shared_length(logps: PairLogps) -> Tensor:
    """Return the number of tokens of the shorter side, [B]."""
    return logps.chosen.num_tokens_B.minimum(logps.rejected.num_tokens_B)


@config_class
class SeparableLoss(ReferenceLoss):
    """A loss of a single pair's a and b, which WPO can weight.

    WPO (Zhou et al. 2024, arXiv:2406.11827, equation 2) weights a pair by how likely the policy is
    to generate its answers: w = Π over both sides of exp(mean over tokens of
    (log p - log Σ_v p_v²)), without a gradient.
    """

    wpo: bool = False
    """Weight the pairs by WPO."""

    @property
    def needs_log_collision(self) -> bool:
        return self.wpo

    def __call__(self, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B]."""
        losses_B = self.of_log_ratios(*self.log_ratios(logps), logps)
        return wpo_weights(logps) * losses_B if self.wpo else losses_B

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        """Compute each pair's loss, float32 [B].

        Args:
            chosen_B: float32, nats: a.
            rejected_B: float32, nats: b.
            logps: the log-probs, for losses that depend on more than a and b.
        """
        raise NotImplementedError


def wpo_weights(logps: PairLogps) -> Tensor:
    """Compute WPO's weights of the pairs: float32 [B], without a gradient."""
    return (_mean_alignment(logps.chosen) + _mean_alignment(logps.rejected)).exp()


def _mean_alignment(side: SideLogps) -> Tensor:
    """Compute the mean over tokens of log p - log Σ_v p_v², [B]."""
    assert side.policy_log_collision_BT is not None, "the policy was not asked for it"
    aligned_BT = side.policy_token_logps_BT.detach() - side.policy_log_collision_BT
    return (aligned_BT * side.loss_mask_BT).sum(-1) / side.num_tokens_B


FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@config_class
class DifferenceLoss(SeparableLoss):
    """A loss of Δ = f'(a) - f'(b), which in DPO is Δ = a - b.

    f-DPO (Wang et al. 2023, arXiv:2309.16240, table 1) replaces the reverse KL by another
    divergence f. The optimal policy's reward is then β f'(policy / reference), up to a constant
    that cancels in the difference:

    - reverse_kl: f' = a
    - forward_kl: f' = 1 - exp(-a)
    - js_divergence: f' = log 2 + log sigmoid(a)
    - alpha_divergence: f' = (exp((α - 1) a) - 1) / (α - 1); α = 0 is forward, α → 1 reverse KL
    """

    f_divergence: FDivergence = "reverse_kl"
    """f-DPO: the divergence that keeps the policy close to the reference."""
    f_alpha: float | None = None
    """f-DPO: α of the alpha_divergence, required for it and only allowed with it."""

    @model_validator(mode="after")
    def _check_divergence(self) -> DifferenceLoss:
        if (self.f_divergence == "alpha_divergence") != (self.f_alpha is not None):
            raise ValueError("f_alpha and f_divergence: alpha_divergence go together")
        if self.f_alpha == 1:
            raise ValueError("f_alpha: for the limit 1, use f_divergence: reverse_kl")
        return self

    @property
    def divides_by_length(self) -> bool:
        """Whether each side is divided by its number of tokens."""
        return False

    def of_log_ratios(self, chosen_B: Tensor, rejected_B: Tensor, logps: PairLogps) -> Tensor:
        chosen_B, rejected_B = self._f_prime(chosen_B), self._f_prime(rejected_B)
        if self.divides_by_length:
            chosen_B = chosen_B / logps.chosen.num_tokens_B
            rejected_B = rejected_B / logps.rejected.num_tokens_B
        return self.of_difference(chosen_B - rejected_B, logps)

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        """Compute each pair's loss from Δ, float32 [B] both; Δ is in nats for the reverse KL."""
        raise NotImplementedError

    def _f_prime(self, log_ratio_B: Tensor) -> Tensor:
        if self.f_divergence == "reverse_kl":
            return log_ratio_B
        if self.f_divergence == "js_divergence":
            return math.log(2) + log_sigmoid(log_ratio_B)
        power = -1.0 if self.f_alpha is None else self.f_alpha - 1
        return (power * log_ratio_B).clamp(max=_MAX_EXPONENT).expm1() / power


def log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)
