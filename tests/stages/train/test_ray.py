"""The stage under a real Ray Train, including a worker that is killed."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray.exceptions
import torch

from schemas.errors import DataError
from stages.stage import Resources
from stages.store.shards import StageOutput
from stages.train import STAGE, TrainConfig, TrainExecution, _raise_own_exception
from stages.train.config import read_outcome
from stages.train.log import METRICS_LOG, Stepped, read_lines
from stages.train.trainer import train
from stages.train.world import World
from tests.stages.train.made_data import Row, make_job, pin_start, write_inputs
from tests.stages.train.test_train import compare_metrics
from tests.stages_running import make_context, stage_dir

CONFIG = TrainConfig(dtype="float32", learning_rate=1e-3, global_batch_size=4, num_epochs=20)
"""100 steps."""


@contextlib.contextmanager
def worker_killed_after(step: int, log: Path) -> Iterator[list[int]]:
    """Kill the process that writes a training's log, once, after it has logged a step."""
    killed: list[int] = []

    def watch() -> None:
        while not killed:
            time.sleep(0.02)
            lines = read_lines(log.read_bytes()) if log.exists() else []
            if any(isinstance(line, Stepped) and line.step >= step for line in lines):
                killed.append(find_owner(log).pid)
                os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield killed
    thread.join(timeout=1)


def find_owner(log: Path) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path == str(log) for file in process.open_files()):
                return process
    raise AssertionError(f"nobody writes {log}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_lost_worker_changes_nothing(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    inputs = write_inputs(tmp_path, encoded, scored, reference=reference)
    straight = make_job(tmp_path / "straight", inputs, reference, CONFIG)
    train(straight, World(device=torch.device("cpu")))
    job = make_job(tmp_path / "ray", inputs, reference, CONFIG)
    context = make_context(
        stage_dir(tmp_path / "ray", "train"),
        inputs,
        pins=pin_start(reference),
        execution=TrainExecution(max_tokens_per_microbatch=200, checkpoint_every_steps=5),
    )
    with worker_killed_after(12, Path(job.out.folder.path) / METRICS_LOG) as killed:
        STAGE.run(CONFIG, replace(context, is_local=False))
    assert killed
    outcome, wanted = read_outcome(job), read_outcome(straight)
    assert outcome is not None
    assert wanted is not None
    assert outcome.summary["resumes"][0]["step"] >= 10
    same = {file.name: file.sha256 for file in wanted.files if file.name != "timings.parquet"}
    found = {file.name: file.sha256 for file in outcome.files if file.name in same}
    assert found == same


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_of_ray_train_share_the_weights(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """With FSDP2, they change only rounding."""
    config = replace(CONFIG, num_epochs=2)
    straight = make_job(tmp_path / "straight", inputs, reference, config)
    train(straight, World(device=torch.device("cpu")))
    context = make_context(
        stage_dir(tmp_path, "train"),
        inputs,
        pins=pin_start(reference),
        execution=TrainExecution(max_tokens_per_microbatch=60, parallelism="fsdp2"),
    )
    resources = Resources(num_workers=2)
    STAGE.run(config, replace(context, is_local=False, resources=resources))
    job = make_job(tmp_path, inputs, reference, config)
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.summary["num_workers"] == 2
    compare_metrics(job, straight)


def test_only_lost_processes_are_retried() -> None:
    lost = ray.exceptions.ActorDiedError()
    own = DataError("score has pair 1, encode does not")
    collective = RuntimeError("Connection closed by peer")
    cause = RuntimeError("Training failed due to worker errors")
    _raise_own_exception([collective, lost], cause)
    with pytest.raises(DataError, match="score has pair 1"):
        _raise_own_exception([collective, own], cause)
    with pytest.raises(RuntimeError, match="closed by peer"):
        _raise_own_exception([collective], cause)
