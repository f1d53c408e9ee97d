"""Which loss is trained? One class each: its parameters, its equation, its paper.

A loss is a pure function of the per-token log-probabilities of policy and reference. It gives one
loss a pair; the loop weights and averages them. Notation: a and b are the log-ratios of policy to
reference, summed over the chosen (n_c tokens) and the rejected completion (n_r tokens), Δ = a - b.

Shape suffixes: B pairs, T tokens of the longest completion of a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field, Tag

from schemas.config import config_class

if TYPE_CHECKING:  # Reading a recipe must not cost the seconds that importing torch takes.
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SideLogps:
    """One side, chosen or rejected, of every pair of a micro-batch."""

    policy_token_logps_BT: Tensor
    """float32, nats, differentiable; arbitrary on padding."""
    ref_token_logps_BT: Tensor
    """float32, nats; arbitrary on padding."""
    loss_mask_BT: Tensor
    """float32: 1 on tokens that count, 0 on padding and on tokens left out by encode."""
    policy_log_collision_BT: Tensor | None = None
    """float32, nats, without a gradient: log of the sum over the vocabulary of p squared at each
    completion token; only where a loss needs it."""

    @property
    def policy_logp_B(self) -> Tensor:
        """float32 [B], nats, differentiable."""
        return (self.policy_token_logps_BT * self.loss_mask_BT).sum(-1)

    @property
    def log_ratio_B(self) -> Tensor:
        """float32 [B], nats: a of the chosen, b of the rejected side.

        Summed over differences and not the difference of sums: where policy and reference are
        close, long completions would lose the leading digits.
        """
        difference_BT = self.policy_token_logps_BT - self.ref_token_logps_BT
        return (difference_BT * self.loss_mask_BT).sum(-1)

    @property
    def num_tokens_B(self) -> Tensor:
        """float32 [B]: tokens that count."""
        return self.loss_mask_BT.sum(-1)


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """What a loss sees of a micro-batch."""

    chosen: SideLogps
    rejected: SideLogps


@config_class
class SigmoidLoss:
    """DPO, and cDPO where labels are smoothed.

    -(1 - ε) log sigmoid(βΔ) - ε log sigmoid(-βΔ)

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. The smoothing is from Mitchell 2023, "A note
    on DPO with noisy preferences and relationship to IPO", equation 3.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    """Which loss this is."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the share of labels assumed to be flipped."""

    def __call__(self, logps: PairLogps) -> Tensor:
        """Give float32 [B]."""
        logits_B = self.beta * (logps.chosen.log_ratio_B - logps.rejected.log_ratio_B)
        loss_B = -(1 - self.label_smoothing) * _log_sigmoid(logits_B)
        return loss_B - self.label_smoothing * _log_sigmoid(-logits_B)


@config_class
class IpoLoss:
    """IPO on log-ratios divided by the completions' lengths.

    (a / n_c - b / n_r - 1 / (2β))²

    Azar et al. 2023, arXiv:2310.12036, equation 17, with β for their τ. The paper's equation has
    the sums a and b; TRL divides by the lengths, and so does this.
    """

    kind: Literal["ipo"] = "ipo"
    """Which loss this is."""
    beta: float = Field(default=0.1, gt=0)
    """τ of the paper: the margin aimed at is 1 / (2 beta) nats a token."""

    def __call__(self, logps: PairLogps) -> Tensor:
        """Give float32 [B]."""
        chosen_B = logps.chosen.log_ratio_B / logps.chosen.num_tokens_B
        rejected_B = logps.rejected.log_ratio_B / logps.rejected.num_tokens_B
        loss_B: Tensor = (chosen_B - rejected_B - 1 / (2 * self.beta)).square()
        return loss_B


def _read_kind(loss: object) -> str:
    """Tell which loss is meant, by a block of a recipe or a made loss; sigmoid unless it says."""
    kind = loss.get("kind", "sigmoid") if isinstance(loss, dict) else getattr(loss, "kind", loss)
    return str(kind)


Loss = Annotated[
    Annotated[SigmoidLoss, Tag("sigmoid")] | Annotated[IpoLoss, Tag("ipo")],
    Discriminator(_read_kind),
]
"""Every loss, told apart by its `kind`. A new one is a class above and a name here."""


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)
