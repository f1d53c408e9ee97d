"""Reference-free losses: nothing is scored, and every command works without scores."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline.commands.verify import find_faults
from pipeline.stage_list import STAGE_NAMES
from run import app
from schemas.errors import ConfigError
from tests.end_to_end.conftest import plan_recipe, run_recipe

SIMPO = "stages.train.loss={kind: simpo, beta: 2.0}"
WITHOUT_SCORE = [name for name in STAGE_NAMES if name != "score"]


def ask(*words: str) -> str:
    """Call the command line in this process; return what it prints."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_recipe_without_a_reference_runs_through(recipe_path: Path) -> None:
    """Reference columns are null, and SimPO's rewards equal 2.0 × mean token log-prob."""
    run = run_recipe(recipe_path, SIMPO)
    assert list(run.outputs) == WITHOUT_SCORE
    assert run.manifest("train").inputs.keys() == {"encode"}
    assert run.manifest("evaluate").inputs.keys() == {"encode", "train"}
    verdict = find_faults(plan_recipe(recipe_path, SIMPO))
    assert (verdict.faults, verdict.missing) == ([], [])

    metrics = run.scan("train", "metrics").collect()
    assert metrics["displacement/chosen"].null_count() == metrics.height
    rows = run.scan("evaluate").collect()
    assert rows.height == run.manifest("evaluate").summary["num_pairs"] > 0
    assert rows["displaced"].null_count() == rows["ref_chosen_logp"].null_count() == rows.height
    assert run.manifest("evaluate").summary["share_displaced"] is None
    model = AutoModelForCausalLM.from_pretrained(
        f"{run.outputs['train'].folder.uri}/model", dtype=torch.float32
    )
    encoded = run.scan("encode").join(rows.lazy(), on="pair_id", how="semi").collect()
    for row in encoded.to_dicts():
        found = rows.filter(pl.col("pair_id") == row["pair_id"]).row(0, named=True)
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            wanted = 2.0 * logps[-len(row[f"{side}_ids"]) :].mean().item()
            assert found[f"reward_{side}"] == pytest.approx(wanted, abs=1e-4)
    after = run.scan("train", "eval_metrics").collect()["rewards/margins"][-1]
    assert rows["margin"].mean() == pytest.approx(after, abs=1e-4)


@pytest.mark.slow
def test_every_command_works_without_scores(recipe_path: Path) -> None:
    """plan, run, show, verify, report and the model card do without scores and say so."""
    words = (str(recipe_path), "--set", SIMPO)
    planned = json.loads(ask("plan", *words, "--json"))
    assert [stage["stage"] for stage in planned] == WITHOUT_SCORE
    ask("run", *words, "--local", "--name", "free")
    assert "no reference" in (recipe_path.parent / "store/runs/free.html").read_text()
    shown = json.loads(ask("show", *words, "--json"))
    assert {stage["state"] for stage in shown} == {"done"}
    assert "displaced" in ask("show", *words, "evaluate")
    assert json.loads(ask("verify", *words, "--json"))["ok"]
    page = recipe_path.parent / "page.html"
    ask("report", "free", "--store", str(recipe_path.parent / "store"), "--output", str(page))
    text = page.read_text()
    assert "compares with no reference, so nothing was scored" in text
    assert "became less likely" not in text
    ask("run", str(recipe_path), "--local", "--name", "compared", "--until", "train")
    ask("report", "free", "compared", "--store", str(recipe_path.parent / "store"))
    fingerprint = next(s["fingerprint"] for s in planned if s["stage"] == "train")
    card_path = next((recipe_path.parent / "store/train").glob(f"{fingerprint}/model/README.md"))
    card = card_path.read_text()
    assert "`simpo` loss" in card
    assert "No reference is involved" in card


@pytest.mark.parametrize("word", ["only", "first", "last", "again"])
def test_a_stage_that_nothing_reads_is_not_run_by_name(recipe_path: Path, word: str) -> None:
    selection: dict[str, Any] = {word: "score"}
    with pytest.raises(ConfigError, match="score: nothing in this recipe reads it"):
        plan_recipe(recipe_path, SIMPO, **selection)
    with pytest.raises(ConfigError, match="score: nothing in this recipe reads it"):
        plan_recipe(recipe_path, SIMPO).stage("score")


def test_a_sum_with_one_loss_that_needs_the_reference_has_it_scored(recipe_path: Path) -> None:
    both = "stages.train.loss=[{kind: sft, weight: 0.1}, {kind: sigmoid}]"
    plan = plan_recipe(recipe_path, both)
    assert [stage.name for stage in plan.stages] == list(STAGE_NAMES)
    assert set(plan.stage("evaluate").inputs) == {"encode", "score", "train"}


def test_the_models_named_for_scoring_are_left_alone(recipe_path: Path) -> None:
    """A model that no stage uses need not exist."""
    model = plan_recipe(recipe_path).stage("score").resolved.config.model
    elsewhere = (
        f"stages.train.model={model}",
        f"stages.encode.tokenizer={model}",
        "stages.score.model=/nowhere",
    )
    plan_recipe(recipe_path, SIMPO, *elsewhere)
    with pytest.raises(ConfigError, match="/nowhere"):
        plan_recipe(recipe_path, *elsewhere)
