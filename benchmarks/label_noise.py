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
        rows = noisy.dynamics().join(
            noisy.scan("dedupe").select("pair_id", "source_row"), on="pair_id"
        )
        print_table(rows.collect(), swapped)


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


def print_table(rows: pl.DataFrame, swapped: set[int]) -> None:
    """Print how well several rankings find the swapped pairs."""


if __name__ == "__main__":
    app()
