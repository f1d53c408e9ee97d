"""Every loss in a whole training, and coupled losses for any split of a batch.

The oracle computes every sequence alone, collects a batch's log-probs, and applies the loss to them
as one batch. The losses themselves are tested against hand-worked values elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from schemas.errors import DataError
from stages.store.shards import StageOutput
from stages.train import STAGE, TrainConfig
from stages.train.config import TrainJob, read_outcome
from stages.train.losses import (
    LOSSES,
    AotLoss,
    AotUnpairedLoss,
    BcoPairLoss,
    BetaDpoLoss,
    DpopLoss,
    Loss,
    OdpoLoss,
    PairLogps,
    PairLoss,
    SftLoss,
    SideLogps,
    SigmoidLoss,
)
from stages.train.losses.coupled import BatchRatios, CoupledLoss
from stages.train.microbatch import Layout
from stages.train.step import take_step
from stages.train.trainer import train
from tests.stages.train.losses.made_logps import losses_of, read_ratios
from tests.stages.train.made_data import (
    Row,
    load_plain,
    make_job,
    plain_logps,
    random_rows,
    score_rows,
    write_inputs,
)
from tests.stages.train.test_step import (
    WORLD,
    only_batch,
    open_test_policy,
    plain_gradients,
    relative_difference,
)
from tests.stages.train.test_train import ALONE, compare_metrics, read_metrics, sha256s
from tests.stages.train.worker import start_workers

COUPLED = (
    AotLoss(beta=0.2, label_smoothing=0.1),
    AotUnpairedLoss(beta=0.3, weight=0.5, ld_alpha=0.5),
    BcoPairLoss(beta=0.1),
    BetaDpoLoss(beta=0.1, alpha=0.05),
    SigmoidLoss(beta=0.1, weight=2.0),
)


def plain_side(
    model: PreTrainedModel, rows: Sequence[Row], scored: Sequence[Row], side: str
) -> SideLogps:
    """Compute one side's log-probs, and the log of the sum of p squared at each token."""
    ref_of = {row["pair_id"]: row[f"ref_{side}_token_logps"] for row in scored}
    collisions = []
    for row in rows:
        ids = torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]])
        p = model(input_ids=ids[None]).logits[0].softmax(-1)
        collisions.append(p[len(row["prompt_ids"]) - 1 : -1].square().sum(-1).log().detach())
    masks = [
        torch.tensor(row[f"{side}_loss_mask"] or [True] * len(row[f"{side}_ids"])).float()
        for row in rows
    ]
    refs = [torch.tensor(ref_of[row["pair_id"]]) for row in rows]
    return SideLogps(
        policy_token_logps_BT=pad_sequence([plain_logps(model, r, side) for r in rows], True),
        ref_token_logps_BT=pad_sequence(refs, batch_first=True),
        loss_mask_BT=pad_sequence(masks, batch_first=True),
        policy_log_collision_BT=pad_sequence(collisions, batch_first=True),
    )


def plain_pairs(model: PreTrainedModel, rows: Sequence[Row], scored: Sequence[Row]) -> PairLogps:
    return PairLogps(
        chosen=plain_side(model, rows, scored, "chosen"),
        rejected=plain_side(model, rows, scored, "rejected"),
        margins_B=torch.tensor([row["margin"] or float("nan") for row in rows]),
    )


def weighted_mean(losses_B: Tensor, rows: Sequence[Row]) -> Tensor:
    return (losses_B * torch.tensor([row["weight"] for row in rows])).mean()


def with_margins(rows: Sequence[Row]) -> list[Row]:
    return [{**row, "margin": 0.5 + number % 4} for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def all_inputs(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StageOutput]:
    folder = tmp_path_factory.mktemp("with-margins")
    return write_inputs(folder, with_margins(encoded), scored, reference=reference)


@pytest.mark.parametrize(
    "loss",
    [*(kind() for kind in LOSSES), DpopLoss(wpo=True)],  # type: ignore[call-arg]
    ids=lambda loss: loss.kind,
)
def test_every_loss_trains_from_start_to_export(
    loss: Loss,
    all_inputs: dict[str, StageOutput],
    encoded: list[Row],
    scored: list[Row],
    other_model: Path,
    tmp_path: Path,
) -> None:
    """The evaluation before the first step equals the loss of plain log-probs.

    The policy starts from another model than the reference, so no margin is 0.
    """
    config = TrainConfig(loss=loss, dtype="float32", global_batch_size=8, learning_rate=1e-3)
    needed = STAGE.needs(config)
    assert needed == (("encode", "score") if loss.needs_reference else ("encode",))
    job = make_job(tmp_path, {name: all_inputs[name] for name in needed}, other_model, config)
    train(job, ALONE)
    held_out = with_margins(encoded)[:5]
    with torch.no_grad():
        logps = plain_pairs(load_plain(other_model), held_out, scored)
        wanted = weighted_mean(losses_of(loss, logps, is_trained_on=False), held_out).item()
    before, after = read_metrics(job, "eval_metrics")
    assert before["loss"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert after["loss"] != before["loss"]
    chosen_B, rejected_B = loss.rewards(logps)
    assert before["rewards/margins"] == pytest.approx(
        (chosen_B - rejected_B).mean().item(), rel=1e-4, abs=1e-5
    )
    assert (before["kl/k3"] is None) == (not loss.needs_reference)
    outcome = read_outcome(job)
    assert outcome is not None
    assert (outcome.summary["drift"] is None) == (not loss.needs_reference)
    assert len(read_metrics(job)) == 3


@pytest.mark.parametrize("max_tokens", [1, 150, 10_000])
@pytest.mark.parametrize("losses", [(loss,) for loss in COUPLED[:4]] + [COUPLED], ids=str)
def test_gradient_of_coupled_pairs_is_that_of_the_whole_batch(
    losses: tuple[PairLoss, ...],
    max_tokens: int,
    tmp_path: Path,
    reference: Path,
    other_model: Path,
) -> None:
    """Micro-batches hold one pair, several or all; the pairs' weights differ."""
    rows = random_rows(7, 9)
    scored = score_rows(rows, reference)
    config = TrainConfig(loss=losses, dtype="float32", max_grad_norm=1e9)  # type: ignore[arg-type]
    policy = open_test_policy(other_model, config)
    layout = Layout(max_tokens=max_tokens, rows="packed")
    batch = only_batch(tmp_path, rows, scored, reference, layout)
    parameters = policy.trained_parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    remembered = {"bco_pair/delta": 0.5, "bco_pair/num_pairs": 3.0, "beta_dpo/margin_std": 9.0}
    metrics = take_step(
        policy,
        optimizer,
        batch,
        config,
        step=5,
        learning_rate=1.0,
        world=WORLD,
        before=remembered,
    )
    found = {name: before[name] - p.detach() for name, p in parameters.items()}

    plain = load_plain(other_model)
    logps = plain_pairs(plain, rows, scored)
    generator = torch.Generator().manual_seed(step_seed(config.seed, 5))
    total = torch.zeros(())
    for loss in losses:
        values_B = (
            loss.of_batch(as_batch(loss, logps), remembered, generator)[0]
            if isinstance(loss, CoupledLoss)
            else loss(logps)
        )
        total = total + loss.weight * weighted_mean(values_B, rows)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert relative_difference(found, plain_gradients(plain, total.float())) < 2e-5


def as_batch(loss: CoupledLoss, logps: PairLogps) -> BatchRatios:
    ratios = read_ratios(loss, logps)
    return replace(
        ratios,
        chosen_B=ratios.chosen_B.double(),
        rejected_B=ratios.rejected_B.double(),
        ref_margins_B=ratios.ref_margins_B.double(),
    )


def step_seed(seed: int, step: int) -> int:
    """Compute the seed of a step's random draws, the same on every worker."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


COUPLED_CONFIG = TrainConfig(
    loss=COUPLED, dtype="float32", learning_rate=2e-3, num_epochs=2, global_batch_size=5
)


@pytest.fixture(scope="module")
def coupled(
    all_inputs: dict[str, StageOutput], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    job = make_job(tmp_path_factory.mktemp("coupled"), all_inputs, reference, COUPLED_CONFIG)
    train(job, ALONE)
    return job


@pytest.mark.slow
def test_two_processes_couple_the_pairs_of_both(
    all_inputs: dict[str, StageOutput], reference: Path, coupled: TrainJob, tmp_path: Path
) -> None:
    job = make_job(tmp_path, all_inputs, reference, COUPLED_CONFIG, max_tokens_per_microbatch=60)
    workers = start_workers(job, scratch=tmp_path / "scratch", size=2)
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    compare_metrics(job, coupled)


@pytest.mark.slow
def test_the_state_of_losses_survives_a_kill(
    all_inputs: dict[str, StageOutput], reference: Path, coupled: TrainJob, tmp_path: Path
) -> None:
    job = make_job(tmp_path, all_inputs, reference, COUPLED_CONFIG, checkpoint_every_steps=3)
    (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at="step:5")
    assert worker.wait(timeout=100) == -9
    train(job, ALONE)
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.summary["resumes"] == [{"step": 3, "num_workers": 1}]
    assert sha256s(job) == sha256s(coupled)
    rows = read_metrics(coupled)
    assert [row["bco_pair/num_pairs"] for row in rows] == [5, 10, 15, 17, 22, 27, 32, 34]
    assert len({row["beta_dpo/beta"] for row in rows}) == len(rows)


def test_a_pair_without_a_margin_is_refused_where_it_is_needed(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    rows = with_margins(encoded)
    rows[3]["margin"] = None
    rows[4]["margin"] = 0.0
    inputs = write_inputs(tmp_path, rows, scored, reference=reference)
    job = make_job(tmp_path, inputs, reference, TrainConfig(loss=OdpoLoss(), dtype="float32"))
    with pytest.raises(DataError, match=rf"2 of 11 pairs, the first {rows[3]['pair_id']}, have no"):
        train(job, ALONE)


def test_a_sum_is_the_sum_and_its_first_loss_gives_the_rewards(
    all_inputs: dict[str, StageOutput], other_model: Path, tmp_path: Path
) -> None:
    found = {}
    for name, loss in (
        ("sigmoid", SigmoidLoss()),
        ("sft", SftLoss()),
        ("both", (SigmoidLoss(weight=0.5), SftLoss(weight=2.0))),
    ):
        config = TrainConfig(loss=loss, dtype="float32", global_batch_size=32)
        job = make_job(tmp_path / name, all_inputs, other_model, config)
        train(job, ALONE)
        found[name] = read_metrics(job, "eval_metrics")[0]
    wanted = 0.5 * found["sigmoid"]["loss"] + 2 * found["sft"]["loss"]
    assert found["both"]["loss"] == pytest.approx(wanted, rel=1e-6)
    assert found["both"]["rewards/margins"] == found["sigmoid"]["rewards/margins"]
