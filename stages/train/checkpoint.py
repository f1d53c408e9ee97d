"""Checkpoints from which a training resumes bit-identically after a crash at any moment.

A checkpoint is a folder `checkpoints/step-000010/`: weights, optimizer state, metrics so far, and a
commit record with their names, sizes and hashes, written last. Everything else follows from the
step: the position in the epoch, the learning rate, the seed of dropout.

With a sharded policy, each worker writes the rows that it holds, and no worker ever holds more. On
resume with another number of workers, each reads the rows that it needs.
"""

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.config import dump_config
from schemas.errors import ConfigError, StageFailed
from schemas.manifest import FileRecord
from stages.store.filesystems import Folder
from stages.store.local_paths import describe_file, readable_path, writable_path
from stages.train.config import TrainJob
from stages.train.log import Line, MetricsLog, read_lines
from stages.train.sharding import is_sharded, own_range, own_rows
from stages.train.world import World

logger = logging.getLogger(__name__)

_COMMIT = "commit.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each parameter, besides its step count."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Files written by one worker: all rows, or only its own if the policy is sharded."""

    weights: FileRecord
    optimizer: FileRecord


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a complete checkpoint."""

    step: int
    """Optimizer steps done."""
    num_workers: int
    """World size at the time of writing."""
    made_by: dict[str, str]
    """Everything that determines the weights, by dotted name; see describe_origin."""
    best_step: int | None
    """Step of the checkpoint with the best weights so far; None without keep_best."""
    parts: list[Part]
    """One per worker, or a single one if every worker holds the whole policy."""
    metrics: FileRecord
    dynamics: dict[str, list[FileRecord]] = {}
    """Parts of the pairs' rows so far, by table, named below the folder of all checkpoints. Empty
    in checkpoints from before pairs were recorded."""

    @property
    def files(self) -> list[FileRecord]:
        return [*(f for part in self.parts for f in (part.weights, part.optimizer)), self.metrics]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one training."""

    folder: Folder
    num_kept: int
    made_by: Mapping[str, str]
    """As in Commit."""

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        log: MetricsLog,
        dynamics: Mapping[str, Sequence[FileRecord]],
        *,
        best_step: int | None,
        world: World,
    ) -> None:
        """Write a checkpoint, each worker its own rows, then delete the oldest checkpoints.

        The parts of the pairs' rows so far, by table, are in the folder already.

        File names are unique to the attempt, because a dying process of an earlier attempt may
        still be writing the same step.
        """
        folder = self.folder.child(_name(step))
        attempt = world.from_first(uuid.uuid4().hex[:8])
        part = None
        if is_sharded(parameters):
            with writable_path(folder) as path:
                part = _write_part(path, f"{attempt}-{world.rank:04d}", parameters, optimizer)
                # Leaving the block syncs every file in the folder: wait until no worker has
                # temporary files there, which would vanish meanwhile.
                world.gather(None)
        elif world.is_first:
            with writable_path(folder) as path:
                part = _write_part(path, f"{attempt}-{world.rank:04d}", parameters, optimizer)
        parts = world.gather(part)
        if not world.is_first:
            return
        metrics = f"metrics-{attempt}.jsonl"
        with writable_path(folder) as path:
            (path / metrics).write_bytes(log.content())
            commit = Commit(
                step=step,
                num_workers=world.size,
                made_by=dict(self.made_by),
                best_step=best_step,
                parts=[part for part in parts if part is not None],
                metrics=describe_file(path, metrics),
                dynamics={table: list(parts) for table, parts in dynamics.items()},
            )
        folder.write_bytes(_COMMIT, msgspec.json.encode(commit))
        for old in self._names()[: -self.num_kept]:
            if best_step is None or old != _name(best_step):
                self.folder.delete_folder(old)

    def newest(self) -> Commit | None:
        """Find the newest checkpoint to resume from, and delete any newer ones.

        It must be intact, and so must the best checkpoint that it refers to.

        Raises:
            ConfigError: a checkpoint belongs to a training with another config or other inputs.
        """
        usable = None
        for name in reversed(self._names()):
            commit = self._read_commit(name)
            damage = self._find_damage(commit)
            if commit and not damage:
                usable = commit
                break
            logger.warning("skipping checkpoint %s/%s: %s", self.folder.uri, name, damage)
        for name in self._names():
            if usable is None or _step(name) > usable.step:
                self.folder.delete_folder(name)
        return usable

    def load(
        self,
        commit: Commit,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> list[Line]:
        """Load a checkpoint's weights and optimizer state, and return the log up to its step.

        Args:
            optimizer: with its moments allocated, as by make_optimizer.
        """
        self._load_weights(commit, parameters)
        folder = self.folder.child(_name(commit.step))
        with _open_parts(folder, [part.optimizer for part in commit.parts]) as moments:
            for name, parameter in parameters.items():
                state = optimizer.state[parameter]
                for key in _MOMENTS:
                    own_rows(state[key]).copy_(moments.read(f"{key}/{name}", own_range(parameter)))
                state["step"].fill_(commit.step)
        return read_lines(folder.read_bytes(commit.metrics.name))

    def load_best(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the weights of the best step.

        Raises:
            StageFailed: its checkpoint was damaged during training.
        """
        commit = self._read_commit(_name(step))
        damage = self._find_damage(commit)
        if commit is None or damage:
            raise StageFailed(
                f"Step {step} was the best, but its checkpoint {self.folder.uri}/{_name(step)} is "
                f"damaged: {damage}. Run again: training resumes from an earlier checkpoint."
            )
        self._load_weights(commit, parameters)

    def _load_weights(self, commit: Commit, parameters: Mapping[str, nn.Parameter]) -> None:
        folder = self.folder.child(_name(commit.step))
        with _open_parts(folder, [part.weights for part in commit.parts]) as weights:
            for name, parameter in parameters.items():
                own_rows(parameter).copy_(weights.read(name, own_range(parameter)))

    def _names(self) -> list[str]:
        names = [name for name in self.folder.list_folders() if name.startswith("step-")]
        return sorted(names, key=_step)

    def _read_commit(self, name: str) -> Commit | None:
        folder = self.folder.child(name)
        if not folder.exists(_COMMIT):
            return None
        try:
            return msgspec.json.decode(folder.read_bytes(_COMMIT), type=Commit)
        except msgspec.DecodeError:  # A partly written record does not count.
            return None

    def _find_damage(self, commit: Commit | None) -> str | None:
        if commit is None:
            return "it has no commit record"
        self._check_origin(commit)
        parts = [part for of_table in commit.dynamics.values() for part in of_table]
        for folder, files in (
            (self.folder.child(_name(commit.step)), commit.files),
            (self.folder, parts),
        ):
            for file in files:
                if not folder.exists(file.name):
                    return f"{file.name} is missing"
                if folder.num_bytes(file.name) != file.num_bytes:
                    return f"{file.name} is not {file.num_bytes} bytes long"
                if folder.sha256(file.name) != file.sha256:
                    return f"the content of {file.name} does not match its sha256"
        if commit.best_step not in (None, commit.step):
            name = _name(commit.best_step)
            if damage := self._find_damage(self._read_commit(name)):
                return f"{name}, its best checkpoint, is damaged: {damage}"
        return None

    def _check_origin(self, commit: Commit) -> None:
        keys = sorted(self.made_by.keys() | commit.made_by.keys())
        changes = [
            f"{key} was {then}, is {now}"
            for key in keys
            if (then := commit.made_by.get(key)) != (now := self.made_by.get(key))
        ]
        if changes:
            raise ConfigError(
                f"{self.folder.uri}/{_name(commit.step)} is a checkpoint of another training: "
                f"{'; '.join(changes)}. Delete {self.folder.uri} to train from the start."
            )


def describe_origin(job: TrainJob) -> dict[str, str]:
    """Describe what determines the weights, by dotted name: the config, the start, the inputs."""
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


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Tensors whose rows are split over consecutive files."""

    files: Sequence[Any]

    def read(self, name: str, rows: range) -> Tensor:
        """Read only these rows of a tensor."""
        slices = [file.get_slice(name) for file in self.files]
        if not slices[0].get_shape():
            scalar: Tensor = self.files[0].get_tensor(name)
            return scalar
        found = []
        first = 0
        for part in slices:
            num_rows = part.get_shape()[0]
            begin, end = (min(max(row - first, 0), num_rows) for row in (rows.start, rows.stop))
            if begin < end or part is slices[0]:
                found.append(part[begin:end])
            first += num_rows
        return torch.cat(found)


@contextlib.contextmanager
def _open_parts(folder: Folder, records: Sequence[FileRecord]) -> Iterator[_Parts]:
    names = [record.name for record in records]
    with readable_path(folder, names) as path, contextlib.ExitStack() as stack, torch.no_grad():
        yield _Parts(
            files=[stack.enter_context(safe_open(path / name, framework="pt")) for name in names]
        )


def _write_part(
    path: Path,
    suffix: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Part:
    weights, moments = f"weights-{suffix}.safetensors", f"optimizer-{suffix}.safetensors"
    _save(path / weights, parameters)
    _save(
        path / moments,
        {
            f"{key}/{name}": optimizer.state[parameter][key]
            for name, parameter in parameters.items()
            for key in _MOMENTS
        },
    )
    return Part(weights=describe_file(path, weights), optimizer=describe_file(path, moments))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: own_rows(tensor).contiguous() for name, tensor in tensors.items()}, path)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
