"""The end of a run: by itself, by Ctrl-C or by a scheduler's signal; nothing is left behind."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.store.shards import StageDir
from tests.end_to_end.conftest import (
    ROOT,
    TIMEOUT_S,
    Undisturbed,
    plan_recipe,
    run_recipe,
    wait_until,
)

ENDLESS = "stages.train.num_epochs=400"
"""Makes training so long that a signal always arrives before its end."""


class Census:
    """Lists what runs leave behind: processes, listening ports and temporary files.

    An environment variable, which child processes inherit, marks a run's processes; its temporary
    files go to a folder of its own.
    """

    def __init__(self, mark: str, temporary: Path) -> None:
        self.environment = {"CENSUS": mark, "TMPDIR": str(temporary)}
        self._temporary = temporary

    def processes(self) -> dict[int, str]:
        """Map the process ids of the marked processes to their command lines."""
        mark = f"CENSUS={self.environment['CENSUS']}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:  # It ended in the meantime.
                continue
        return found

    def ports(self) -> set[str]:
        """List the addresses on which the processes listen, as /proc/net/tcp writes them."""
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
        """List all that is there at the moment."""
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


def wait_until_ended(census: Census) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while left := census.processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def assert_nothing_is_left(census: Census, shared_memory_before: set[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while left := census.left():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    # Other programs' segments come and go; these prefixes are torch's, vLLM's and Ray's.
    new = set(os.listdir("/dev/shm")) - shared_memory_before
    assert not [name for name in new if name.startswith(("psm_", "torch_", "ray"))]


@dataclass(frozen=True)
class Prepared:
    """A store in which all stages before one are done."""

    undisturbed: Undisturbed
    store: Path

    @property
    def recipe(self) -> Path:
        return self.undisturbed.recipe

    def out(self, stage: str) -> StageDir:
        return plan_recipe(self.recipe, ENDLESS, store=self.store).stage(stage).out

    def start(self, census: Census, way: str, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line, `--local` or on a Ray cluster of its own."""
        command = self.undisturbed.command(self.store, "--set", ENDLESS, *arguments)
        return subprocess.Popen(
            [*command, *(["--local"] if way == "--local" else [])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **census.environment},
        )


def prepare(undisturbed: Undisturbed, tmp_path: Path, stage: str) -> Prepared:
    """Make a store in which all stages before one are done."""
    undisturbed.copy_stages(tmp_path / "store", before=stage)
    return Prepared(undisturbed, tmp_path / "store")


def has_begun(out: StageDir, stage: str) -> Callable[[], bool]:
    """Return a check whether score has two commits, or train a checkpoint."""
    if stage == "score":
        return lambda: len(list(Path(out.folder.path, "_commits").glob("part-*.json"))) >= 2
    return lambda: any(Path(out.folder.path, "checkpoints").glob("step-*/commit.json"))


UNDER_RAY = (pytest.mark.ray, pytest.mark.slow)


@pytest.mark.parametrize(
    ("way", "stage", "number", "code"),
    [
        pytest.param("--local", "score", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("--local", "train", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("ray", "score", signal.SIGTERM, 143, marks=UNDER_RAY),
        pytest.param("ray", "train", signal.SIGINT, 130, marks=UNDER_RAY),
    ],
)
def test_a_signal_stops_a_run_in_good_order(
    undisturbed: Undisturbed,
    tmp_path: Path,
    census: Census,
    way: str,
    stage: str,
    number: int,
    code: int,
) -> None:
    """Commits stay, the exit code names the signal, nothing else is left, the next run resumes."""
    prepared = prepare(undisturbed, tmp_path, stage)
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
    plan = plan_recipe(prepared.recipe, ENDLESS, store=prepared.store)
    assert plan.stage(stage).state == "resume"
    if stage == "score":
        committed = out.committed()
        run = run_recipe(prepared.recipe, store=prepared.store, only="score")
        records = {record.index: record for record in run.manifest("score").shards}
        assert {index: records[index] for index in committed} == committed


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["--local", pytest.param("ray", marks=(pytest.mark.ray, pytest.mark.long))]
)
def test_a_second_signal_stops_at_once_and_the_next_run_cleans_up(
    undisturbed: Undisturbed, tmp_path: Path, census: Census, way: str
) -> None:
    """Ray's processes end after their driver; the next run deletes the folder they leave."""
    prepared = prepare(undisturbed, tmp_path, "score")
    before = set(os.listdir("/dev/shm"))
    process = prepared.start(census, way, "--only", "score")
    wait_until(process, has_begun(prepared.out("score"), "score"))
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    # If the interpreter is already shutting down, the signal itself ends the process, which a
    # shell reports as 130, too.
    assert process.returncode in (130, -signal.SIGINT)
    wait_until_ended(census)
    process = prepared.start(census, way, "--only", "score")
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, printed
    assert_nothing_is_left(census, before)
    undisturbed.assert_same(prepared.store, ["score"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--local", pytest.param("ray", marks=pytest.mark.ray)])
def test_runs_that_end_by_themselves_leave_nothing(
    undisturbed: Undisturbed, tmp_path: Path, census: Census, way: str
) -> None:
    """A run that succeeds, one with the user's mistake, and one with a failing stage.

    While it runs, the census sees it.
    """
    prepared = prepare(undisturbed, tmp_path, "score")
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
