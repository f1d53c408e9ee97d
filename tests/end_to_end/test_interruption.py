"""Runs killed by SIGKILL inside a stage: the next run redoes only what was in flight."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from run import app
from tests.end_to_end.conftest import (
    ROOT,
    TIMEOUT_S,
    Undisturbed,
    list_contents,
    plan_recipe,
    run_recipe,
    wait_until,
)

TO_SCORE = ("validate", "dedupe", "encode", "score")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a command line in a session of its own, so that killing it hits nothing else."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # For `wait_until`; a run logs less than a pipe holds.
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@contextlib.contextmanager
def stopped_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> Iterator[None]:
    """Stop a run at a moment, keep it stopped during the block, then kill it."""
    wait_until(process, is_time)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    """Kill a run at a moment."""
    with stopped_when(process, is_time):
        pass


def has_commits(out: Path, count: int) -> Callable[[], bool]:
    """Return a check whether a stage has committed at least `count` shards."""
    return lambda: len(list((out / "_commits").glob("part-*"))) >= count


def assert_shown_while_running(
    recipe: Path, store: Path, process: subprocess.Popen[bytes], stage: str, *, words: str
) -> None:
    """Check that `show`, called in another process than the run's, reports progress and owner."""
    for arguments in ([], [stage]):
        command = ["show", str(recipe), "--store", str(store), *arguments]
        result = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
        assert result.exit_code == 0, result.output
        [line] = [line for line in result.output.splitlines() if line.startswith(stage)]
        assert words in line
        assert f"{socket.gethostname()}:{process.pid} works on it" in line


def test_killed_while_scoring(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """All stages up to score run in the killed process; committed shards are not redone."""
    recipe, store = undisturbed.recipe, tmp_path / "store"
    out = undisturbed.stage_path(store, "score")
    process = start(undisturbed.command(store, "--until", "score", "--local"))
    num_shards = len(undisturbed.run().manifest("score").shards)
    words = f"of {num_shards} shards are done"
    with stopped_when(process, has_commits(out, 2)):
        assert_shown_while_running(recipe, store, process, "score", words=words)

    planned = plan_recipe(recipe, store=store).stage("score")
    done_before = planned.out.committed()
    assert (planned.state, planned.why) == ("resume", f"begun; {len(done_before)} {words}")
    assert 2 <= len(done_before) < num_shards
    resumed = run_recipe(recipe, store=store, last="score")
    done_after = {record.index: record for record in resumed.manifest("score").shards}
    assert {index: done_after[index] for index in done_before} == done_before
    undisturbed.assert_same(store, TO_SCORE)


@pytest.mark.slow
def test_killed_while_some_sequences_are_reused(recipe_path: Path, tmp_path: Path) -> None:
    """Half of the pairs are scored before; the run over all of them is killed and resumed."""
    lines = (tmp_path / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_bytes(b"".join(lines[:12]))
    small = "stages.dedupe.rows_per_shard=2"
    half = f"stages.validate.inputs=[{tmp_path / 'half.jsonl'}]"
    undisturbed_store = tmp_path / "undisturbed"
    for store in (None, undisturbed_store):
        run_recipe(recipe_path, small, half, store=store, last="score")
    undisturbed = run_recipe(recipe_path, small, store=undisturbed_store, last="score")
    assert undisturbed.manifest("score").summary["num_sequences_reused"] > 0
    out = Path(plan_recipe(recipe_path, small).stage("score").out.folder.uri)
    command = Undisturbed(recipe=recipe_path, store=undisturbed_store).command(tmp_path / "store")
    process = start([*command, "--set", small, "--until", "score", "--local"])
    kill_when(process, has_commits(out, 2))
    assert plan_recipe(recipe_path, small).stage("score").state == "resume"
    resumed = run_recipe(recipe_path, small, last="score")
    assert list_contents(resumed, ["score"]) == list_contents(undisturbed, ["score"])
    for name in ("num_sequences_scored", "num_sequences_reused", "reused_from"):
        found = resumed.manifest("score").summary[name]
        assert found == undisturbed.manifest("score").summary[name]


@pytest.mark.slow
def test_killed_while_training(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The run resumes from its checkpoint; model, metrics and evaluation have the same bytes."""
    recipe, store = undisturbed.recipe, tmp_path / "store"
    undisturbed.copy_stages(store, before="train")
    out = undisturbed.stage_path(store, "train")
    process = start(undisturbed.command(store, "--local"))

    def is_past_a_checkpoint() -> bool:
        metrics = out / "metrics.jsonl"
        return metrics.exists() and metrics.read_bytes().count(b'"type":"step"') >= 3

    words = f"of {undisturbed.run().manifest('train').summary['num_steps']}: loss "
    with stopped_when(process, is_past_a_checkpoint):
        assert_shown_while_running(recipe, store, process, "train", words=words)
    assert not (out / "manifest.json").exists()
    assert plan_recipe(recipe, store=store).stage("train").state == "resume"
    resumed = run_recipe(recipe, store=store)
    undisturbed.assert_same(store, ("train", "evaluate"))
    assert "train/model/model.safetensors" in list_contents(resumed, ["train"])


def wait_until_ended(session: int) -> None:
    """Wait until no process of a session is alive: a killed driver's cluster ends with it."""
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
@pytest.mark.slow
def test_killed_while_ray_scores(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The driver is killed; its cluster ends by itself, and a run without Ray resumes."""
    store = tmp_path / "store"
    undisturbed.copy_stages(store, before="score")
    out = undisturbed.stage_path(store, "score")
    process = start(undisturbed.command(store, "--until", "score"))
    kill_when(process, has_commits(out, 1))
    run_recipe(undisturbed.recipe, store=store, last="score")
    undisturbed.assert_same(store, TO_SCORE)


@pytest.mark.long
@pytest.mark.ray
def test_killed_while_ray_trains(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The driver is killed; a run without Ray resumes while the training worker is still dying."""
    store = tmp_path / "store"
    undisturbed.copy_stages(store, before="train")
    out = undisturbed.stage_path(store, "train")
    process = start(undisturbed.command(store, "--until", "train"))
    kill_when(process, lambda: any(out.glob("checkpoints/*/commit.json")))
    assert not (out / "manifest.json").exists()
    run_recipe(undisturbed.recipe, store=store, last="train")
    wait_until_ended(process.pid)
    undisturbed.assert_same(store, ["train"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_scoring_actor_that_is_killed_is_replaced(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The run goes on and succeeds; its commit records name both processes."""
    recipe, store = undisturbed.recipe, tmp_path / "store"
    undisturbed.copy_stages(store, before="score")
    out = plan_recipe(recipe, store=store).stage("score").out
    alone = ("--set", "execution.score.num_workers=1")
    process = start(undisturbed.command(store, *alone, "--until", "score"))
    wait_until(process, lambda: bool(out.committed()))
    first = next(iter(out.committed().values())).writer
    os.kill(int(first.rpartition(":")[2]), signal.SIGKILL)
    assert process.wait(TIMEOUT_S) == 0
    writers = {record.writer for record in out.committed().values()}
    assert first in writers
    assert len(writers) == 2
    undisturbed.assert_same(store, ["score"])
