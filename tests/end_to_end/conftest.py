"""A whole recipe over twenty pairs and a tiny model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.execute import execute_plan
from pipeline.plan import Plan, Selection, make_plan
from pipeline.ray.session import find_capacity
from pipeline.recipe import load_recipe
from pipeline.runs import Run, open_record
from stages.store.filesystems import Folder

NUM_PAIRS = 20
BROKEN_LINES = [b'{"prompt": "q", "chosen": ', b'{"prompt": 5, "chosen": "a", "rejected": "b"}']


def write_pairs(path: Path, num_pairs: int = NUM_PAIRS) -> None:
    """Twenty good pairs, a copy of the first, and two broken lines."""

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


@pytest.fixture
def recipe_path(tmp_path: Path, tiny_model: Path) -> Path:
    """A recipe file with its data, in a folder of its own."""
    write_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_model)))
    return path


def plan_recipe(path: Path, *overrides: str, store: Path | None = None, **selection: Any) -> Plan:
    recipe = load_recipe(str(path), overrides=overrides, store=str(store) if store else None)
    return make_plan(recipe, Selection(**selection), has_gpus=False)


def run_recipe(
    path: Path,
    *overrides: str,
    store: Path | None = None,
    is_local: bool = True,
    **selection: Any,
) -> Run:
    plan = plan_recipe(path, *overrides, store=store, **selection)
    capacity = find_capacity(None, is_local=is_local)
    record = execute_plan(plan, capacity=capacity, is_local=is_local)
    return open_record(plan.store, record)


def list_contents(run: Run, stages: Sequence[str]) -> dict[str, str]:
    """Give the sha256 of every file that the stages answer for.

    Left out is what tells about the making: timings, and the check that each scoring worker does.
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
    """Two runs scored the same pairs in one order, and no token's values are 1e-4 nats apart."""
    values = [scored.scan("score").collect() for scored in (run, other)]
    assert values[0]["pair_id"].to_list() == values[1]["pair_id"].to_list()
    for side in ("chosen", "rejected"):
        tokens = [table[f"ref_{side}_token_logps"].explode().to_numpy() for table in values]
        assert np.abs(tokens[0] - tokens[1]).max() < 1e-4
