"""One worker of one or more trainings, as a process that a test can kill.

Arguments: a file with pickled TrainJobs, rank, world size, a rendezvous file, and when to die:
`never`, `step:N` (after step N is logged), `commit:N` (before checkpoint N's commit record is
written), `full:N` (from checkpoint N on, no file may grow beyond 100 KiB), `export` (before the
model is written).
"""

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from stages.store.filesystems import Folder
from stages.train.checkpoint import Checkpoints
from stages.train.config import TrainJob
from stages.train.log import Line, MetricsLog, Stepped
from stages.train.trainer import train
from stages.train.world import World


def start_workers(
    *jobs: TrainJob, scratch: Path, size: int = 1, die_at: str = "never"
) -> list[subprocess.Popen[bytes]]:
    """Start processes that run these trainings one after the other."""
    scratch.mkdir(exist_ok=True)
    (scratch / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    (scratch / "meeting").unlink(missing_ok=True)
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.stages.train.worker"),
                *(str(scratch / "jobs.pickle"), str(rank), str(size), str(scratch / "meeting")),
                die_at,
            ]
        )
        for rank in range(size)
    ]


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(step: int) -> None:
    append = MetricsLog.append

    def append_and_die(log: MetricsLog, line: Line) -> None:
        append(log, line)
        if isinstance(line, Stepped) and line.step == step:
            die()

    mock.patch.object(MetricsLog, "append", append_and_die).start()


def die_before_commit(step: int) -> None:
    write_bytes = Folder.write_bytes

    def write_or_die(folder: Folder, name: str, content: bytes) -> None:
        if name == "commit.json" and folder.uri.endswith(f"step-{step:06d}"):
            die()
        write_bytes(folder, name, content)

    mock.patch.object(Folder, "write_bytes", write_or_die).start()


def fill_disk_before(step: int) -> None:
    save = Checkpoints.save

    def save_on_full_disk(checkpoints: Checkpoints, at: int, *args: Any, **options: Any) -> None:
        if at == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))
        save(checkpoints, at, *args, **options)

    mock.patch.object(Checkpoints, "save", save_on_full_disk).start()


def main() -> None:
    path, rank, size, meeting, die_at = sys.argv[1:]
    moment, _, step = die_at.partition(":")
    if moment == "step":
        die_after_step(int(step))
    elif moment == "commit":
        die_before_commit(int(step))
    elif moment == "full":
        fill_disk_before(int(step))
    elif moment == "export":
        mock.patch("stages.train.trainer.export_model", side_effect=die).start()
    if int(size) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(size)
        )
    world = World(rank=int(rank), size=int(size), device=torch.device("cpu"))
    for job in pickle.loads(Path(path).read_bytes()):
        train(job, world)
    if int(size) > 1:
        dist.destroy_process_group()
    # Exit without shutting the interpreter down, as Ray's workers do: a torch thread that takes the
    # GIL during shutdown aborts the process (about one run in fifteen).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
