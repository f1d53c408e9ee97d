"""Losses that couple the pairs of a batch.

The batch is that of an optimizer step, over all workers, so micro-batches and world size change
only rounding. A first pass, without a gradient, computes a and b of all pairs. The pass with a
gradient then needs only the losses and their derivatives with respect to a and b (objective.py).

Notation: a and b are the log-ratios of policy to reference, summed over the chosen and the rejected
completion. Shape suffixes: B pairs of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from schemas.config import config_class
from stages.train.losses.base import ReferenceLoss, log_sigmoid
from stages.train.losses.differences import smoothed

if TYPE_CHECKING:
    from torch import Generator, Tensor

State = Mapping[str, float]
"""State that a loss keeps from step to step, by metric column."""


@dataclass(frozen=True, kw_only=True)
class BatchRatios:
    """Summed log-ratios of all pairs of a batch, in the batch's order."""

    chosen_B: Tensor
    """float64, nats: a."""
    rejected_B: Tensor
    """float64, nats: b."""
    ref_margins_B: Tensor
    """float64, nats: the reference's log-prob of chosen minus rejected."""


@config_class
class CoupledLoss(ReferenceLoss):
    """A loss of a pair that depends on the other pairs of its batch."""

    couples_pairs: ClassVar[bool] = True
    state_columns: ClassVar[tuple[str, ...]] = ()
    """Metric columns that hold its state; the next step reads it from there."""

    def of_batch(
        self, ratios: BatchRatios, state: State, generator: Generator | None
    ) -> tuple[Tensor, State]:
        """Compute the losses, float64 [B], differentiable in a and b, and the new state.

        Args:
            ratios: log-ratios of the whole batch.
            state: the state after the last step; empty before the first.
            generator: for random draws, seeded by the step; None in an evaluation, where nothing is
                drawn and the state does not change.
        """
        raise NotImplementedError


@config_class
class AotLoss(CoupledLoss):
    """AOT: the batch's margins should stochastically dominate those of the reference.

    -(1 - ε) log sigmoid(β δ_k) - ε log sigmoid(-β δ_k), δ_k = u_(k) - v_(k): the k-th smallest of
    the policy's margins u = log π(chosen) - log π(rejected) and of the reference's, v

    Melnyk et al. 2024, arXiv:2406.05882, "paired".
    """

    kind: Literal["aot"] = "aot"
    """Name of the loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the fraction of labels assumed to be flipped."""

    def of_batch(
        self, ratios: BatchRatios, state: State, generator: Generator | None
    ) -> tuple[Tensor, State]:
        policy_B = ratios.chosen_B - ratios.rejected_B + ratios.ref_margins_B
        losses_B = _match_quantiles(policy_B, ratios.ref_margins_B, self.beta, self.label_smoothing)
        return losses_B, {}


@config_class
class AotUnpairedLoss(CoupledLoss):
    """AOT without pairing: chosen rewards should stochastically dominate rejected rewards.

    As aot, with δ_k = a_(k) - b_(k); quantile k counts as the pair whose chosen side has rank k.

    Melnyk et al. 2024, arXiv:2406.05882, "unpaired".
    """

    kind: Literal["aot_unpaired"] = "aot_unpaired"
    """Name of the loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the fraction of labels assumed to be flipped."""

    def of_batch(
        self, ratios: BatchRatios, state: State, generator: Generator | None
    ) -> tuple[Tensor, State]:
        losses_B = _match_quantiles(
            ratios.chosen_B, ratios.rejected_B, self.beta, self.label_smoothing
        )
        return losses_B, {}


def _match_quantiles(
    values_B: Tensor, others_B: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Compare the k-th smallest values of two lists; the loss belongs to the first one's pair."""
    sorted_B, places_B = values_B.sort(stable=True)
    losses_B = smoothed(beta * (sorted_B - others_B.sort(stable=True).values), label_smoothing)
    return losses_B.new_zeros(len(losses_B)).scatter(0, places_B, losses_B)


@config_class
class BcoPairLoss(CoupledLoss):
    """BCO: rewards as the logits of a binary classifier of chosen against rejected answers.

    -log sigmoid(βa - δ) - log sigmoid(-(βb - δ)), δ the mean reward of both sides over all pairs so
    far, including this batch

    Jung et al. 2024, arXiv:2404.04656.
    """

    kind: Literal["bco_pair"] = "bco_pair"
    """Name of the loss."""
    shift: Literal["running_mean", "none"] = "running_mean"
    """δ: the mean reward so far, as in the paper, or none for 0, as in TRL's bco_pair."""

    state_columns: ClassVar[tuple[str, ...]] = ("bco_pair/delta", "bco_pair/num_pairs")

    def of_batch(
        self, ratios: BatchRatios, state: State, generator: Generator | None
    ) -> tuple[Tensor, State]:
        chosen_B, rejected_B = self.beta * ratios.chosen_B, self.beta * ratios.rejected_B
        delta, num_pairs = (state.get(name, 0.0) for name in self.state_columns)
        if self.shift == "running_mean" and generator is not None:
            mean = 0.5 * (chosen_B.detach() + rejected_B.detach()).mean().item()
            num_pairs += len(chosen_B)
            delta += (mean - delta) * len(chosen_B) / num_pairs
        losses_B = -log_sigmoid(chosen_B - delta) - log_sigmoid(delta - rejected_B)
        return losses_B, dict(zip(self.state_columns, (delta, num_pairs), strict=True))


@config_class
class BetaDpoLoss(CoupledLoss):
    """β-DPO: β adapts to the batch, larger where its pairs are easier to tell apart.

    -log sigmoid(β_t Δ) of the pairs kept, β_t = β (1 + α (mean Δ of the pairs kept - M)), M and σ
    running means of a batch's mean and standard deviation of Δ. The fraction ρ of the pairs is
    kept, drawn without replacement with weights exp(-½ ((Δ - M) / σ)²).

    Wu et al. 2024, arXiv:2407.08639. As in the authors' code, M and σ start at 0
    and include a batch before it is trained on, Δ is not multiplied by β, and β_t is at least 1e-3.
    """

    kind: Literal["beta_dpo"] = "beta_dpo"
    """Name of the loss."""
    alpha: float = Field(default=0.6, ge=0)
    """α: how strongly β adapts to the batch, in 1 / nats."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the running means M and σ."""
    keep_fraction: float = Field(default=0.8, gt=0, le=1)
    """ρ: fraction of a batch's pairs to train on."""

    state_columns: ClassVar[tuple[str, ...]] = (
        "beta_dpo/margin_mean",
        "beta_dpo/margin_std",
        "beta_dpo/beta",
    )

    def of_batch(
        self, ratios: BatchRatios, state: State, generator: Generator | None
    ) -> tuple[Tensor, State]:
        delta_B = ratios.chosen_B - ratios.rejected_B
        if generator is None:
            return -log_sigmoid(state.get("beta_dpo/beta", self.beta) * delta_B), state
        margins_B = delta_B.detach()
        batch_mean, batch_std = margins_B.mean().item(), margins_B.std(correction=0).item()
        mean = self._follow(state.get("beta_dpo/margin_mean", 0.0), batch_mean)
        std = self._follow(state.get("beta_dpo/margin_std", 0.0), batch_std)
        kept_K = self._draw(margins_B, mean, std, generator)
        beta = self.beta * (1 + self.alpha * (margins_B[kept_K].mean().item() - mean))
        beta = max(beta, _LOWEST_BETA)
        share_B = margins_B.new_zeros(len(margins_B))
        share_B[kept_K] = len(margins_B) / len(kept_K)
        losses_B = share_B * -log_sigmoid(beta * delta_B)
        return losses_B, dict(zip(self.state_columns, (mean, std, beta), strict=True))

    def _follow(self, running: float, value: float) -> float:
        return self.momentum * running + (1 - self.momentum) * value

    def _draw(self, margins_B: Tensor, mean: float, std: float, generator: Generator) -> Tensor:
        """Draw the positions of the pairs to keep.

        The largest log-weights plus Gumbel noise are a draw without replacement (Efraimidis and
        Spirakis 2006), and log-weights do not underflow.
        """
        log_weights_B = -0.5 * ((margins_B - mean) / max(std, _LOWEST_STD)).square()
        uniform_B = margins_B.new_empty(len(margins_B)).uniform_(generator=generator)
        keys_B = log_weights_B - (-uniform_B.log()).log()
        return keys_B.topk(max(1, int(len(margins_B) * self.keep_fraction))).indices


_LOWEST_BETA = 1e-3
_LOWEST_STD = 1e-6
"""Nats; smaller differences between pairs are rounding."""
