"""What does a worker of the training need to know? Small, and picklable, because it travels."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from schemas.config import dump_config
from schemas.manifest import FileRecord
from stages.models.resolve import ModelPin
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput
from stages.train.config import TrainConfig, TrainExecution

CHECKPOINTS = "checkpoints"
"""Folder below the stage's directory while training runs."""
_OUTCOME = "outcome.json"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training, fully resolved."""

    config: TrainConfig
    execution: TrainExecution
    start: ModelPin
    inputs: Mapping[str, StageOutput]
    """encode, and score where a loss needs the reference."""
    out: StageDir
    num_threads: int
    """Of each worker; another number may change the order of additions."""

    @property
    def has_reference(self) -> bool:
        """Whether there are reference log-probs."""
        return "score" in self.inputs

    @property
    def starts_from_reference(self) -> bool:
        """Whether score used the very model that the policy starts from."""
        scored = self.inputs["score"].manifest.config
        adapter = {"adapter": scored["adapter"]} if scored["adapter"] else {}
        return self.start.identity() == {**scored["model"], **adapter}

    @property
    def is_float32(self) -> bool:
        """Whether policy and reference are both computed in float32."""
        dtypes = (self.config.dtype, self.inputs["score"].manifest.config["dtype"])
        return dtypes == ("float32", "float32")


def describe_origin(job: TrainJob) -> dict[str, str]:
    """Say what decides the weights, by dotted name: the config, the start and the inputs."""
    origin = {f"train.{key}": value for key, value in _flatten(dump_config(job.config))}
    origin["start"] = job.start.weights
    for name, output in job.inputs.items():
        manifest = output.manifest
        origin[name] = manifest.fingerprint + f".{manifest.attempt}" * (manifest.attempt > 1)
    return origin


def _flatten(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield path + key, str(value)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished training hands to the driver, which may be another one than it began with."""

    files: list[FileRecord]
    summary: dict[str, Any]


def write_outcome(job: TrainJob, outcome: Outcome) -> None:
    """Say that the training has ended, and with what."""
    folder = job.out.work("train").folder
    folder.create()
    folder.write_bytes(_OUTCOME, msgspec.json.encode(outcome))


def read_outcome(job: TrainJob) -> Outcome | None:
    """Give what a finished training left, or None."""
    folder = job.out.work("train").folder
    if not folder.exists(_OUTCOME):
        return None
    return msgspec.json.decode(folder.read_bytes(_OUTCOME), type=Outcome)


def with_absolute_paths(job: TrainJob) -> TrainJob:
    """Name every folder so that it means the same in a worker with another working directory."""
    inputs = {
        name: replace(output, folder=_absolute(output.folder))
        for name, output in job.inputs.items()
    }
    return replace(job, inputs=inputs, out=replace(job.out, folder=_absolute(job.out.folder)))


def _absolute(folder: Folder) -> Folder:
    return Folder(os.path.abspath(folder.uri)) if "://" not in folder.uri else folder
