"""Rows are data: they name no file, and nothing is written outside the store."""

import json
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from tests.end_to_end.conftest import plan_recipe, recipe_path, run_recipe

__all__ = ["recipe_path"]  # a fixture

CLIMBING = ("../../../owned", "/tmp/owned", "a/b/../../../owned", "..\\owned", "owned\x00.json")


def test_no_file_is_named_after_what_a_row_holds(recipe_path: Path) -> None:
    """Sources, ids and texts contain climbing paths, and the rule that rejects them is off."""
    folder = recipe_path.parent
    rows = [
        {
            "prompt": f"{CLIMBING[n % 4]} {n}",
            "chosen": f"yes {n}",
            "rejected": f"no {n}",
            "source": CLIMBING[n % 4],
            "source_id": CLIMBING[n % 4],
        }
        for n in range(8)
    ]
    path = folder / "climbing.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path for path in folder.rglob("*") if path.is_file()}
    run = run_recipe(
        recipe_path,
        f"stages.validate.inputs=[{path}]",
        "stages.validate.rules={SOURCE_UNSAFE_NAME: warn}",
        last="encode",
    )
    assert run.manifest("encode").counts.num_out == 8
    assert set(run.scan("encode").collect()["source"]) == set(CLIMBING[:4])
    written = {path for path in folder.rglob("*") if path.is_file()} - before
    assert written
    assert all(path.is_relative_to(folder / "store") for path in written)
    assert not [path for path in written if "owned" in path.name]
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".hidden", "a/b"])
def test_a_runs_name_is_no_path(recipe_path: Path, name: str) -> None:
    from pipeline.execute import execute_plan
    from pipeline.ray.session import find_capacity

    capacity = find_capacity(None, is_local=True)
    with pytest.raises(ConfigError, match="a word without slashes"):
        execute_plan(plan_recipe(recipe_path), capacity=capacity, is_local=True, run_name=name)
    assert not (recipe_path.parent / "store").exists()
