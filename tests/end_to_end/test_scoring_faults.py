"""What goes wrong during scoring costs only what was not committed, and leaves nothing behind."""

import contextlib
import getpass
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.runs import Run
from schemas.errors import StageFailed
from schemas.manifest import ShardRecord
from tests.end_to_end.conftest import (
    assert_values_agree,
    list_contents,
    plan_recipe,
    run_recipe,
    tiny_recipe,
    write_pairs,
)

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180
SMALL = "stages.dedupe.rows_per_shard=2"
MARK = "OFFLINE_DPO_TEST"


class Started:
    """A command line, and whatever it starts, found by an environment variable they inherit."""

    def __init__(self, path: Path, *arguments: str, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._segments_before = orphaned_segments()
        self._errors = path.with_suffix(".stderr")
        # Too long a name for Ray, which is known to keep its logs when a driver is killed.
        self._temporary = Path(tempfile.mkdtemp(prefix="temporary-"))
        environment["TMPDIR"] = str(self._temporary)
        # What torch's compiler keeps there on purpose, for every later process.
        self._cache = self._temporary / f"torchinductor_{getpass.getuser()}"
        self._cache.symlink_to(Path(tempfile.gettempdir(), self._cache.name))
        self._cache.resolve().mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "run.py", "run", str(path), "--set", SMALL, *arguments],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=self._errors.open("wb"),
            env={**os.environ, "PYTHONPATH": str(ROOT), MARK: self._mark, **environment},
        )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait_until(self, is_time: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_time():
            assert self.process.poll() is None, f"it ended too early:\n{self.errors}"
            assert time.monotonic() < deadline, f"it never came so far:\n{self.errors}"
            time.sleep(0.01)

    def family(self) -> list[int]:
        """Every living process that it started, daemons included."""
        wanted = f"{MARK}={self._mark}".encode()
        return [int(path.parent.name) for path in _environments() if wanted in _read(path)]

    def require_nothing_left(self) -> None:
        """Wait until no process of it lives; then it has neither shared memory nor files."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.family():
            assert time.monotonic() < deadline, f"still there: {self.family()}"
            time.sleep(0.2)
        assert orphaned_segments() <= self._segments_before
        self._cache.unlink()
        self._temporary.rmdir()


def _environments() -> Iterator[Path]:
    yield from Path("/proc").glob("[0-9]*/environ")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def orphaned_segments() -> set[str]:
    """Shared memory that no living process has mapped or open."""
    segments = {path.name for path in Path("/dev/shm").iterdir() if path.is_file()}
    used: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        used.update(
            line.rpartition(b"/")[2].decode()
            for line in _read(maps).splitlines()
            if b"/dev/shm/" in line
        )
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("/dev/shm/"):
            used.add(Path(target).name)
    return segments - used


def require_equal(run: Run, recipe_path: Path, store: Path, layout: str = SMALL) -> None:
    undisturbed = run_recipe(recipe_path, layout, store=store, last="score")
    stages = ("validate", "dedupe", "encode", "score")
    assert list_contents(run, stages) == list_contents(undisturbed, stages)


def commits(recipe_path: Path) -> set[int]:
    return set(plan_recipe(recipe_path, SMALL).stage("score").out.committed())


@pytest.mark.long
@pytest.mark.ray
def test_a_killed_driver_leaves_neither_processes_nor_shared_memory(
    recipe_path: Path, tmp_path: Path
) -> None:
    run_recipe(recipe_path, SMALL, last="encode")
    started = Started(recipe_path, "--only", "score", "--set", "execution.score.num_workers=1")
    started.wait_until(lambda: len(commits(recipe_path)) >= 1)
    assert len(started.family()) > 3
    started.process.send_signal(signal.SIGKILL)
    started.process.wait()
    started.require_nothing_left()
    done = commits(recipe_path)
    assert not (
        Path(plan_recipe(recipe_path, SMALL).stage("score").out.folder.uri) / "manifest.json"
    ).exists()
    resumed = run_recipe(recipe_path, SMALL, last="score")
    assert done <= {record.index for record in resumed.manifest("score").shards}
    require_equal(resumed, recipe_path, tmp_path / "undisturbed")


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_workers_out_of_memory_fail_the_run_and_the_next_one_goes_on(
    recipe_path: Path, tmp_path: Path
) -> None:
    """Ray's memory monitor kills workers, as told that 1 % of the memory is all there is: when they
    start, or with the one shard, which costs four of them."""
    one = "stages.dedupe.rows_per_shard=100"
    run_recipe(recipe_path, one, last="encode")
    started = Started(
        recipe_path,
        *("--only", "score", "--set", "execution.score.num_workers=1", "--set", one),
        RAY_memory_usage_threshold="0.01",
        RAY_memory_monitor_refresh_ms="100",
    )
    assert started.process.wait(TIMEOUT_S) == 1
    lost = ("its process was lost four times", "Its processes are lost at once")
    assert any(said in started.errors for said in lost)
    assert "memory" in started.errors
    assert "Traceback" not in started.errors
    started.require_nothing_left()
    assert not plan_recipe(recipe_path, one).stage("score").out.committed()
    resumed = run_recipe(recipe_path, one, last="score")
    require_equal(resumed, recipe_path, tmp_path / "undisturbed", one)


VLLM = (
    "stages.dedupe.rows_per_shard=160",
    "stages.score.backend=vllm",
    "execution.score.kv_cache_gib=0.0625",
)


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.slow
def test_a_lost_process_of_the_engine_fails_the_run_and_the_next_one_goes_on(
    recipe_path: Path, tmp_path: Path
) -> None:
    """Two processes share the model until one is killed, which costs the second of two shards."""
    started, workers = start_engine_of_two(recipe_path, "--local")
    workers[1].send_signal(signal.SIGKILL)
    assert started.process.wait(TIMEOUT_S) == 1
    assert "1 of 2 shards failed" in started.errors
    assert "One of the 2 processes of vLLM's engine was lost" in started.errors
    assert "Traceback" not in started.errors
    assert not any(worker.is_running() for worker in workers)
    started.require_nothing_left()
    assert len(require_scored_once(recipe_path, tmp_path)) == 1


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("killed", ["actor", "driver"])
def test_an_engine_of_two_processes_ends_with_whom_it_works_for(
    recipe_path: Path, tmp_path: Path, killed: str
) -> None:
    started, workers = start_engine_of_two(recipe_path, "--set", "execution.score.num_workers=1")
    actor = workers[0].parent()
    if killed == "driver":
        started.process.kill()
        started.process.wait()
    else:
        assert actor is not None
        actor.kill()
        assert started.process.wait(TIMEOUT_S) == 0, started.errors
        assert "was lost" in started.errors
    _, alive = psutil.wait_procs(workers, TIMEOUT_S)
    assert not alive
    started.require_nothing_left()
    assert len(require_scored_once(recipe_path, tmp_path)) == (1 if killed == "driver" else 2)


def start_engine_of_two(path: Path, *arguments: str) -> tuple[Started, list[psutil.Process]]:
    """Score two shards by an engine of two processes; give them when the first shard is done."""
    write_pairs(path.parent / "pairs.jsonl", num_pairs=300)
    run_recipe(path, VLLM[0], last="encode")
    settings = (*VLLM, "execution.score.tensor_parallel_size=2")
    started = Started(
        path,
        *("--only", "score", *arguments),
        *(word for setting in settings for word in ("--set", setting)),
    )
    out = plan_recipe(path, *VLLM).stage("score").out
    started.wait_until(lambda: len(out.committed()) >= 1)
    workers = list_engine_processes(started)
    assert len(workers) == 2
    return started, workers


def require_scored_once(path: Path, scratch: Path) -> dict[int, ShardRecord]:
    """Go on with one process; what was done stays, and all is what the other backend gives.

    Returns:
        The shards that were done.
    """
    done = plan_recipe(path, *VLLM).stage("score").out.committed()
    resumed = run_recipe(path, *VLLM, last="score")
    records = {record.index: record for record in resumed.manifest("score").shards}
    assert {index: records[index] for index in done} == done
    other = run_recipe(path, VLLM[0], store=scratch / "other", last="score")
    assert_values_agree(resumed, other)
    return done


def list_engine_processes(started: Started) -> list[psutil.Process]:
    """Give vLLM's processes for a model that is spread over several: they change their title, and
    with it the environment that others see."""
    family = psutil.Process(started.process.pid).children(recursive=True)
    return [process for process in family if "VLLM" in " ".join(process.cmdline())]


def test_a_shard_that_always_fails_is_the_only_one_redone(
    recipe_path: Path, tmp_path: Path
) -> None:
    """encode's third file is cut short; twice the others are kept, then it comes back."""
    encode = run_recipe(recipe_path, SMALL, last="encode").outputs["encode"]
    damaged = Path(encode.folder.uri) / encode.manifest.shards[2].files["data"].name
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    records = None
    for _ in range(2):
        with pytest.raises(StageFailed, match=f"1 of [0-9]+ shards failed(.|\n)*{damaged.name}"):
            run_recipe(recipe_path, SMALL, first="score", last="score")
        out = plan_recipe(recipe_path, SMALL).stage("score").out
        assert 2 not in out.committed()
        assert len(out.committed()) == len(encode.manifest.shards) - 1
        assert records in (None, out.committed()), "what was done is not done again"
        records = out.committed()
    damaged.write_bytes(content)
    resumed = run_recipe(recipe_path, SMALL, last="score")
    found = {record.index: record for record in resumed.manifest("score").shards}
    assert {index: found[index] for index in records or {}} == records
    require_equal(resumed, recipe_path, tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("a file system of its own takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_disk(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"0" * 4096)


def test_a_full_disk_fails_the_run_and_the_next_one_goes_on(
    small_disk: Path, tmp_path: Path, tiny_model: Path
) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "tiny.yaml"
    recipe = {**tiny_recipe(tmp_path, tiny_model), "store": str(small_disk / "store")}
    path.write_text(yaml.safe_dump(recipe))
    run_recipe(path, SMALL, last="encode")
    ballast = small_disk / "ballast"
    fill_disk(ballast)
    # Room for a few small files, not for all.
    with ballast.open("rb+") as stream:
        stream.truncate(ballast.stat().st_size - 10 * 4096)
    with pytest.raises((StageFailed, OSError), match="No space left"):
        run_recipe(path, SMALL, last="score")
    done = commits(path)
    ballast.unlink()
    resumed = run_recipe(path, SMALL, last="score")
    assert done <= commits(path)
    require_equal(resumed, path, tmp_path / "undisturbed")
