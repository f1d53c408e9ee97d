"""Stage validate: which input rows are usable preference pairs, and why are the others not?"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Annotated, Any

import pyarrow.compute as pc
from pydantic import AfterValidator, Field

from schemas.config import config_class
from schemas.errors import DataError
from schemas.ids import pair_id, prompt_id
from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED
from stages.base import Execution, ShardWorker, Stage, StageContext, StageResult
from stages.shards import StageDir, read_file
from stages.validate.findings import Finding, RowFault, make_printable
from stages.validate.formats import FORMATS, Draft, convert_row, recognise_format
from stages.validate.inputs import InputFile, InputFiles
from stages.validate.messages import Message
from stages.validate.reading import (
    RawRow,
    Split,
    count_lines,
    limit_rows,
    read_rows,
    sniff_container,
    split_file,
    whole_file,
)
from stages.validate.rules import check_pair, describe_code

AUTO = "auto"
_SAMPLE_ROWS = 1000
_BATCH_ROWS = 1000
_BATCH_BYTES = 16 << 20
_NOT_FAULTS = frozenset({"TIE"})
"""Reasons that say something about the data, not that something is wrong with it."""


def _check_format_name(name: str) -> str:
    if name != AUTO and name not in FORMATS:
        raise ValueError(f"no such format; known are {AUTO}, {', '.join(FORMATS)}")
    return name


@config_class
class ValidateConfig:
    """Which rows are read, and what becomes of them."""

    inputs: list[str] = Field(min_length=1)
    """Files, folders or globs of JSONL (plain, gzip, zstd) and Parquet, told apart by content."""
    format: Annotated[str, AfterValidator(_check_format_name)] = AUTO
    """How rows are laid out; auto = recognised for each file by its first 1,000 rows. Plain strings
    become messages of a user and an assistant, character for character."""
    eval_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the prompts that are held out (split = eval), each with all of its pairs."""
    split_seed: int = 0
    """Another number holds out other prompts."""
    max_pairs: int | None = Field(default=None, ge=1)
    """For a first try: read only so many rows, from the start of the first input on; null = all."""
    max_reject_fraction: float = Field(default=0.1, ge=0, le=1)
    """The stage fails when a larger share of the rows is rejected; ties don't count as faults."""
    split_bytes: int = Field(default=64 << 20, ge=1)
    """Bytes of input that one shard holds, before compression; row groups of Parquet stay whole,
    and compressed JSONL is one shard a file."""


@dataclass(frozen=True, kw_only=True)
class ValidateTask:
    """One shard: a part of a file, in a known format."""

    index: int
    split: Split
    format: str

    @property
    def description(self) -> str:
        return f"{_describe_split(self.split)} as {self.format}"


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """One shard of the pass that counts lines."""

    index: int
    split: Split

    @property
    def description(self) -> str:
        return _describe_split(self.split)


def build_pair(
    draft: Draft,
    *,
    source_file: InputFile,
    source_row: int,
    warnings: Sequence[Finding],
    split: str,
) -> dict[str, Any]:
    """Give the row of a valid pair, with the columns of schemas.rows.PAIR."""
    return {
        "pair_id": pair_id(draft.prompt, draft.chosen, draft.rejected, draft.tools),
        "prompt_id": prompt_id(draft.prompt, draft.tools),
        "prompt": draft.prompt,
        "chosen": draft.chosen,
        "rejected": draft.rejected,
        "tools": draft.tools,
        "score_chosen": draft.score_chosen,
        "score_rejected": draft.score_rejected,
        "margin": draft.margin,
        "weight": draft.weight,
        "source": draft.source or source_file.stem,
        "source_file": source_file.name,
        "source_row": source_row,
        "source_id": draft.source_id,
        "split": split,
        "warnings": list(dict.fromkeys(warning.code for warning in warnings)),
        "extra": draft.extra,
    }


def build_rejection(row: RawRow, findings: Sequence[Finding], file: InputFile) -> dict[str, Any]:
    """Give the row of a rejected one, with the columns of schemas.rows.REJECTED."""
    first = findings[0]
    raw, sha256 = row.excerpt()
    return {
        "code": first.code,
        "codes": list(dict.fromkeys(finding.code for finding in findings)),
        "field": None if first.field is None else make_printable(first.field),
        "detail": make_printable(first.detail),
        "source_file": file.name,
        "source_row": row.number,
        "pair_id": None,
        "kept_pair_id": None,
        "similarity": None,
        "raw": raw,
        "raw_sha256": sha256,
    }


def choose_split(prompt: Sequence[Message], *, eval_fraction: float, seed: int) -> str:
    """Decide by a prompt's text alone whether its pairs train or are held out.

    System messages, white space and Unicode composition make no difference, so that variants of one
    prompt do not straddle. A larger fraction holds out a superset of what a smaller one does.

    Returns:
        train or eval.
    """
    hasher = hashlib.sha256(str(seed).encode())
    for message in prompt:
        if message["role"] != "system":
            text = " ".join(unicodedata.normalize("NFC", message["content"] or "").split())
            hasher.update(f"\0{message['role']}\0{text}".encode())
    position = int.from_bytes(hasher.digest()[:8], "big") / 2**64
    return "eval" if position < eval_fraction else "train"


@dataclass(frozen=True, kw_only=True)
class _Validate:
    """Makes the worker that validates one shard."""

    out: StageDir
    eval_fraction: float
    split_seed: int

    def __call__(self) -> ShardWorker[ValidateTask]:
        return self._validate_shard

    def _validate_shard(self, task: ValidateTask) -> ShardRecord:
        tally = _Tally()
        task.split.file.check_size()
        with self.out.write_shard(task.index, {"data": PAIR, "rejected": REJECTED}) as shard:
            for batch in _batches(read_rows(task.split)):
                rows: dict[str, list[dict[str, Any]]] = {"data": [], "rejected": []}
                for raw in batch:
                    role, row = self._judge(raw, task)
                    rows[role].append(row)
                tally.add(pairs=rows["data"], rejections=rows["rejected"])
                for role in rows:
                    shard.write_rows(role, rows[role])
            return shard.commit(tally.counts())

    def _judge(self, raw: RawRow, task: ValidateTask) -> tuple[str, dict[str, Any]]:
        """Turn a raw row into a row of data or of rejected, and say which."""
        file = task.split.file
        if isinstance(raw.content, Finding):
            return "rejected", build_rejection(raw, [raw.content], file)
        try:
            draft = convert_row(raw.content, task.format)
        except RowFault as fault:
            return "rejected", build_rejection(raw, [fault.finding], file)
        rejections, warnings = check_pair(draft)
        if rejections:
            return "rejected", build_rejection(raw, rejections, file)
        split = choose_split(draft.prompt, eval_fraction=self.eval_fraction, seed=self.split_seed)
        pair = build_pair(
            draft, source_file=file, source_row=raw.number, warnings=warnings, split=split
        )
        return "data", pair


class _Tally:
    """Counts what became of the rows of a shard."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.num_eval = 0
        self.reasons: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    def add(
        self, pairs: Sequence[Mapping[str, Any]], rejections: Sequence[Mapping[str, Any]]
    ) -> None:
        self.num_pairs += len(pairs)
        self.num_eval += sum(pair["split"] == "eval" for pair in pairs)
        self.warnings.update(code for pair in pairs for code in pair["warnings"])
        self.reasons.update(rejection["code"] for rejection in rejections)

    def counts(self) -> Counts:
        return Counts(
            num_in=self.num_pairs + self.reasons.total(),
            num_out=self.num_pairs,
            reasons=dict(sorted(self.reasons.items())),
            warnings=dict(sorted(self.warnings.items())),
            more={"num_eval": self.num_eval},
        )


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Gather rows up to a number and a size, so that memory stays bounded."""
    batch: list[RawRow] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += len(row.raw)
        if len(batch) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class _CountLines:
    """Makes the worker that counts the lines of one byte range, so that rows can be numbered."""

    out: StageDir

    def __call__(self) -> ShardWorker[CountTask]:
        return self._count

    def _count(self, task: CountTask) -> ShardRecord:
        task.split.file.check_size()
        with self.out.write_shard(task.index, {}) as shard:
            return shard.commit(Counts(num_in=count_lines(task.split)))


def run(config: ValidateConfig, ctx: StageContext) -> StageResult:
    """Validate all input rows.

    Raises:
        ConfigError: a file's format cannot be told.
        DataError: a file cannot be read, or too many rows are rejected.
    """
    inputs = ctx.pins["inputs"]
    assert isinstance(inputs, InputFiles)
    formats, splits = _plan_splits(config, inputs.files)
    splits = _number_rows(splits, ctx)
    tasks = [
        ValidateTask(index=index, split=split, format=formats[split.file.name])
        for index, split in enumerate(splits)
    ]
    worker = _Validate(
        out=ctx.out, eval_fraction=config.eval_fraction, split_seed=config.split_seed
    )
    shards = ctx.map_shards(worker, tasks)
    _refuse_faulty_data(shards, config.max_reject_fraction, ctx.out)
    num_rows = sum(shard.counts.num_in for shard in shards)
    seconds = sum(shard.seconds for shard in shards)
    summary = {
        "formats": formats,
        "rows_per_second_per_worker": round(num_rows / max(seconds, 0.001)),
    }
    return StageResult(shards=shards, summary=summary)


def _plan_splits(
    config: ValidateConfig, files: Sequence[InputFile]
) -> tuple[dict[str, str], list[Split]]:
    """Give the format of each file that is read, and the parts that files are read in."""
    formats: dict[str, str] = {}
    splits: list[Split] = []
    num_left = config.max_pairs
    for file in files:
        if num_left == 0:
            break
        container = sniff_container(file)
        formats[file.name] = _find_format(config, whole_file(file, container))
        parts = split_file(file, container, split_bytes=config.split_bytes)
        if num_left is not None:
            parts, num_taken = limit_rows(parts, num_left)
            num_left -= num_taken
        splits.extend(parts)
    return formats, splits


def _find_format(config: ValidateConfig, whole: Split) -> str:
    rows = islice(read_rows(whole), _SAMPLE_ROWS)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{whole.file.name} has no rows. Remove it from stages.validate.inputs.")
    if config.format != AUTO:
        return config.format
    contents = (row.content for row in chain([first], rows))
    readable = (content for content in contents if not isinstance(content, Finding))
    return recognise_format(readable, file=whole.file.name)


def _number_rows(splits: Sequence[Split], ctx: StageContext) -> list[Split]:
    """Say for each byte range of a file which row it starts with.

    That takes a pass that counts newlines in all ranges but the last of each file, by the workers.
    """
    followed = [
        before
        for before, after in pairwise(splits)
        if after.container == "jsonl" and after.file == before.file
    ]
    tasks = [CountTask(index=index, split=split) for index, split in enumerate(followed)]
    work = ctx.out.work("lines")
    records = (
        ctx.map_shards(_CountLines(out=work), tasks, into=work, label="lines") if tasks else []
    )
    num_lines = {
        (task.split.file.name, task.split.begin): record.counts.num_in
        for task, record in zip(tasks, records, strict=True)
    }
    numbered: list[Split] = []
    for split in splits:
        if split.container == "jsonl" and split.begin > 0:
            before = numbered[-1]
            first_row = before.first_row + num_lines[before.file.name, before.begin]
            split = replace(split, first_row=first_row)
        numbered.append(split)
    return numbered


def _refuse_faulty_data(
    shards: Sequence[ShardRecord], max_reject_fraction: float, out: StageDir
) -> None:
    """End the stage if more rows than allowed have faults, and show the most frequent ones."""
    total = Counts.total(shard.counts for shard in shards)
    faults = Counter({c: n for c, n in total.reasons.items() if c not in _NOT_FAULTS})
    if faults.total() <= max_reject_fraction * total.num_in:
        return
    lines = [
        f"  {code}: {count:,} rows. {describe_code(code)}\n    {_find_example(shards, code, out)}"
        for code, count in faults.most_common(5)
    ]
    raise DataError(
        f"{faults.total():,} of {total.num_in:,} rows have faults "
        f"({faults.total() / total.num_in:.1%}; allowed are {max_reject_fraction:.1%}). "
        "The most frequent:\n" + "\n".join(lines) + "\n"
        f"All of them, with the rows as they were read, are in {out.folder.uri}/rejected/. "
        "Mend the input, name another stages.validate.format, or, to go on without these rows, "
        "raise stages.validate.max_reject_fraction."
    )


def _find_example(shards: Sequence[ShardRecord], code: str, out: StageDir) -> str:
    shard = next(shard for shard in shards if code in shard.counts.reasons)
    columns = ["code", "field", "detail", "source_file", "source_row"]
    table = read_file(out.folder, shard.files["rejected"], columns=columns)
    row = table.filter(pc.equal(table["code"], code)).slice(0, 1).to_pylist()[0]
    place = f"{row['source_file']} row {row['source_row']}"
    return f"{place}{', ' + row['field'] if row['field'] else ''}: {row['detail']}"


def _describe_split(split: Split) -> str:
    unit = "row groups" if split.container == "parquet" else "bytes"
    rows = "" if split.max_rows is None else f", {split.max_rows} rows"
    return f"{split.file.name} ({split.container}, {unit} {split.begin} to {split.end}{rows})"


def _needs(config: ValidateConfig) -> tuple[str, ...]:
    return ()


STAGE = Stage(
    name="validate",
    version=1,
    needs=_needs,
    config=ValidateConfig,
    execution=Execution,
    run=run,
    pins={"inputs": "files"},
)
