"""Runs every example over examples/feedback.csv with a tiny model, and checks what it shows."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from examples.own_loss import FocalLoss
from pipeline import open_run
from pipeline.runs import Run
from stages.train.losses import PairLogps, SideLogps

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks run in their own folder, as in Jupyter, and draw without a screen."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("MPLBACKEND", "Agg")


def run_notebook(name: str, **parameters: Any) -> dict[str, Any]:
    """Run a notebook's code cells in order, in one namespace.

    Args:
        name: of the notebook.
        parameters: replace what the cell tagged `parameters` sets.
    Returns:
        The namespace.
    """
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= namespace.keys()
            namespace.update(parameters)
    return namespace


@pytest.mark.usefixtures("in_examples")
def test_the_notebook_that_inspects_a_run_shows_what_its_files_hold(
    recipe: Path, finished: Run
) -> None:
    """The table has 29 rows: a tie, a row with an empty answer, and one copy."""
    shown = run_notebook("inspect_run.ipynb", STORE=str(recipe.parent / "store"), RUN=finished.name)
    reasons = {(stage, code): count for stage, code, count in shown["reasons"].iter_rows()}
    assert reasons == {
        ("validate", "TIE"): 1,
        ("validate", "FIELD_NULL"): 1,
        ("dedupe", "DUP_EXACT"): 1,
    }
    scores = finished.scan("score").collect()
    preferred = (scores["ref_chosen_logp"] > scores["ref_rejected_logp"]).mean()
    assert shown["by_source"]["len"].to_list() == [26]
    assert shown["by_source"]["prefers_chosen"].to_list() == [pytest.approx(preferred)]
    evaluated = finished.scan("evaluate").collect()
    wrong = evaluated.filter(pl.col("margin") <= 0)
    assert set(shown["wrong"]["pair_id"]) == set(wrong["pair_id"])


@pytest.mark.usefixtures("in_examples")
def test_the_notebook_about_training_dynamics_shows_what_its_files_hold(
    recipe: Path, finished: Run
) -> None:
    shown = run_notebook(
        "training_dynamics.ipynb", STORE=str(recipe.parent / "store"), RUN=finished.name
    )
    visits = finished.scan("train", "dynamics").collect()
    assert shown["by_source"]["len"].sum() == visits["pair_id"].n_unique()
    assert shown["by_source"]["gradient_share"].sum() == pytest.approx(1)
    assert shown["shown"]["prompt"].null_count() == 0
    held_out = finished.scan("evaluate").collect()
    assert set(shown["held_out"]["pair_id"]) == set(held_out["pair_id"])
    assert shown["held_out"]["last_margin"].sum() == pytest.approx(
        held_out["margin"].sum(), abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.usefixtures("in_examples", "finished")
def test_the_notebook_that_compares_betas_scores_once(recipe: Path) -> None:
    store = recipe.parent / "store"
    shown = run_notebook(
        "compare_betas.ipynb",
        CHECKOUT=str(ROOT),
        RECIPE=str(recipe),
        STORE=str(store),
        BETAS=[0.05, 0.5],
        OPTIONS=["--local"],
    )
    assert len(list((store / "score").iterdir())) == 1
    assert len({run.manifest("train").fingerprint for run in shown["runs"].values()}) == 2
    held_out = shown["held_out"]
    assert held_out["beta"].to_list() == [0.05, 0.5]
    for beta, run in shown["runs"].items():
        evaluated = run.scan("evaluate").collect()
        row = held_out.row(by_predicate=pl.col("beta") == beta, named=True)
        assert row["num_pairs"] == len(evaluated)
        assert row["accuracy"] == pytest.approx((evaluated["margin"] > 0).mean())


def logps(chosen: list[float], rejected: list[float]) -> tuple[PairLogps, torch.Tensor]:
    """Pairs of one token a side, with a reference of 0 nats; and the chosen log-probs, a leaf."""

    def side(values: torch.Tensor) -> SideLogps:
        zeros = torch.zeros_like(values)
        return SideLogps(
            policy_token_logps_BT=values,
            ref_token_logps_BT=zeros,
            loss_mask_BT=torch.ones_like(values),
        )

    leaf = torch.tensor(chosen)[:, None].requires_grad_()
    return PairLogps(chosen=side(leaf), rejected=side(torch.tensor(rejected)[:, None])), leaf


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_the_focal_loss_is_its_equation(gamma: float) -> None:
    """Of Δ = 0, 2 and -3 with β = 1, in plain Python."""
    pairs, _ = logps([-1.0, -1.0, -4.0], [-1.0, -3.0, -1.0])
    found = FocalLoss(beta=1.0, gamma=gamma)(pairs).tolist()
    for delta, value in zip((0, 2, -3), found, strict=True):
        p = 1 / (1 + math.exp(-delta))
        assert value == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-6)


def test_the_focal_loss_has_finite_gradients_far_from_0() -> None:
    pairs, chosen = logps([500.0, -500.0], [0.0, 0.0])
    FocalLoss(beta=1.0, gamma=0.5)(pairs).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


@pytest.mark.slow
def test_a_loss_of_ones_own_trains_from_the_same_scores(recipe: Path, finished: Run) -> None:
    """Before the first step policy and reference agree: 0.5² ln 2, and gamma is hashed."""
    command = [sys.executable, "-m", "examples.own_loss", "run", str(recipe), "--local"]
    done = subprocess.run(
        [*command, "--name", "own", "--set", "stages.train.loss.gamma=2"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"loss, first to last step +(\S+) →", done.stdout)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(0.25 * math.log(2), abs=1e-4)
    own = open_run(str(recipe.parent / "store"), "own")
    assert own.manifest("score").fingerprint == finished.manifest("score").fingerprint
    assert own.manifest("train").fingerprint != finished.manifest("train").fingerprint
