"""Metrics of the pairs in made_logps, worked by hand."""

import math

import pytest
import torch

from stages.train.losses import PairLogps, SideLogps, SigmoidLoss, SimpoLoss
from stages.train.metrics import PairSums
from stages.train.world import World
from tests.stages.train.losses.made_logps import LN2, make_logps

WORLD = World(device=torch.device("cpu"))


def test_metrics_by_hand() -> None:
    """log r of the chosen tokens: ln 2, ln 2; -ln 4. Of the rejected: -ln 4; -ln 16, -ln 4.

    Their mean over six tokens is -8/6 ln 2. 1/r - 1 + log r is 1/2 - 1 + ln 2 twice, 3 - ln 4 three
    times and 15 - ln 16 once. Both sides fell in the second pair.
    """
    sums = PairSums(WORLD.device, has_reference=True)
    sums.add(torch.tensor([1.0, 3.0]), make_logps(), SigmoidLoss(beta=0.5))
    k3 = 2 * (-0.5 + LN2) + 3 * (3 - 2 * LN2) + 15 - 4 * LN2
    assert sums.means(WORLD) == {
        "loss": 2.0,
        "rewards/chosen": pytest.approx(0, abs=1e-12),
        "rewards/rejected": pytest.approx(-2 * LN2),
        "rewards/margins": pytest.approx(2 * LN2),
        "rewards/accuracies": 1.0,
        "logps/chosen": pytest.approx(-2.5 * LN2),
        "logps/rejected": pytest.approx(-4 * LN2),
        "lengths/chosen": 1.5,
        "lengths/rejected": 1.5,
        "displacement/chosen": 0.5,
        "displacement/both": 0.5,
        "kl/k1": pytest.approx(-8 / 6 * LN2),
        "kl/k3": pytest.approx(k3 / 6),
        "num_pairs": 2,
    }


def test_without_a_reference_nothing_is_compared_with_one() -> None:
    logps = make_logps()
    sides = [
        SideLogps(
            policy_token_logps_BT=side.policy_token_logps_BT,
            ref_token_logps_BT=None,
            loss_mask_BT=side.loss_mask_BT,
        )
        for side in (logps.chosen, logps.rejected)
    ]
    sums = PairSums(WORLD.device, has_reference=False)
    alone = PairLogps(chosen=sides[0], rejected=sides[1])
    sums.add(torch.zeros(2), alone, SimpoLoss(beta=2.0))
    found = sums.means(WORLD)
    assert found["rewards/margins"] == pytest.approx(LN2)
    assert found["rewards/accuracies"] == 0.5
    assert not {name for name in found if name.startswith(("kl/", "displacement/"))}


def test_a_token_that_the_policy_gave_up_keeps_the_metrics_finite() -> None:
    side = SideLogps(
        policy_token_logps_BT=torch.tensor([[-1e3]]),
        ref_token_logps_BT=torch.tensor([[-1.0]]),
        loss_mask_BT=torch.ones(1, 1),
    )
    sums = PairSums(WORLD.device, has_reference=True)
    sums.add(torch.zeros(1), PairLogps(chosen=side, rejected=side), SigmoidLoss())
    assert all(math.isfinite(value) for value in sums.means(WORLD).values())
