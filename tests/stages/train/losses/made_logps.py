"""Hand-made pairs with known sums, and random pairs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.train.losses import PairLogps, PairLoss, SideLogps
from stages.train.losses.coupled import BatchRatios, CoupledLoss, State

LN2, LN4 = math.log(2), math.log(4)


def make_side(
    policy: Sequence[Sequence[float]],
    ref: Sequence[Sequence[float]],
    mask: Sequence[Sequence[float]],
    log_collision: Sequence[Sequence[float]] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> SideLogps:
    tensors = [torch.tensor(rows, dtype=dtype) for rows in (policy, ref, mask)]
    return SideLogps(
        policy_token_logps_BT=tensors[0].requires_grad_(),
        ref_token_logps_BT=tensors[1],
        loss_mask_BT=tensors[2],
        policy_log_collision_BT=None
        if log_collision is None
        else torch.tensor(log_collision, dtype=torch.float64),
    )


def make_logps() -> PairLogps:
    """Make two pairs.

    First: two chosen tokens with p = 1/2 under the policy and 1/4 under the reference, a masked
    token between them and padding after them: l_c = -ln 4, a = ln 4. One rejected token with
    p = 1/4 and 1: l_r = -ln 4, b = -ln 4. Δ = ln 16.

    Second: one chosen token with p = 1/8 and 1/2: a = -ln 4. Two rejected tokens with p = 1/16 and
    1, and 1/4 and 1: b = -ln 64. Δ = ln 16 again, although chosen fell.

    The collision probability is 1/4 and 1/2 at the first pair's chosen tokens, 1/2 at its rejected
    one; in the second pair it is p itself. Margins in the data: 2 and 4.
    """
    return PairLogps(
        chosen=make_side(
            [[-LN2, -9.0, -LN2, -77.0], [-3 * LN2, -5.0, -5.0, -5.0]],
            [[-LN4, -1.0, -LN4, -55.0], [-LN2, -3.0, -3.0, -3.0]],
            [[1, 0, 1, 0], [1, 0, 0, 0]],
            [[-LN4, -7.0, -LN2, -7.0], [-3 * LN2, -7.0, -7.0, -7.0]],
        ),
        rejected=make_side(
            [[-LN4, -88.0], [-4 * LN2, -LN4]],
            [[0.0, -44.0], [0.0, 0.0]],
            [[1, 0], [1, 1]],
            [[-LN2, -7.0], [-4 * LN2, -LN4]],
        ),
        margins_B=torch.tensor([2.0, 4.0], dtype=torch.float64),
    )


def random_logps(
    seed: int, num_pairs: int = 6, *, dtype: torch.dtype = torch.float64, longest: int = 7
) -> PairLogps:
    """Make log-probs of a policy that has moved a little; no side is fully masked."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        lengths_B = torch.randint(1, longest + 1, (num_pairs,), generator=generator)
        mask_BT = (torch.arange(longest) < lengths_B[:, None]).to(dtype)
        ref_BT = -2 * torch.rand(num_pairs, longest, generator=generator, dtype=dtype) - 0.05
        moved_BT = torch.randn(num_pairs, longest, generator=generator, dtype=dtype)
        policy_BT = (ref_BT + moved_BT).clamp(max=-0.01)
        collision_BT = -3 * torch.rand(num_pairs, longest, generator=generator, dtype=dtype)
        sides.append(
            SideLogps(
                policy_token_logps_BT=policy_BT.requires_grad_(),
                ref_token_logps_BT=ref_BT,
                loss_mask_BT=mask_BT,
                policy_log_collision_BT=collision_BT,
            )
        )
    margins_B = torch.rand(num_pairs, generator=generator, dtype=dtype) + 0.5
    return PairLogps(chosen=sides[0], rejected=sides[1], margins_B=margins_B)


def read_ratios(loss: CoupledLoss, logps: PairLogps) -> BatchRatios:
    """Compute the log-ratios of the pairs as a whole batch."""
    chosen_B, rejected_B = loss.log_ratios(logps)
    return BatchRatios(
        chosen_B=chosen_B, rejected_B=rejected_B, ref_margins_B=loss.ref_margins(logps)
    )


def losses_of(
    loss: PairLoss, logps: PairLogps, *, state: State | None = None, is_trained_on: bool = True
) -> Tensor:
    """Compute the losses of the pairs as a whole batch, as in training or evaluation."""
    if isinstance(loss, CoupledLoss):
        generator = torch.Generator().manual_seed(0) if is_trained_on else None
        return loss.of_batch(read_ratios(loss, logps), state or {}, generator)[0]
    return loss(logps)
