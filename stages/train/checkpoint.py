"""How does a training survive a crash at any moment, and go on with the same bits?

A checkpoint is a folder `checkpoints/step-000010/`: weights, optimizer, metrics so far, and a
commit record that names them with sizes and hashes and is written last. All else that a training
depends on follows from the step: the place in the epoch, the learning rate, the seed of dropout.

Where the policy is sharded, every worker writes the rows that it holds, and nobody ever holds more.
Another number of workers reads the rows that it needs.
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

from schemas.errors import ConfigError, StageFailed
from schemas.manifest import FileRecord
from stages.store.filesystems import Folder
from stages.store.local_paths import describe_file, readable_path, writable_path
from stages.train.log import Line, MetricsLog, read_lines
from stages.train.sharding import is_sharded, own_range, own_rows
from stages.train.world import World

logger = logging.getLogger(__name__)

_COMMIT = "commit.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, beside the number of steps."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker wrote: all rows, or where the policy is sharded its own."""

    weights: FileRecord
    optimizer: FileRecord


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """Says that a checkpoint is complete."""

    step: int
    """Optimizer steps done."""
    num_workers: int
    """World size that it was written with."""
    made_by: dict[str, str]
    """What decides the weights of this training, by dotted name: its config and its inputs."""
    best_step: int | None
    """The checkpoint that holds the best weights so far, where the best are kept."""
    parts: list[Part]
    """By worker; one where every worker holds the whole policy."""
    metrics: FileRecord

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
        *,
        best_step: int | None,
        world: World,
    ) -> None:
        """Write a checkpoint, every worker what it holds, then delete the oldest ones.

        The files' names are this attempt's own, so that a dying process of an earlier attempt,
        which may be writing the same step, cannot get in the way.
        """
        folder = self.folder.child(_name(step))
        attempt = world.from_first(uuid.uuid4().hex[:8])
        part = None
        if world.is_first or is_sharded(parameters):
            part = _write_part(folder, f"{attempt}-{world.rank:04d}", parameters, optimizer)
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
            )
        folder.write_bytes(_COMMIT, msgspec.json.encode(commit))
        for old in self._names()[: -self.num_kept]:
            if best_step is None or old != _name(best_step):
                self.folder.delete_folder(old)

    def newest(self) -> Commit | None:
        """Find the newest checkpoint that can be gone on from, and delete what is newer.

        That is one that is whole, as is the one with the best weights that it knows of.

        Raises:
            ConfigError: a checkpoint is of a training with another config or other inputs.
        """
        usable = None
        for name in reversed(self._names()):
            commit = self._read_commit(name)
            damage = self._find_damage(commit)
            if commit and not damage:
                usable = commit
                break
            logger.warning("checkpoint %s/%s is not used: %s", self.folder.uri, name, damage)
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
        """Put a checkpoint's weights and optimizer state in place, and give the metrics so far.

        Args:
            optimizer: with moments, as make_optimizer gives it.
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
        """Put the weights of the best step in place.

        Raises:
            StageFailed: its checkpoint was damaged while training went on.
        """
        commit = self._read_commit(_name(step))
        damage = self._find_damage(commit)
        if commit is None or damage:
            raise StageFailed(
                f"Step {step} was the best, but its checkpoint {self.folder.uri}/{_name(step)} is "
                f"damaged: {damage}. Run again: training goes on from a checkpoint before it."
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
        except msgspec.DecodeError:  # Half a record is none.
            return None

    def _find_damage(self, commit: Commit | None) -> str | None:
        if commit is None:
            return "it has no commit record"
        self._check_origin(commit)
        folder = self.folder.child(_name(commit.step))
        for file in commit.files:
            if not folder.exists(file.name):
                return f"{file.name} is missing"
            if folder.num_bytes(file.name) != file.num_bytes:
                return f"{file.name} does not have its {file.num_bytes} bytes"
            if folder.sha256(file.name) != file.sha256:
                return f"{file.name} has other content than its sha256 says"
        if commit.best_step not in (None, commit.step):
            name = _name(commit.best_step)
            if damage := self._find_damage(self._read_commit(name)):
                return f"{name}, the best before it, is damaged: {damage}"
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


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Tensors whose rows are spread over files, one file after the other."""

    files: Sequence[Any]

    def read(self, name: str, rows: range) -> Tensor:
        """Read some rows of a tensor, and no others."""
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
    folder: Folder,
    suffix: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Part:
    weights, moments = f"weights-{suffix}.safetensors", f"optimizer-{suffix}.safetensors"
    with writable_path(folder) as path:
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
