"""FSDP2 over real processes: one process's numbers, checkpoints in parts, a whole export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GradientCheckpointingLayer

from stages.policy.decoder_layers import find_layers
from stages.store.shards import StageOutput
from stages.train import BestSettings, LoraSettings, TrainConfig
from stages.train.config import TrainJob
from stages.train.trainer import train
from tests.stages.train.made_data import (
    Row,
    load_plain,
    make_job,
    random_rows,
    score_rows,
    write_inputs,
)
from tests.stages.train.test_train import ALONE, compare_metrics, read_metrics, resumes, sha256s
from tests.stages.train.worker import start_workers

CONFIG = TrainConfig(
    dtype="float32",
    learning_rate=2e-3,
    lr_schedule="constant",
    num_epochs=2,
    global_batch_size=5,
    eval_every_steps=3,
)
"""19 training pairs: 4 steps per epoch, the last of four pairs; 8 steps in all."""
LORA = replace(CONFIG, learning_rate=1e-2, lora=LoraSettings(rank=4))
EXECUTION: dict[str, Any] = {
    "parallelism": "fsdp2",
    "max_tokens_per_microbatch": 60,
    "max_logits": 320 * 7,
    "keep_checkpoints": True,
}
"""Micro-batches of one or two pairs, each with several chunks of the output layer."""


@pytest.fixture(scope="module")
def uneven(
    reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Row], dict[str, StageOutput]]:
    """Short pairs and two that are ten times as long, which take up most of a worker's share."""
    rows = random_rows(0, 22, num_eval=5) + random_rows(5, 2, longest=240)
    inputs = write_inputs(
        tmp_path_factory.mktemp("uneven"), rows, score_rows(rows, reference), reference=reference
    )
    return rows, inputs


@pytest.fixture(scope="module")
def inputs(uneven: tuple[list[Row], dict[str, StageOutput]]) -> dict[str, StageOutput]:
    return uneven[1]


@pytest.fixture(scope="module")
def straight(
    inputs: dict[str, StageOutput], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TrainJob]:
    """Trainings on one worker: full and LoRA."""
    folder = tmp_path_factory.mktemp("straight")
    jobs = {
        "full": make_job(folder / "full", inputs, reference, CONFIG),
        "lora": make_job(folder / "lora", inputs, reference, LORA),
    }
    for job in jobs.values():
        train(job, ALONE)
    return jobs


@pytest.fixture(scope="module")
def sharded(
    inputs: dict[str, StageOutput], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TrainJob]:
    """The same trainings on two workers with sharded weights."""
    folder = tmp_path_factory.mktemp("sharded")
    jobs = {
        "full": make_job(folder / "full", inputs, reference, CONFIG, **EXECUTION),
        "lora": make_job(
            folder / "lora", inputs, reference, LORA, **EXECUTION, gradient_checkpointing=True
        ),
    }
    run_workers(*jobs.values(), scratch=folder / "scratch", size=2)
    return jobs


def run_workers(*jobs: TrainJob, scratch: Path, size: int) -> None:
    workers = start_workers(*jobs, scratch=scratch, size=size)
    assert [worker.wait(timeout=400) for worker in workers] == [0] * size


def compare_models(found: TrainJob, wanted: TrainJob) -> None:
    models = [load_plain(Path(job.out.folder.path) / "model") for job in (found, wanted)]
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(parameter, other, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["full", "lora"])
def test_two_workers_share_the_weights_and_change_only_rounding(
    what: str, sharded: dict[str, TrainJob], straight: dict[str, TrainJob]
) -> None:
    compare_metrics(sharded[what], straight[what])
    compare_models(sharded[what], straight[what])


@pytest.mark.slow
def test_four_workers_share_the_weights_and_change_only_rounding(
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: dict[str, TrainJob],
    tmp_path: Path,
) -> None:
    """Batches of five pairs give some of the four workers nothing but fillers."""
    jobs = [
        make_job(tmp_path / "fsdp2", inputs, reference, CONFIG, **EXECUTION),
        make_job(
            tmp_path / "ddp", inputs, reference, CONFIG, **{**EXECUTION, "parallelism": "ddp"}
        ),
    ]
    run_workers(*jobs, scratch=tmp_path / "scratch", size=4)
    for job in jobs:
        compare_metrics(job, straight["full"])
        compare_models(job, straight["full"])


@pytest.mark.slow
def test_each_worker_saves_its_rows_only(sharded: dict[str, TrainJob]) -> None:
    """A parameter of 5 rows is split into 3 and 2; the parts are the exported model."""
    folder = Path(sharded["full"].out.folder.path)
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    first, second = (load_file(path) for path in sorted(checkpoint.glob("weights-*")))
    whole = dict(load_plain(folder / "model").named_parameters())
    assert first.keys() == second.keys() == whole.keys()
    for name, parameter in whole.items():
        assert len(first[name]) == -(-len(parameter) // 2)
        torch.testing.assert_close(
            torch.cat([first[name], second[name]]), parameter.detach(), atol=0, rtol=0
        )


@pytest.mark.slow
def test_sharded_training_that_is_killed_resumes_to_the_same_bits(
    inputs: dict[str, StageOutput],
    reference: Path,
    sharded: dict[str, TrainJob],
    tmp_path: Path,
) -> None:
    """Weights, optimizer and metrics agree, as the last step's checkpoint shows."""
    job = make_job(tmp_path, inputs, reference, CONFIG, **EXECUTION, checkpoint_every_steps=2)
    scratch = tmp_path / "scratch"
    first, second = start_workers(job, scratch=scratch, size=2, die_at="step:5")
    assert first.wait(timeout=400) == -9
    assert second.wait(timeout=400) != 0
    run_workers(job, scratch=scratch, size=2)
    assert resumes(job) == [{"step": 4, "num_workers": 2}]
    assert sha256s(job) == sha256s(sharded["full"])
    assert last_checkpoint(job) == last_checkpoint(sharded["full"])


def last_checkpoint(job: TrainJob) -> list[bytes]:
    """Read the bytes of weights and optimizer state, worker by worker."""
    newest = max((Path(job.out.folder.path) / "checkpoints").glob("step-*"))
    return [path.read_bytes() for path in sorted(newest.glob("*.safetensors"))]


@pytest.mark.slow
def test_another_number_of_workers_resumes_and_is_recorded(
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: dict[str, TrainJob],
    tmp_path: Path,
) -> None:
    """Two sharded workers, then one alone, which reads both parts of the checkpoint."""
    job = make_job(tmp_path, inputs, reference, CONFIG, **EXECUTION, checkpoint_every_steps=2)
    workers = start_workers(job, scratch=tmp_path / "scratch", size=2, die_at="step:5")
    assert workers[0].wait(timeout=400) == -9
    assert workers[1].wait(timeout=400) != 0
    train(job, ALONE)
    assert resumes(job) == [{"step": 4, "num_workers": 1}]
    compare_metrics(job, straight["full"])
    compare_models(job, straight["full"])


@pytest.mark.slow
def test_the_best_step_of_a_sharded_training_is_exported(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """The learning rate overshoots, so the last step is not the best."""
    config = replace(CONFIG, learning_rate=2e-2, num_epochs=3, keep_best=BestSettings())
    job = make_job(tmp_path, inputs, reference, config, **EXECUTION, num_checkpoints_kept=1)
    run_workers(job, scratch=tmp_path / "scratch", size=2)
    rows = [row for row in read_metrics(job, "eval_metrics") if row["step"] > 0]
    best = int(min(rows, key=lambda row: row["loss"])["step"])
    assert best < 12
    folder = Path(job.out.folder.path)
    saved = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert saved == {f"step-{best:06d}", "step-000012"}
    parts = sorted((folder / "checkpoints" / f"step-{best:06d}").glob("weights-*"))
    first, second = map(load_file, parts)
    for name, parameter in load_plain(folder / "model").named_parameters():
        assert torch.equal(parameter, torch.cat([first[name], second[name]]))


def test_the_outermost_of_nested_layers_are_sharded() -> None:
    class Mixer(GradientCheckpointingLayer):
        pass

    class Block(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()

    blocks = nn.ModuleList([Block(), Block(), Mixer()])
    assert find_layers(nn.ModuleList([nn.Linear(1, 1), blocks])) == list(blocks)
