"""Best step, early stopping and the exported step, also after a crash."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.config import parse_config
from schemas.errors import ConfigError, DataError
from stages.store.shards import StageOutput
from stages.train import BestSettings, TrainConfig
from stages.train.config import TrainJob, read_outcome
from stages.train.log import Evaluated, Line, find_best, has_lost_patience
from stages.train.trainer import train
from tests.stages.train.made_data import Row, load_plain, make_job, write_inputs
from tests.stages.train.test_train import ALONE, CONFIG, read_metrics, resumes, sha256s
from tests.stages.train.worker import start_workers

OVERSHOOTING = replace(
    CONFIG,
    learning_rate=2e-2,
    num_epochs=4,
    eval_every_steps=2,
    keep_best=BestSettings(patience=3),
)
"""20 steps without early stopping; the rate is too high for the held-out pairs."""


def evaluated(values: list[float], metric: str) -> list[Line]:
    """Make evaluations after steps 0, 10, 20, …"""
    return [
        Evaluated(step=10 * number, metrics={metric: value}) for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("loss", [0.1, 0.6, 0.5, 0.7], 20),
        ("loss", [0.1, 0.5, 0.6, 0.5], 10),
        ("rewards/accuracies", [0.9, 0.6, 0.5, 0.7], 30),
        ("rewards/margins", [0.0, -1.0, -2.0], 10),
    ],
)
def test_the_best_of_the_steps_is_the_first_among_equals(
    metric: str, values: list[float], best: int
) -> None:
    """The first value is the start's and is never the best."""
    settings = parse_config(BestSettings, {"metric": metric}, path="")
    found = find_best(evaluated(values, metric), settings)
    assert found is not None
    assert found.step == best


@pytest.mark.parametrize(
    ("values", "is_over"),
    [
        ([0.7], False),
        ([0.7, 0.8], False),
        ([0.7, 0.6, 0.61], False),
        ([0.7, 0.6, 0.61, 0.6], True),
        ([0.7, 0.6, 0.61, 0.59], False),
    ],
)
def test_patience_is_lost_after_enough_evaluations_without_a_new_best(
    values: list[float], is_over: bool
) -> None:
    lines = evaluated(values, "loss")
    assert has_lost_patience(lines, BestSettings(patience=2)) is is_over
    assert has_lost_patience(lines, BestSettings(patience=0)) is False
    assert has_lost_patience(lines, None) is False


@pytest.fixture(scope="module")
def stopped(
    inputs: dict[str, StageOutput], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    """An uninterrupted training that stops early and keeps its checkpoints."""
    job = make_job(
        tmp_path_factory.mktemp("stopped"),
        inputs,
        reference,
        OVERSHOOTING,
        num_checkpoints_kept=1,
        keep_checkpoints=True,
    )
    train(job, ALONE)
    return job


def test_training_stops_early_and_exports_the_best_step(stopped: TrainJob) -> None:
    rows = [row for row in read_metrics(stopped, "eval_metrics") if row["step"] > 0]
    best = min(rows, key=lambda row: row["loss"])
    last = int(best["step"]) + 3 * 2
    assert [row["step"] for row in rows] == list(range(2, last + 1, 2))
    assert len(read_metrics(stopped)) == last < 20
    outcome = read_outcome(stopped)
    assert outcome is not None
    assert outcome.summary["exported_step"] == best["step"]
    assert outcome.summary["stopped_early"]
    assert outcome.summary["eval_best"] == best
    folder = Path(stopped.out.folder.path)
    assert f"step {int(best['step'])}" in (folder / "model" / "README.md").read_text()
    (weights,) = (folder / "checkpoints" / f"step-{int(best['step']):06d}").glob("weights-*")
    saved = load_file(weights)
    for name, parameter in load_plain(folder / "model").named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_the_best_checkpoint_outlives_newer_ones(stopped: TrainJob) -> None:
    """num_checkpoints_kept is 1, which keeps the last step's."""
    best, last = (
        int(outcome_step) for outcome_step in (find_exported(stopped), len(read_metrics(stopped)))
    )
    checkpoints = Path(stopped.out.folder.path) / "checkpoints"
    names = {path.name for path in checkpoints.glob("step-*")}
    assert names == {f"step-{best:06d}", f"step-{last:06d}"}


def find_exported(job: TrainJob) -> int:
    outcome = read_outcome(job)
    assert outcome is not None
    return int(outcome.summary["exported_step"])


@pytest.mark.slow
@pytest.mark.parametrize("since_best", [1, 3, 5])
def test_a_killed_training_stops_at_the_same_step(
    since_best: int,
    stopped: TrainJob,
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
) -> None:
    """It is killed between evaluations, after one, two or three without a new best."""
    best = find_exported(stopped)
    job = make_job(tmp_path, inputs, reference, OVERSHOOTING, checkpoint_every_steps=3)
    (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at=f"step:{best + since_best}")
    assert worker.wait(timeout=100) == -9
    train(job, ALONE)
    assert resumes(job)
    assert sha256s(job) == sha256s(stopped)


@pytest.mark.slow
def test_without_the_best_checkpoint_no_later_one_is_resumed_from(
    stopped: TrainJob, inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    best = find_exported(stopped)
    job = make_job(tmp_path, inputs, reference, OVERSHOOTING, checkpoint_every_steps=1)
    (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at=f"step:{best + 3}")
    assert worker.wait(timeout=100) == -9
    (weights,) = (Path(job.out.folder.path) / "checkpoints" / f"step-{best:06d}").glob("weights-*")
    weights.write_bytes(weights.read_bytes()[:-1])
    train(job, ALONE)
    assert resumes(job) == []
    assert sha256s(job) == sha256s(stopped)


def test_the_best_needs_evaluations() -> None:
    with pytest.raises(ConfigError, match="set eval_every_steps"):
        parse_config(TrainConfig, {"keep_best": {}}, path="stages.train")


def test_the_best_needs_held_out_pairs(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    everything = [{**row, "split": "train"} for row in encoded]
    inputs = write_inputs(tmp_path, everything, scored, reference=reference)
    with pytest.raises(DataError, match="eval_fraction"):
        train(make_job(tmp_path, inputs, reference, OVERSHOOTING), ALONE)
