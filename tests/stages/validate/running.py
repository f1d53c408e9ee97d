"""Helpers of validate's tests: write input files, run the stage, read its output."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.config import parse_config
from schemas.manifest import Counts, ShardRecord
from stages.store.shards import StageDir
from stages.validate import STAGE
from stages.validate.config import ValidateConfig
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.formats.row_reader import RowReader
from stages.validate.inputs import InputConfig, InputFile, find_inputs
from tests.stages_running import make_context, read_rows, stage_dir

GOOD = {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}
"""A row of plain strings that breaks no rule."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Output of the stage."""

    pairs: list[Row]
    rejected: list[Row]
    shards: tuple[ShardRecord, ...]
    summary: Mapping[str, Any]
    out: StageDir

    @property
    def counts(self) -> Counts:
        return Counts.total(shard.counts for shard in self.shards)


def validate(out: Path, *inputs: Path | str | Row, **config: Any) -> Outcome:
    """Run the whole stage in this process; any share of rejected rows is allowed by default.

    An input is a pattern or a block of a recipe.
    """
    settings = {"eval_fraction": 0.0, "max_reject_fraction": 1.0, **config}
    blocks = [given if isinstance(given, dict) else str(given) for given in inputs]
    parsed = parse_config(ValidateConfig, {"inputs": blocks, **settings}, path="")
    directory = stage_dir(out, "validate")
    ctx = make_context(directory, {}, pins={"inputs": find_inputs(parsed.inputs)})
    result = STAGE.run(parsed, ctx)
    return Outcome(
        pairs=read_rows(directory),
        rejected=read_rows(directory, "rejected"),
        shards=tuple(result.shards),
        summary=result.summary,
        out=directory,
    )


def convert_row(row: Mapping[str, Any], format_name: str, **settings: Any) -> PairDraft:
    """Convert a row that gives one pair."""
    (draft,) = RowReader(format=format_name, **settings).read(row)
    return draft


def find_files(*patterns: Path | str) -> tuple[InputFile, ...]:
    """Find the files that patterns match, as the stage does."""
    return find_inputs([InputConfig(path=str(pattern)) for pattern in patterns]).files


def jsonl(rows: Iterable[object]) -> bytes:
    """Write one line a row; a row of bytes is already a line."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return b"".join(line + b"\n" for line in lines)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def spoken(messages: Iterable[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """Return the role and content of each message."""
    return [(message["role"], message["content"]) for message in messages]
