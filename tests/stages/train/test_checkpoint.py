"""Workers of a sharded training write a checkpoint together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.store import local_paths
from stages.store.filesystems import Folder
from stages.train import checkpoint
from stages.train.checkpoint import Checkpoints
from stages.train.log import MetricsLog
from stages.train.world import World


@dataclass(frozen=True, kw_only=True)
class SlowerWorld(World):
    """A world of two whose other worker is still writing when this one starts to wait."""

    temporary: Path
    """A file that the other worker removes before it waits."""

    def from_first(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        self.temporary.unlink(missing_ok=True)
        return [value, value]


def test_no_worker_syncs_temporary_files_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker renames them at any time, so opening one fails."""
    synced: list[str] = []
    monkeypatch.setattr(local_paths, "sync_file", synced.append)
    monkeypatch.setattr(checkpoint, "is_sharded", lambda parameters: True)
    step_folder = tmp_path / "step-000004"
    step_folder.mkdir()
    temporary = step_folder / ".tmp-of-the-other"
    temporary.touch()
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    Checkpoints(folder=Folder(str(tmp_path)), num_kept=1, made_by={}).save(
        4,
        {"weight": parameter},
        optimizer,
        MetricsLog(folder=Folder(str(tmp_path)), is_written=True),
        {},
        best_step=None,
        world=SlowerWorld(size=2, device=torch.device("cpu"), temporary=temporary),
    )
    names = [Path(path).name for path in synced]
    assert {name.split("-")[0] for name in names} == {"weights", "optimizer", "metrics"}
