"""Runs of a whole recipe over twenty pairs and a tiny model, for the end-to-end tests."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.execute import execute_plan
from pipeline.plan import Plan, Selection, make_plan
from pipeline.ray.session import find_capacity
from pipeline.recipe import load_recipe
from pipeline.runs import Run, open_record, open_run
from pipeline.stage_list import STAGE_NAMES
from stages.store.filesystems import Folder

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
"""Limit for one command line or one awaited moment, with room for a busy machine."""
NUM_PAIRS = 20
NUM_FILES = 6
"""Input files of the undisturbed recipe, and so shards of its validate stage."""
BROKEN_LINES = [b'{"prompt": "q", "chosen": ', b'{"prompt": 5, "chosen": "a", "rejected": "b"}']


def write_pairs(path: Path, num_pairs: int = NUM_PAIRS) -> None:
    """Write valid pairs, a copy of the first one, and two broken lines."""

    def answer(content: str) -> dict[str, str]:
        return {"role": "assistant", "content": content}

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n % 5} plus {n}?"}],
            "chosen": [answer(f"It is {n % 5 + n}." + " Sure." * (n % 3))],
            "rejected": [answer(f"Who cares about {n}?" + " No." * (n % 4))],
        }
        for n in range(num_pairs)
    ]
    lines = [json.dumps(row).encode() for row in [*rows, rows[0]]]
    lines[7:7] = BROKEN_LINES
    path.write_bytes(b"\n".join(lines) + b"\n")


def tiny_recipe(folder: Path, model: Path) -> dict[str, Any]:
    """Build a recipe that reads `pairs.jsonl` in a folder and keeps its store beside it."""
    return {
        "name": "tiny",
        "store": str(folder / "store"),
        "stages": {
            "validate": {
                "inputs": [str(folder / "pairs.jsonl")],
                "eval_fraction": 0.3,
                "max_reject_fraction": 0.5,
            },
            "dedupe": {"rows_per_shard": 7},
            "encode": {"max_length": 128, "max_prompt_length": 64},
            "score": {"model": str(model), "backend": "transformers", "dtype": "float32"},
            "train": {"learning_rate": 1e-3, "global_batch_size": 4, "num_epochs": 2},
            "evaluate": {"num_generations": 2, "max_new_tokens": 8},
        },
    }


def write_recipe(folder: Path, model: Path) -> Path:
    """Write `tiny.yaml` and its `pairs.jsonl` into a folder; return the recipe's path."""
    write_pairs(folder / "pairs.jsonl")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, model)))
    return path


@pytest.fixture
def recipe_path(tmp_path: Path, tiny_model: Path) -> Path:
    """A recipe that has not run, with its data, in the test's own folder."""
    return write_recipe(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe that has run to the end in process. Tests share it and must not change its store."""
    path = write_recipe(tmp_path_factory.mktemp("finished"), tiny_model)
    run_recipe(path)
    return path


def plan_recipe(path: Path, *overrides: str, store: Path | None = None, **selection: Any) -> Plan:
    """Plan a recipe; `selection` holds the fields of Selection."""
    recipe = load_recipe(str(path), overrides=overrides, store=str(store) if store else None)
    return make_plan(recipe, Selection(**selection), has_gpus=False)


def run_recipe(
    path: Path,
    *overrides: str,
    store: Path | None = None,
    is_local: bool = True,
    **selection: Any,
) -> Run:
    """Run a recipe in this process, or on Ray unless `is_local`, and open the finished run."""
    plan = plan_recipe(path, *overrides, store=store, **selection)
    capacity = find_capacity(None, is_local=is_local)
    record = execute_plan(plan, capacity=capacity, is_local=is_local)
    return open_record(plan.store, record)


def list_contents(run: Run, stages: Sequence[str]) -> dict[str, str]:
    """Map every file in the stages' manifests to its sha256.

    Leaves out timings and each scoring worker's self-check, which differ between equal runs.
    """
    contents = {}
    for stage in stages:
        output = run.outputs[stage]
        manifest = output.manifest
        files = [file for shard in manifest.shards for file in shard.files.values()]
        for file in [*files, *manifest.files]:
            if file.name != "timings.parquet" and not file.name.startswith("checks/"):
                contents[f"{stage}/{file.name}"] = Folder(output.folder.uri).sha256(file.name)
    return contents


def assert_values_agree(run: Run, other: Run) -> None:
    """Check that two runs scored the same pairs in one order, every token within 1e-4 nats."""
    values = [scored.scan("score").collect() for scored in (run, other)]
    assert values[0]["pair_id"].to_list() == values[1]["pair_id"].to_list()
    for side in ("chosen", "rejected"):
        tokens = [table[f"ref_{side}_token_logps"].explode().to_numpy() for table in values]
        assert np.abs(tokens[0] - tokens[1]).max() < 1e-4


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A recipe that ran to the end in this process, and the store with its outputs.

    It has ten shards and a checkpoint after every second of its 24 training steps, so that a
    disturbed run can be caught in the middle of any stage.
    """

    recipe: Path
    store: Path

    def run(self) -> Run:
        """Open the finished run."""
        return open_run(str(self.store), "tiny")

    def copy_stages(self, store: Path, *, before: str) -> None:
        """Fill a new store with the outputs of all stages before one."""
        copied = STAGE_NAMES[: STAGE_NAMES.index(before)]
        for name in (*copied, *(["reference"] if "score" in copied else [])):
            shutil.copytree(self.store / name, store / name)

    def command(self, store: Path, *arguments: str) -> list[str]:
        """Build the command line that runs the recipe on a store."""
        command = [sys.executable, "run.py", "run", str(self.recipe), "--store", str(store)]
        return [*command, *arguments]

    def stage_path(self, store: Path, stage: str, *overrides: str) -> Path:
        """Locate a stage's directory in a store, where it may not exist yet."""
        plan = plan_recipe(self.recipe, *overrides, store=store)
        return Path(plan.stage(stage).out.folder.path)

    def assert_same(self, store: Path, stages: Sequence[str] = STAGE_NAMES) -> None:
        """Check that a finished run in a store has the bytes of the undisturbed one."""
        found = open_run(str(store), "tiny")
        assert list_contents(found, stages) == list_contents(self.run(), stages)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Undisturbed:
    """The recipe that tests disturb on stores of their own. Its store must not change."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_pairs(folder / "pairs.jsonl")
    recipe = tiny_recipe(folder, tiny_model)
    recipe["stages"]["validate"]["inputs"] = split_lines(folder / "pairs.jsonl", NUM_FILES)
    recipe["stages"]["dedupe"]["rows_per_shard"] = 2
    recipe["stages"]["train"]["num_epochs"] = 6
    recipe["execution"] = {"train": {"checkpoint_every_steps": 2}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run = run_recipe(path)
    assert run.manifest("train").summary["num_steps"] == 24
    return Undisturbed(recipe=path, store=folder / "store")


def split_lines(path: Path, num_files: int) -> list[str]:
    """Deal a file's lines out to several files; return their paths."""
    lines = path.read_bytes().splitlines(keepends=True)
    parts = [path.with_name(f"part-{number}.jsonl") for number in range(num_files)]
    for number, part in enumerate(parts):
        part.write_bytes(b"".join(lines[number::num_files]))
    return [str(part) for part in parts]


def wait_until(
    process: "subprocess.Popen[Any]", is_time: Callable[[], bool], errors: Path | None = None
) -> None:
    """Wait for a moment of a running process, which must not end before it."""

    def output() -> str:
        if errors is not None:
            return errors.read_text(errors="replace")
        return str(process.communicate()[0]) if process.poll() is not None else ""

    deadline = time.monotonic() + TIMEOUT_S
    while not is_time():
        assert process.poll() is None, f"the run ended too early: {output()}"
        assert time.monotonic() < deadline, f"the awaited moment never came: {output()}"
        time.sleep(0.005)
