"""How far are scores from a plain float32 forward of one sequence at a time, by engine and dtype?

python -m benchmarks.accuracy --pairs hh.jsonl.gz
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.beside_trl import CHECKOUT
from benchmarks.pairs import RUN, prepare_pairs
from benchmarks.protocol import Backend
from pipeline import open_run
from stages.models import fetch_model, pin_model
from stages.policy.groups import Group
from stages.scoring.pairs import ENCODED_COLUMNS, list_groups
from stages.scoring.protocol import Dtype, ScorerSettings, open_scorer

ENGINES: tuple[tuple[Backend, Dtype], ...] = (
    ("transformers", "float32"),
    ("vllm", "float32"),
    ("transformers", "bfloat16"),
    ("vllm", "bfloat16"),
    ("transformers", "float16"),
    ("vllm", "float16"),
)

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    pairs: Annotated[str, typer.Option(help="What validate reads.")] = "pipeline/sample",
    num_pairs: Annotated[int, typer.Option(help="Usable pairs taken from its beginning.")] = 40,
    model: Annotated[str, typer.Option(help="As in a recipe.")] = "sample:smollm2-135m-instruct",
) -> None:
    """Print the table."""
    folder = fetch_model(pin_model(model))
    print(
        "| engine | dtype | token: median | 99 % | largest | sequence: median | largest |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch, "store")
        prepare_pairs(pairs, num_pairs, model=folder, dtype="float32", store=store)
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
                print(f"| {backend} | {dtype} | not served |  |  |  |  |")
            else:
                print(f"| {backend} | {dtype} | {compare(load(found), load(plain))} |", flush=True)


def score_with(folder: str, store: str, backend: Backend, dtype: Dtype, answer: str) -> None:
    settings = ScorerSettings(
        backend=backend, dtype=dtype, max_length=1024, num_threads=torch.get_num_threads()
    )
    scorer = open_scorer(folder, settings)
    found = scorer.score(read_groups(Path(store)))
    scorer.close()
    save(Path(answer), [values for arrays in found for values in arrays])


def read_groups(store: Path) -> list[Group]:
    encode = open_run(str(store), RUN).outputs["encode"]
    shards = encode.manifest.shards
    encoded = pa.concat_tables(encode.read(shard, columns=ENCODED_COLUMNS) for shard in shards)
    return [sequences.group for sequences in list_groups(encoded)]


@torch.no_grad()
def plain_logps(folder: str, groups: list[Group]) -> list[np.ndarray]:
    """Every sequence by itself, all of its logits at once, their log_softmax in float64."""
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


def compare(found: list[np.ndarray], plain: list[np.ndarray]) -> str:
    differences = [values - wanted for values, wanted in zip(found, plain, strict=True)]
    by_token = np.abs(np.concatenate(differences))
    by_sequence = np.abs([values.sum() for values in differences])
    numbers = (
        *(np.median(by_token), np.quantile(by_token, 0.99), by_token.max()),
        *(np.median(by_sequence), by_sequence.max()),
    )
    return " | ".join(f"{number:.1e}" for number in numbers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        score_with(*sys.argv[2:])  # type: ignore[arg-type]
    else:
        app()
