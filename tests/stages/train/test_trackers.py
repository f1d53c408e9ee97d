"""TensorBoard's and W&B's files contain every step once, also after a crash."""

import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from schemas.errors import ConfigError
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput
from stages.train import TrainConfig
from stages.train.config import TrainJob
from stages.train.publish import check_trackers
from stages.train.trainer import train
from tests.stages.train.made_data import make_job
from tests.stages.train.test_train import ALONE, CONFIG, read_metrics, resumes
from tests.stages.train.worker import start_workers

Shown = dict[str, dict[int, float]]
"""Values by metric and step."""


def read_tensorboard(folder: Path) -> list[tuple[str, int, float]]:
    """Read event files, whose records are a length, 4 bytes, an Event and 4 bytes."""
    found = []
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


def read_wandb(folder: Path) -> list[tuple[str, int, float]]:
    """Read an offline run's records."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("offline-run-*/run-*.wandb")
    found = []
    for data in read_leveldb_log(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.pop("_step")
            found += [(name, step, value) for name, value in items.items() if name[0] != "_"]
    return found


def read_leveldb_log(content: bytes) -> Iterator[bytes]:
    """Read LevelDB's log format after W&B's header of 7 bytes.

    Blocks of 32 KiB hold chunks, each with 4 bytes of checksum, 2 of length and 1 of kind (1: a
    whole record; 2, 3, 4: its first, a middle, its last part). Fewer than 7 bytes at the end of a
    block are unused.
    """
    place, record = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def by_metric(values: list[tuple[str, int, float]]) -> Shown:
    """Group values by metric, asserting that no step occurs twice."""
    shown: Shown = {}
    for name, step, value in values:
        assert step not in shown.setdefault(name, {}), (name, step)
        shown[name][step] = value
    return shown


def wanted_of(rows: list[dict[str, float]], column: str) -> dict[int, Any]:
    return {int(row["step"]): pytest.approx(row[column], rel=1e-6) for row in rows}


def compare(shown: Mapping[str, Mapping[int, float]], job: TrainJob) -> None:
    for column in ("loss", "rewards/margins", "logps/chosen", "grad_norm", "learning_rate"):
        assert shown[f"train/{column}"] == wanted_of(read_metrics(job), column)
    for column in ("loss", "rewards/accuracies"):
        assert shown[f"eval/{column}"] == wanted_of(read_metrics(job, "eval_metrics"), column)
    assert min(shown["train/tokens_per_second"].values()) > 0


@pytest.mark.slow
def test_a_resumed_training_shows_every_step_once(
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after showing step 7, it resumes from step 4 and shows steps 5 to 7 again."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    job = make_job(
        tmp_path,
        inputs,
        reference,
        CONFIG,
        checkpoint_every_steps=4,
        trackers=("tensorboard", "wandb"),
    )
    (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at="step:7")
    assert worker.wait(timeout=100) == -9
    train(job, ALONE)
    assert resumes(job) == [{"step": 4, "num_workers": 1}]
    folder = Path(job.out.folder.path)
    compare(by_metric(read_tensorboard(folder / "tensorboard")), job)
    compare(by_metric(read_wandb(folder / "wandb")), job)


def test_a_tracker_that_is_not_installed_is_named_before_training(
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    job = make_job(tmp_path, inputs, reference, TrainConfig(), trackers=("wandb",))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(job)


def test_trackers_need_a_local_store(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, inputs, reference, TrainConfig(), trackers=("tensorboard",))
    job = replace(job, out=replace(job.out, folder=Folder("memory://store/train/0123")))
    with pytest.raises(ConfigError, match="local path"):
        check_trackers(job)
