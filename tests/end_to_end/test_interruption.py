"""SIGKILL inside a stage: the next run redoes what was in flight, and ends with the same bytes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import list_contents, plan_recipe, run_recipe

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


def start_run(
    path: Path, *settings: str, until: str = "evaluate", under_ray: bool = False
) -> subprocess.Popen[bytes]:
    """Start the command line in a session of its own, so that only what it started is killed."""
    command = [sys.executable, "run.py", "run", str(path)]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["--until", until]
    return subprocess.Popen(
        command if under_ray else [*command, "--local"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@contextlib.contextmanager
def stopped_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> Iterator[None]:
    """Let a run come so far and no farther; it lives until the block ends, and is killed then."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_time():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    with stopped_when(process, is_time):
        pass


def assert_shown_while_at_work(
    path: Path, process: subprocess.Popen[bytes], stage: str, *settings: str, said: str
) -> None:
    """Another process that reads the store says how far a run is, and who works."""
    command = [sys.executable, "run.py", "show", str(path)]
    command += [word for setting in settings for word in ("--set", setting)]
    wide = {**os.environ, "COLUMNS": "400"}
    for arguments in ([], [stage]):
        shown = subprocess.run(
            [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=wide
        ).stdout
        [line] = [line for line in shown.splitlines() if line.startswith(stage)]
        assert said in line
        assert f"{socket.gethostname()}:{process.pid} works on it" in line


def test_killed_while_scoring(recipe_path: Path, tmp_path: Path) -> None:
    small = "stages.dedupe.rows_per_shard=2"
    undisturbed = run_recipe(recipe_path, small, store=tmp_path / "undisturbed", last="score")
    commits = Path(plan_recipe(recipe_path, small).stage("score").out.folder.uri) / "_commits"
    process = start_run(recipe_path, small, until="score")
    num_shards = len(undisturbed.manifest("score").shards)
    said = f"of {num_shards} shards are done"
    with stopped_when(process, lambda: commits.exists() and len(list(commits.glob("part-*"))) >= 2):
        assert_shown_while_at_work(recipe_path, process, "score", small, said=said)

    planned = plan_recipe(recipe_path, small).stage("score")
    done_before = planned.out.committed()
    assert (planned.state, planned.why) == ("resume", f"begun; {len(done_before)} {said}")
    assert 2 <= len(done_before) < len(undisturbed.manifest("score").shards)
    resumed = run_recipe(recipe_path, small, last="score")
    done_after = {record.index: record for record in resumed.manifest("score").shards}
    assert {index: done_after[index] for index in done_before} == done_before
    stages = ("validate", "dedupe", "encode", "score")
    assert list_contents(resumed, stages) == list_contents(undisturbed, stages)


def test_killed_while_some_sequences_are_reused(recipe_path: Path, tmp_path: Path) -> None:
    """Half of the pairs are scored before; the run over all of them is killed and goes on."""
    lines = (tmp_path / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_bytes(b"".join(lines[:12]))
    small = "stages.dedupe.rows_per_shard=2"
    half = f"stages.validate.inputs=[{tmp_path / 'half.jsonl'}]"
    undisturbed_store = tmp_path / "undisturbed"
    for store in (None, undisturbed_store):
        run_recipe(recipe_path, small, half, store=store, last="score")
    undisturbed = run_recipe(recipe_path, small, store=undisturbed_store, last="score")
    assert undisturbed.manifest("score").summary["num_sequences_reused"] > 0
    commits = Path(plan_recipe(recipe_path, small).stage("score").out.folder.uri) / "_commits"
    process = start_run(recipe_path, small, until="score")
    kill_when(process, lambda: commits.exists() and len(list(commits.glob("part-*"))) >= 2)
    assert plan_recipe(recipe_path, small).stage("score").state == "resume"
    resumed = run_recipe(recipe_path, small, last="score")
    assert list_contents(resumed, ["score"]) == list_contents(undisturbed, ["score"])
    for name in ("num_sequences_scored", "num_sequences_reused", "reused_from"):
        found = resumed.manifest("score").summary[name]
        assert found == undisturbed.manifest("score").summary[name]


def test_killed_while_training(recipe_path: Path, tmp_path: Path) -> None:
    settings = ("stages.train.num_epochs=6", "execution.train.checkpoint_every_steps=2")
    undisturbed = run_recipe(recipe_path, *settings, store=tmp_path / "undisturbed")
    run_recipe(recipe_path, *settings, last="score")
    out = Path(plan_recipe(recipe_path, *settings).stage("train").out.folder.uri)
    process = start_run(recipe_path, *settings)

    def has_checkpoint_and_more() -> bool:
        metrics = out / "metrics.jsonl"
        return metrics.exists() and metrics.read_bytes().count(b'"type":"step"') >= 3

    num_steps = undisturbed.manifest("train").summary["num_steps"]
    said = f"of {num_steps}: loss "
    with stopped_when(process, has_checkpoint_and_more):
        assert_shown_while_at_work(recipe_path, process, "train", *settings, said=said)
    assert not (out / "manifest.json").exists()
    assert plan_recipe(recipe_path, *settings).stage("train").state == "resume"
    resumed = run_recipe(recipe_path, *settings)
    stages = ("train", "evaluate")
    assert list_contents(resumed, stages) == list_contents(undisturbed, stages)
    assert "train/model/model.safetensors" in list_contents(resumed, stages)


def wait_until_ended(session: int) -> None:
    """Wait for the cluster of a killed driver: its processes are in the driver's session."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(is_in_session(process.pid, session) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "processes outlive their driver"
        time.sleep(0.2)


def is_in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


@pytest.mark.ray
def test_killed_while_ray_scores(recipe_path: Path, tmp_path: Path) -> None:
    """The driver is killed; its cluster ends by itself, and a run without Ray goes on."""
    small = "stages.dedupe.rows_per_shard=2"
    run_recipe(recipe_path, small, last="encode")
    commits = Path(plan_recipe(recipe_path, small).stage("score").out.folder.uri) / "_commits"
    process = start_run(recipe_path, small, until="score", under_ray=True)
    kill_when(process, lambda: commits.exists() and len(list(commits.glob("part-*"))) >= 1)
    resumed = run_recipe(recipe_path, small, last="score")
    undisturbed = run_recipe(recipe_path, small, store=tmp_path / "undisturbed", last="score")
    assert list_contents(resumed, ["score"]) == list_contents(undisturbed, ["score"])


@pytest.mark.long
@pytest.mark.ray
def test_killed_while_ray_trains(recipe_path: Path, tmp_path: Path) -> None:
    """The driver is killed; a run without Ray goes on while its worker is still dying."""
    settings = ("stages.train.num_epochs=6", "execution.train.checkpoint_every_steps=2")
    run_recipe(recipe_path, *settings, last="score")
    out = Path(plan_recipe(recipe_path, *settings).stage("train").out.folder.uri)
    process = start_run(recipe_path, *settings, until="train", under_ray=True)
    kill_when(process, lambda: any(out.glob("checkpoints/*/commit.json")))
    assert not (out / "manifest.json").exists()
    resumed = run_recipe(recipe_path, *settings, last="train")
    wait_until_ended(process.pid)
    undisturbed = run_recipe(recipe_path, *settings, store=tmp_path / "undisturbed", last="train")
    assert list_contents(resumed, ["train"]) == list_contents(undisturbed, ["train"])


@pytest.mark.ray
def test_a_scoring_actor_that_is_killed_is_replaced(recipe_path: Path, tmp_path: Path) -> None:
    """The run goes on and ends well; the commit records name both processes."""
    small = "stages.dedupe.rows_per_shard=1"
    undisturbed = run_recipe(recipe_path, small, store=tmp_path / "undisturbed", last="score")
    run_recipe(recipe_path, small, last="encode")
    out = plan_recipe(recipe_path, small).stage("score").out
    alone = "execution.score.num_workers=1"
    process = start_run(recipe_path, small, alone, until="score", under_ray=True)
    deadline = time.monotonic() + TIMEOUT_S
    while not (records := out.committed()):
        assert process.poll() is None, "the run ended before its actor could be killed"
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)
    first = next(iter(records.values())).writer
    os.kill(int(first.rpartition(":")[2]), signal.SIGKILL)
    assert process.wait(TIMEOUT_S) == 0
    writers = {record.writer for record in out.committed().values()}
    assert first in writers
    assert len(writers) == 2
    resumed = run_recipe(recipe_path, small, last="score")
    assert list_contents(resumed, ["score"]) == list_contents(undisturbed, ["score"])
