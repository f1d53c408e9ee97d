"""A step equals a plain one: each sequence alone, a live reference, the equation written out."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from schemas.errors import StageFailed
from stages.models.resolve import pin_model
from stages.train import LoraSettings, TrainConfig, TrainExecution
from stages.train.losses import PairLogps, SigmoidLoss
from stages.train.microbatch import Layout, StepBatch, read_batches
from stages.train.order import keep_order
from stages.train.pairs import index_pairs
from stages.train.policy import Policy, make_optimizer, open_policy
from stages.train.step import rehearse, take_step
from stages.train.world import World
from tests.stages.train.made_data import (
    Row,
    load_plain,
    plain_logps,
    random_rows,
    score_rows,
    write_inputs,
)
from tests.tiny_models import make_tiny_model

WORLD = World(device=torch.device("cpu"))
BETA = 0.3


def open_test_policy(start: Path, config: TrainConfig, **options: Any) -> Policy:
    return open_policy(
        config,
        TrainExecution(**options),
        pin_model(str(start)),
        device=WORLD.device,
        max_length=48,
    )


def only_batch(
    folder: Path, rows: list[Row], scored: list[Row], reference: Path, layout: Layout
) -> StepBatch:
    index = index_pairs(write_inputs(folder, rows, scored, reference=reference))["train"]
    order = keep_order(index.num_pairs_S.tolist())
    (batch,) = read_batches(index, order, batch_size=len(index), layout=layout, world=WORLD)
    return batch


def plain_loss(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    rows: list[Row],
    *,
    moving: Sequence[str] = ("chosen", "rejected"),
) -> Tensor:
    """Compute weighted DPO (equation 7) per pair, with one side optionally held constant."""
    total = torch.zeros(())
    for row in rows:
        log_ratios = {}
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                ref = plain_logps(reference, row, side)
            mask = torch.tensor(row[f"{side}_loss_mask"] or [True] * len(ref))
            logps = plain_logps(policy, row, side)
            logps = logps if side in moving else logps.detach()
            log_ratios[side] = (logps[mask] - ref[mask]).sum()
        margin = BETA * (log_ratios["chosen"] - log_ratios["rejected"])
        total = total - row["weight"] * logsigmoid(margin)
    return total / len(rows)


def plain_gradients(policy: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def step_gradients(policy: Policy, batch: StepBatch, config: TrainConfig) -> dict[str, Tensor]:
    """Compute gradients from a step of plain gradient descent at learning rate 1."""
    before = {name: p.detach().clone() for name, p in policy.trained_parameters.items()}
    optimizer = torch.optim.SGD(policy.trained_parameters.values(), lr=1.0)
    take_step(policy, optimizer, batch, config, step=1, learning_rate=1.0, world=WORLD)
    return {name: before[name] - p.detach() for name, p in policy.trained_parameters.items()}


def relative_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    difference = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted])
    return float(difference.norm() / torch.cat([g.flatten() for g in wanted.values()]).norm())


@pytest.mark.parametrize(
    ("architecture", "max_tokens", "options"),
    [
        ("llama", 1, {}),
        ("llama", 150, {}),
        ("llama", 10_000, {}),
        ("llama", 150, {"gradient_checkpointing": True}),
        ("llama", 150, {"max_logits": 5 * 320}),
        ("gpt2", 150, {}),
        ("mistral", 150, {}),
    ],
)
def test_gradient_equals_that_of_two_plain_forwards(
    architecture: str, max_tokens: int, options: dict[str, Any], tmp_path: Path
) -> None:
    reference = make_tiny_model(tmp_path / "reference", architecture)
    start = make_tiny_model(tmp_path / "start", architecture, seed=1)
    rows = random_rows(7, 9)
    config = TrainConfig(loss=SigmoidLoss(beta=BETA), dtype="float32", max_grad_norm=1e9)
    policy = open_test_policy(start, config, **options)
    assert policy.rows == "packed"
    layout = Layout(max_tokens=max_tokens, rows=policy.rows)
    batch = only_batch(tmp_path, rows, score_rows(rows, reference), reference, layout)
    plain = load_plain(start)
    loss = plain_loss(plain, load_plain(reference), rows)
    wanted = plain_gradients(plain, loss)
    assert relative_difference(step_gradients(policy, batch, config), wanted) < 1e-5


def test_gradient_norms_by_side_equal_those_of_plain_forwards_and_change_nothing(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path, other_model: Path
) -> None:
    """The oracle differentiates the written-out loss with one side's log-probs held constant."""
    layout = Layout(max_tokens=150, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    rows = [row for row in encoded if row["split"] == "train"]
    weights, found = [], []
    for interval in (0, 3):
        config = TrainConfig(
            loss=SigmoidLoss(beta=BETA), dtype="float32", side_norms_every_steps=interval
        )
        policy = open_test_policy(other_model, config)
        optimizer = make_optimizer(policy, config)
        found = [
            take_step(policy, optimizer, batch, config, step=n, learning_rate=1e-3, world=WORLD)
            for n in (3, 4)
        ]
        weights.append({name: p.detach() for name, p in policy.trained_parameters.items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "grad_norm/chosen" in found[0]
    assert "grad_norm/chosen" not in found[1]

    plain, plain_reference = load_plain(other_model), load_plain(reference)
    for side in ("chosen", "rejected"):
        loss = plain_loss(plain, plain_reference, rows, moving=(side,))
        gradient = torch.cat([g.flatten() for g in plain_gradients(plain, loss).values()])
        assert found[0][f"grad_norm/{side}"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_metrics_say_what_the_step_did(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path, other_model: Path
) -> None:
    config = TrainConfig(loss=SigmoidLoss(beta=BETA), dtype="float32")
    policy = open_test_policy(other_model, config)
    layout = Layout(max_tokens=150, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    optimizer = make_optimizer(policy, config)
    found = take_step(policy, optimizer, batch, config, step=1, learning_rate=1e-3, world=WORLD)

    plain, plain_reference = load_plain(other_model), load_plain(reference)
    rows = [row for row in encoded if row["split"] == "train"]
    loss = plain_loss(plain, plain_reference, rows)
    gradient = torch.cat([g.flatten() for g in plain_gradients(plain, loss).values()])
    sides = {}
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            logps, rewards, lengths = [], [], []
            for row in rows:
                mask = torch.tensor(row[f"{side}_loss_mask"] or [True] * len(row[f"{side}_ids"]))
                logps.append(plain_logps(plain, row, side)[mask].sum().item())
                ref = plain_logps(plain_reference, row, side)[mask].sum().item()
                rewards.append(BETA * (logps[-1] - ref))
                lengths.append(mask.sum().item())
            sides[side] = torch.tensor(logps), torch.tensor(rewards), sum(lengths)
    margins = sides["chosen"][1] - sides["rejected"][1]
    fell = [sides[side][1] < 0 for side in ("chosen", "rejected")]
    num_tokens = sides["chosen"][2] + sides["rejected"][2]
    gained = (sides["chosen"][1] + sides["rejected"][1]).sum().item() / BETA
    assert found == {
        "loss": pytest.approx(loss.item(), abs=1e-5),
        "rewards/chosen": pytest.approx(sides["chosen"][1].mean().item(), abs=1e-4),
        "rewards/rejected": pytest.approx(sides["rejected"][1].mean().item(), abs=1e-4),
        "rewards/margins": pytest.approx(margins.mean().item(), abs=1e-4),
        "rewards/accuracies": pytest.approx((margins > 0).float().mean().item(), abs=1e-6),
        "logps/chosen": pytest.approx(sides["chosen"][0].mean().item(), abs=1e-3),
        "logps/rejected": pytest.approx(sides["rejected"][0].mean().item(), abs=1e-3),
        "lengths/chosen": pytest.approx(sides["chosen"][2] / len(rows)),
        "lengths/rejected": pytest.approx(sides["rejected"][2] / len(rows)),
        "displacement/chosen": pytest.approx(fell[0].float().mean().item()),
        "displacement/both": pytest.approx((fell[0] & fell[1]).float().mean().item()),
        "kl/k1": pytest.approx(gained / num_tokens, abs=1e-4),
        "kl/k3": found["kl/k3"],  # By hand in test_metrics.
        "num_pairs": len(rows),
        "grad_norm": pytest.approx(gradient.norm().item(), rel=1e-4),
        "learning_rate": 1e-3,
        "num_tokens": sum(
            len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) - 2
            for row in rows
        ),
    }


def test_gradients_are_clipped_to_their_largest_norm(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    config = TrainConfig(dtype="float32", max_grad_norm=0.5)
    policy = open_test_policy(reference, config)
    layout = Layout(max_tokens=500, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    gradients = step_gradients(policy, batch, config)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_bfloat16_is_autocast_over_float32_weights(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    """bfloat16 keeps 8 bits: the gradients agree to a few per cent and are not equal."""
    layout = Layout(max_tokens=150, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    gradients = []
    for dtype in ("float32", "bfloat16"):
        config = TrainConfig(dtype=dtype, max_grad_norm=1e9)
        policy = open_test_policy(reference, config)
        assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
        gradients.append(step_gradients(policy, batch, config))
    assert 1e-4 < relative_difference(gradients[1], gradients[0]) < 0.1


def test_no_graph_is_alive_when_the_next_micro_batch_is_computed(
    tmp_path: Path,
    encoded: list[Row],
    scored: list[Row],
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Leftover graphs would fragment the memory that the next micro-batch needs."""
    layout = Layout(max_tokens=150, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    config = TrainConfig(dtype="float32", side_norms_every_steps=1)
    policy = open_test_policy(reference, config)
    computed: list[weakref.ref[Tensor]] = []
    compute = Policy.pair_logps

    def watch(*args: Any, **kwargs: Any) -> PairLogps:
        assert [ref() for ref in computed] == [None] * len(computed)
        logps = compute(*args, **kwargs)
        sides = (logps.chosen, logps.rejected)
        computed.extend(weakref.ref(side.policy_token_logps_BT) for side in sides)
        return logps

    monkeypatch.setattr(Policy, "pair_logps", watch)
    step_gradients(policy, batch, config)
    assert len(batch.microbatches) > 1
    assert len(computed) == 3 * 2 * len(batch.microbatches)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.5)], ids=["all", "lora"])
def test_a_rehearsal_changes_no_bit_of_the_steps_after_it(
    lora: LoraSettings | None,
    tmp_path: Path,
    encoded: list[Row],
    scored: list[Row],
    reference: Path,
) -> None:
    """The other steps have no rehearsal, and their AdamW allocates its moments itself."""
    config = TrainConfig(loss=SigmoidLoss(beta=BETA), dtype="float32", lora=lora)
    layout = Layout(max_tokens=150, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    weights, metrics = [], []
    for is_rehearsed in (True, False):
        policy = open_test_policy(reference, config)
        before = {name: p.detach().clone() for name, p in policy.trained_parameters.items()}
        optimizer = make_optimizer(policy, config)
        if is_rehearsed:
            rehearse(policy, batch.microbatches[0].batch)
            assert not policy.model.training
        else:
            optimizer.state.clear()
        for name, parameter in policy.trained_parameters.items():
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        metrics += [
            take_step(policy, optimizer, batch, config, step=n, learning_rate=1e-3, world=WORLD)
            for n in (1, 2)
        ]
        weights.append({name: p.detach() for name, p in policy.trained_parameters.items()})
    assert metrics[:2] == metrics[2:]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_weight_decay_is_on_matrices_only(reference: Path) -> None:
    config = TrainConfig(dtype="float32", learning_rate=0.5, weight_decay=0.1)
    policy = open_test_policy(reference, config)
    optimizer = make_optimizer(policy, config)
    before = {name: p.detach().clone() for name, p in policy.trained_parameters.items()}
    for parameter in policy.trained_parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in policy.trained_parameters.items():
        kept = 1.0 if "norm" in name else 1 - 0.5 * 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


def test_lora_trains_the_adapter_alone(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    config = TrainConfig(
        dtype="float32",
        lora=LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "down_proj")),
    )
    policy = open_test_policy(reference, config)
    assert {name.split(".")[-4] for name in policy.trained_parameters} <= {"q_proj", "down_proj"}
    ranks = {p.shape[0] for name, p in policy.trained_parameters.items() if "lora_A" in name}
    assert ranks == {4}
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    batch = only_batch(tmp_path, encoded, scored, reference, Layout(max_tokens=500, rows="packed"))
    optimizer = make_optimizer(policy, config)
    take_step(policy, optimizer, batch, config, step=1, learning_rate=1e-2, world=WORLD)
    changed = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    # B starts at 0, so the adapter does nothing yet and only B has a gradient.
    assert changed == {name for name in policy.trained_parameters if "lora_B" in name}


def test_dropout_of_the_adapter_depends_on_the_step_alone(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    config = TrainConfig(dtype="float32", lora=LoraSettings(rank=4, dropout=0.5))
    layout = Layout(max_tokens=500, rows="packed")
    batch = only_batch(tmp_path, encoded, scored, reference, layout)
    norms = []
    for step in (1, 1, 2):
        policy = open_test_policy(reference, config)
        metrics = take_step(
            policy,
            make_optimizer(policy, config),
            batch,
            config,
            step=step,
            learning_rate=1e-3,
            world=WORLD,
        )
        norms.append(metrics["grad_norm"])
        torch.rand(5)  # Other code may draw random numbers in between.
    assert norms[0] == norms[1] != norms[2]


def test_a_loss_that_is_not_finite_stops_before_anything_changes(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    bad = scored[11]["pair_id"]
    broken = [
        {**row, "ref_chosen_token_logps": [float("nan")] * row["num_chosen_tokens"]}
        if row["pair_id"] == bad
        else row
        for row in scored
    ]
    config = TrainConfig(dtype="float32")
    policy = open_test_policy(reference, config)
    before = [p.detach().clone() for p in policy.trained_parameters.values()]
    layout = Layout(max_tokens=150, rows="packed")
    batch = only_batch(tmp_path, encoded, broken, reference, layout)
    optimizer = make_optimizer(policy, config)
    with pytest.raises(StageFailed, match=rf"step 17: loss nan, in pairs {bad}\. "):
        take_step(policy, optimizer, batch, config, step=17, learning_rate=1.0, world=WORLD)
    assert all(map(torch.equal, before, policy.trained_parameters.values()))
