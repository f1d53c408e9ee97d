"""Error of scores against plain float32 forwards of single sequences, by engine and dtype.

Also measures how far an engine's own values differ between computing a prompt once for all of its
completions and computing each sequence by itself.

python -m benchmarks.accuracy --pairs hh.jsonl.gz
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.beside_trl import CHECKOUT
from benchmarks.measurement import Backend
from benchmarks.pairs import RUN, prepare_pairs, read_encoded
from pipeline import open_run
from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model
from stages.policy.groups import Group
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import list_groups
from stages.scorers.protocol import Dtype, ScorerSettings

ENGINES: tuple[tuple[Backend, Dtype], ...] = (
    ("transformers", "float32"),
    ("vllm", "float32"),
    ("transformers", "bfloat16"),
    ("vllm", "bfloat16"),
    ("transformers", "float16"),
    ("vllm", "float16"),
)

WHOLE = ".whole.npz"
"""Suffix of the file with the values of sequences computed by themselves."""

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    pairs: Annotated[str, typer.Option(help="Any input that validate reads.")] = "pipeline/sample",
    num_pairs: Annotated[int, typer.Option(help="Use this many of the first usable pairs.")] = 40,
    model: Annotated[
        str, typer.Option(help="Model, as in a recipe.")
    ] = "sample:smollm2-135m-instruct",
) -> None:
    """Print the table."""
    folder = fetch_model(pin_model(model))
    print(
        "| engine | dtype | token: median | 99 % | largest | sequence: median | largest "
        "| sharing, token: median | largest |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch, "store")
        prepare_pairs(pairs, num_pairs, model=folder, dtype="float32", store=store, until="encode")
        plain = Path(scratch, "plain.npz")
        save(plain, plain_logps(folder, read_groups(store)))
        for backend, dtype in ENGINES:
            found = Path(scratch, f"{backend}-{dtype}.npz")
            task = ["engine", folder, str(store), backend, dtype, str(found)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.accuracy", *task],
                cwd=CHECKOUT,
                capture_output=True,
                check=False,
            )
            if done.returncode:
                print(f"| {backend} | {dtype} | not served |  |  |  |  |  |  |", flush=True)
                continue
            shared, wanted = load(found), load(plain)
            whole = load(found.with_suffix(WHOLE))
            cells = [
                *describe(differ_by_token(shared, wanted), 0.5, 0.99, 1),
                *describe(differ_by_sequence(shared, wanted), 0.5, 1),
                *describe(differ_by_token(shared, whole), 0.5, 1),
            ]
            print(f"| {backend} | {dtype} | {' | '.join(cells)} |", flush=True)


def score_with(folder: str, store: str, backend: Backend, dtype: Dtype, answer: str) -> None:
    settings = ScorerSettings(
        backend=backend, dtype=dtype, max_length=1024, num_threads=torch.get_num_threads()
    )
    scorer = open_scorer(folder, settings)
    groups = read_groups(Path(store))
    save(Path(answer), flatten(scorer.score(groups)))
    scorer.shares_prompts = False
    save(Path(answer).with_suffix(WHOLE), flatten(scorer.score(groups)))
    scorer.close()


def flatten(scored: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    return [values for arrays in scored for values in arrays]


def read_groups(store: Path) -> list[Group]:
    encoded = read_encoded(open_run(str(store), RUN).outputs["encode"])
    return [sequences.group for sequences in list_groups(encoded)]


@torch.no_grad()
def plain_logps(folder: str, groups: list[Group]) -> list[np.ndarray]:
    """Compute each sequence by itself, with all logits at once and log_softmax in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for single in (single for group in groups for single in group.split()):
        [completion_ids] = single.completions
        ids = torch.from_numpy(np.concatenate([single.prompt_ids, completion_ids])).long()
        logits = model(input_ids=ids[None]).logits[0, len(single.prompt_ids) - 1 : -1]
        wanted = ids[len(single.prompt_ids) :, None]
        found.append(logits.double().log_softmax(-1).gather(1, wanted)[:, 0].numpy())
    return found


def save(path: Path, arrays: list[np.ndarray]) -> None:
    np.savez(path, *arrays)


def load(path: Path) -> list[np.ndarray]:
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def differ_by_token(found: list[np.ndarray], other: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a - b for a, b in zip(found, other, strict=True)])


def differ_by_sequence(found: list[np.ndarray], other: list[np.ndarray]) -> np.ndarray:
    return np.array([(a - b).sum() for a, b in zip(found, other, strict=True)])


def describe(differences: np.ndarray, *quantiles: float) -> list[str]:
    return [f"{np.quantile(np.abs(differences), quantile):.1e}" for quantile in quantiles]


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        score_with(*sys.argv[2:])  # type: ignore[arg-type]
    else:
        app()
