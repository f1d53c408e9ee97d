"""Training survives kills, full disks and foreign checkpoints without losing saved work."""

import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from stages.store.shards import StageOutput
from stages.train.config import TrainJob
from stages.train.trainer import train
from tests.stages.train.made_data import Row, make_job
from tests.stages.train.test_train import ALONE, CONFIG, resumes, sha256s
from tests.stages.train.worker import start_workers


def last_state(job: TrainJob) -> dict[str, bytes]:
    """Read the bytes of the weights and optimizer state in the last checkpoint."""
    newest = max((Path(job.out.folder.path) / "checkpoints").iterdir())
    return {path.name.split("-")[0]: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.fixture(scope="module")
def kept(
    inputs: dict[str, StageOutput], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    """An uninterrupted training of CONFIG that keeps its last checkpoint."""
    job = make_job(
        tmp_path_factory.mktemp("kept"), inputs, reference, CONFIG, keep_checkpoints=True
    )
    train(job, ALONE)
    return job


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps_it_ends_with_the_same_bits(
    seed: int,
    kept: TrainJob,
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
) -> None:
    """After three kills, weights, optimizer and metrics are those of an uninterrupted training."""
    job = make_job(
        tmp_path, inputs, reference, CONFIG, checkpoint_every_steps=2, keep_checkpoints=True
    )
    kill_at = sorted(random.Random(seed).sample(range(1, 10), 3))
    for step in kill_at:
        (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at=f"step:{step}")
        assert worker.wait(timeout=100) == -9
    train(job, ALONE)
    assert sha256s(job) == sha256s(kept)
    assert last_state(job) == last_state(kept)


def test_a_full_disk_while_saving_loses_nothing_that_was_saved(
    kept: TrainJob, inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """A real disk of 1.5 MB has room for one checkpoint of 1 MB, but not for two.

    The next run, with more room, resumes from the complete checkpoint.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("making a small file system needs root: " + mounted.stderr.decode())
    try:
        small = make_job(disk, inputs, reference, CONFIG, checkpoint_every_steps=2)
        with pytest.raises(Exception, match=r"No space left|os error 28"):
            train(small, ALONE)
        shutil.copytree(disk, tmp_path / "larger")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    job = make_job(
        tmp_path / "larger",
        inputs,
        reference,
        CONFIG,
        checkpoint_every_steps=2,
        keep_checkpoints=True,
    )
    train(job, ALONE)
    assert [resume["step"] for resume in resumes(job)] == [2]
    assert sha256s(job) == sha256s(kept)
    assert last_state(job) == last_state(kept)


@pytest.mark.slow
def test_a_file_that_cannot_grow_while_saving_loses_nothing_that_was_saved(
    kept: TrainJob, inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    """The same without root: from checkpoint 4 on, files are limited to 100 KiB."""
    job = make_job(tmp_path, inputs, reference, CONFIG, checkpoint_every_steps=2)
    (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at="full:4")
    assert worker.wait(timeout=100) == 1
    left = Path(job.out.folder.path) / "checkpoints" / "step-000004"
    assert not (left / "commit.json").exists()
    train(job, ALONE)
    assert [resume["step"] for resume in resumes(job)] == [2]
    assert sha256s(job) == sha256s(kept)


@pytest.mark.parametrize("what", ["config", "data", "start"])
def test_a_checkpoint_of_another_training_is_refused_with_the_difference(
    what: str,
    inputs: dict[str, StageOutput],
    encoded: list[Row],
    reference: Path,
    other_model: Path,
    kept: TrainJob,
    tmp_path: Path,
) -> None:
    """Fingerprints keep trainings apart, but folders can be copied by hand."""
    config, start, data = CONFIG, reference, inputs
    if what == "config":
        config = replace(CONFIG, learning_rate=1e-3)
    elif what == "start":
        start = other_model
    else:
        manifest = replace_fingerprint(inputs["score"])
        data = {**inputs, "score": manifest}
    job = make_job(tmp_path, data, start, config)
    shutil.copytree(
        Path(kept.out.folder.path) / "checkpoints", Path(job.out.folder.path) / "checkpoints"
    )
    said = {
        "config": r"train.learning_rate was 0.002, is 0.001\.",
        "start": r"start was \w{64}, is \w{64}\.",
        "data": r"score was 0123456789ab, is ba9876543210\.",
    }[what]
    with pytest.raises(ConfigError, match=said):
        train(job, ALONE)


def replace_fingerprint(output: StageOutput) -> StageOutput:
    import msgspec

    manifest = msgspec.structs.replace(output.manifest, fingerprint="ba9876543210")
    return replace(output, manifest=manifest)
