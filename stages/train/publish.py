"""Publish a training: live metrics to TensorBoard and Weights & Biases, the model to the HF hub.

Trackers follow the metrics log from its first line and start over with each attempt, so a resumed
training shows every step once. Their files lie next to the stage's tables and are kept. Metrics are
named as in other trainers: `train/loss`, `eval/loss`.

The token for the hub comes from the environment (HF_TOKEN, or the one stored by `hf auth login`).
No recipe, manifest or log contains it.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from schemas.config import dump_config
from schemas.errors import ConfigError, StageFailed
from stages.store.filesystems import Folder
from stages.store.local_paths import readable_path
from stages.train.config import TrainJob
from stages.train.log import Evaluated, Line, Stepped, Tracker

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Package of each tracker, whose name is also the folder of its files."""

WANDB_PROJECT = "offline-dpo"
"""Project of the run unless the environment's WANDB_PROJECT names another."""


def check_trackers(job: TrainJob) -> None:
    """Refuse a tracker that cannot work, before anything is trained.

    Raises:
        ConfigError: its package is not installed, or the store is not local.
    """
    for name in job.execution.trackers:
        if not job.out.folder.is_local:
            raise ConfigError(
                f"execution.train.trackers: {name} writes its files next to the stage's output, "
                f"which must be on a local path, and {job.out.folder.uri} is not. Remove trackers: "
                "metrics.jsonl holds everything they would show."
            )
        package = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"execution.train.trackers: {name} needs the package {package}, which is not "
                f"installed. Run `pip install {package}` on the workers, or remove {name}."
            )


def open_trackers(job: TrainJob) -> list[Tracker]:
    """Open the configured trackers."""
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
    """A run named after the training's fingerprint; WANDB_* in the environment set its owner."""

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
        # The server rejects steps that it already has for a resumed run.
        if (shown := _name_metrics(line)) and shown["step"] >= self._run.step:
            step = shown.pop("step")
            self._run.log(shown, step=step)

    def end(self) -> None:
        self._run.finish()


def _name_metrics(line: Line) -> dict[str, Any]:
    """Return a line's numbers by their displayed names, and its step."""
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


def prepare_repository(repo: str) -> None:
    """Create the hub repository, private, unless it exists, and check write access to it.

    This runs before training, so that a missing permission costs nothing.

    Raises:
        StageFailed: the hub refuses, or cannot be reached.
    """
    with _named_failures(repo, "so nothing has been trained yet"):
        HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().auth_check(repo, write=True)


def publish_model(folder: Folder, repo: str, *, fingerprint: str) -> str:
    """Upload an exported model in one commit, and return the commit's URL.

    Raises:
        StageFailed: the hub refuses, or cannot be reached.
    """
    names = folder.list_files()
    with (
        _named_failures(repo, "the model is trained, and the next run uploads it again"),
        readable_path(folder, names) as path,
    ):
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=names,
            commit_message=f"Trained offline, {fingerprint}",
        )
    return str(commit.commit_url)


@contextmanager
def _named_failures(repo: str, state: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx2.HTTPError) as error:
        raise StageFailed(
            f"execution.train.push_to_hub: {repo} is not writable, {state}: {error} Check that "
            "HF_TOKEN in the environment has write access to it, or remove push_to_hub."
        ) from error
