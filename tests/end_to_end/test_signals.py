"""How a run ends: by itself, by Ctrl-C, by a scheduler, or killed; and what it leaves behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipeline import open_run
from pipeline.runs import Run
from stages.store.shards import StageDir
from tests.end_to_end.conftest import (
    list_contents,
    plan_recipe,
    run_recipe,
    tiny_recipe,
    write_pairs,
)

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180
SETTINGS = (
    "stages.dedupe.rows_per_shard=1",
    "stages.train.num_epochs=400",  # Nobody waits for its end.
    "execution.train.checkpoint_every_steps=2",
)


class Census:
    """What runs leave: processes, ports, shared memory, temporary files.

    Runs are known by an environment variable, which every process inherits from the one that starts
    it, and by a folder for temporary files of their own.
    """

    def __init__(self, mark: str, temporary: Path) -> None:
        self.environment = {"CENSUS": mark, "TMPDIR": str(temporary)}
        self._temporary = temporary

    def processes(self) -> dict[int, str]:
        mark = f"CENSUS={self.environment['CENSUS']}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:  # It has ended meanwhile.
                continue
        return found

    def ports(self) -> set[str]:
        """Give the sockets on which one of the processes listens, as the kernel lists them."""
        inodes = set()
        for pid in self.processes():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        listening = "0A"
        return {
            fields[1]
            for fields in map(str.split, lines)
            if fields[3] == listening and fields[9] in inodes
        }

    def left(self) -> list[object]:
        temporary = [str(path) for path in self._temporary.iterdir()]
        return [*self.processes().items(), *self.ports(), *temporary]


@pytest.fixture
def census(tmp_path: Path) -> Iterator[Census]:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as folder:
        counted = Census(tmp_path.name, Path(folder))
        yield counted
        for pid in counted.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_time():
        if process.poll() is not None:
            raise AssertionError(f"it ended too early: {process.communicate()[0]}")
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.01)


def wait_until_ended(census: Census) -> None:
    deadline = time.monotonic() + 60
    while left := census.processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def assert_nothing_is_left(census: Census, shared_memory_before: set[str]) -> None:
    deadline = time.monotonic() + 20
    while left := census.left():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    # Segments of other programs on this machine come and go; these are torch's and vLLM's.
    new = set(os.listdir("/dev/shm")) - shared_memory_before
    assert not [name for name in new if name.startswith(("psm_", "torch_", "ray"))]


@dataclass(frozen=True)
class Prepared:
    """A recipe, and a store in which everything before a stage is done."""

    recipe: Path
    store: Path

    def out(self, stage: str) -> StageDir:
        return plan_recipe(self.recipe, *SETTINGS, store=self.store).stage(stage).out

    def start(self, census: Census, way: str, *arguments: str) -> subprocess.Popen[str]:
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        command = [sys.executable, "run.py", "run", str(self.recipe), "--store", str(self.store)]
        return subprocess.Popen(
            [*command, *settings, *arguments, *(["--local"] if way == "--local" else [])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **census.environment},
        )

    def finish(self, stage: str) -> Run:
        return run_recipe(self.recipe, *SETTINGS, store=self.store, only=stage)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Prepared:
    """All that signals interrupt, undisturbed, up to score."""
    folder = tmp_path_factory.mktemp("scored")
    write_pairs(folder / "pairs.jsonl")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_model)))
    run_recipe(recipe, *SETTINGS, last="score")
    return Prepared(recipe, folder / "store")


def prepare(scored: Prepared, tmp_path: Path, stage: str) -> Prepared:
    """Copy the store, without what comes from the stage on."""
    store = tmp_path / "store"
    shutil.copytree(scored.store, store)
    if stage == "score":
        shutil.rmtree(store / "score")
        shutil.rmtree(store / "reference")
    return Prepared(scored.recipe, store)


def has_begun(out: StageDir, stage: str) -> Callable[[], bool]:
    if stage == "score":
        return lambda: len(list(Path(out.folder.path, "_commits").glob("part-*.json"))) >= 2
    return lambda: any(Path(out.folder.path, "checkpoints").glob("step-*/commit.json"))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("way", "stage", "number", "code"),
    [
        ("--local", "score", signal.SIGINT, 130),
        ("--local", "train", signal.SIGTERM, 143),
        ("ray", "score", signal.SIGTERM, 143),
        ("ray", "train", signal.SIGINT, 130),
    ],
)
def test_a_signal_stops_a_run_in_good_order(
    scored: Prepared,
    tmp_path: Path,
    census: Census,
    way: str,
    stage: str,
    number: int,
    code: int,
) -> None:
    """What is committed stays, the exit code tells, nothing else is left; the next run goes on."""
    prepared = prepare(scored, tmp_path, stage)
    out = prepared.out(stage)
    before = set(os.listdir("/dev/shm"))
    process = prepared.start(census, way, "--only", stage)
    wait_until(process, has_begun(out, stage))
    os.kill(process.pid, number)
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, printed
    assert "Interrupted. What is committed stays; run again to go on." in printed
    assert "Traceback" not in printed
    assert_nothing_is_left(census, before)
    plan = plan_recipe(prepared.recipe, *SETTINGS, store=prepared.store)
    assert plan.stage(stage).state == "resume"
    if stage == "score":
        committed = out.committed()
        manifest = prepared.finish("score").manifest("score")
        records = {record.index: record for record in manifest.shards}
        assert {index: records[index] for index in committed} == committed


@pytest.mark.ray
@pytest.mark.parametrize("way", ["--local", pytest.param("ray", marks=pytest.mark.long)])
def test_a_second_signal_stops_at_once_and_the_next_run_cleans_up(
    scored: Prepared, tmp_path: Path, census: Census, way: str
) -> None:
    """Ray's processes notice that their driver is gone; its folder goes with the next run."""
    prepared = prepare(scored, tmp_path, "score")
    before = set(os.listdir("/dev/shm"))
    process = prepared.start(census, way, "--only", "score")
    wait_until(process, has_begun(prepared.out("score"), "score"))
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    # While the interpreter ends, the signal itself ends the process: to a shell that is 130, too.
    assert process.returncode in (130, -signal.SIGINT)
    wait_until_ended(census)
    process = prepared.start(census, way, "--only", "score")
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, printed
    assert_nothing_is_left(census, before)
    ours, theirs = (open_run(str(each.store), "tiny") for each in (prepared, scored))
    assert list_contents(ours, ["score"]) == list_contents(theirs, ["score"])


@pytest.mark.ray
@pytest.mark.parametrize("way", ["--local", "ray"])
def test_runs_that_end_by_themselves_leave_nothing(
    scored: Prepared, tmp_path: Path, census: Census, way: str
) -> None:
    """Well, with the user's mistake, and with a stage that fails; the census sees one that runs."""
    prepared = prepare(scored, tmp_path, "score")
    before = set(os.listdir("/dev/shm"))
    endings = [
        (["--only", "score"], 0),
        (["--only", "evaluate"], 2),
        (["--until", "validate", "--set", "stages.validate.max_reject_fraction=0.01"], 1),
    ]
    for arguments, code in endings:
        process = prepared.start(census, way, *arguments)
        wait_until(process, lambda: bool(census.processes()))
        printed, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == code, printed
        assert_nothing_is_left(census, before)
