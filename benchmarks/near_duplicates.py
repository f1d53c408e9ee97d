"""Recall, precision and speed of dedupe on planted near-duplicates.

    python -m benchmarks.near_duplicates --pairs test.jsonl.gz --num-rows 20000

Rows are made from the texts of the given pairs: bases (the pairs themselves, then mixtures of their
sentences) and edited copies of some bases. Similarity is computed by plain Python sets that share
no code with the stage.
"""

import argparse
import random
import re
import resource
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from pipeline.execute import execute_plan, read_output
from pipeline.plan import Selection, make_plan
from pipeline.ray.mapper import InProcessMapper
from pipeline.ray.session import find_capacity
from pipeline.recipe import load_recipe
from schemas.ids import pair_id, prompt_id
from schemas.manifest import Counts, Manifest
from schemas.rows import PAIR
from stages.dedupe import run
from stages.dedupe.config import DedupeConfig
from stages.dedupe.contamination import BenchmarkFiles
from stages.stage import Execution, Resources, StageContext
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, open_stage_dir, read_file

_FINGERPRINT = "0" * 12
_COPIED_SHARE = 0.4
_GUARDED = re.compile(r"[0-9+=<>^%&#$!*/-]|\b(not|no|never|cannot|without|t)\b", re.IGNORECASE)


class Texts(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def main() -> None:
    arguments = _parse_arguments()
    generator = random.Random(arguments.seed)
    found = read_texts(arguments.pairs)
    rows, kinds = plant(found, arguments.num_rows, generator)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        out, seconds = deduplicate(rows, Path(folder), rows_per_shard=arguments.rows_per_shard)
        total = time.process_time() - started
        rejected = read_all(out, "rejected")
        doubtful = {row["source_row"] for row in read_all(out, "data") if row["warnings"]}
    mean_chars = sum(len(text) for row in rows for text in row) / len(rows)
    print(f"{len(rows):,} rows, {mean_chars:,.0f} characters each, seed {arguments.seed}")
    show_recall(rows, kinds, rejected, doubtful)
    print("\npass      CPU µs per row")
    for label, spent in seconds.items():
        print(f"{label:<9} {spent / len(rows) * 1e6:12.1f}")
    num_used = sum(seconds.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"all       {num_used / len(rows) * 1e6:12.1f}   {len(rows) / num_used:,.0f} rows/s/core")
    print(
        f"({total:.0f} s of CPU including the input's writing; peak {peak:.2f} GB, rows included)"
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", required=True, help="any input that validate reads")
    parser.add_argument("--num-rows", type=int, default=20_000)
    parser.add_argument("--rows-per-shard", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_texts(pairs: str) -> list[Texts]:
    """Read pairs with the validate stage; join each prompt's messages into one text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        validate = {"inputs": [pairs], "max_reject_fraction": 1.0}
        path.write_text(yaml.safe_dump({"store": folder, "stages": {"validate": validate}}))
        plan = make_plan(load_recipe(str(path)), Selection(only="validate"), has_gpus=False)
        execute_plan(plan, capacity=find_capacity(None, is_local=True), is_local=True)
        output = read_output(plan.stage("validate"))
        rows = [row for shard in output.manifest.shards for row in output.read(shard).to_pylist()]
    sides = ("prompt", "chosen", "rejected")
    return [Texts(*("\n".join(m["content"] or "" for m in row[s]) for s in sides)) for row in rows]


def plant(
    found: Sequence[Texts], num_rows: int, generator: random.Random
) -> tuple[list[Texts], list[tuple[str, int]]]:
    """Make rows; return with each its kind of edit and the number of its base."""
    sentences = [s for row in found for text in row for s in re.split(r"(?<=[.?!])\s+", text) if s]
    words = sorted({word for sentence in sentences for word in sentence.split()})
    num_bases = int(num_rows * (1 - _COPIED_SHARE))
    rows = list(found[:num_bases])
    while len(rows) < num_bases:
        model = generator.choice(found)
        rows.append(Texts(*(_mix(text, sentences, generator) for text in model)))
    kinds = [("base", number) for number in range(num_bases)]
    edits = list(EDITS)
    while len(rows) < num_rows:
        kind = edits[len(rows) % len(edits)]
        base = generator.randrange(num_bases)
        rows.append(EDITS[kind](rows[base], words, generator))
        kinds.append((kind, base))
    return rows, kinds


def _mix(text: str, sentences: Sequence[str], generator: random.Random) -> str:
    mixed: list[str] = []
    while sum(map(len, mixed)) < len(text):
        mixed.append(generator.choice(sentences))
    return " ".join(mixed) or text


Edit = Callable[[Texts, Sequence[str], random.Random], Texts]


def _edit_words(share: float) -> Edit:
    """Return an edit that replaces, deletes or inserts words in this share of places."""

    def edit_text(text: str, words: Sequence[str], generator: random.Random) -> str:
        edited: list[str] = []
        for word in text.split(" "):
            if generator.random() >= share or _GUARDED.search(word):
                edited.append(word)
                continue
            added = generator.choice(words)
            added = "word" if _GUARDED.search(added) else added
            edited += generator.choice([[added], [], [word, added]])
        return " ".join(edited)

    return lambda row, words, generator: Texts(*(edit_text(t, words, generator) for t in row))


def _retype(row: Texts, words: Sequence[str], generator: random.Random) -> Texts:
    """Change capitals, letter composition and punctuation."""
    return Texts(
        *(unicodedata.normalize("NFD", t.upper()).replace(",", ";").replace(".", " .") for t in row)
    )


def _cut(row: Texts, words: Sequence[str], generator: random.Random) -> Texts:
    """Cut the last quarter of both answers."""
    return Texts(row.prompt, *(text[: len(text) * 3 // 4] for text in row[1:]))


def _swap(row: Texts, words: Sequence[str], generator: random.Random) -> Texts:
    edited = _edit_words(0.01)(row, words, generator)
    return Texts(edited.prompt, edited.rejected, edited.chosen)


def _count_on(row: Texts, words: Sequence[str], generator: random.Random) -> Texts:
    """Change a number; add one to a text without any."""
    prompt = re.sub(r"\d+", lambda n: str(int(n[0]) + 1), row.prompt, count=1)
    return row._replace(prompt=prompt if prompt != row.prompt else f"{row.prompt} 7")


def _answer_anew(row: Texts, words: Sequence[str], generator: random.Random) -> Texts:
    return Texts(
        row.prompt, *(" ".join(generator.choices(words, k=len(t.split()) or 1)) for t in row[1:])
    )


EDITS: dict[str, Edit] = {
    "copy": lambda row, words, generator: row,
    "case and punctuation": _retype,
    "2 % of words": _edit_words(0.02),
    "5 % of words": _edit_words(0.05),
    "12 % of words": _edit_words(0.12),
    "answers cut by a quarter": _cut,
    "labels swapped, 1 % of words": _swap,
    "another number": _count_on,
    "new answers": _answer_anew,
}


def deduplicate(
    rows: Sequence[Texts], folder: Path, *, rows_per_shard: int
) -> tuple[StageDir, dict[str, float]]:
    """Run the stage over rows in this process; also return the CPU seconds of each pass."""
    validated = open_stage_dir(Folder(str(folder)), "validate", _FINGERPRINT, 1)
    shards = []
    for first in range(0, len(rows), rows_per_shard):
        batch = [_make_row(number, rows[number]) for number in _span(first, rows, rows_per_shard)]
        with validated.write_shard(len(shards), {"data": PAIR}) as shard:
            shard.write("data", pa.Table.from_pylist(batch, schema=PAIR.arrow))
            shards.append(shard.commit(Counts(num_in=len(batch), num_out=len(batch))))
    manifest = Manifest(
        stage="validate",
        version=1,
        fingerprint=_FINGERPRINT,
        attempt=1,
        inputs={},
        config={},
        settings={},
        shards=shards,
        files=[],
        counts=Counts.total(shard.counts for shard in shards),
        summary={},
        versions={},
        host="",
        started_at="",
        seconds=0.0,
    )
    clock = _Clock()
    out = open_stage_dir(Folder(str(folder)), "dedupe", _FINGERPRINT, 1)
    context = StageContext(
        inputs={"validate": StageOutput(folder=validated.folder, manifest=manifest)},
        pins={"benchmarks": BenchmarkFiles(files=())},
        out=out,
        store=Folder(str(folder)),
        attempt=1,
        versions={},
        started_at="",
        execution=Execution(),
        resources=Resources(num_workers=1),
        mapper=InProcessMapper(),
        progress=clock,
        is_local=True,
    )
    run(DedupeConfig(rows_per_shard=rows_per_shard), context)
    clock.start("", 0, "")
    return out, clock.seconds


def _span(first: int, rows: Sequence[Texts], count: int) -> range:
    return range(first, min(first + count, len(rows)))


class _Clock:
    """Records the CPU time between the starts of passes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._label, self._since = "", 0.0

    def start(self, label: str, total: int, unit: str) -> None:
        now = time.process_time()
        if self._label:
            self.seconds[self._label] = now - self._since
        self._label, self._since = label, now

    def advance(self, amount: int, note: str = "") -> None:
        pass


def _make_row(number: int, texts: Texts) -> dict[str, Any]:
    def say(role: str, text: str) -> list[dict[str, Any]]:
        others = dict.fromkeys(("reasoning", "tool_calls", "tool_call_id", "name"))
        return [{"role": role, "content": text, **others}]

    prompt, chosen, rejected = (
        say(role, text)
        for role, text in zip(("user", "assistant", "assistant"), texts, strict=True)
    )
    absent = ("tools", "score_chosen", "score_rejected", "margin", "source_id", "extra")
    return {
        "pair_id": pair_id(prompt, chosen, rejected),
        "prompt_id": prompt_id(prompt),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "weight": 1.0,
        "source": "made",
        "source_file": "made.jsonl",
        "source_row": number,
        "split": "train",
        "warnings": [],
        **dict.fromkeys(absent),
    }


def read_all(out: StageDir, role: str) -> list[dict[str, Any]]:
    """Read the rows of all shards."""
    records = [record for _, record in sorted(out.committed().items())]
    return [row for r in records for row in read_file(out.folder, r.files[role]).to_pylist()]


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return word 3-grams by plain Python, which shares no code with the stage."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in folded).split()
    if not words:
        return {tuple(text.split())}
    return {tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2))}


def measure(one: Texts, other: Texts) -> tuple[float, float]:
    """Return the Jaccard similarity of whole pairs, and that of the less similar answer."""

    def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
        return len(a & b) / len(a | b)

    a, b = [shingles(text) for text in one], [shingles(text) for text in other]
    same = jaccard(a[1], b[1]), jaccard(a[2], b[2])
    crossed = jaccard(a[1], b[2]), jaccard(a[2], b[1])
    sides = crossed if sum(same) < sum(crossed) else same
    return jaccard(set().union(*a), set().union(*b)), min(sides)


def meanings(row: Texts) -> Counter[str]:
    """Count what must not differ between near-duplicates: numbers, signs and negations."""
    return Counter(
        found[0].lower()
        for text in row
        for found in re.finditer(
            r"[^\W_]*\d[^\W_]*|!=|[+=<>^%&#$*/-]|\b(not|no|never|cannot|without|t)\b", text, re.I
        )
    )


def show_recall(
    rows: Sequence[Texts],
    kinds: Sequence[tuple[str, int]],
    rejected: Sequence[dict[str, Any]],
    doubtful: set[int],
) -> None:
    """Print, by kind of edit, how many copies are near and what happened to them.

    *Found* copies are not kept beside their base; *marked* ones are kept with a warning, because
    the two differ in a number, a sign or a negation.
    """
    gone = {row["source_row"] for row in rejected}
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    for number, (kind, base) in enumerate(kinds):
        if kind == "base":
            continue
        similarity, least = measure(rows[number], rows[base])
        is_near = similarity >= 0.7 and least >= 0.5
        differs = meanings(rows[number]) != meanings(rows[base])
        tally[kind]["copies"] += 1
        tally[kind]["near"] += is_near
        tally[kind]["found"] += is_near and (number in gone or base in gone)
        tally[kind]["marked"] += (
            is_near and differs and number in doubtful and not gone & {number, base}
        )
        tally[kind]["gone, not near"] += number in gone and not is_near
    print(f"{'kind of edit':<30} {'copies':>7} {'near':>7} {'found':>7} {'marked':>7}  recall")
    tally["all"] = sum(tally.values(), Counter())
    for kind, counts in tally.items():
        settled = counts["found"] + counts["marked"]
        recall = f"{settled / counts['near']:7.4f}" if counts["near"] else "      -"
        columns = [f"{counts[name]:>7}" for name in ("copies", "near", "found", "marked")]
        print(f"{kind:<30} {' '.join(columns)} {recall}")
    print(f"rejected though not near their base: {tally['all']['gone, not near']}")
    _show_precision(rows, rejected)


def _show_precision(rows: Sequence[Texts], rejected: Sequence[dict[str, Any]]) -> None:
    text_of = {}
    for number, row in enumerate(rows):
        made = _make_row(number, row)
        text_of[made["pair_id"]] = row
    near = [row for row in rejected if row["code"] == "DUP_NEAR"]
    right = 0
    for row in near:
        similarity, least = measure(rows[row["source_row"]], text_of[row["kept_pair_id"]])
        right += similarity >= 0.7 and least >= 0.5
    print(f"rejected: {dict(Counter(row['code'] for row in rejected))}")
    print(f"precision of DUP_NEAR: {right / max(len(near), 1):.4f} of {len(near):,}")


if __name__ == "__main__":
    main()
