"""Faults during scoring: they cost only uncommitted shards and leave nothing behind."""

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

from schemas.errors import StageFailed
from schemas.manifest import ShardRecord
from tests.end_to_end.conftest import (
    ROOT,
    TIMEOUT_S,
    Undisturbed,
    assert_values_agree,
    list_contents,
    plan_recipe,
    run_recipe,
    wait_until,
    write_pairs,
)

TO_SCORE = ("validate", "dedupe", "encode", "score")
MARK = "OFFLINE_DPO_TEST"


class Started:
    """A command line and all processes it starts, which inherit a marking environment variable."""

    def __init__(self, command: list[str], errors: Path, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._segments_before = orphaned_segments()
        self._errors = errors
        # Ray puts its session elsewhere: this name is too long for its sockets' paths. The logs of
        # a killed driver's session stay behind, which is known.
        self._temporary = Path(tempfile.mkdtemp(prefix="temporary-"))
        environment["TMPDIR"] = str(self._temporary)
        # torch's compiler keeps a cache in TMPDIR for later processes.
        self._cache = self._temporary / f"torchinductor_{getpass.getuser()}"
        self._cache.symlink_to(Path(tempfile.gettempdir(), self._cache.name))
        self._cache.resolve().mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            command,
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
        """Wait for a moment, which must come before the command line ends."""
        wait_until(self.process, is_time, self._errors)

    def family(self) -> list[int]:
        """List the process ids of everything it started that is alive, daemons included."""
        wanted = f"{MARK}={self._mark}".encode()
        return [int(path.parent.name) for path in _environments() if wanted in _read(path)]

    def require_nothing_left(self) -> None:
        """Wait until none of its processes is alive; check that no memory or file is left."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.family():
            assert time.monotonic() < deadline, f"still alive: {self.family()}"
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
    """List the shared memory segments that no living process has mapped or open."""
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


def committed(undisturbed: Undisturbed, store: Path) -> dict[int, ShardRecord]:
    """Read the commit records of score in a store."""
    return plan_recipe(undisturbed.recipe, store=store).stage("score").out.committed()


@pytest.mark.long
@pytest.mark.ray
def test_a_killed_driver_leaves_neither_processes_nor_shared_memory(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    undisturbed.copy_stages(store, before="score")
    arguments = ("--only", "score", "--set", "execution.score.num_workers=1")
    started = Started(undisturbed.command(store, *arguments), tmp_path / "stderr")
    started.wait_until(lambda: len(committed(undisturbed, store)) >= 1)
    assert len(started.family()) > 3
    started.process.send_signal(signal.SIGKILL)
    started.process.wait()
    started.require_nothing_left()
    done = set(committed(undisturbed, store))
    assert not (undisturbed.stage_path(store, "score") / "manifest.json").exists()
    resumed = run_recipe(undisturbed.recipe, store=store, last="score")
    assert done <= {record.index for record in resumed.manifest("score").shards}
    undisturbed.assert_same(store, TO_SCORE)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_workers_out_of_memory_fail_the_run_and_the_next_one_goes_on(
    recipe_path: Path, tmp_path: Path
) -> None:
    """Ray's memory monitor may use 1 % of the memory and kills the workers.

    It does so when they start, or while they score the only shard, which four processes try.
    """
    one = "stages.dedupe.rows_per_shard=100"
    run_recipe(recipe_path, one, last="encode")
    started = Started(
        run_command(recipe_path, one, "execution.score.num_workers=1"),
        tmp_path / "stderr",
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
    undisturbed = run_recipe(recipe_path, one, store=tmp_path / "undisturbed", last="score")
    assert list_contents(resumed, TO_SCORE) == list_contents(undisturbed, TO_SCORE)


def run_command(path: Path, *overrides: str) -> list[str]:
    """Build the command line that runs score of a recipe alone."""
    settings = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "run.py", "run", str(path), "--only", "score", *settings]


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
    """Two processes share the model; killing one fails the second of two shards."""
    started, workers = start_engine_of_two(recipe_path, is_local=True)
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
def test_an_engine_of_two_processes_ends_with_its_actor_and_with_its_driver(
    recipe_path: Path, tmp_path: Path, killed: str
) -> None:
    started, workers = start_engine_of_two(recipe_path, is_local=False)
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


def start_engine_of_two(path: Path, *, is_local: bool) -> tuple[Started, list[psutil.Process]]:
    """Score two shards with a tensor-parallel engine of two processes, up to the first commit.

    Returns:
        The command line, still running, and the engine's processes.
    """
    write_pairs(path.parent / "pairs.jsonl", num_pairs=300)
    run_recipe(path, VLLM[0], last="encode")
    overrides = (
        *VLLM,
        "execution.score.tensor_parallel_size=2",
        "execution.score.num_workers=1",
    )
    command = [*run_command(path, *overrides), *(["--local"] if is_local else [])]
    started = Started(command, path.with_suffix(".stderr"))
    out = plan_recipe(path, *VLLM).stage("score").out
    started.wait_until(lambda: len(out.committed()) >= 1)
    workers = list_engine_processes(started)
    assert len(workers) == 2
    return started, workers


def require_scored_once(path: Path, scratch: Path) -> dict[int, ShardRecord]:
    """Resume with an engine of one process: committed shards stay, all values are right.

    Returns:
        The shards that were committed before.
    """
    done = plan_recipe(path, *VLLM).stage("score").out.committed()
    resumed = run_recipe(path, *VLLM, last="score")
    records = {record.index: record for record in resumed.manifest("score").shards}
    assert {index: records[index] for index in done} == done
    other = run_recipe(path, VLLM[0], store=scratch / "other", last="score")
    assert_values_agree(resumed, other)
    return done


def list_engine_processes(started: Started) -> list[psutil.Process]:
    """List the worker processes of a tensor-parallel vLLM engine.

    They overwrite their title and with it the environment that /proc shows, so the mark is gone.
    """
    family = psutil.Process(started.process.pid).children(recursive=True)
    return [process for process in family if "VLLM" in " ".join(process.cmdline())]


def test_a_shard_that_always_fails_is_the_only_one_redone(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """encode's third file is truncated for two runs, which keep the other shards, then restored."""
    recipe, store = undisturbed.recipe, tmp_path / "store"
    undisturbed.copy_stages(store, before="score")
    shards = undisturbed.run().manifest("encode").shards
    damaged = undisturbed.stage_path(store, "encode") / shards[2].files["data"].name
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    records = None
    for _ in range(2):
        with pytest.raises(StageFailed, match=f"1 of [0-9]+ shards failed(.|\n)*{damaged.name}"):
            run_recipe(recipe, store=store, first="score", last="score")
        done = committed(undisturbed, store)
        assert 2 not in done
        assert len(done) == len(shards) - 1
        assert records in (None, done), "the second run must keep the first one's shards"
        records = done
    damaged.write_bytes(content)
    resumed = run_recipe(recipe, store=store, last="score")
    found = {record.index: record for record in resumed.manifest("score").shards}
    assert {index: found[index] for index in records or {}} == records
    undisturbed.assert_same(store, TO_SCORE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, which only root can mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_disk(ballast: Path) -> None:
    """Write one file until the disk is full."""
    with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"0" * 4096)


@pytest.mark.slow
def test_a_full_disk_fails_the_run_and_the_next_one_goes_on(
    small_disk: Path, undisturbed: Undisturbed
) -> None:
    recipe, store = undisturbed.recipe, small_disk / "store"
    undisturbed.copy_stages(store, before="score")
    ballast = small_disk / "ballast"
    fill_disk(ballast)
    # Room for a few small files, not for all.
    with ballast.open("rb+") as stream:
        stream.truncate(ballast.stat().st_size - 10 * 4096)
    with pytest.raises((StageFailed, OSError), match="No space left"):
        run_recipe(recipe, store=store, last="score")
    done = set(committed(undisturbed, store))
    ballast.unlink()
    run_recipe(recipe, store=store, last="score")
    assert done <= set(committed(undisturbed, store))
    undisturbed.assert_same(store, TO_SCORE)
