"""Tests on a simulated store of many shards: each command answers within seconds."""

import time
from pathlib import Path

import pytest

from benchmarks.scale import ACTIONS, measure, plan_again, resume, simulate_store, write_recipe
from stages.store.filesystems import Folder

NUM_PAIRS = 20_000_000
NUM_SHARDS = 800


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("scale"), tiny_model)
    simulate_store(path, NUM_PAIRS)
    return path


def test_the_simulated_store_is_half_scored(recipe: Path) -> None:
    states = {stage.name: stage.state for stage in plan_again(recipe).stages}
    assert states == {
        "validate": "done",
        "dedupe": "done",
        "encode": "done",
        "score": "resume",
        "train": "run",
        "evaluate": "run",
    }
    assert resume(recipe) == NUM_SHARDS / 2


@pytest.mark.parametrize("action", ACTIONS)
def test_nobody_waits_for_20_million_pairs(recipe: Path, action: str) -> None:
    """CPU seconds without imports, and peak memory; 10^8 pairs take five times as much."""
    seconds, memory_gb = measure(recipe, action)
    assert seconds < 5
    assert memory_gb < 0.5


def test_commit_records_are_read_several_at_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store, 400 round trips of 20 ms would take 8 s one by one."""
    read = Folder.read_bytes

    def read_slowly(folder: Folder, name: str) -> bytes:
        time.sleep(0.02)
        return read(folder, name)

    out = plan_again(recipe).stage("score").out
    monkeypatch.setattr(Folder, "read_bytes", read_slowly)
    started = time.monotonic()
    assert len(out.committed()) == NUM_SHARDS / 2
    assert time.monotonic() - started < 4
