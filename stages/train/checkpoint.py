"""How does a training survive a crash at any moment, and go on with the same bits?

A checkpoint is a folder `checkpoints/step-000010/`: weights, optimizer, metrics so far, and a
commit record that names them with sizes and hashes and is written last. All else that a training
depends on follows from the step: the place in the epoch, the learning rate, the seed of dropout.
"""

import logging
import uuid
from dataclasses import dataclass

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.manifest import FileRecord
from stages.folders import Folder
from stages.train.log import Line, MetricsLog, read_lines
from stages.train.transfer import describe_file, readable_path, writable_path

logger = logging.getLogger(__name__)

_COMMIT = "commit.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for each parameter."""


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """Says that a checkpoint is complete."""

    step: int
    """Optimizer steps done."""
    num_workers: int
    """World size that it was written with."""
    weights: FileRecord
    optimizer: FileRecord
    metrics: FileRecord


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one training."""

    folder: Folder
    num_kept: int

    def save(
        self,
        step: int,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        log: MetricsLog,
        *,
        num_workers: int,
    ) -> None:
        """Write a checkpoint, then delete the oldest ones.

        The files' names are this attempt's own, so that a dying process of an earlier attempt,
        which may be writing the same step, cannot get in the way.
        """
        folder = self.folder.child(f"step-{step:06d}")
        attempt = uuid.uuid4().hex[:8]
        weights = f"weights-{attempt}.safetensors"
        moments = f"optimizer-{attempt}.safetensors"
        metrics = f"metrics-{attempt}.jsonl"
        with writable_path(folder) as path:
            save_file(_detach(parameters), path / weights)
            save_file(_flatten_moments(parameters, optimizer), path / moments)
            (path / metrics).write_bytes(log.content())
            commit = Commit(
                step=step,
                num_workers=num_workers,
                weights=describe_file(path, weights),
                optimizer=describe_file(path, moments),
                metrics=describe_file(path, metrics),
            )
        folder.write_bytes(_COMMIT, msgspec.json.encode(commit))
        for old in self._names()[: -self.num_kept]:
            self.folder.delete_folder(old)

    def newest(self) -> Commit | None:
        """Find the newest complete checkpoint; damaged ones are passed over, and said so."""
        for name in reversed(self._names()):
            commit = self._read_commit(name)
            damage = "it has no commit record" if commit is None else self._find_damage(commit)
            if commit and not damage:
                return commit
            logger.warning("checkpoint %s/%s is not used: %s", self.folder.uri, name, damage)
        return None

    def load(
        self,
        commit: Commit,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> list[Line]:
        """Put a checkpoint's weights and optimizer state in place, and give the metrics so far."""
        folder = self._folder_of(commit)
        names = [commit.weights.name, commit.optimizer.name, commit.metrics.name]
        with readable_path(folder, names) as path, torch.no_grad():
            with safe_open(path / commit.weights.name, framework="pt") as weights:
                for name, parameter in parameters.items():
                    parameter.copy_(weights.get_tensor(name))
            with safe_open(path / commit.optimizer.name, framework="pt") as moments:
                for name, parameter in parameters.items():
                    optimizer.state[parameter] = {
                        # A copy: what is read may be a view of the file.
                        key: moments.get_tensor(f"{key}/{name}").to(parameter.device, copy=True)
                        for key in _MOMENTS
                    }
            return read_lines((path / commit.metrics.name).read_bytes())

    def _names(self) -> list[str]:
        names = [name for name in self.folder.list_folders() if name.startswith("step-")]
        return sorted(names, key=lambda name: int(name.removeprefix("step-")))

    def _folder_of(self, commit: Commit) -> Folder:
        return self.folder.child(f"step-{commit.step:06d}")

    def _read_commit(self, name: str) -> Commit | None:
        folder = self.folder.child(name)
        if not folder.exists(_COMMIT):
            return None
        try:
            return msgspec.json.decode(folder.read_bytes(_COMMIT), type=Commit)
        except msgspec.DecodeError:  # Half a record is none.
            return None

    def _find_damage(self, commit: Commit) -> str | None:
        folder = self._folder_of(commit)
        for file in (commit.weights, commit.optimizer, commit.metrics):
            if not folder.exists(file.name):
                return f"{file.name} is missing"
            if folder.num_bytes(file.name) != file.num_bytes:
                return f"{file.name} does not have its {file.num_bytes} bytes"
            if folder.sha256(file.name) != file.sha256:
                return f"{file.name} has other content than its sha256 says"
        return None


def _detach(tensors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flatten_moments(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": optimizer.state[parameter][key].contiguous()
        for name, parameter in parameters.items()
        for key in _MOMENTS
    }
