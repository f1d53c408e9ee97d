"""Input of the losses: log-probs per completion token, and their sums.

Shape suffixes: B pairs, T tokens of the longest completion of a side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # Reading a recipe must not take the seconds of importing torch.
    from torch import Tensor

Side = Literal["chosen", "rejected"]


@dataclass(frozen=True, kw_only=True)
class SideLogps:
    """One side, chosen or rejected, of every pair of a micro-batch."""

    policy_token_logps_BT: Tensor
    """float32, nats, differentiable; arbitrary on padding."""
    ref_token_logps_BT: Tensor | None
    """float32, nats; arbitrary on padding. None if no loss needs a reference."""
    loss_mask_BT: Tensor
    """float32: 1 on tokens in the loss, 0 on padding and on tokens that encode masked."""
    policy_log_collision_BT: Tensor | None = None
    """float32, nats, without a gradient: log of the sum of p squared over the vocabulary at each
    completion token. None unless a loss needs it."""

    @property
    def policy_logp_B(self) -> Tensor:
        """float32 [B], nats, differentiable."""
        return (self.policy_token_logps_BT * self.loss_mask_BT).sum(-1)

    @property
    def mean_policy_logp_B(self) -> Tensor:
        """float32 [B], nats per token, differentiable."""
        return self.policy_logp_B / self.num_tokens_B

    @property
    def token_log_ratios_BT(self) -> Tensor:
        """float32 [B, T], nats: policy minus reference, differentiable; arbitrary on padding."""
        assert self.ref_token_logps_BT is not None, "a loss that needs none asked for a reference"
        return self.policy_token_logps_BT - self.ref_token_logps_BT

    @property
    def log_ratio_B(self) -> Tensor:
        """float32 [B], nats: a of the chosen, b of the rejected side.

        A sum of differences, not a difference of sums: when policy and reference are close, long
        completions would lose the leading digits.
        """
        return (self.token_log_ratios_BT * self.loss_mask_BT).sum(-1)

    @property
    def num_tokens_B(self) -> Tensor:
        """float32 [B]: tokens in the loss."""
        return self.loss_mask_BT.sum(-1)

    def detach(self) -> SideLogps:
        """Return the same values without gradients."""
        return replace(self, policy_token_logps_BT=self.policy_token_logps_BT.detach())


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """A loss's input for one micro-batch."""

    chosen: SideLogps
    rejected: SideLogps
    margins_B: Tensor | None = None
    """float32: margin of chosen over rejected in the data, in its own unit; NaN where it has
    none."""

    def with_gradient_of(self, side: Side) -> PairLogps:
        """Return the same values with the other side detached."""
        if side == "chosen":
            return replace(self, rejected=self.rejected.detach())
        return replace(self, chosen=self.chosen.detach())

    def detach(self) -> PairLogps:
        """Return the same values without gradients."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())
