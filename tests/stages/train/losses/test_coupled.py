"""Coupled losses worked by hand: sorted sides, running means, an adaptive beta."""

from math import log

import pytest
import torch
from torch import Tensor

from stages.train.losses import AotLoss, AotUnpairedLoss, BcoPairLoss, BetaDpoLoss
from stages.train.losses.coupled import BatchRatios

LN2, LN3 = log(2), log(3)


def make_ratios(
    chosen: list[float], rejected: list[float], ref_margins: list[float] | None = None
) -> BatchRatios:
    chosen_B, rejected_B, ref_margins_B = (
        torch.tensor(values, dtype=torch.float64)
        for values in (chosen, rejected, ref_margins or [0.0] * len(chosen))
    )
    return BatchRatios(
        chosen_B=chosen_B.requires_grad_(),
        rejected_B=rejected_B.requires_grad_(),
        ref_margins_B=ref_margins_B,
    )


def gradients_of(losses_B: Tensor, ratios: BatchRatios) -> tuple[list[float], list[float]]:
    chosen_B, rejected_B = torch.autograd.grad(losses_B.sum(), (ratios.chosen_B, ratios.rejected_B))
    return chosen_B.tolist(), rejected_B.tolist()


def test_aot_compares_the_margins_rank_by_rank() -> None:
    """v = (0, 5) and u = a - b + v = (5 + ln 2, ln 3): sorted δ = (ln 3 - 0, 5 + ln 2 - 5).

    The first pair has the larger u and so δ = ln 2, sigmoid 2/3; the second has 3/4. The derivative
    with respect to a is sigmoid - 1.
    """
    ratios = make_ratios([5 + LN2, LN3 - 5], [0.0, 0.0], [0.0, 5.0])
    losses_B, state = AotLoss(beta=1.0).of_batch(ratios, {}, None)
    assert losses_B.tolist() == pytest.approx([log(3 / 2), log(4 / 3)])
    by_chosen, by_rejected = gradients_of(losses_B, ratios)
    assert by_chosen == pytest.approx([-1 / 3, -1 / 4])
    assert by_rejected == pytest.approx([1 / 3, 1 / 4])
    assert state == {}


def test_unpaired_aot_compares_the_sides_rank_by_rank() -> None:
    """a = (ln 2, 7 + ln 3), b = (7, 0): δ = (ln 2 - 0, 7 + ln 3 - 7), so sigmoids 2/3 and 3/4.

    The second pair's b is compared with the first pair's a, and vice versa.
    """
    ratios = make_ratios([LN2, 7 + LN3], [7.0, 0.0])
    losses_B, _ = AotUnpairedLoss(beta=1.0).of_batch(ratios, {}, None)
    assert losses_B.tolist() == pytest.approx([log(3 / 2), log(4 / 3)])
    by_chosen, by_rejected = gradients_of(losses_B, ratios)
    assert by_chosen == pytest.approx([-1 / 3, -1 / 4])
    assert by_rejected == pytest.approx([1 / 4, 1 / 3])


def test_bco_shifts_by_the_mean_reward_of_all_pairs_so_far() -> None:
    """Rewards 1, 3 and -1, 1: mean 1 over 2 pairs. Then 5 and 3 of one pair: (2 · 1 + 4) / 3 = 2.

    The loss is -log sigmoid(5 - 2) - log sigmoid(2 - 3), also in an evaluation afterwards.
    """
    loss = BcoPairLoss(beta=0.5)
    generator = torch.Generator()
    _, state = loss.of_batch(make_ratios([2.0, 6.0], [-2.0, 2.0]), {}, generator)
    assert state == {"bco_pair/delta": 1.0, "bco_pair/num_pairs": 2.0}
    losses_B, after = loss.of_batch(make_ratios([10.0], [6.0]), state, generator)
    assert after == {"bco_pair/delta": pytest.approx(2.0), "bco_pair/num_pairs": 3.0}
    wanted = [log(1 + 1 / torch.tensor(3.0).exp().item()) + log(1 + torch.tensor(1.0).exp().item())]
    assert losses_B.tolist() == pytest.approx(wanted, rel=1e-6)
    evaluated_B, unchanged = loss.of_batch(make_ratios([10.0], [6.0]), after, None)
    assert evaluated_B.tolist() == losses_B.tolist()
    assert unchanged == after


def test_beta_adapts_to_the_margins_of_a_batch() -> None:
    """Δ = (2, 6): mean 4, standard deviation 2. M = 0.75 · 2 + 0.25 · 4 = 2.5, σ = 0.75 · 4 + 0.5.

    β = 0.1 (1 + 0.5 (4 - 2.5)) = 0.175.
    """
    loss = BetaDpoLoss(beta=0.1, alpha=0.5, momentum=0.75, keep_fraction=1.0)
    before = {"beta_dpo/margin_mean": 2.0, "beta_dpo/margin_std": 4.0, "beta_dpo/beta": 9.0}
    ratios = make_ratios([1.0, 3.0], [-1.0, -3.0])
    losses_B, state = loss.of_batch(ratios, before, torch.Generator())
    assert state == {
        "beta_dpo/margin_mean": pytest.approx(2.5),
        "beta_dpo/margin_std": pytest.approx(3.5),
        "beta_dpo/beta": pytest.approx(0.175),
    }
    logits = torch.tensor([0.175 * 2, 0.175 * 6], dtype=torch.float64)
    torch.testing.assert_close(losses_B.detach(), -torch.nn.functional.logsigmoid(logits))
    # β_t has no gradient, so the derivative with respect to a is -β sigmoid(-β Δ).
    by_chosen, _ = gradients_of(losses_B, ratios)
    assert by_chosen == pytest.approx((-0.175 * (-logits).sigmoid()).tolist())


def test_beta_stays_above_zero() -> None:
    loss = BetaDpoLoss(beta=0.1, alpha=1.0, momentum=0.0, keep_fraction=1.0)
    held = BetaDpoLoss(beta=0.1, alpha=1.0, momentum=0.999, keep_fraction=1.0)
    ratios = make_ratios([-50.0], [50.0])
    assert loss.of_batch(ratios, {}, torch.Generator())[1]["beta_dpo/beta"] == pytest.approx(0.1)
    assert held.of_batch(ratios, {}, torch.Generator())[1]["beta_dpo/beta"] == 1e-3


def test_pairs_far_from_the_running_mean_are_left_out_and_the_others_count_more() -> None:
    """Four of five pairs are kept (0.8), never the one 40 standard deviations away."""
    loss = BetaDpoLoss(beta=0.1, alpha=0.0, momentum=0.999, keep_fraction=0.8)
    state = {"beta_dpo/margin_mean": 0.0, "beta_dpo/margin_std": 1.0}
    ratios = make_ratios([0.1, -0.2, 40.0, 0.3, 0.0], [0.0] * 5)
    losses_B, _ = loss.of_batch(ratios, state, torch.Generator().manual_seed(1))
    assert losses_B[2] == 0
    kept = torch.tensor([0, 1, 3, 4])
    wanted = -torch.nn.functional.logsigmoid(0.1 * ratios.chosen_B[kept])
    torch.testing.assert_close(losses_B[kept], 5 / 4 * wanted)


def test_the_draw_follows_the_weights_and_the_generator() -> None:
    """One of two pairs is kept; distances 0 and 1 have odds 1 : exp(-½)."""
    loss = BetaDpoLoss(momentum=0.999999, keep_fraction=0.5)
    state = {"beta_dpo/margin_mean": 0.0, "beta_dpo/margin_std": 1.0}
    ratios = make_ratios([0.0, 1.0], [0.0, 0.0])

    def draw(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        return bool(loss.of_batch(ratios, state, generator)[0][0] > 0)

    drawn = [draw(seed) for seed in range(2000)]
    # 0.622; the standard deviation of a share of 2,000 is 0.011.
    assert sum(drawn) / len(drawn) == pytest.approx(1 / (1 + 0.6065), abs=0.04)
    assert drawn[:50] == [draw(seed) for seed in range(50)]
