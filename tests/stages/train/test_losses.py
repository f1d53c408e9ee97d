"""Losses against values worked by hand and against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from schemas.config import parse_config
from schemas.errors import ConfigError
from stages.train import TrainConfig
from stages.train.losses import IpoLoss, Loss, PairLogps, SideLogps, SigmoidLoss


def make_side(
    policy: list[list[float]], ref: list[list[float]], mask: list[list[float]]
) -> SideLogps:
    tensors = [torch.tensor(rows, dtype=torch.float64) for rows in (policy, ref, mask)]
    return SideLogps(
        policy_token_logps_BT=tensors[0].requires_grad_(),
        ref_token_logps_BT=tensors[1],
        loss_mask_BT=tensors[2],
    )


def make_logps() -> PairLogps:
    """Two pairs.

    First: a = (-1 + 3) + (-2 + 2.5) = 2.5 over two tokens, the third is padding;
    b = -4 + 3 = -1 over one token. Δ = 3.5.
    Second: a = -0.5 + 0.5 - 1 + 2 = 1 over three tokens of which the middle one (+9) is masked;
    b = 2 over two tokens. Δ = -1.
    """
    return PairLogps(
        chosen=make_side(
            [[-1.0, -2.0, -77.0], [-0.5, -1.0, -1.0]],
            [[-3.0, -2.5, -55.0], [-0.5, -10.0, -2.0]],
            [[1, 1, 0], [1, 0, 1]],
        ),
        rejected=make_side(
            [[-4.0, 88.0], [-1.0, -1.0]], [[-3.0, 44.0], [-2.0, -2.0]], [[1, 0], [1, 1]]
        ),
    )


def test_log_ratios_are_sums_over_the_loss_mask() -> None:
    logps = make_logps()
    assert logps.chosen.log_ratio_B.tolist() == [2.5, 1.0]
    assert logps.rejected.log_ratio_B.tolist() == [-1.0, 2.0]
    assert logps.chosen.policy_logp_B.tolist() == [-3.0, -1.5]
    assert logps.chosen.num_tokens_B.tolist() == [2.0, 2.0]


def test_sigmoid_loss_by_hand() -> None:
    """With beta 0.2: βΔ = 0.7 and -0.2, and -log sigmoid(x) = log(1 + exp(-x))."""
    losses = SigmoidLoss(beta=0.2)(make_logps())
    assert losses.tolist() == pytest.approx(
        [math.log(1 + math.exp(-0.7)), math.log(1 + math.exp(0.2))], rel=1e-12
    )


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    losses = SigmoidLoss(beta=0.2, label_smoothing=0.25)(make_logps())
    right, flipped = math.log(1 + math.exp(-0.7)), math.log(1 + math.exp(0.7))
    assert losses[0].item() == pytest.approx(0.75 * right + 0.25 * flipped, rel=1e-12)


def test_sigmoid_loss_of_the_reference_itself_is_ln_2() -> None:
    side = make_side([[-1.0, -2.0]], [[-1.0, -2.0]], [[1, 1]])
    assert SigmoidLoss()(PairLogps(chosen=side, rejected=side)).tolist() == [math.log(2)]


def test_ipo_loss_by_hand() -> None:
    """With beta 0.5 the aim is 1: (2.5/2 + 1/1 - 1)² = 1.25², and (1/2 - 2/2 - 1)² = 1.5²."""
    assert IpoLoss(beta=0.5)(make_logps()).tolist() == pytest.approx([1.5625, 2.25], rel=1e-12)


def test_extreme_margins_stay_finite() -> None:
    side = make_side([[1e4]], [[0.0]], [[1]])
    other = make_side([[-1e4]], [[0.0]], [[1]])
    assert SigmoidLoss(beta=1.0)(PairLogps(chosen=other, rejected=side)).tolist() == [2e4]


@pytest.mark.parametrize(
    "loss", [SigmoidLoss(beta=0.3), SigmoidLoss(label_smoothing=0.1), IpoLoss(beta=0.2)], ids=repr
)
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    logps = make_logps()

    def loss_of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(
            PairLogps(
                chosen=SideLogps(
                    policy_token_logps_BT=chosen,
                    ref_token_logps_BT=logps.chosen.ref_token_logps_BT,
                    loss_mask_BT=logps.chosen.loss_mask_BT,
                ),
                rejected=SideLogps(
                    policy_token_logps_BT=rejected,
                    ref_token_logps_BT=logps.rejected.ref_token_logps_BT,
                    loss_mask_BT=logps.rejected.loss_mask_BT,
                ),
            )
        )

    inputs = (logps.chosen.policy_token_logps_BT, logps.rejected.policy_token_logps_BT)
    assert torch.autograd.gradcheck(loss_of, inputs)


def test_recipe_chooses_the_loss_by_its_kind() -> None:
    config = parse_config(TrainConfig, {"loss": {"kind": "ipo", "beta": 0.2}}, path="train")
    assert config.loss == IpoLoss(beta=0.2)
    assert parse_config(TrainConfig, {}, path="train").loss == SigmoidLoss(beta=0.1)
    with pytest.raises(ConfigError, match=r"train\.loss.*label_smoothing"):
        parse_config(TrainConfig, {"loss": {"kind": "ipo", "label_smoothing": 0.1}}, path="train")
