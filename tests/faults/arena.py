"""What is a disturbed run compared with? With the store of an undisturbed one, byte for byte."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipeline.stage_list import STAGE_NAMES
from tests.end_to_end.conftest import write_pairs
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
NUM_PAIRS = 96
TIMEOUT_S = 240
MARK = "OFFLINE_DPO_FAULTS"
"""Set in the environment of all that a round starts, and so of what those start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arena:
    """A recipe with its data and its model, and the store of its undisturbed run."""

    folder: Path
    backend: str

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def inputs(self) -> list[Path]:
        return [self.folder / "a.jsonl", self.folder / "b.jsonl"]

    @property
    def undisturbed(self) -> Path:
        return self.folder / "undisturbed"

    def stage_dir(self, store: Path, stage: str) -> Path:
        """Give a stage's directory in a store; fingerprints are those of the undisturbed run."""
        [found] = (self.undisturbed / stage).iterdir()
        return store / stage / found.name


def make_arena(folder: Path, backend: str = "transformers") -> Arena:
    """Make the data and the model, and run the recipe undisturbed, in one process."""
    arena = Arena(folder=folder, backend=backend)
    folder.mkdir(parents=True, exist_ok=True)
    for path in arena.inputs:
        write_pairs(path, NUM_PAIRS // 2 if path.name == "a.jsonl" else NUM_PAIRS)
    make_tiny_model(folder / "model")
    one = {"num_workers": 1, "num_cpus_per_worker": 1}
    recipe = {
        "name": "tiny",
        "store": "set by --store",
        "stages": {
            "validate": {
                "inputs": [str(path) for path in arena.inputs],
                "eval_fraction": 0.3,
                "max_reject_fraction": 0.5,
                "split_bytes": 2048,
            },
            "dedupe": {"rows_per_shard": 4},
            "encode": {"max_length": 128, "max_prompt_length": 64},
            "score": {"model": str(folder / "model"), "backend": backend, "dtype": "float32"},
            "train": {"learning_rate": 1e-3, "global_batch_size": 4, "num_epochs": 4},
            "evaluate": {"num_generations": 2, "max_new_tokens": 8},
        },
        "execution": {
            "validate": {"num_workers": 2},
            "dedupe": {"num_workers": 2},
            "encode": one,
            "score": {**one, "kv_cache_gib": 0.25},
            "train": {"num_cpus_per_worker": 1, "checkpoint_every_steps": 3},
            "evaluate": {**one, "kv_cache_gib": 0.25},
        },
    }
    arena.recipe.write_text(yaml.safe_dump(recipe))
    run = start_run(arena, arena.undisturbed, "evaluate")
    assert run.wait() == 0, run.errors()
    return arena


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartedRun:
    """A command line at work, in a session of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the exit code; negative: the signal that ended it."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"it did not end in {timeout_s} s: {self.errors()}") from None

    def is_running(self) -> bool:
        return self.process.poll() is None

    def errors(self) -> str:
        return self.log.read_text(errors="replace")

    def last_words(self) -> str:
        """Give the message that it ended with: from `error:` on, or else the last line."""
        text = self.errors().strip()
        message = text[text.rindex("error: ") :] if "error: " in text else text.splitlines()[-1:]
        said = message if isinstance(message, str) else "".join(message)
        return " ".join(said.split())


def start_run(
    arena: Arena,
    store: Path,
    last: str,
    *,
    is_local: bool = True,
    environment: dict[str, str] | None = None,
    mark: str = "undisturbed",
) -> StartedRun:
    """Start `run.py run … --until LAST`."""
    command = [sys.executable, "run.py", "run", str(arena.recipe), "--store", str(store)]
    command += ["--until", last, *(["--local"] if is_local else [])]
    log = arena.folder / f"log-{uuid.uuid4().hex}.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                MARK: mark,
                **(environment or {}),
            },
        )
    return StartedRun(process=process, log=log, started=time.monotonic())


def call_verify(arena: Arena, store: Path, *, repair: bool = False) -> dict[str, Any]:
    """Call `run.py verify --json`, and check that its exit code agrees with what it says."""
    command = [sys.executable, "run.py", "verify", str(arena.recipe), "--store", str(store)]
    done = subprocess.run(
        [*command, "--json", *(["--repair"] if repair else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout, done.stderr
    verdict: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if verdict["ok"] else 1)
    return verdict


def copy_stages(arena: Arena, store: Path, stages: tuple[str, ...]) -> None:
    """Begin a store with the outputs of the first stages."""
    for stage in stages:
        shutil.copytree(arena.undisturbed / stage, store / stage)
    if "score" in stages:
        shutil.copytree(arena.undisturbed / "reference", store / "reference")


def stages_before(stage: str) -> tuple[str, ...]:
    return STAGE_NAMES[: STAGE_NAMES.index(stage)]


def find_differences(arena: Arena, store: Path, last: str) -> list[str]:
    """Compare every stage up to one with the undisturbed run's, and say what differs.

    Compared are all files byte for byte, and of records all but what tells about the making:
    hosts, processes, times. A file more or less is a difference, wherever it lies.
    """
    differences = []
    for stage in (*stages_before(last), last):
        there, here = (
            _read_all(arena.stage_dir(root, stage)) for root in (arena.undisturbed, store)
        )
        for name in sorted(set(there) | set(here)):
            if there.get(name) != here.get(name):
                state = "differs" if name in there and name in here else "more"
                differences.append(f"{stage}/{name} {state if name in here else 'is missing'}")
    return differences


_PROVENANCE = ("host", "seconds", "started_at", "versions", "summary", "checksum", "writer")


def _read_all(folder: Path) -> dict[str, bytes]:
    """Read the files below a stage's directory, records without what tells about the making."""
    contents = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not path.is_file() or name == "timings.parquet" or name.startswith("checks/"):
            continue
        content = path.read_bytes()
        if name.endswith(".json") and "/" not in name.removeprefix("_commits/"):
            content = json.dumps(_without_provenance(json.loads(content))).encode()
        contents[name] = content
    return contents


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _PROVENANCE}
        if isinstance(files := kept.get("files"), list):  # A manifest's, beside its shards.
            made = ("timings.parquet", "checks/")
            kept["files"] = [file for file in files if not file["name"].startswith(made)]
        return {key: _without_provenance(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_without_provenance(item) for item in value]
    return value


def count_done(stage_dir: Path) -> int:
    """Say how far a stage is: commit records, those of its passes included, or training steps."""
    metrics = stage_dir / "metrics.jsonl"
    try:
        if metrics.exists():
            return metrics.read_bytes().count(b"\n")
        return sum(1 for _ in stage_dir.rglob("part-*.json"))
    except FileNotFoundError:  # The stage finishes, and cleans up.
        return 0


def wait_until(run: StartedRun, is_time: Callable[[], bool]) -> bool:
    """Wait for a moment; False when the run has ended before it."""
    while run.is_running():
        if is_time():
            return True
        assert time.monotonic() - run.started < TIMEOUT_S, run.errors()
        time.sleep(0.002)
    return False


def marked_processes(mark: str) -> list[psutil.Process]:
    """Find the processes that a round has started, directly or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
