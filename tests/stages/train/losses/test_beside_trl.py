"""Values and gradients of the losses equal those of TRL's own code, on random log-probs.

TRL's DPOTrainer._compute_loss runs unchanged. Its policy and reference return given numbers instead
of computing them, and the attributes that its constructor would set are set by hand.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from trl import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from stages.train.losses import (
    AotLoss,
    AotUnpairedLoss,
    ApoDownLoss,
    ApoZeroLoss,
    BcoPairLoss,
    DiscopopLoss,
    ExoPairLoss,
    HingeLoss,
    IpoLoss,
    NcaPairLoss,
    PairLogps,
    PairLoss,
    RobustLoss,
    SftLoss,
    SideLogps,
    SigmoidLoss,
    SigmoidNormLoss,
    SppoHardLoss,
)
from stages.train.losses.base import DifferenceLoss, ReferenceLoss, SeparableLoss
from tests.stages.train.losses.made_logps import losses_of, random_logps

NUM_PROMPT_TOKENS = 3
BETA = 0.3


class Table(nn.Module):
    """A language model that returns the log-probs it was made with."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_sum_sq_probs: Tensor) -> None:
        super().__init__()
        self.output = SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=log_sum_sq_probs,
            entropy=torch.zeros_like(log_probs),
            mean_logits=torch.zeros_like(log_probs),
            is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
        )

    def forward(self, **_: Any) -> SimpleNamespace:
        return self.output


def make_trainer(policy: Table, reference: Table, **options: Any) -> DPOTrainer:
    args = DPOConfig(
        output_dir="unused", beta=BETA, use_cpu=True, bf16=False, report_to=[], **options
    )
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.__dict__ |= {
        **{name: getattr(args, name) for name in ("beta", "ld_alpha", "label_smoothing")},
        **{name: getattr(args, name) for name in ("f_divergence_type", "f_alpha_divergence_coef")},
        "use_weighting": args.use_weighting,
        "loss_types": args.loss_type,
        "loss_weights": args.loss_weights or [1.0] * len(args.loss_type),
        "args": args,
        "accelerator": Accelerator(cpu=True),
        "model": policy,
        "ref_model": reference,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return trainer


def lay_out_for_trl(chosen_BT: Tensor, rejected_BT: Tensor) -> Tensor:
    """Stack the sides, chosen first, after one zero for each predicted prompt token."""
    rows_RT = torch.cat([chosen_BT, rejected_BT])
    prompt = rows_RT.new_zeros(len(rows_RT), NUM_PROMPT_TOKENS - 1)
    return torch.cat([prompt, rows_RT], 1)


def trl_loss(logps: PairLogps, **options: Any) -> Tensor:
    sides = (logps.chosen, logps.rejected)
    masks = [side.loss_mask_BT for side in sides]

    def table(name: str) -> Tensor:
        values = [getattr(side, name).masked_fill(side.loss_mask_BT == 0, 0) for side in sides]
        return lay_out_for_trl(values[0], values[1])

    collision = table("policy_log_collision_BT")
    policy = Table(table("policy_token_logps_BT"), collision)
    reference = Table(table("ref_token_logps_BT"), collision)
    mask = torch.cat([torch.zeros(2 * len(masks[0]), 1), lay_out_for_trl(*masks)], 1).long()
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    trainer = make_trainer(policy, reference, **options)
    loss: Tensor = trainer._compute_loss(policy, inputs, return_outputs=False)
    return loss


def value_and_gradient(loss: Tensor, logps: PairLogps) -> tuple[float, Tensor]:
    leaves = [logps.chosen.policy_token_logps_BT, logps.rejected.policy_token_logps_BT]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    filled = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    return loss.item(), torch.cat([gradient.flatten() for gradient in filled])


def check_beside_trl(losses: list[PairLoss], logps: PairLogps, **options: Any) -> None:
    kinds = [loss.kind for loss in losses]
    weights = [loss.weight for loss in losses]
    wanted, wanted_gradient = value_and_gradient(
        trl_loss(logps, loss_type=kinds, loss_weights=weights, **options), logps
    )
    ours = sum((loss.weight * losses_of(loss, logps).mean() for loss in losses), torch.zeros(()))
    found, gradient = value_and_gradient(ours, logps)
    assert found == pytest.approx(wanted, abs=1e-6, rel=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-6, rtol=1e-6)
    assert wanted_gradient.abs().max() > 1e-3, "comparing zeros would prove nothing"


SMOOTHED = [
    RobustLoss(beta=BETA, label_smoothing=0.1),
    ExoPairLoss(beta=BETA, label_smoothing=0.1),
    AotLoss(beta=BETA, label_smoothing=0.1),
    AotUnpairedLoss(beta=BETA, label_smoothing=0.1),
]
PLAIN = [
    SigmoidLoss(beta=BETA),
    SigmoidNormLoss(beta=BETA),
    HingeLoss(beta=BETA),
    IpoLoss(beta=BETA),
    DiscopopLoss(beta=BETA, tau=0.05),
    NcaPairLoss(beta=BETA),
    BcoPairLoss(beta=BETA, shift="none"),
    SppoHardLoss(beta=BETA),
    ApoZeroLoss(beta=BETA),
    ApoDownLoss(beta=BETA),
    AotLoss(beta=BETA),
    AotUnpairedLoss(beta=BETA),
]
COMPARED = [*((loss, 0.0) for loss in PLAIN), *((loss, 0.1) for loss in SMOOTHED)]


def name(value: object) -> str:
    return value.kind if isinstance(value, PairLoss) else str(value)


def with_options(loss: Any, **options: Any) -> PairLoss:
    changed: PairLoss = replace(loss, **options)
    return changed


@pytest.mark.parametrize(("loss", "label_smoothing"), COMPARED, ids=name)
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_trls(loss: PairLoss, label_smoothing: float, seed: int) -> None:
    check_beside_trl([loss], random_logps(seed), label_smoothing=label_smoothing)


@pytest.mark.parametrize(("loss", "label_smoothing"), COMPARED, ids=name)
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_ld_dpo_equals_trls(loss: PairLoss, label_smoothing: float, ld_alpha: float) -> None:
    assert isinstance(loss, ReferenceLoss)
    check_beside_trl(
        [with_options(loss, ld_alpha=ld_alpha)],
        random_logps(1),
        label_smoothing=label_smoothing,
        ld_alpha=ld_alpha,
    )


@pytest.mark.parametrize(
    ("loss", "label_smoothing"),
    [each for each in COMPARED if isinstance(each[0], DifferenceLoss)],
    ids=name,
)
@pytest.mark.parametrize(
    ("divergence", "f_alpha"),
    [
        ("forward_kl", None),
        ("js_divergence", None),
        ("alpha_divergence", 0.5),
        ("alpha_divergence", 1.7),
    ],
)
def test_f_divergences_equal_trls(
    loss: PairLoss, label_smoothing: float, divergence: str, f_alpha: float | None
) -> None:
    """TRL's alpha-divergence requires float32, whose cancellation sets the tolerance."""
    dtype = torch.float32 if f_alpha else torch.float64
    logps = random_logps(2, dtype=dtype, longest=3)
    options = {} if f_alpha is None else {"f_alpha_divergence_coef": f_alpha}
    check_beside_trl(
        [with_options(loss, f_divergence=divergence, f_alpha=f_alpha)],
        logps,
        label_smoothing=label_smoothing,
        f_divergence_type=divergence,
        **options,
    )


@pytest.mark.parametrize(
    ("loss", "label_smoothing"),
    [each for each in COMPARED if isinstance(each[0], SeparableLoss) and each[0].kind != "hinge"],
    ids=name,
)
def test_wpo_equals_trls(loss: PairLoss, label_smoothing: float) -> None:
    check_beside_trl(
        [with_options(loss, wpo=True)],
        random_logps(4),
        label_smoothing=label_smoothing,
        use_weighting=True,
    )


def test_wpo_of_the_hinge_equals_trls_in_value() -> None:
    """TRL weights the loss in place, which makes the hinge's gradient fail."""
    logps = random_logps(4)
    wanted = trl_loss(logps, loss_type=["hinge"], use_weighting=True)
    found = HingeLoss(beta=BETA, wpo=True)(logps).mean()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        wanted.backward()


def test_a_sum_equals_trls() -> None:
    losses = [with_options(SigmoidLoss(beta=BETA), weight=0.8), IpoLoss(beta=BETA, weight=0.3)]
    check_beside_trl([*losses, BcoPairLoss(beta=BETA, shift="none", weight=1.5)], random_logps(5))


def equal_lengths(logps: PairLogps) -> PairLogps:
    sides = [
        SideLogps(
            policy_token_logps_BT=side.policy_token_logps_BT,
            ref_token_logps_BT=side.ref_token_logps_BT,
            loss_mask_BT=torch.ones_like(side.loss_mask_BT),
            policy_log_collision_BT=side.policy_log_collision_BT,
        )
        for side in (logps.chosen, logps.rejected)
    ]
    return PairLogps(chosen=sides[0], rejected=sides[1])


def test_sft_equals_trls_for_answers_of_equal_length() -> None:
    """TRL averages over the tokens of a micro-batch, so longer answers count more."""
    logps = random_logps(6)
    check_beside_trl([SigmoidLoss(beta=BETA), SftLoss(weight=0.2)], equal_lengths(logps))
    assert trl_loss(logps, loss_type=["sft"]).item() != pytest.approx(
        SftLoss()(logps).mean().item(), abs=1e-2
    )


def test_trl_ignores_label_smoothing_of_sigmoid_and_we_do_not() -> None:
    logps = random_logps(7)
    ignored = trl_loss(logps, loss_type=["sigmoid"], label_smoothing=0.3).item()
    assert ignored == pytest.approx(SigmoidLoss(beta=BETA)(logps).mean().item())
    smoothed = SigmoidLoss(beta=BETA, label_smoothing=0.3)(logps).mean().item()
    assert abs(smoothed - ignored) > 1e-3


def test_discopop_is_finite_far_below_zero_unlike_trls() -> None:
    logps = random_logps(8, dtype=torch.float32)
    moved = [side.policy_token_logps_BT.detach() for side in (logps.chosen, logps.rejected)]
    moved[0] -= 500
    sides = [
        replace(side, policy_token_logps_BT=policy_BT)
        for side, policy_BT in zip((logps.chosen, logps.rejected), moved, strict=True)
    ]
    far = PairLogps(chosen=sides[0], rejected=sides[1])
    assert trl_loss(far, loss_type=["discopop"]).isnan()
    sigmoid = SigmoidLoss(beta=BETA)(far)
    torch.testing.assert_close(DiscopopLoss(beta=BETA)(far), sigmoid)


def test_every_loss_of_trl_is_compared() -> None:
    """TRL's losses are read from its error message for an unknown one."""
    compared = {loss.kind for loss, _ in COMPARED} | {"sft"}
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        trl_loss(random_logps(0), loss_type=["none"])
    known = str(caught.value).split("[")[1].split("]")[0].replace("'", "").split(", ")
    assert set(known) == compared
