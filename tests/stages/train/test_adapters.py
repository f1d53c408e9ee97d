"""Adapters on rounded and quantised bases, and their variants: gradients, exports, resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from schemas.errors import ConfigError
from stages.store.shards import StageOutput
from stages.train import BestSettings, LoraSettings, TrainConfig
from stages.train.config import TrainJob, read_outcome
from stages.train.losses import SigmoidLoss
from stages.train.microbatch import Layout, StepBatch
from stages.train.policy import Policy
from stages.train.trainer import train
from tests.stages.train.made_data import Row, load_plain, make_job
from tests.stages.train.test_sharding import EXECUTION, last_checkpoint, run_workers
from tests.stages.train.test_step import (
    BETA,
    only_batch,
    open_test_policy,
    plain_gradients,
    plain_loss,
    relative_difference,
    step_gradients,
)
from tests.stages.train.test_train import ALONE, read_metrics, resumes, sha256s
from tests.stages.train.worker import start_workers

SETTINGS = LoraSettings(rank=4, alpha=8)
CONFIG = TrainConfig(loss=SigmoidLoss(beta=BETA), dtype="float32", max_grad_norm=1e9, lora=SETTINGS)
TRAINING = replace(CONFIG, max_grad_norm=1.0, learning_rate=1e-2, num_epochs=2, global_batch_size=4)
"""17 training pairs: 5 steps per epoch, 10 in all."""
ROUNDED = replace(TRAINING, dtype="bfloat16")


def nf4(config: TrainConfig) -> TrainConfig:
    assert config.lora is not None
    return replace(config, lora=replace(config.lora, quantization="nf4"))


# --- gradients ------------------------------------------------------------------------------------


def open_adapted(settings: LoraSettings, base: nn.Module) -> PeftModel:
    """Put an adapter on a model by peft alone."""
    torch.manual_seed(CONFIG.seed)
    adapted = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules="all-linear",
            use_dora=settings.use_dora,
            use_rslora=settings.use_rslora,
        ),
    )
    return adapted.eval()


def open_quantized(start: Path) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    # Not repacked for inference, which rounds it again.
    return model.train()


def disturb(parameters: dict[str, nn.Parameter]) -> None:
    """Move an adapter away from its start, where half of its gradients are 0."""
    for number, name in enumerate(sorted(parameters)):
        noise = torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            parameters[name].add_(noise, alpha=0.05)


def trained_by_name(adapted: PeftModel) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model."): one
        for name, one in adapted.named_parameters()
        if one.requires_grad
    }


def oracle_gradients(adapted: PeftModel, reference: Path, rows: list[Row]) -> dict[str, Tensor]:
    """Compute gradients of textbook DPO, every sequence in a forward pass of its own."""
    disturb(trained_by_name(adapted))
    gradients = plain_gradients(adapted, plain_loss(adapted, load_plain(reference), rows))
    return {name.removeprefix("base_model.model."): one for name, one in gradients.items()}


def open_disturbed(start: Path, config: TrainConfig) -> Policy:
    policy = open_test_policy(start, config, max_logits=7 * 320)
    assert policy.rows == "packed"
    disturb(dict(policy.trained_parameters))
    return policy


@pytest.fixture
def rows(encoded: list[Row]) -> list[Row]:
    return [row for row in encoded if row["split"] == "train"]


@pytest.fixture
def batch(tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path) -> StepBatch:
    return only_batch(tmp_path, encoded, scored, reference, Layout(max_tokens=150, rows="packed"))


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}],
    ids=str,
)
def test_gradients_of_variants_are_those_of_peft_alone(
    reference: Path, other_model: Path, rows: list[Row], batch: StepBatch, changes: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, **changes)
    adapted = open_adapted(settings, load_plain(other_model))
    wanted = oracle_gradients(adapted, reference, rows)
    policy = open_disturbed(other_model, replace(CONFIG, lora=settings))
    assert relative_difference(step_gradients(policy, batch, CONFIG), wanted) < 1e-4


def test_gradients_on_nf4_weights_are_those_of_peft_and_transformers_alone(
    reference: Path, other_model: Path, rows: list[Row], batch: StepBatch
) -> None:
    adapted = open_adapted(SETTINGS, open_quantized(other_model)).train()
    wanted = oracle_gradients(adapted, reference, rows)
    policy = open_disturbed(other_model, nf4(CONFIG))
    assert relative_difference(step_gradients(policy, batch, CONFIG), wanted) < 1e-4


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bfloat16", "nf4"])
def test_bfloat16_gradients_are_as_close_to_float32_as_those_of_peft_alone(
    tmp_path: Path,
    reference: Path,
    other_model: Path,
    rows: list[Row],
    batch: StepBatch,
    is_quantized: bool,
) -> None:
    """Both adapters are float32, on weights rounded to bfloat16; products are rounded, too."""
    rounded_start = tmp_path / "rounded"
    load_plain(other_model).to(torch.bfloat16).float().save_pretrained(rounded_start)

    def open_base() -> nn.Module:
        return open_quantized(rounded_start) if is_quantized else load_plain(rounded_start)

    exact = open_adapted(SETTINGS, open_base()).train()
    wanted = oracle_gradients(exact, reference, rows)
    rounded = open_adapted(SETTINGS, open_base()).train()
    with torch.autocast("cpu", torch.bfloat16):
        usual = oracle_gradients(rounded, reference, rows)
    config = replace(CONFIG, dtype="bfloat16")
    policy = open_disturbed(other_model, nf4(config) if is_quantized else config)
    assert {one.dtype for one in policy.trained_parameters.values()} == {torch.float32}
    found = step_gradients(policy, batch, config)
    assert 1e-4 < relative_difference(found, wanted) < 1.5 * relative_difference(usual, wanted)


def test_a_frozen_base_is_held_in_the_dtype_of_training(other_model: Path) -> None:
    policy = open_disturbed(other_model, replace(CONFIG, dtype="bfloat16"))
    frozen = {one.dtype for one in policy.model.parameters() if not one.requires_grad}
    assert frozen == {torch.bfloat16}
    quantized = open_disturbed(other_model, nf4(replace(CONFIG, dtype="bfloat16")))
    by_name = dict(quantized.model.named_parameters())
    assert by_name["model.layers.0.mlp.up_proj.base_layer.weight"].dtype == torch.uint8
    assert by_name["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_dropout_of_dora_is_on_in_steps_alone(other_model: Path, batch: StepBatch) -> None:
    config = replace(CONFIG, lora=replace(SETTINGS, use_dora=True, dropout=0.5))
    policy = open_disturbed(other_model, config)

    def compute() -> Tensor:
        torch.manual_seed(0)
        return policy.completion_tokens(batch.microbatches[0].batch).logps_N.detach()

    still = compute()
    with policy.training_mode():
        assert (compute() - still).abs().max() > 1e-3
    assert torch.equal(compute(), still)


def test_dora_refuses_rows_of_zeros(other_model: Path) -> None:
    """The output layer's row of padding is 0, and its norm would divide it."""
    settings = replace(SETTINGS, use_dora=True, target_modules=("lm_head",))
    with pytest.raises(ConfigError, match=r"lm_head has rows that are all 0.*use_dora"):
        open_disturbed(other_model, replace(CONFIG, lora=settings))


# --- trainings ------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def merge_by_hand(start: Path, adapter: Path, *, scaling: float) -> dict[str, Tensor]:
    """Add B A times the scaling to the start's own weights, in float32."""
    merged = {name: one.float() for name, one in load_file(start / "model.safetensors").items()}
    held = load_file(adapter / "adapter_model.safetensors")
    for name, a in held.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            merged[layer] += scaling * held[name.replace("lora_A", "lora_B")] @ a
    return merged


@pytest.mark.parametrize(
    ("config", "least", "most"),
    [(ROUNDED, 1e-4, 0.1), (nf4(ROUNDED), 0.1, 2.0), (nf4(TRAINING), 0.1, 2.0)],
    ids=["bfloat16", "nf4 bfloat16", "nf4 float32"],
)
def test_an_adapter_is_merged_into_weights_that_were_not_rounded(
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
    config: TrainConfig,
    least: float,
    most: float,
) -> None:
    """The manifest says how far the policy on its rounded weights is from what is exported."""
    job = make_job(tmp_path, inputs, reference, config)
    train(job, ALONE)
    folder = Path(job.out.folder.path)
    found = weights_of(folder)
    wanted = merge_by_hand(reference, folder / "adapter", scaling=8 / 4)
    for name, one in found.items():
        torch.testing.assert_close(one, wanted[name], atol=1e-6, rtol=0)
    outcome = read_outcome(job)
    assert outcome is not None
    export = outcome.summary["export"]
    assert export["model"]["max"] < 1e-4
    assert export["adapter"]["max"] < 1e-4
    assert least < export["rounded_base"]["max"] < most


def test_a_quantised_start_is_not_the_reference(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """Its distance would stop a training that should start from the reference."""
    job = make_job(tmp_path / "nf4", inputs, reference, nf4(TRAINING))
    train(job, ALONE)
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.summary["drift"]["is_reference"] is False
    assert outcome.summary["drift"]["max"] > 0.1
    assert make_job(tmp_path, inputs, reference, TRAINING).starts_from_reference


@pytest.mark.slow
def test_a_killed_dora_training_on_nf4_weights_resumes_to_the_same_bits(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, use_dora=True, use_rslora=True, dropout=0.3, quantization="nf4")
    config = replace(TRAINING, lora=settings)
    jobs = [
        make_job(tmp_path / name, inputs, reference, config, checkpoint_every_steps=every)
        for name, every in (("straight", 100), ("killed", 4))
    ]
    run_workers(jobs[0], scratch=tmp_path / "scratch", size=1)
    [worker] = start_workers(jobs[1], scratch=tmp_path / "scratch", die_at="step:6")
    assert worker.wait(timeout=400) == -9
    run_workers(jobs[1], scratch=tmp_path / "scratch", size=1)
    assert resumes(jobs[1]) == [{"step": 4, "num_workers": 1}]
    assert sha256s(jobs[0]) == sha256s(jobs[1])


# --- several workers ------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_share_a_rounded_base_and_change_only_rounding(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """Its base is in shards; the adapter is whole, and so are the first worker's checkpoints.

    A training that was killed resumes to the same bits, and exports the best step.
    """
    config = replace(ROUNDED, eval_every_steps=4, keep_best=BestSettings())
    alone = make_job(tmp_path / "alone", inputs, reference, config)
    train(alone, ALONE)
    options: dict[str, dict[str, Any]] = {
        "ddp": {"parallelism": "ddp"},
        "fsdp2": {"gradient_checkpointing": True},
        "killed": {"gradient_checkpointing": True, "checkpoint_every_steps": 2},
    }
    jobs = {
        name: make_job(tmp_path / name, inputs, reference, config, **{**EXECUTION, **changes})
        for name, changes in options.items()
    }
    scratch = tmp_path / "scratch"
    run_workers(jobs["ddp"], jobs["fsdp2"], scratch=scratch, size=2)
    first, second = start_workers(jobs["killed"], scratch=scratch, size=2, die_at="step:7")
    assert first.wait(timeout=400) == -9
    assert second.wait(timeout=400) != 0
    run_workers(jobs["killed"], scratch=scratch, size=2)
    for job in (jobs["ddp"], jobs["fsdp2"]):
        compare_roughly(job, alone)
        assert len(last_checkpoint(job)) == 2
    assert resumes(jobs["killed"]) == [{"step": 6, "num_workers": 2}]
    assert sha256s(jobs["killed"]) == sha256s(jobs["fsdp2"])
    assert last_checkpoint(jobs["killed"]) == last_checkpoint(jobs["fsdp2"])


def compare_roughly(found: TrainJob, wanted: TrainJob) -> None:
    """Compare losses within the rounding of bfloat16, and exported weights."""
    for row, other in zip(read_metrics(found), read_metrics(wanted), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.03)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)
    for folder in (Path(job.out.folder.path) for job in (found, wanted)):
        assert "base_model" not in "".join(weights_of(folder))
