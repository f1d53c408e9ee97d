"""Running the stage over hand-made rows, and plain-Python oracles of similarity."""

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.manifest import Counts
from schemas.rows import PAIR, REJECTED
from stages.dedupe import run
from stages.dedupe.config import DedupeConfig
from stages.dedupe.contamination import pin_benchmarks
from stages.stage import StageResult
from stages.store.shards import StageDir
from tests.stages_rows import pair_row
from tests.stages_running import make_context, open_output, read_rows, stage_dir

Rows = list[dict[str, Any]]
Texts = tuple[str, str, str]

WORDS = [
    first + middle + last
    for first in ("b", "d", "f", "k", "l", "m", "p", "r", "s", "v")
    for middle in ("a", "e", "i", "o", "u")
    for last in ("n", "rt", "l", "sk", "m", "x")
]
"""300 meaningless words; none is a number or a negation."""


def dedupe(folder: Path, shards: Sequence[Rows], **config: Any) -> StageDir:
    """Write rows as validate would, in these shards, and run the stage over them."""
    out = stage_dir(folder, "dedupe")
    run_into(out, folder, shards, **config)
    return out


def run_into(out: StageDir, folder: Path, shards: Sequence[Rows], **config: Any) -> StageResult:
    """Like `dedupe`, into a directory that may hold a part of the work."""
    validated = stage_dir(folder, "validate")
    records = []
    for index, rows in enumerate(shards):
        with validated.write_shard(index, {"data": PAIR, "rejected": REJECTED}) as shard:
            shard.write_rows("data", rows)
            records.append(shard.commit(Counts(num_in=len(rows), num_out=len(rows))))
    parsed = DedupeConfig(**config)
    context = make_context(
        out,
        {"validate": open_output(validated, "validate", records)},
        pins={"benchmarks": pin_benchmarks(parsed.benchmarks)},
    )
    return run(parsed, context)


def at(place: int, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**row, "source_row": place, **more}


def numbered(*texts: Texts) -> Rows:
    """Rows with these texts, numbered 0, 1, …"""
    return [at(place, pair_row(*row)) for place, row in enumerate(texts)]


def rejected_codes(out: StageDir) -> dict[int, str]:
    return {row["source_row"]: row["code"] for row in read_rows(out, "rejected")}


def kept_places(out: StageDir) -> list[int]:
    return sorted(row["source_row"] for row in read_rows(out))


def warnings_of(out: StageDir) -> dict[int, list[str]]:
    return {row["source_row"]: row["warnings"] for row in read_rows(out) if row["warnings"]}


def content_of(out: StageDir) -> list[Any]:
    """Return the names of all files of the stage, which hold the digests of their content."""
    return [record.files for _, record in sorted(out.committed().items())]


def say(num_words: int, seed: int) -> str:
    """Return this number of words, drawn by a seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def replace_word(text: str, place: int, word: str = "changed") -> str:
    words = text.split(" ")
    words[place] = word
    return " ".join(words)


def shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    """Return the word 3-grams of a text with spaces, by plain Python."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in folded).split()
    return {tuple(words[k : k + size]) for k in range(max(1, len(words) - size + 1))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other)


def similarity(one: Texts, other: Texts) -> float:
    """Return the Jaccard similarity of prompt and answers together."""
    return jaccard(*(set().union(*map(shingles, texts)) for texts in (one, other)))
