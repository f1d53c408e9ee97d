"""Fuzz test of the validate stage: every damaged file must yield rows or one clear error.

    python -m benchmarks.fuzz_inputs --seconds 600 --seed 0

A seeded script damages valid files of every container and reads them in processes with limited
memory and time. Files that end in another way are kept in the folder.
"""

import argparse
import gzip
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import yaml

from pipeline.execute import execute_plan
from pipeline.plan import Selection, make_plan
from pipeline.ray.session import Capacity
from pipeline.recipe import load_recipe
from schemas.errors import ConfigError, PipelineError

CASES_A_PROCESS = 40
SECONDS_A_PROCESS = 240
MEMORY_BYTES = 6 << 30
_ROWS = [
    {
        "prompt": f"What is {number} + 1?",
        "chosen": f"It is {number + 1}.\n\nHuman: \u00e9\u2028",
        "rejected": "0",
        "score_chosen": number / 7,
        "id": number,
        "tags": ["a", None] if number % 2 else [],
    }
    for number in range(30)
]
_TOKENS = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"NaN",
    b"1e999",
    b"null",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"PAR1",
    b"\x1f\x8b",
    b"(\xb5/\xfd",
)


def _pack_arrow(make: Callable[[io.BytesIO, pa.Schema], pa.ipc.RecordBatchFileWriter]) -> bytes:
    table, sink = pa.Table.from_pylist(_ROWS), io.BytesIO()
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    return sink.getvalue()


def _pack_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_ROWS), sink, row_group_size=7)
    return sink.getvalue()


def _pack_csv() -> bytes:
    rows = (f'{row["prompt"]},"{row["chosen"]}",{row["rejected"]}' for row in _ROWS)
    return "\n".join(["prompt,chosen,rejected", *rows]).encode()


_LINES = b"".join(json.dumps(row).encode() + b"\n" for row in _ROWS)
CONTAINERS: dict[str, Callable[[], bytes]] = {
    "lines.jsonl": lambda: _LINES,
    "array.json": lambda: json.dumps(_ROWS, indent=1).encode(),
    "objects.json": lambda: "\n".join(json.dumps(row, indent=1) for row in _ROWS).encode(),
    "wrapped.json": lambda: json.dumps({"data": _ROWS}, indent=1).encode(),
    "columns.json": lambda: json.dumps(
        {key: [row[key] for row in _ROWS] for key in _ROWS[0]}
    ).encode(),
    "table.csv": _pack_csv,
    "lines.jsonl.gz": lambda: gzip.compress(_LINES, mtime=0),
    "lines.jsonl.zst": lambda: pa.compress(_LINES, codec="zstd", asbytes=True),
    "table.parquet": _pack_parquet,
    "table.arrow": lambda: _pack_arrow(pa.ipc.new_file),
    "stream.arrow": lambda: _pack_arrow(pa.ipc.new_stream),
}


def damage(content: bytes, generator: random.Random) -> bytes:
    """Flip, insert, remove, repeat or cut some bytes."""
    data = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 4, 16])):
        place = generator.randrange(len(data) + 1)
        kind = generator.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[place:place] = generator.choice(_TOKENS) * generator.choice([1, 1, 70])
        elif kind == 2:
            del data[place : place + generator.choice([1, 4, 100])]
        elif kind == 3:
            data[place:place] = data[place : place + generator.choice([1, 30, 400])]
        elif kind == 4:
            data[place : place + 4] = generator.randbytes(4)
        elif generator.random() < 0.2:
            del data[place:]
    return bytes(data)


def make_case(number: int, seed: int) -> tuple[str, bytes]:
    """Return the name and the content of one damaged file."""
    generator = random.Random(f"{seed}:{number}")
    name = generator.choice(sorted(CONTAINERS))
    return name, damage(CONTAINERS[name](), generator)


def try_cases(first: int, seed: int, folder: Path) -> None:
    """Read some damaged files in this process, and print the outcome of each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for number in range(first, first + CASES_A_PROCESS):
        name, content = make_case(number, seed)
        (folder / "current").write_text(str(number))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / name
            file.write_bytes(content)
            print(json.dumps({"number": number, "end": _read(file, Path(scratch))}), flush=True)


def _read(file: Path, scratch: Path) -> str:
    validate = {
        "inputs": [str(file)],
        "format": "prompt_completion_strings",
        "max_reject_fraction": 1.0,
    }
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"store": str(scratch / "store"), "stages": {"validate": validate}})
    )
    try:
        plan = make_plan(load_recipe(str(recipe)), Selection(only="validate"), has_gpus=False)
        capacity = Capacity(num_cpus=1, num_gpus=0, num_cpus_per_node=1)
        execute_plan(plan, capacity=capacity, is_local=True)
    except PipelineError as error:
        kind = "config error" if isinstance(error, ConfigError) else "data error"
        # Another kind of exception inside a shard arrives as the text of StageFailed.
        is_ours = "Error: " not in str(error) or "DataError: " in str(error)
        named = file.name in str(error)
        return kind if is_ours and named else f"FAILED {error}"
    except Exception:  # The failures that the fuzz test looks for.
        return f"FAILED {traceback.format_exc()}"
    manifest = plan.stage("validate").out.manifest()
    assert manifest is not None
    counts = manifest.counts
    if counts.num_in != counts.num_rows_kept + counts.num_rejected:
        return f"FAILED rows are lost: {counts}"
    return "rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("store/fuzz"))
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.first is not None:
        try_cases(arguments.first, arguments.seed, arguments.folder)
        return
    ends: Counter[str] = Counter()
    began, first = time.monotonic(), 0
    while time.monotonic() - began < arguments.seconds:
        for number, end in _try_apart(first, arguments):
            ends[end.split(" ")[0] if end.startswith("FAILED") else end] += 1
            if end.startswith("FAILED"):
                name, content = make_case(number, arguments.seed)
                (arguments.folder / f"{number}-{name}").write_bytes(content)
                print(f"case {number}, {name}: {end}")
        first += CASES_A_PROCESS
    print(f"{first:,} files, seed {arguments.seed}: {dict(ends)}")
    sys.exit(1 if ends["FAILED"] else 0)


def _try_apart(first: int, arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """Read some files in another process; if it dies or hangs, the file it was reading fails."""
    command = [sys.executable, "-m", "benchmarks.fuzz_inputs", "--first", str(first)]
    command += ["--seed", str(arguments.seed), "--folder", str(arguments.folder)]
    with tempfile.TemporaryFile() as printed:
        try:
            done = subprocess.run(
                command,
                stdout=printed,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS_A_PROCESS,
                check=False,
            )
            problem = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"no end within {SECONDS_A_PROCESS} s"
        printed.seek(0)
        ends = [(case["number"], case["end"]) for case in map(json.loads, printed)]
    if problem:
        ends.append((int((arguments.folder / "current").read_text()), f"FAILED {problem}"))
    return ends


if __name__ == "__main__":
    main()
