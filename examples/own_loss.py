"""Adds a loss without editing the checkout: the command line with a focal DPO loss.

    python -m examples.own_loss run RECIPE --local --set stages.train.loss.gamma=1.0

Every command of run.py works this way. The loss is part of the train stage's config, so its kind
and parameters are hashed: another gamma trains again and scores nothing. A loss for everybody is a
class in stages/train/losses and a line in its `Loss`.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

import run
import stages.train
from schemas.config import config_class
from stages.train.config import TrainConfig
from stages.train.losses import PairLogps
from stages.train.losses.base import DifferenceLoss, log_sigmoid


@config_class
class FocalLoss(DifferenceLoss):
    """DPO that counts pairs less once they are learnt.

    -(1 - p)^γ log p, p = sigmoid(βΔ)

    Lin et al. 2017, arXiv:1708.02002, applied to DPO's probability of the label.
    """

    kind: Literal["focal"] = "focal"
    """Which loss this is."""
    gamma: float = Field(default=2.0, ge=0)
    """γ: how fast a pair's weight falls as it is learnt; 0 is DPO."""

    def of_difference(self, delta_B: Tensor, logps: PairLogps) -> Tensor:
        logits_B = self.beta * delta_B
        weights_B = (self.gamma * log_sigmoid(-logits_B)).exp()  # (1 - p)^γ, with finite gradients
        return -weights_B * log_sigmoid(logits_B)


@config_class
class FocalTrainConfig(TrainConfig):
    """The train stage's block under `stages:`, with this loss as the only one."""

    loss: FocalLoss = FocalLoss()  # type: ignore[assignment]
    """The focal loss with its parameters."""


def add_loss() -> None:
    """Make the train stage of this process read FocalTrainConfig."""
    stages.train.STAGE = replace(stages.train.STAGE, config=FocalTrainConfig)


if __name__ == "__main__":
    from examples import own_loss  # Not __main__: Ray's workers import the classes by name.

    own_loss.add_loss()
    run.main()
