"""How well the training dynamics find wrong labels: swap a tenth of the pairs, train, and rank.

python -m benchmarks.label_noise
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
import yaml

from benchmarks.beside_trl import CHECKOUT
from pipeline import Run, open_run
from pipeline.dynamics import scan_dynamics

SHARE = 0.1
"""Of the pairs, swapped; also the share that is looked at, from the most suspicious pair on."""
RECIPE = CHECKOUT / "pipeline" / "recipes" / "quickstart.yaml"

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    pairs: Annotated[str, typer.Option(help="Any input that validate reads.")] = "pipeline/sample",
    seed: Annotated[int, typer.Option(help="Chooses the pairs that are swapped.")] = 0,
    num_epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = 2,
    num_threads: Annotated[int, typer.Option(help="Threads of scoring and training.")] = 2,
    store: Annotated[
        Path | None, typer.Option(help="Keeps what is computed, for a second call.")
    ] = None,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (store or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        clean = run_recipe(folder, "clean", {"inputs": [pairs]}, until="dedupe")
        path = folder / f"noisy-{seed}.jsonl"
        swapped = write_noisy(clean, path, seed=seed)
        noisy = run_recipe(
            folder,
            f"noisy-{seed}-{num_epochs}",
            {"inputs": [str(path)]},
            until="train",
            num_epochs=num_epochs,
            num_threads=num_threads,
        )
        print_table(noisy, swapped)


def run_recipe(
    folder: Path,
    name: str,
    validate: dict[str, Any],
    *,
    until: str,
    num_epochs: int = 1,
    num_threads: int = 1,
) -> Run:
    """Run the quickstart's settings over other inputs, without held-out pairs."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["store"] = str(folder / "store")
    recipe["stages"]["validate"] = {**validate, "eval_fraction": 0.0}
    recipe["stages"]["score"]["backend"] = "transformers"
    recipe["stages"]["train"]["num_epochs"] = num_epochs
    for stage in ("score", "train"):
        recipe["execution"].setdefault(stage, {})["num_cpus_per_worker"] = num_threads
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "run.py", "run", str(path), "--until", until]
    subprocess.run([*command, "--local", "--name", name], cwd=CHECKOUT, check=True)
    return open_run(recipe["store"], name)


def write_noisy(clean: Run, path: Path, *, seed: int) -> set[int]:
    """Write the pairs with some of them swapped, and return the rows of these."""
    columns = ("prompt", "chosen", "rejected", "source")
    rows = clean.pairs().sort("pair_id").select(columns).collect().to_dicts()
    order = np.random.default_rng(seed).permutation(len(rows))
    swapped = set(order[: round(SHARE * len(rows))].tolist())
    for number in swapped:
        row = rows[number]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return swapped


def print_table(noisy: Run, swapped: set[int]) -> None:
    """Print how well several rankings find the swapped pairs, the lowest value first."""
    pairs = noisy.pairs().with_columns(is_swapped=pl.col("source_row").is_in(swapped))
    num_epochs = noisy.manifest("train").config["num_epochs"]
    rankings = {
        "relative margin" + f", epoch 1 to {epochs} of {num_epochs}" * (epochs < num_epochs): (
            scan_epochs(noisy, epochs),
            pl.col("relative_margin"),
        )
        for epochs in range(1, num_epochs + 1)
    }
    dynamics = noisy.dynamics()
    rankings["mean margin"] = dynamics, pl.col("mean_margin")
    rankings["first margin"] = dynamics, pl.col("first_margin")
    rankings["last margin"] = dynamics, pl.col("last_margin")
    per_token = pl.col("ref_chosen_logp") / pl.col("num_chosen_tokens") - pl.col(
        "ref_rejected_logp"
    ) / pl.col("num_rejected_tokens")
    rankings["reference margin per token, without training"] = dynamics, per_token
    print("| ranking | AUROC | share of the swapped among the lowest 10 % |\n|---|---:|---:|")
    for name, (frame, score) in rankings.items():
        known = frame.select(
            "pair_id", "relative_margin", "mean_margin", "first_margin", "last_margin"
        )
        rows = pairs.join(known, on="pair_id").select("is_swapped", score=score).collect()
        is_swapped, scores = rows["is_swapped"].to_numpy(), rows["score"].to_numpy()
        lowest = is_swapped[np.argsort(scores, kind="stable")[: len(swapped)]]
        auroc = measure_auroc(scores[is_swapped], scores[~is_swapped])
        print(f"| {name} | {auroc:.3f} | {lowest.mean():.2f} |")
    flagged = dynamics.filter("suspicious").join(pairs, on="pair_id")
    found = flagged.select(pl.len(), pl.col("is_swapped").sum()).collect().row(0)
    print(f"suspicious: {found[0]} pairs, {found[1]} of them swapped, of {len(swapped)} in all")


def scan_epochs(run: Run, num_epochs: int) -> pl.LazyFrame:
    """Sum up the first epochs alone."""
    visits = run.scan("train", "dynamics").filter(pl.col("epoch") <= num_epochs)
    noise = run.manifest("train").summary["drift"]["engine_noise"]
    return scan_dynamics("dynamics", visits, run.pairs(), noise=noise)


def measure_auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Measure how often a positive is below a negative; ties count half."""
    below = positives[:, None] < negatives
    return float((below + 0.5 * (positives[:, None] == negatives)).mean())


if __name__ == "__main__":
    app()
