"""A step computes every architecture as a plain float32 forward and backward pass does."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ConfigError
from schemas.rows import SCORE
from stages.models.resolve import pin_model
from stages.train import TrainConfig, TrainExecution
from stages.train.config import LoraSettings, read_outcome
from stages.train.microbatch import MicroBatch, lay_out_pairs
from stages.train.pairs import Pair
from stages.train.policy import Policy, open_policy
from stages.train.trainer import train
from tests.stages.policy.plain_forward import gradients, largest_gradient_error
from tests.stages.scorers.oracle import (
    group_of,
    open_plain_model,
    plain_logps,
    random_ids,
    sequence_logps,
)
from tests.stages.train.made_data import Row, make_job, random_rows, write_inputs
from tests.stages.train.test_train import ALONE
from tests.tiny_architectures import REFUSED, few_fast_ones, make_tiny_architecture
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")
MAX_LENGTH = 128
QUICK = ("gpt2", "gemma4", "diffllama", "phimoe", "llama-dynamic", "phi3-longrope", "mamba")


def make_pairs() -> list[Pair]:
    """Prompts that begin alike; short pairs and one of the greatest length."""
    rng = np.random.default_rng(0)
    begin = random_ids(rng, 4)
    pairs = []
    for number, lengths in enumerate([(40, 30, 2), (1, 1, 1), (86, 38, 5), (60, 20, 33)]):
        prompt, chosen, rejected = (random_ids(rng, length) for length in lengths)
        pairs.append(
            Pair(
                pair_id=str(number),
                group=group_of(np.concatenate([begin, prompt]), chosen, rejected),
                ref_chosen_token_logps_C=None,
                ref_rejected_token_logps_R=None,
                chosen_loss_mask_C=np.ones(len(chosen), np.bool_),
                rejected_loss_mask_R=np.ones(len(rejected), np.bool_),
                weight=1.0,
            )
        )
    return pairs


def open_start(
    folder: Path, *, lora: LoraSettings | None = None, is_checkpointed: bool = False
) -> Policy:
    return open_policy(
        TrainConfig(dtype="float32", lora=lora),
        TrainExecution(gradient_checkpointing=is_checkpointed),
        pin_model(str(folder)),
        device=CPU,
        max_length=MAX_LENGTH,
    )


def lay_out_all(policy: Policy) -> MicroBatch:
    return lay_out_pairs(make_pairs(), device=CPU, rows=policy.rows)


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("architecture", few_fast_ones(QUICK))
def test_a_step_computes_what_a_plain_forward_computes(
    architecture: str, is_checkpointed: bool, tmp_path: Path
) -> None:
    """Log-probs before the first step, and the gradient of their squares."""
    folder = make_tiny_architecture(tmp_path, architecture)
    policy = open_start(folder, is_checkpointed=is_checkpointed)
    microbatch = lay_out_all(policy)
    with policy.training_mode():
        found_N = policy.completion_tokens(microbatch.batch).logps_N
        found_N.square().sum().backward()
    wanted_N, wanted = plain_gradients(folder)
    torch.testing.assert_close(found_N, wanted_N, rtol=0, atol=1e-4)
    found = gradients(policy.model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert largest_gradient_error(found, wanted) < 1e-4


def plain_gradients(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of all sequences, and the gradient of their squares; each alone, by a model that
    has seen no other one."""
    shipped = open_plain_model(folder)
    logps, sums = [], {name: torch.zeros_like(one) for name, one in shipped.named_parameters()}
    for pair in make_pairs():
        for ids in pair.group.completions:
            model = deepcopy(shipped)
            logps.append(sequence_logps(model, pair.group.prompt_ids, ids, use_cache=False))
            logps[-1].square().sum().backward()
            for name, gradient in gradients(model).items():
                sums[name] += gradient
    return torch.cat(logps).detach(), sums


@pytest.mark.parametrize("architecture", few_fast_ones(("llama-dynamic", "falcon-alibi")))
def test_every_architecture_is_trained_and_exported(architecture: str, tmp_path: Path) -> None:
    """Two steps from scores of plain transformers, which the drift gate compares with the start;
    then transformers must read from the export what was trained."""
    start = make_tiny_architecture(tmp_path / "start", architecture)
    rows = random_rows(7, 8, longest=80)
    assert max(row["num_prompt_tokens"] + row["num_chosen_tokens"] for row in rows) > 100
    inputs = write_inputs(tmp_path / "inputs", rows, score_plainly(rows, start), reference=start)
    config = TrainConfig(dtype="float32", learning_rate=1e-3, global_batch_size=4)
    job = make_job(tmp_path, inputs, start, config)
    train(job, ALONE)
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.summary["export"]["model"]["max"] < 1e-4


def score_plainly(rows: Sequence[Row], start: Path) -> list[Row]:
    """Make rows of score's table from plain transformers, each sequence by a fresh model."""
    scored = []
    for row in rows:
        sides = {side: np.array(row[f"{side}_ids"], np.int32) for side in ("chosen", "rejected")}
        group = group_of(np.array(row["prompt_ids"], np.int32), *sides.values())
        [found] = plain_logps(start, [group])
        values = dict(zip(sides, found, strict=True))
        scored.append(
            {
                **{key: row[key] for key in SCORE.arrow.names if key in row},
                **{f"ref_{side}_token_logps": logps.tolist() for side, logps in values.items()},
                **{f"ref_{side}_logp": float(logps.sum()) for side, logps in values.items()},
            }
        )
    return scored


@pytest.mark.parametrize("architecture", REFUSED)
def test_an_architecture_that_is_not_computed_is_refused_by_name(
    architecture: str, tmp_path: Path
) -> None:
    folder = make_tiny_architecture(tmp_path, architecture)
    with pytest.raises(ConfigError, match=r"ForCausalLM .* another architecture"):
        open_start(folder)


def test_only_the_adapter_drops_its_inputs_in_training_mode(tmp_path: Path) -> None:
    """GPT-2's own dropout rates are 0.1. Only what is lost from the adapter changes the values, and
    a new adapter adds nothing, so that its second matrix gets random weights first."""
    policy = open_start(make_tiny_model(tmp_path, "gpt2"), lora=LoraSettings(dropout=0.5))
    with torch.no_grad():
        for name, parameter in policy.trained_parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = lay_out_all(policy).batch

    def compute() -> Tensor:
        return policy.completion_tokens(batch).logps_N

    with torch.no_grad():
        before = compute()
        assert policy.adapter is not None
        with policy.training_mode():
            assert (compute() - before).abs().max() > 1e-3
            with policy.adapter.disable_adapter():
                bare = compute()
        assert torch.equal(compute(), before)
        with policy.adapter.disable_adapter():
            assert torch.equal(compute(), bare)
