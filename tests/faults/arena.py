"""The undisturbed run of the fault rounds, and the byte-for-byte comparison with it."""

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
"""Environment variable that marks all processes of a round; child processes inherit it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arena:
    """A recipe with its data, its model and the store of its undisturbed run."""

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
        """Locate a stage's directory in a store by its fingerprint in the undisturbed run."""
        [found] = (self.undisturbed / stage).iterdir()
        return store / stage / found.name


def make_arena(folder: Path, backend: str = "transformers", *, num_pairs: int = NUM_PAIRS) -> Arena:
    """Make data and model, and run the recipe undisturbed in one process."""
    arena = Arena(folder=folder, backend=backend)
    folder.mkdir(parents=True, exist_ok=True)
    for path in arena.inputs:
        write_pairs(path, num_pairs // 2 if path.name == "a.jsonl" else num_pairs)
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
    """A command line running in a session of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the exit code; a negative one is the signal that ended the run."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(
                f"the run did not end within {timeout_s} s: {self.errors()}"
            ) from None

    def is_running(self) -> bool:
        return self.process.poll() is None

    def errors(self) -> str:
        return self.log.read_text(errors="replace")

    def last_words(self) -> str:
        """Return the final message: the text from `error:` on, or else the last line."""
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
    """Start `run.py run RECIPE --until LAST`."""
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
    """Call `run.py verify --json`, and check that its exit code agrees with its verdict."""
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
    """Copy the outputs of the given stages into a store."""
    for stage in stages:
        shutil.copytree(arena.undisturbed / stage, store / stage)
    if "score" in stages:
        shutil.copytree(arena.undisturbed / "reference", store / "reference")


def stages_before(stage: str) -> tuple[str, ...]:
    return STAGE_NAMES[: STAGE_NAMES.index(stage)]


def find_differences(arena: Arena, store: Path, last: str) -> list[str]:
    """Compare every stage up to `last` with the undisturbed run, and list the differences.

    Files are compared byte for byte, records without their provenance (hosts, processes, times).
    An extra or a missing file is a difference, wherever it lies.
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
    """Read the files below a stage's directory, records without provenance."""
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
    """Count a stage's commit records, including those of its passes, or its training steps."""
    metrics = stage_dir / "metrics.jsonl"
    try:
        if metrics.exists():
            return metrics.read_bytes().count(b"\n")
        return sum(1 for _ in stage_dir.rglob("part-*.json"))
    except FileNotFoundError:  # The stage is finishing and cleans up.
        return 0


def wait_until(run: StartedRun, is_time: Callable[[], bool]) -> bool:
    """Wait for a moment; return False if the run ends before it."""
    while run.is_running():
        if is_time():
            return True
        assert time.monotonic() - run.started < TIMEOUT_S, run.errors()
        time.sleep(0.002)
    return False


def marked_processes(mark: str) -> list[psutil.Process]:
    """Find the living processes that a round started, directly or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
