"""Where else are the metrics seen while training runs? TensorBoard, Weights & Biases.

They follow the metrics log, the lines of earlier attempts included, and begin anew with each
attempt: so a resumed training shows every step once. What they write lies beside the stage's tables
and stays; both name metrics as other trainers do, `train/loss` and `eval/loss`.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from schemas.config import dump_config
from schemas.errors import ConfigError
from stages.train.job import TrainJob
from stages.train.log import Evaluated, Line, Stepped, Tracker

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}

WANDB_PROJECT = "offline-dpo"
"""Unless the environment's WANDB_PROJECT names another."""


def check_trackers(job: TrainJob) -> None:
    """Refuse a tracker that cannot work, before anything is trained.

    Raises:
        ConfigError: its package is not installed, or the store is not local.
    """
    for name in job.execution.trackers:
        if not job.out.folder.is_local:
            raise ConfigError(
                f"execution.train.trackers: {name} writes its files beside the stage's output, "
                f"which has to be on a local path, and {job.out.folder.uri} is none. Leave "
                "trackers out: metrics.jsonl has all that they would show."
            )
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"execution.train.trackers: {name} wants the package {package}, which is not "
                f"installed. Run `pip install {package}` where the workers run, or leave it out."
            )


def open_trackers(job: TrainJob) -> list[Tracker]:
    """Give those that are asked for."""
    makers: dict[str, type[TensorBoard | WeightsAndBiases]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
    }
    return [makers[name](job) for name in job.execution.trackers]


class TensorBoard:
    """Event files below `tensorboard/`, for `tensorboard --logdir`."""

    def __init__(self, job: TrainJob) -> None:
        self._folder = job.out.folder

    def begin(self, lines: Sequence[Line]) -> None:
        from tensorboardX import SummaryWriter

        self._folder.delete_folder("tensorboard")
        self._writer = SummaryWriter(self._folder.file("tensorboard"))
        for line in lines:
            self.follow(line)

    def follow(self, line: Line) -> None:
        if shown := _name_metrics(line):
            step = shown.pop("step")
            for name, value in shown.items():
                self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run named after the training's fingerprint; WANDB_* in the environment say whose it is."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job

    def begin(self, lines: Sequence[Line]) -> None:
        import wandb

        folder = self._job.out.folder
        folder.delete_folder("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            id=folder.path.rsplit("/", 1)[-1].replace(".", "-"),
            resume="allow",
            config={"train": dump_config(self._job.config), "start": self._job.start.spec},
            dir=folder.path,
        )
        for line in lines:
            self.follow(line)

    def follow(self, line: Line) -> None:
        # A run that the server knows already takes none of its steps again.
        if (shown := _name_metrics(line)) and shown["step"] >= self._run.step:
            step = shown.pop("step")
            self._run.log(shown, step=step)

    def end(self) -> None:
        self._run.finish()


def _name_metrics(line: Line) -> dict[str, Any]:
    """Give a line's numbers by the names that they are shown under, and its step."""
    if isinstance(line, Stepped):
        numbers = {
            **line.metrics,
            "tokens_per_second": line.metrics["num_tokens"] / line.seconds,
            "memory_bytes": line.memory_bytes,
        }
    elif isinstance(line, Evaluated):
        numbers = dict(line.metrics)
    else:
        return {}
    kind = "train" if isinstance(line, Stepped) else "eval"
    del numbers["step"]
    return {"step": line.step, **{f"{kind}/{name}": value for name, value in numbers.items()}}
