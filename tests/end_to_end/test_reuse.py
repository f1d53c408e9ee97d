"""Messages of plan, run and show about reused reference log-probs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.commands.show import show_run
from pipeline.runs import Run
from pipeline.stage_list import load_stages
from tests.end_to_end.conftest import NUM_PAIRS, plan_recipe, run_recipe, write_pairs

NUM_SEQUENCES = 2 * NUM_PAIRS
OTHERS = "stages.dedupe.rows_per_shard=5"
"""Deals the same pairs out to other shards: encode and score run again and reuse all values."""


def pretend_older(store: Path) -> None:
    """Rewrite the store's reuse index as if an old torch had computed all values."""
    for path in store.glob("reference/*/*.json"):
        entry = json.loads(path.read_text())
        entry["versions"] = [{**versions, "torch": "0.0.1"} for versions in entry["versions"]]
        path.write_text(json.dumps(entry))


def show(run: Run) -> str:
    """Render a run's summary as text."""
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show_run(run, load_stages()))
    return console.export_text()


def summary(run: Run) -> dict[str, Any]:
    return run.manifest("score").summary


def test_values_of_other_versions_are_warned_of_before_and_after(recipe_path: Path) -> None:
    """plan warns before such values are reused and afterwards, until `--again score`."""
    run_recipe(recipe_path, last="score")
    plan = plan_recipe(recipe_path, OTHERS)
    assert plan.warnings == []
    assert plan.stage("score").why.endswith("; equal sequences are reused from 1 earlier")
    pretend_older(recipe_path.parent / "store")

    [warning] = plan_recipe(recipe_path, OTHERS).warnings
    assert "score would reuse values" in warning
    assert "torch 0.0.1 (now 2." in warning
    assert "`--again score`" in warning

    assert summary(run_recipe(recipe_path, OTHERS, last="score"))["num_sequences_scored"] == 0
    [warning] = plan_recipe(recipe_path, OTHERS).warnings
    assert "score holds values from earlier outputs that torch 0.0.1" in warning

    plan = plan_recipe(recipe_path, OTHERS, again="score")
    assert (plan.warnings, plan.stage("score").why) == ([], "asked for by --again")
    anew = run_recipe(recipe_path, OTHERS, again="score", last="score")
    assert summary(anew)["num_sequences_scored"] == NUM_SEQUENCES
    assert plan_recipe(recipe_path, OTHERS).warnings == []


def test_a_later_value_replaces_one_of_an_older_version(recipe_path: Path) -> None:
    """After --again, a third run reuses the new values."""
    run_recipe(recipe_path, last="score")
    pretend_older(recipe_path.parent / "store")
    path = next((recipe_path.parent / "store").glob("reference/*/*.json"))
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "started_at": "2020-01-01T00:00:00+00:00"}))
    again = run_recipe(recipe_path, again="score", last="score")
    third = run_recipe(recipe_path, OTHERS, last="score")
    assert summary(third)["reused_from"] == {
        Path(again.outputs["score"].folder.uri).name: NUM_SEQUENCES
    }
    assert summary(third)["reused_versions"] != []
    assert plan_recipe(recipe_path, OTHERS).warnings == []


def test_a_run_says_what_it_reused(recipe_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With two more pairs, four sequences are scored and the others reused."""
    first = run_recipe(recipe_path, last="score")
    assert "reference reused" not in show(first)
    assert "reference scoring" in show(first)
    write_pairs(recipe_path.parent / "more.jsonl", NUM_PAIRS + 2)
    more = f"stages.validate.inputs=[{recipe_path.parent / 'more.jsonl'}]"
    with caplog.at_level(logging.INFO):
        second = run_recipe(recipe_path, more, last="score")
    said = f"{NUM_SEQUENCES} of {NUM_SEQUENCES + 4} sequences"
    assert f"{said} reused; " in caplog.text
    assert f"reference reused {said}" in " ".join(show(second).split())
    third = run_recipe(recipe_path, more, OTHERS, last="score")
    assert "reference scoring" not in show(third)
