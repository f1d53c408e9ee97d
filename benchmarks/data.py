"""Speed and memory of the data stages on up to a million pairs, beside common alternatives.

    python -m benchmarks.data --pairs test.jsonl.gz

A seeded script makes pairs from the given HH transcripts. Each row of the table is measured in its
own process on one core; rows that are already in the results file are not measured again.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.machine import OthersWatch, describe_machine
from benchmarks.near_duplicates import Texts, read_texts

RESULTS = Path(__file__).parent / "results"
SIZES = (10_000, 100_000, 1_000_000)
_COPIES = (("copied", 0.02), ("edited", 0.02), ("swapped", 0.005))
"""Shares of rows that copy an earlier row, as it is, with a word added, or with the answers
exchanged. All other rows are new mixtures of sentences."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "ARROW_NUM_THREADS")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Row(msgspec.Struct, frozen=True):
    """A row of the table, not yet measured."""

    label: str
    num_pairs: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one process."""

    label: str
    num_pairs: int
    num_kept: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    """Peak resident memory of the process, its imports included."""
    other_cores: float
    """Average cores kept busy by other processes."""


class Work(NamedTuple):
    label: str
    most_pairs: int
    """Larger sizes are skipped: they would take hours, or more memory than the machine has."""


VALIDATE_REJECTING = "validate, the rules that reject"
VALIDATE = "validate, all rules"
DEDUPE_EXACT = "dedupe, exact only"
DEDUPE = "dedupe, near-duplicates and leaks too"
DATASETS = "datasets.map in Python: parse, exact duplicates"
DATASKETCH = "datasketch MinHashLSH: near-duplicates"

WORKS = (
    Work(VALIDATE_REJECTING, SIZES[-1]),
    Work(VALIDATE, SIZES[-1]),
    Work(DEDUPE_EXACT, SIZES[-1]),
    Work(DEDUPE, SIZES[-1]),
    Work(DATASETS, SIZES[-1]),
    Work(DATASKETCH, 100_000),
)


def main() -> None:
    arguments = _parse_arguments()
    if arguments.measure:
        label, num_pairs = arguments.measure
        measured = measure(Row(label, int(num_pairs)), arguments.folder, arguments.seed)
        print(msgspec.json.encode(measured).decode())
        return
    results = RESULTS / f"{arguments.name}.jsonl"
    done = _read_results(results)
    found = read_texts(arguments.pairs)
    for num_pairs in arguments.sizes:
        file = input_file(arguments.folder, num_pairs, arguments.seed)
        for work in WORKS:
            row = Row(work.label, num_pairs)
            if row in done or num_pairs > work.most_pairs:
                continue
            if not file.exists():
                write_pairs(found, num_pairs, arguments.seed, file)
            measured = _measure_apart(row, arguments)
            done[row] = measured
            with results.open("ab") as stream:
                stream.write(msgspec.json.encode(measured) + b"\n")
            print(f"{num_pairs:>9,} {work.label}: {_rate(measured):,.0f} pairs/s")
    (RESULTS / f"{arguments.name}.md").write_text(make_table(list(done.values())))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", help="HH transcripts, in any form that validate reads")
    parser.add_argument("--folder", type=Path, default=Path("store/benchmark-data"))
    parser.add_argument("--name", default="data", help="name of the files in benchmarks/results")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.measure and not arguments.pairs:
        parser.error("--pairs is needed")
    return arguments


def input_file(folder: Path, num_pairs: int, seed: int) -> Path:
    return folder / f"pairs-{num_pairs}-{seed}.jsonl"


def write_pairs(found: Sequence[Texts], num_pairs: int, seed: int, file: Path) -> None:
    """Write pairs as HH transcripts; each row depends only on the seed and its number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sentences = [s for row in found for text in row for s in re.split(r"(?<=[.?!])\s+", text) if s]
    beside = file.with_suffix(".part")
    with beside.open("w", encoding="utf-8") as stream:
        for number in range(num_pairs):
            prompt, chosen, rejected = make_pair(found, sentences, number, seed)
            start = f"\n\nHuman: {prompt}\n\nAssistant: "
            row = {"chosen": start + chosen, "rejected": start + rejected}
            stream.write(json.dumps(row) + "\n")
    beside.rename(file)


def make_pair(found: Sequence[Texts], sentences: Sequence[str], number: int, seed: int) -> Texts:
    """Make a row: mostly new, or from an earlier row in the shares of _COPIES."""
    generator = random.Random(f"{seed}:{number}")
    place = generator.random()
    for kind, share in _COPIES if number else ():
        if place < share:
            earlier = make_pair(found, sentences, generator.randrange(number), seed)
            return _change(earlier, kind, sentences, generator)
        place -= share
    model = generator.choice(found)
    return Texts(*(_mix(text, sentences, generator) for text in model))


def _change(row: Texts, kind: str, sentences: Sequence[str], generator: random.Random) -> Texts:
    if kind == "copied":
        return row
    if kind == "swapped":
        return Texts(row.prompt, row.rejected, row.chosen)
    return row._replace(chosen=f"{row.chosen} {generator.choice(sentences).split()[0]}")


def _mix(text: str, sentences: Sequence[str], generator: random.Random) -> str:
    """Combine sentences up to the length of a text, each with one word from another sentence.

    Without the changed word, a few thousand sentences would make short texts collide more often the
    more rows there are, unlike real texts.
    """
    mixed, num_chars = [], 0
    while not mixed or num_chars < len(text):
        words = _TURN.sub(" ", generator.choice(sentences)).split()
        others = generator.choice(sentences).split()
        if words and others:
            words[generator.randrange(len(words))] = generator.choice(others)
        mixed.append(" ".join(words))
        num_chars += len(mixed[-1]) + 1
    return " ".join(mixed)


def _measure_apart(row: Row, arguments: argparse.Namespace) -> Measured:
    command = [sys.executable, "-m", "benchmarks.data", "--folder", str(arguments.folder)]
    command += ["--seed", str(arguments.seed), "--measure", row.label, str(row.num_pairs)]
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, "1")}
    watch = OthersWatch()
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    measured = msgspec.json.decode(printed.splitlines()[-1], type=Measured)
    return msgspec.structs.replace(measured, other_cores=round(watch.cores(), 2))


def measure(row: Row, folder: Path, seed: int) -> Measured:
    """Do the work of one row in this process, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    file = input_file(folder, row.num_pairs, seed)
    if row.label == DATASETS:
        steps = parse_with_datasets(file, folder)
    elif row.label == DATASKETCH:
        steps = find_near_with_datasketch(file)
    else:
        steps = run_stage(row.label, file, folder)
    next(steps)  # Imports, plans and earlier stages are not measured.
    cpu, wall = time.process_time(), time.perf_counter()
    num_kept = next(steps)
    return Measured(
        label=row.label,
        num_pairs=row.num_pairs,
        num_kept=num_kept,
        cpu_seconds=round(time.process_time() - cpu, 2),
        wall_seconds=round(time.perf_counter() - wall, 2),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        other_cores=0.0,
    )


def run_stage(label: str, file: Path, folder: Path) -> Iterator[int]:
    """Run validate or dedupe without Ray; dedupe reads what validate's own row wrote."""
    from pipeline.execute import execute_plan
    from pipeline.plan import Selection, make_plan
    from pipeline.ray.session import Capacity
    from pipeline.recipe import load_recipe
    from stages.validate.codes import CODES

    stage = label.split(",")[0]
    warnings = {
        code: "off"
        for code, described in CODES.items()
        if described.level == "warn" and described.why_fixed is None
    }
    stages = {
        "validate": {
            "inputs": [str(file)],
            "rules": warnings if label == VALIDATE_REJECTING else {},
        },
        "dedupe": {} if label == DEDUPE else {"near": None, "leaks": None},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"store": str(folder / "store"), "stages": stages}))
    plan = make_plan(load_recipe(str(recipe)), Selection(only=stage, again=stage), has_gpus=False)
    yield 0
    capacity = Capacity(num_cpus=1, num_gpus=0, num_cpus_per_node=1)
    execute_plan(plan, capacity=capacity, is_local=True)
    manifest = plan.stage(stage).out.manifest()
    assert manifest is not None
    yield manifest.counts.num_out


def parse_with_datasets(file: Path, folder: Path) -> Iterator[int]:
    """Parse and remove exact duplicates, as usual with datasets and plain Python."""
    import datasets

    datasets.disable_progress_bars()
    yield 0
    rows = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(folder / "datasets")
    )
    rows = rows.map(_parse_row, remove_columns=rows.column_names, load_from_cache_file=False)
    seen: set[str] = set()

    def is_new(row: dict[str, str]) -> bool:
        is_seen = row["digest"] in seen
        seen.add(row["digest"])
        return not is_seen

    yield len(rows.filter(is_new, load_from_cache_file=False))


def _parse_row(row: dict[str, str]) -> dict[str, object]:
    sides = {}
    for side in ("chosen", "rejected"):
        _, *parts = _TURN.split(row[side])
        sides[side] = [
            {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
            for speaker, said in zip(parts[::2], parts[1::2], strict=True)
        ]
    prompt = sides["chosen"][:-1]
    is_pair = prompt == sides["rejected"][:-1] and all(
        side[-1]["content"] for side in sides.values()
    )
    parsed = {
        "prompt": prompt,
        "chosen": sides["chosen"][-1:],
        "rejected": sides["rejected"][-1:],
        "is_pair": is_pair,
    }
    return {**parsed, "digest": hashlib.sha256(json.dumps(parsed).encode()).hexdigest()}


def find_near_with_datasketch(file: Path) -> Iterator[int]:
    """Find near-duplicates with datasketch's index in memory, without verifying them."""
    from datasketch import MinHash, MinHashLSH

    yield 0
    index = MinHashLSH(threshold=0.7, num_perm=128)
    num_kept = 0
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            row = json.loads(line)
            words = re.findall(r"\w+", f"{row['chosen']} {row['rejected']}".lower())
            grams = {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))}
            sketch = MinHash(num_perm=128)
            sketch.update_batch([gram.encode() for gram in grams])
            if not index.query(sketch):
                index.insert(str(number), sketch)
                num_kept += 1
    yield num_kept


def _read_results(file: Path) -> dict[Row, Measured]:
    if not file.exists():
        return {}
    lines = [msgspec.json.decode(line, type=Measured) for line in file.read_bytes().splitlines()]
    return {Row(line.label, line.num_pairs): line for line in lines}


def _rate(measured: Measured) -> float:
    return measured.num_pairs / measured.cpu_seconds


def make_table(measured: Sequence[Measured]) -> str:
    """Return the table of pairs/s on one core and peak memory, by work and size."""
    sizes = sorted({each.num_pairs for each in measured})
    by_row = {Row(each.label, each.num_pairs): each for each in measured}
    machine = describe_machine()
    lines = [
        f"Pairs made from HH transcripts, one core of {machine['processor']}. "
        "Pairs per CPU second, and peak memory of the process.",
        "",
        "| | " + " | ".join(f"{size:,} pairs" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for work in WORKS:
        cells = [by_row.get(Row(work.label, size)) for size in sizes]
        shown = [
            f"{_rate(cell):,.0f}/s, {cell.peak_bytes / 1e9:.2f} GB" if cell else "—"
            for cell in cells
        ]
        lines.append(f"| {work.label} | " + " | ".join(shown) + " |")
    busy = max(each.other_cores for each in measured)
    lines += ["", f"Other processes kept at most {busy:.2f} cores busy during a row."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
