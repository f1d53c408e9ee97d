"""Cost of vLLM's CPU settings, each measured in alternation with the default.

python -m benchmarks.vllm_settings --pairs hh.jsonl.gz

Rows are processor seconds and wall seconds of scoring the same pairs, without start-up. They are
the minimum of the repeats, because larger values on a shared machine measure its other users.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks.beside_trl import CHECKOUT, wait_until_quiet
from benchmarks.measurement import Measurement
from benchmarks.our_worker import measure_scoring
from benchmarks.pairs import RUN, prepare_pairs
from pipeline import open_run
from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model
from stages.scorers import vllm_scorer
from stages.scorers.protocol import ScorerSettings, ScoringExecution


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One setting of an engine."""

    max_tokens_per_batch: int = 4096
    block_size: int = vllm_scorer.CPU_BLOCK_SIZE
    kv_cache_gib: float = 1.0
    num_threads: int = 2


DEFAULT = Choice()
CHOICES = (
    Choice(max_tokens_per_batch=512),
    Choice(max_tokens_per_batch=2048),
    Choice(max_tokens_per_batch=8192),
    Choice(block_size=64),
    Choice(block_size=128),
    Choice(kv_cache_gib=0.25),
    Choice(kv_cache_gib=4.0),
    Choice(num_threads=1),
)

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    pairs: Annotated[str, typer.Option(help="Any input that validate reads.")] = "pipeline/sample",
    num_pairs: Annotated[int, typer.Option(help="Use this many of the first usable pairs.")] = 32,
    model: Annotated[
        str, typer.Option(help="Model, as in a recipe.")
    ] = "sample:smollm2-135m-instruct",
    repeats: Annotated[int, typer.Option(help="Measurements of each setting.")] = 2,
) -> None:
    """Print the table."""
    folder = fetch_model(pin_model(model))
    found: dict[Choice, list[Measurement]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch, "store")
        prepare_pairs(pairs, num_pairs, model=folder, dtype="float32", store=store, until="encode")
        for _ in range(repeats):
            for index, choice in enumerate(CHOICES):
                if index % 3 == 0:
                    found.setdefault(DEFAULT, []).append(measure(folder, store, DEFAULT))
                found.setdefault(choice, []).append(measure(folder, store, choice))
    print("| setting | processor seconds | seconds | tokens computed | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for choice, costs in found.items():
        print(
            f"| {describe(choice)} | {min(cost.cpu_seconds for cost in costs):.1f} "
            f"| {min(cost.seconds for cost in costs):.1f} | {costs[0].num_tokens_computed:,} "
            f"| {max(cost.peak_memory_bytes for cost in costs) / 1e9:.2f} GB |"
        )


def describe(choice: Choice) -> str:
    default = msgspec.to_builtins(DEFAULT)
    others = [
        f"{name} {value}"
        for name, value in msgspec.to_builtins(choice).items()
        if value != default[name]
    ]
    return ", ".join(others or [f"{name} {value}" for name, value in default.items()])


def measure(folder: str, store: Path, choice: Choice) -> Measurement:
    """Score in a process of its own, when nothing else runs."""
    wait_until_quiet()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_settings", "engine", folder, str(store)],
        cwd=CHECKOUT,
        input=msgspec.json.encode(choice),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{describe(choice)} failed:\n{done.stderr.decode()[-2000:]}")
    cost = msgspec.json.decode(done.stdout.splitlines()[-1], type=Measurement)
    print(f"{describe(choice)}: {cost.cpu_seconds:.1f} s, {cost.seconds:.1f} s", file=sys.stderr)
    return cost


def score_with(folder: str, store: str, choice: Choice) -> Measurement:
    vllm_scorer.CPU_BLOCK_SIZE = choice.block_size
    encode = open_run(store, RUN).outputs["encode"]
    settings = ScorerSettings(
        backend="vllm",
        dtype="float32",
        max_length=encode.manifest.config["max_length"],
        num_threads=choice.num_threads,
        execution=ScoringExecution(
            max_tokens_per_batch=choice.max_tokens_per_batch, kv_cache_gib=choice.kv_cache_gib
        ),
    )
    return measure_scoring(encode, folder, settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        choice = msgspec.json.decode(sys.stdin.buffer.read(), type=Choice)
        print(msgspec.json.encode(score_with(*sys.argv[2:], choice)).decode())
    else:
        app()
