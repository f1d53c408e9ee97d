"""Sweeps of a tiny recipe: shared stages, halving, failures, and going on after an end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.runs import list_runs
from run import app
from stages.store.filesystems import Folder
from tests.end_to_end.conftest import (
    ROOT,
    TIMEOUT_S,
    list_contents,
    plan_recipe,
    run_recipe,
    wait_until,
)

RATE = "stages.train.learning_rate"
RATES = f"{RATE}=1e-3,2e-3,3e-3,4e-3"


def sweep(recipe: Path, *options: str, exit_code: int = 0) -> dict[str, Any]:
    """Run a sweep in this process and return what it prints as JSON."""
    result = CliRunner().invoke(app, ["sweep", str(recipe), "--local", "--json", *options])
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def states(found: dict[str, Any]) -> dict[str, str]:
    """Map each learning rate to the state of its run."""
    return {run["settings"]["learning_rate"]: run["state"] for run in found["runs"]}


def list_outputs(store: Path, stage: str) -> list[str]:
    return [path.name for path in (store / stage).iterdir()]


@pytest.mark.slow
def test_halving_ends_in_the_bytes_of_a_plain_run(recipe_path: Path, tmp_path: Path) -> None:
    """Eight steps: of four runs two stop after step 2, one after step 4, and one is complete.

    The same command then runs nothing; without --halving, the stopped runs go on to the bytes of
    runs that never stopped.
    """
    store = tmp_path / "store"
    found = sweep(recipe_path, "--set", RATES, "--halving")
    assert [run["state"] for run in found["runs"]] == ["done", "stopped", "stopped", "stopped"]
    assert [run["why"] for run in found["runs"]] == [
        "",
        "after step 4 of 8",
        "after step 2 of 8",
        "after step 2 of 8",
    ]
    by_loss = {
        run["settings"]["learning_rate"]: run["rungs"][0]["metrics"]["loss"]
        for run in found["runs"]
    }
    early = {run["settings"]["learning_rate"] for run in found["runs"][2:]}
    assert early == set(sorted(by_loss, key=by_loss.__getitem__)[2:])
    assert len(list_outputs(store, "score")) == 1
    assert len(list_runs(Folder(str(store)))) == 4
    slow = plan_recipe(recipe_path, f"{RATE}={sorted(early)[0]}").stage("train")
    assert (slow.state, slow.why[:19]) == ("resume", "begun; step 2 of 8:")

    assert sweep(recipe_path, "--set", RATES, "--halving") == found
    whole = sweep(recipe_path, "--set", RATES)
    assert set(states(whole).values()) == {"done"}
    for run in whole["runs"]:
        override = f"{RATE}={run['settings']['learning_rate']}"
        plain = run_recipe(recipe_path, override, store=tmp_path / "plain")
        swept = run_recipe(recipe_path, override)
        assert plain.name == run["name"]
        assert list_contents(swept, ["train", "evaluate"]) == list_contents(
            plain, ["train", "evaluate"]
        )


def test_a_failing_run_stops_no_other(recipe_path: Path) -> None:
    options = ("--set", f"{RATE}=1e+30,1e-3", "--set", "stages.evaluate.num_generations=0")
    found = sweep(recipe_path, *options, exit_code=1)
    assert states(found) == {"1e+30": "failed", "1e-3": "done"}
    assert found["best_run"] == found["runs"][0]["name"]
    assert Path(found["best_model"], "model.safetensors").exists()
    assert Path(found["page"]).exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on(recipe_path: Path, tmp_path: Path) -> None:
    """Killed in the second of two trainings, which is redone from its checkpoint."""
    options = ("--set", f"{RATE}=1e-3,2e-3", "--set", "execution.train.checkpoint_every_steps=2")
    long = ("--set", "stages.train.num_epochs=20")
    first, second = (
        plan_recipe(recipe_path, f"{RATE}={rate}", "stages.train.num_epochs=20").stage("train").out
        for rate in ("1e-3", "2e-3")
    )
    command = [sys.executable, "run.py", "sweep", str(recipe_path), "--local", *options, *long]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    checkpoints = Path(second.folder.path, "checkpoints")
    wait_until(process, lambda: any(checkpoints.glob("step-*/commit.json")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    manifest = first.manifest()
    assert manifest is not None
    assert second.manifest() is None
    found = sweep(recipe_path, *options, *long)
    assert set(states(found).values()) == {"done"}
    assert first.manifest() == manifest
    resumed = second.manifest()
    assert resumed is not None
    assert resumed.summary["resumes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([f"{RATE}=1e-6,fast"], f"{RATE}: Input should be a valid number"),
        (["stages.train.betta=1,2"], "stages.train.betta: no such key."),
        ([f"{RATE}=1e-6,0.000001"], "learning_rate=1e-6 and learning_rate=0.000001 train the same"),
        (["stages.evaluate.num_generations=1,2"], "train the same model"),
        (["store=a,b", f"{RATE}=1,2"], "share one store"),
    ],
)
def test_a_mistake_gets_one_message_before_anything_runs(
    recipe_path: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    listed = [part for option in options for part in ("--set", option)]
    command = [sys.executable, "run.py", "sweep", str(recipe_path), "--local", *listed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stderr.count(message) == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_two_trainings_at_once_on_ray_are_interrupted_and_go_on(
    recipe_path: Path, tmp_path: Path
) -> None:
    """Ctrl-C comes while two trainings have taken steps; the same command completes them."""
    recipe = yaml.safe_load(recipe_path.read_text())
    recipe["stages"]["train"]["num_epochs"] = 240
    recipe["execution"] = {"train": {"num_cpus_per_worker": 0.5, "checkpoint_every_steps": 20}}
    recipe_path.write_text(yaml.safe_dump(recipe))
    run_recipe(recipe_path, last="score")
    overrides = [f"{RATE}={rate}" for rate in ("1e-3", "2e-3")]
    outs = [plan_recipe(recipe_path, override).stage("train").out for override in overrides]
    command = [
        *(sys.executable, "run.py", "sweep", str(recipe_path), "--max-concurrent", "2", "--json"),
        *("--set", f"{RATE}=1e-3,2e-3"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    checkpoints = [Path(out.folder.path, "checkpoints") for out in outs]
    wait_until(process, lambda: all(any(c.glob("step-*/commit.json")) for c in checkpoints))
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    assert not any(out.is_complete() for out in outs)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert set(states(json.loads(done.stdout)).values()) == {"done"}
    for out in outs:
        manifest = out.manifest()
        assert manifest is not None
        assert manifest.summary["resumes"]
    assert len(list_outputs(tmp_path / "store", "score")) == 1
