"""Input pairs of the benchmarks, made by the pipeline's own stages up to score."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import yaml

from pipeline import Run, open_run
from stages.scorers.pairs import ENCODED_COLUMNS
from stages.store.shards import StageOutput

RUN = "pairs"
_CHECKOUT = Path(__file__).resolve().parent.parent


def prepare_pairs(
    pairs: str, num_pairs: int, *, model: str, dtype: str, store: Path, until: str = "score"
) -> Path:
    """Make a store in which encode and score hold the first `num_pairs` usable pairs of an input.

    With until="encode" the score stage does not run.

    Returns:
        The recipe.

    Raises:
        SystemExit: the input has fewer usable pairs, or pairs that TRL cannot train on alike.
    """
    num_rows = num_pairs
    while True:
        recipe = _write_recipe(pairs, num_rows, model=model, dtype=dtype, store=store)
        _run_stages(recipe, until="encode")
        run = open_run(str(store), RUN)
        num_found = run.manifest("encode").counts.num_out
        if num_found == num_pairs:
            break
        if run.manifest("validate").counts.num_in < num_rows:
            raise SystemExit(f"{pairs} has {num_found} usable pairs; --num-pairs is {num_pairs}.")
        num_rows += num_pairs - num_found
    _require_plain(run)
    _run_stages(recipe, until=until)
    return recipe


def read_encoded(encode: StageOutput) -> pa.Table:
    """Read all rows of an encode stage, with the columns that a scorer needs."""
    return pa.concat_tables(
        encode.read(shard, columns=ENCODED_COLUMNS) for shard in encode.manifest.shards
    )


def _write_recipe(pairs: str, num_rows: int, *, model: str, dtype: str, store: Path) -> Path:
    recipe = {
        "store": str(store),
        "stages": {
            "validate": {
                "inputs": [pairs],
                "max_pairs": num_rows,
                "eval_fraction": 0.0,
                "max_reject_fraction": 1.0,
            },
            "score": {"model": model, "backend": "transformers", "dtype": dtype},
        },
    }
    path = store.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def _run_stages(recipe: Path, *, until: str) -> None:
    command = [sys.executable, "run.py", "run", str(recipe), "--until", until]
    done = subprocess.run(
        [*command, "--local", "--name", RUN],
        cwd=_CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def _require_plain(run: Run) -> None:
    is_plain = (
        pl.all_horizontal(pl.col("chosen_loss_mask", "rejected_loss_mask").is_null())
        & (pl.col("weight") == 1)
        & (pl.col("split") == "train")
    )
    num_others = run.scan("encode").filter(~is_plain).select(pl.len()).collect().item()
    if num_others:
        raise SystemExit(
            f"{num_others} pairs have a weight, or tokens that are not scored (tool answers). "
            "TRL would train on them differently. Choose other pairs."
        )
