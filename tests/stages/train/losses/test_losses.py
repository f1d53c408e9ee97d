"""Every loss equals values worked by hand, with logarithms of whole numbers."""

import math
from math import log, sqrt

import pytest
import torch

from schemas.config import parse_config
from schemas.errors import ConfigError
from stages.train import TrainConfig
from stages.train.losses import (
    LOSSES,
    AotLoss,
    AotUnpairedLoss,
    ApoDownLoss,
    ApoZeroLoss,
    BcoPairLoss,
    BetaDpoLoss,
    DiscopopLoss,
    DpopLoss,
    ExoPairLoss,
    HingeLoss,
    IpoLoss,
    NcaPairLoss,
    OdpoLoss,
    OrpoLoss,
    PairLogps,
    PairLoss,
    RobustLoss,
    SftLoss,
    SigmoidLoss,
    SigmoidNormLoss,
    SimpoLoss,
    SlicLoss,
    SppoHardLoss,
)
from stages.train.losses.base import DifferenceLoss
from stages.train.losses.coupled import CoupledLoss
from tests.stages.train.losses.made_logps import LN2, LN4, losses_of, make_logps, make_side

HAND_WORKED: list[tuple[PairLoss, list[float]]] = [
    # β Δ = ln 4 in both pairs, and sigmoid(ln 4) = 4/5.
    (SigmoidLoss(beta=0.5), [log(5 / 4), log(5 / 4)]),
    (SigmoidLoss(beta=0.5, label_smoothing=0.25), [0.75 * log(5 / 4) + 0.25 * log(5)] * 2),
    (RobustLoss(beta=0.5, label_smoothing=0.25), [(0.75 * log(5 / 4) - 0.25 * log(5)) / 0.5] * 2),
    # β Δ = ln 2.
    (HingeLoss(beta=0.25), [1 - LN2, 1 - LN2]),
    (HingeLoss(beta=0.5), [0.0, 0.0]),
    # A token: ln 2 + ln 4 = ln 8, and -ln 4 + ln 8 = ln 2; sigmoid(ln 8) = 8/9.
    (SigmoidNormLoss(beta=1.0), [log(9 / 8), log(3 / 2)]),
    (IpoLoss(beta=0.5), [(3 * LN2 - 1) ** 2, (LN2 - 1) ** 2]),
    (IpoLoss(beta=0.5, length_normalised=False), [(4 * LN2 - 1) ** 2] * 2),
    # The policy's preference is 4/5 against 1/5, the label's 9/10 against 1/10.
    (ExoPairLoss(beta=0.5, label_smoothing=0.1), [0.8 * log(8 / 9) + 0.2 * log(2)] * 2),
    # m = sigmoid(2 ln 4) = 16/17, exp(-ln 4) = 1/4.
    (DiscopopLoss(beta=0.5, tau=0.5), [(log(5 / 4) + 16 / 4) / 17] * 2),
    # ln 4 less ln 2, and less ln 4; or less 2 and 4 times a half of ln 2.
    (OdpoLoss(beta=0.5), [log(3 / 2), log(2)]),
    (OdpoLoss(beta=0.5, offset_of="margin", offset_alpha=LN2 / 2), [log(3 / 2), log(2)]),
    # β a = ln 2 and β b = -ln 2: sigmoids 2/3 and 1/3. Second pair -ln 2 and -ln 8: 1/3 and 1/9.
    (
        NcaPairLoss(beta=0.5),
        [log(3 / 2) + 0.5 * log(3) + 0.5 * log(3 / 2), log(3) + 0.5 * log(3 / 2 * 9 / 8)],
    ),
    (ApoZeroLoss(beta=0.5), [1 - 2 / 3 + 1 / 3, 1 - 1 / 3 + 1 / 9]),
    (ApoDownLoss(beta=0.5), [2 / 3 + 1 - 4 / 5, 1 / 3 + 1 - 4 / 5]),
    (BcoPairLoss(beta=0.5, shift="none"), [2 * log(3 / 2), log(3) + log(9 / 8)]),
    # The aim is 1 / (2 β) = 1.
    (SppoHardLoss(beta=0.5), [2 * (LN4 - 1) ** 2, (-LN4 - 1) ** 2 + (-3 * LN4 + 1) ** 2]),
    # In the second pair chosen lost ln 4: β (ln 16 - 1/2 ln 4) = 3/2 ln 2.
    (DpopLoss(beta=0.5, penalty=0.5), [log(5 / 4), log(1 + 1 / sqrt(8))]),
    (DpopLoss(beta=0.5, penalty=1.0), [log(5 / 4), log(3 / 2)]),
    # u = l_c - l_r: 0 and ln 8; v: -ln 16 and -ln 2; δ = ln 16 for either.
    (AotLoss(beta=0.5), [log(5 / 4), log(5 / 4)]),
    # Sorted a: -ln 4, ln 4; b: -ln 64, -ln 4; δ = ln 16 for either.
    (AotUnpairedLoss(beta=0.5), [log(5 / 4), log(5 / 4)]),
    # l_c / n_c: -ln 2 and -ln 8; l_r / n_r: -ln 4 and -ln 8.
    (SftLoss(), [LN2, 3 * LN2]),
    (SimpoLoss(beta=2.0, gamma=LN2), [log(3 / 2), log(3)]),
    # Odds 1 to 1/3, and 1/7 to 1/7.
    (OrpoLoss(beta=0.5), [LN2 + 0.5 * log(4 / 3), 3 * LN2 + 0.5 * LN2]),
    # 1 + ln 4 - ln 4 = 1, and 1 + ln 8 - ln 64 = 1 - ln 8 < 0; λ l_c = ln 2 and 3/2 ln 2.
    (SlicLoss(delta=1.0, regularisation=0.5), [1 + LN2, 1.5 * LN2]),
    # M = 0.1 ln 16 and β_1 = 1/2 (1 + (ln 16 - M) / ln 16) = 0.95 as both margins are ln 16.
    (
        BetaDpoLoss(beta=0.5, alpha=1 / (4 * LN2), keep_fraction=1.0),
        [log(1 + 16**-0.95), log(1 + 16**-0.95)],
    ),
]


@pytest.mark.parametrize(("loss", "wanted"), HAND_WORKED, ids=lambda value: str(value)[:60])
def test_loss_by_hand(loss: PairLoss, wanted: list[float]) -> None:
    assert losses_of(loss, make_logps()).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_every_loss_is_worked_by_hand() -> None:
    assert {type(loss) for loss, _ in HAND_WORKED} == set(LOSSES)


def test_sums_are_taken_over_the_loss_mask() -> None:
    logps = make_logps()
    assert logps.chosen.log_ratio_B.tolist() == pytest.approx([LN4, -LN4])
    assert logps.rejected.log_ratio_B.tolist() == pytest.approx([-LN4, -3 * LN4])
    assert logps.chosen.policy_logp_B.tolist() == pytest.approx([-LN4, -3 * LN2])
    assert logps.chosen.num_tokens_B.tolist() == [2.0, 1.0]
    assert logps.rejected.num_tokens_B.tolist() == [1.0, 2.0]


def test_sigmoid_loss_of_the_reference_itself_is_ln_2() -> None:
    side = make_side([[-1.0, -2.0]], [[-1.0, -2.0]], [[1, 1]])
    assert SigmoidLoss()(PairLogps(chosen=side, rejected=side)).tolist() == [math.log(2)]


@pytest.mark.parametrize("kind", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("is_flipped", [False, True])
def test_extreme_log_probs_stay_finite(kind: type[PairLoss], is_flipped: bool) -> None:
    """In float32, exp(89) is infinite. A chosen answer may also have probability 1."""
    sides = [
        make_side([[value]], [[ref]], [[1]], dtype=torch.float32)
        for value, ref in ((0.0, -1e4), (-1e4, 0.0))
    ]
    if is_flipped:
        sides.reverse()
    logps = PairLogps(chosen=sides[0], rejected=sides[1], margins_B=sides[0].loss_mask_BT.sum(-1))
    made: list[PairLoss] = [kind()]  # type: ignore[call-arg]
    if issubclass(kind, DifferenceLoss):
        made.append(kind(f_divergence="forward_kl"))  # type: ignore[call-arg]
    for loss in made:
        losses = losses_of(loss, logps)
        assert losses.isfinite().all()
        losses.sum().backward()
        for side in sides:
            gradient = side.policy_token_logps_BT.grad
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        (SigmoidLoss(beta=0.5), [LN2, -LN2], [-LN2, -3 * LN2]),
        (SigmoidLoss(beta=0.5, ld_alpha=0.0), [LN2, -LN2], [-LN2, -3 * LN2]),
        (IpoLoss(beta=0.5), [LN2, -LN2], [-LN2, -3 * LN2]),
        (SimpoLoss(beta=2.0), [-2 * LN2, -6 * LN2], [-4 * LN2, -6 * LN2]),
        (OrpoLoss(beta=0.5), [-0.5 * LN2, -1.5 * LN2], [-LN2, -1.5 * LN2]),
        (SftLoss(), [-LN2, -3 * LN2], [-2 * LN2, -3 * LN2]),
        (SlicLoss(), [-2 * LN2, -3 * LN2], [-2 * LN2, -6 * LN2]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rewards_by_hand(loss: PairLoss, chosen: list[float], rejected: list[float]) -> None:
    """β times plain sums of log-ratios, whatever modifiers the loss has, or log-probs."""
    found = [rewards_B.tolist() for rewards_B in loss.rewards(make_logps())]
    assert found == [pytest.approx(chosen), pytest.approx(rejected)]


def test_recipe_chooses_the_loss_by_its_kind() -> None:
    config = parse_config(TrainConfig, {"loss": {"kind": "ipo", "beta": 0.2}}, path="train")
    assert config.losses == (IpoLoss(beta=0.2),)
    assert parse_config(TrainConfig, {}, path="train").losses == (SigmoidLoss(beta=0.1),)
    config = parse_config(
        TrainConfig, {"loss": [{"beta": 0.2}, {"kind": "sft", "weight": 0.5}]}, path="train"
    )
    assert config.losses == (SigmoidLoss(beta=0.2), SftLoss(weight=0.5))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "ipo", "label_smoothing": 0.1}, r"train\.loss\.label_smoothing: no such key\."),
        ({"kind": "nca_pair", "f_divergence": "forward_kl"}, r"f_divergence: no such key\."),
        ({"kind": "aot", "wpo": True}, r"train\.loss\.wpo: no such key\."),
        ({"kind": "simpo", "ld_alpha": 0.5}, r"train\.loss\.ld_alpha: no such key\."),
        ([{"kind": "sft"}, {"kind": "hinge", "bta": 1}], r"train\.loss\.1\.bta: .* 'beta'"),
        ([{"kind": "sft"}, {"kind": "sft"}], "each kind once; sft occurs twice"),
        ([], "at least 1"),
        ({"kind": "dpo"}, r"train\.loss\.kind: no such kind\. Kinds: sigmoid, .*\(found 'dpo'\)"),
        ({"f_divergence": "alpha_divergence"}, "f_alpha and .* go together"),
        ({"f_alpha": 0.5}, "f_alpha and .* go together"),
        ({"f_divergence": "alpha_divergence", "f_alpha": 1}, "limit 1, use .*reverse_kl"),
        ({"ld_side": "policy"}, "set ld_alpha below 1"),
        ({"token_clamp": [1, 2]}, "a bound below 0 and one above"),
        ({"token_clamp": [-1, 1], "ld_side": "policy", "ld_alpha": 0.5}, "use ld_side: both"),
        ({"kind": "exo_pair", "label_smoothing": 0}, "greater than 0"),
    ],
)
def test_an_unsupported_combination_is_refused_with_one_message(loss: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(TrainConfig, {"loss": loss}, path="train")
    assert str(caught.value).count("\n") == 0


def test_which_losses_need_a_reference_and_which_couple_pairs() -> None:
    assert {loss for loss in LOSSES if not loss.needs_reference} == {
        SftLoss,
        SimpoLoss,
        OrpoLoss,
        SlicLoss,
    }
    coupled = {AotLoss, AotUnpairedLoss, BcoPairLoss, BetaDpoLoss}
    assert {loss for loss in LOSSES if loss.couples_pairs} == coupled
    assert {loss for loss in LOSSES if issubclass(loss, CoupledLoss)} == coupled
    both = parse_config(TrainConfig, {"loss": [{"kind": "sft"}, {"kind": "simpo"}]}, path="")
    assert not both.needs_reference
    assert parse_config(TrainConfig, {"loss": [{"kind": "sft"}, {}]}, path="").needs_reference
