"""bfloat16 training computes what a bfloat16 model computes, and keeps float32 weights."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.policy.batches import Batch
from stages.store.shards import StageOutput
from stages.train import TrainConfig, TrainExecution
from stages.train.config import read_outcome
from stages.train.losses import SigmoidLoss
from stages.train.microbatch import Layout, StepBatch
from stages.train.policy import Policy, make_optimizer
from stages.train.sharding import shard_policy
from stages.train.step import take_step
from stages.train.trainer import train
from tests.stages.train.made_data import Row, load_plain, make_job
from tests.stages.train.test_architectures import lay_out_all
from tests.stages.train.test_architectures import plain_gradients as plain_gradients_of_squares
from tests.stages.train.test_step import (
    BETA,
    WORLD,
    only_batch,
    open_test_policy,
    plain_gradients,
    plain_loss,
    relative_difference,
)
from tests.stages.train.test_train import read_metrics
from tests.tiny_architectures import make_tiny_architecture

ROOT = Path(__file__).parents[3]
CONFIG = TrainConfig(loss=SigmoidLoss(beta=BETA), dtype="bfloat16", max_grad_norm=1e9)
LAYOUT = Layout(max_tokens=150, rows="packed")


@pytest.fixture
def alone() -> Iterator[None]:
    with WORLD.joined():
        yield


@pytest.fixture
def rows(encoded: list[Row]) -> list[Row]:
    return [row for row in encoded if row["split"] == "train"]


@pytest.fixture
def batch(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path, alone: None
) -> StepBatch:
    return only_batch(tmp_path, encoded, scored, reference, LAYOUT)


def open_sharded(start: Path, **options: Any) -> Policy:
    policy = open_test_policy(start, CONFIG, parallelism="fsdp2", **options)
    assert policy.rows == "packed"
    return shard_policy(policy, WORLD)


def whole(parameter: nn.Parameter) -> Tensor:
    assert isinstance(parameter, DTensor)
    assert parameter.dtype == torch.float32
    return parameter.full_tensor().detach()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_logits": 5 * 320},
        {"gradient_checkpointing": True},
        pytest.param({"compile_layers": True}, marks=pytest.mark.slow),
        pytest.param(
            {"compile_layers": True, "gradient_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_gradients_are_as_close_to_float32_as_those_of_a_bfloat16_model(
    other_model: Path, reference: Path, rows: list[Row], batch: StepBatch, options: dict[str, Any]
) -> None:
    """Three of plain transformers: in float32, and with its weights cast to bfloat16."""
    plain = load_plain(other_model)
    wanted = plain_gradients(plain, plain_loss(plain, load_plain(reference), rows))
    cast = load_plain(other_model).to(torch.bfloat16)
    usual = plain_gradients(cast, plain_loss(cast, load_plain(reference), rows))
    policy = open_sharded(other_model, **options)
    found = step_gradients(policy, batch)
    assert 1e-4 < relative_difference(found, wanted) < 1.5 * relative_difference(usual, wanted)


@pytest.mark.parametrize(
    ("architecture", "is_autocast"),
    [("gpt2", False), ("mamba", False), ("olmoe", False), ("minimax", True)],
)
def test_models_that_cannot_take_rounded_weights_are_computed_by_autocast(
    architecture: str, is_autocast: bool, tmp_path: Path, alone: None
) -> None:
    """MiniMax multiplies hidden states with float32 buffers; others compute what a model cast to
    bfloat16 computes, and both are about as far from float32."""
    folder = make_tiny_architecture(tmp_path, architecture)
    policy = shard_policy(open_test_policy(folder, CONFIG, parallelism="fsdp2"), WORLD)
    assert policy.is_autocast == is_autocast
    policy.completion_tokens(lay_out_all(policy).batch).logps_N.square().sum().backward()
    found = {
        name: parameter.grad.full_tensor()
        if isinstance(parameter.grad, DTensor)
        else parameter.grad
        for name, parameter in policy.trained_parameters.items()
        if parameter.grad is not None
    }
    _, wanted = plain_gradients_of_squares(folder)
    wanted = {name: gradient for name, gradient in wanted.items() if name in found}
    assert 1e-4 < relative_difference(found, wanted) < 0.1


def step_gradients(policy: Policy, batch: StepBatch) -> dict[str, Tensor]:
    """Compute gradients from a step of plain gradient descent at learning rate 1."""
    before = {name: whole(one).clone() for name, one in policy.trained_parameters.items()}
    optimizer = torch.optim.SGD(policy.trained_parameters.values(), lr=1.0)
    take_step(policy, optimizer, batch, CONFIG, step=1, learning_rate=1.0, world=WORLD)
    return {name: before[name] - whole(one) for name, one in policy.trained_parameters.items()}


def test_hidden_states_are_bfloat16_between_layers(other_model: Path, batch: StepBatch) -> None:
    policy = open_sharded(other_model)
    seen = []
    for layer in policy.model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    policy.completion_tokens(batch.microbatches[0].batch)
    assert {one.dtype for pair in seen for one in pair} == {torch.bfloat16}


def test_steps_too_small_for_bfloat16_are_kept(other_model: Path, batch: StepBatch) -> None:
    """A first step of AdamW changes each weight by the learning rate, here 1e-6, where bfloat16
    distinguishes weights of 0.01 to 0.1 by 6e-5 and more."""
    policy = open_sharded(other_model)
    before = {name: whole(one).clone() for name, one in policy.trained_parameters.items()}
    optimizer = make_optimizer(policy, CONFIG)
    take_step(policy, optimizer, batch, CONFIG, step=1, learning_rate=1e-6, world=WORLD)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        change = (whole(policy.trained_parameters[name]) - before[name]).abs()
        assert change.median().item() == pytest.approx(1e-6, rel=0.1)


def test_a_training_is_exported_as_its_float32_weights(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """The probe compares the export with them, in float32."""
    config = replace(CONFIG, learning_rate=2e-3, num_epochs=2, max_grad_norm=1.0)
    losses = {}
    for parallelism in ("fsdp2", "ddp"):
        job = make_job(tmp_path / parallelism, inputs, reference, config, parallelism=parallelism)
        train(job, WORLD)
        outcome = read_outcome(job)
        assert outcome is not None
        assert outcome.summary["export"]["model"]["max"] < 1e-4
        losses[parallelism] = [row["loss"] for row in read_metrics(job)]
    assert losses["fsdp2"] != losses["ddp"]
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], abs=0.02)


@pytest.mark.parametrize("passing", ["forward", "backward"])
def test_memory_that_runs_out_within_a_layer_halves_the_micro_batch(
    passing: str,
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for 170 tokens: of 640, 320 and 160 the last fits. Steps are as with 160 given."""
    forward = Policy.completion_tokens
    seen = []

    def compute(policy: Policy, batch: Batch, *args: Any) -> Any:
        seen.append(batch.input_ids_RL.numel())
        if seen[-1] <= 170:
            return forward(policy, batch, *args)
        with failing(policy.model.model.layers[0].mlp, passing):
            tokens = forward(policy, batch, *args)
            tokens.logps_N.sum().backward()

    config = replace(CONFIG, learning_rate=2e-3, max_grad_norm=1.0)
    fixed, auto = (
        make_job(
            tmp_path / str(max_tokens),
            inputs,
            reference,
            config,
            parallelism="fsdp2",
            max_tokens_per_microbatch=max_tokens,
        )
        for max_tokens in (160, "auto")
    )
    train(fixed, WORLD)
    monkeypatch.setattr(Policy, "completion_tokens", compute)
    train(auto, WORLD)
    assert min(seen[:2]) > 170
    assert [row["loss"] for row in read_metrics(auto)] == [
        row["loss"] for row in read_metrics(fixed)
    ]


def failing(module: nn.Module, passing: str) -> Any:
    def fail(module: nn.Module, values: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if passing == "forward":
        return module.register_forward_pre_hook(fail)
    return module.register_full_backward_pre_hook(fail)


def test_an_own_process_group_lasts_as_long_as_the_training() -> None:
    """In a process of its own, because vLLM's engine leaves its group in this one."""
    code = (
        "import torch, torch.distributed as dist; from stages.train.world import World\n"
        "with World(device=torch.device('cpu')).joined():\n"
        "    print(dist.is_initialized(), dist.get_world_size())\n"
        "print(dist.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "1", "False"]


@pytest.mark.parametrize(
    ("parallelism", "device_type", "shards"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("ddp", "cuda", False),
        ("fsdp2", "cpu", True),
    ],
)
def test_policies_are_sharded_on_gpus_unless_told_otherwise(
    parallelism: Any, device_type: str, shards: bool
) -> None:
    assert TrainExecution(parallelism=parallelism).shards(device_type) == shards
