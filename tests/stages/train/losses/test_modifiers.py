"""Modifiers of log-ratios and weights of pairs, worked by hand on made_logps."""

import math

import pytest
import torch
from torch import Tensor

from stages.train.losses import (
    LOSSES,
    DpopLoss,
    HingeLoss,
    IpoLoss,
    PairLogps,
    PairLoss,
    SideLogps,
    SigmoidLoss,
)
from stages.train.losses.base import DifferenceLoss, ReferenceLoss, SeparableLoss
from tests.stages.train.losses.made_logps import LN2, LN4, losses_of, make_logps, random_logps


def test_ld_dpo_weights_tokens_beyond_the_shorter_side() -> None:
    """First pair: the second of two chosen tokens, after a masked one, is the tail.

    a = ln 2 + ½ ln 2 and b = -ln 4. Second pair: the second of two rejected tokens is the tail, and
    b = -ln 16 - ½ ln 4.
    """
    chosen_B, rejected_B = SigmoidLoss(ld_alpha=0.5).log_ratios(make_logps())
    assert chosen_B.tolist() == pytest.approx([1.5 * LN2, -LN4])
    assert rejected_B.tolist() == pytest.approx([-LN4, -5 * LN2])


def test_ld_dpo_of_the_policy_alone_leaves_the_reference_whole() -> None:
    """a = -ln 2 - ½ ln 2 + ln 16; second pair b = -ln 16 - ½ ln 4 - 0."""
    loss = SigmoidLoss(ld_alpha=0.5, ld_side="policy")
    chosen_B, rejected_B = loss.log_ratios(make_logps())
    assert chosen_B.tolist() == pytest.approx([2.5 * LN2, -LN4])
    assert rejected_B.tolist() == pytest.approx([-LN4, -5 * LN2])


def test_lengths_stay_those_of_the_tokens_under_ld_dpo() -> None:
    """IPO: (1.5 ln 2 / 2 + ln 4 - 1)²."""
    losses = IpoLoss(beta=0.5, ld_alpha=0.5)(make_logps())
    assert losses[0].item() == pytest.approx((0.75 * LN2 + LN4 - 1) ** 2)


def test_token_clamp_bounds_each_token_and_stops_its_gradient() -> None:
    """Log-ratios of ln 2 = 0.69 become 0.5, and -ln 4 = -1.39 becomes -1."""
    logps = make_logps()
    chosen_B, rejected_B = HingeLoss(token_clamp=(-1, 0.5)).log_ratios(logps)
    assert chosen_B.tolist() == pytest.approx([1.0, -1.0])
    assert rejected_B.tolist() == pytest.approx([-1.0, -2.0])
    (chosen_B.sum() + rejected_B.sum()).backward()
    assert not logps.chosen.policy_token_logps_BT.grad.count_nonzero()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "delta"),
    [
        # a = ln 4, b = -ln 4.
        ({"f_divergence": "reverse_kl"}, 2 * LN4),
        ({"f_divergence": "forward_kl"}, (1 - 1 / 4) - (1 - 4)),
        ({"f_divergence": "js_divergence"}, math.log(8 / 5) - math.log(2 / 5)),
        ({"f_divergence": "alpha_divergence", "f_alpha": 0.5}, 1 + 2),
        ({"f_divergence": "alpha_divergence", "f_alpha": 2.0}, 3 + 3 / 4),
        ({"f_divergence": "alpha_divergence", "f_alpha": 1 + 1e-9}, 2 * LN4),
    ],
)
def test_f_divergences_by_hand(options: dict[str, object], delta: float) -> None:
    losses = HingeLoss(beta=0.1, **options)(make_logps())  # type: ignore[arg-type]
    assert losses[0].item() == pytest.approx(1 - 0.1 * delta, rel=1e-7)


def test_wpo_weights_pairs_by_their_likelihood_under_the_policy() -> None:
    """Chosen tokens: ln 2 and 0 above the log collision probability. Rejected: ln 2 below.

    w = exp(½ ln 2 - ln 2) = √½. In the second pair p is the collision probability: w = 1.
    """
    plain = DpopLoss(beta=0.5)(make_logps())
    logps = make_logps()
    weighted = DpopLoss(beta=0.5, wpo=True)(logps)
    assert (weighted / plain).tolist() == pytest.approx([math.sqrt(0.5), 1.0])
    weighted[0].backward()
    again = make_logps()
    DpopLoss(beta=0.5)(again)[0].backward()
    found, wanted = (each.chosen.policy_token_logps_BT.grad for each in (logps, again))
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found, math.sqrt(0.5) * wanted)


def variants() -> list[PairLoss]:
    """List every loss with its defaults, and with each modifier that it supports."""
    made: list[PairLoss] = []
    for kind in LOSSES:
        made.append(kind())  # type: ignore[call-arg]
        if issubclass(kind, ReferenceLoss):
            made.append(kind(ld_alpha=0.4))  # type: ignore[call-arg]
            made.append(kind(ld_alpha=0.4, ld_side="policy"))  # type: ignore[call-arg]
            made.append(kind(token_clamp=(-0.7, 0.9)))  # type: ignore[call-arg]
        if issubclass(kind, DifferenceLoss):
            for divergence in ("forward_kl", "js_divergence"):
                made.append(kind(f_divergence=divergence))  # type: ignore[call-arg]
            made.append(
                kind(f_divergence="alpha_divergence", f_alpha=0.3)  # type: ignore[call-arg]
            )
        if "label_smoothing" in kind.__annotations__:
            made.append(kind(label_smoothing=0.2))  # type: ignore[call-arg]
    return made


@pytest.mark.parametrize("loss", variants(), ids=repr)
def test_gradients_agree_with_finite_differences(loss: PairLoss) -> None:
    """The state of bco_pair and beta_dpo has no gradient and is fixed here."""
    logps = random_logps(3, num_pairs=4, longest=3)

    def loss_of(chosen: Tensor, rejected: Tensor) -> Tensor:
        sides = [
            SideLogps(
                policy_token_logps_BT=policy,
                ref_token_logps_BT=side.ref_token_logps_BT,
                loss_mask_BT=side.loss_mask_BT,
                policy_log_collision_BT=side.policy_log_collision_BT,
            )
            for policy, side in ((chosen, logps.chosen), (rejected, logps.rejected))
        ]
        return losses_of(
            loss,
            PairLogps(chosen=sides[0], rejected=sides[1], margins_B=logps.margins_B),
            state={"bco_pair/delta": 0.3, "beta_dpo/beta": 0.2},
            is_trained_on=False,
        )

    inputs = (logps.chosen.policy_token_logps_BT, logps.rejected.policy_token_logps_BT)
    assert torch.autograd.gradcheck(loss_of, inputs)


def test_modifiers_exist_only_where_they_apply() -> None:
    """WPO needs a separable loss, f-divergences a difference in which the constant cancels."""
    with_wpo = {kind.kind for kind in LOSSES if issubclass(kind, SeparableLoss)}
    assert {"sigmoid", "nca_pair", "dpop"} <= with_wpo
    assert not with_wpo & {"aot", "bco_pair", "beta_dpo", "sft", "simpo"}
    with_divergence = {kind.kind for kind in LOSSES if issubclass(kind, DifferenceLoss)}
    assert with_divergence == {
        *("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop", "odpo"),
    }
