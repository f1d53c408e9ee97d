"""Which parts of which files become shards, in which format, and with which row do they start?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from schemas.errors import DataError
from schemas.manifest import Counts, ShardRecord
from stages.base import ShardWorker, StageContext
from stages.shards import StageDir
from stages.validate.config import ValidateConfig
from stages.validate.findings import Finding
from stages.validate.formats import (
    AUTO,
    MAP,
    RowReader,
    check_columns,
    recognise_format,
)
from stages.validate.inputs import InputFile
from stages.validate.reading import (
    Split,
    count_lines,
    limit_rows,
    read_rows,
    sniff_container,
    split_file,
    whole_file,
)

_SAMPLE_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class ValidateTask:
    """One shard: a part of a file, and how its rows are read."""

    index: int
    split: Split
    reader: RowReader

    @property
    def description(self) -> str:
        return f"{_describe_split(self.split)} as {self.reader.format}"


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """One shard of the pass that counts lines."""

    index: int
    split: Split

    @property
    def description(self) -> str:
        return _describe_split(self.split)


def plan_tasks(
    config: ValidateConfig, files: Sequence[InputFile], ctx: StageContext
) -> list[ValidateTask]:
    """Lay out the stage: every part of every file that is read, in source order.

    Raises:
        ConfigError: a file's format cannot be told.
        DataError: a file cannot be read.
    """
    readers, splits = _plan_splits(config, files)
    return [
        ValidateTask(index=index, split=split, reader=readers[split.file.name])
        for index, split in enumerate(_number_rows(splits, ctx))
    ]


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


def _plan_splits(
    config: ValidateConfig, files: Sequence[InputFile]
) -> tuple[dict[str, RowReader], list[Split]]:
    """Say how each file is read, and the parts that files are read in."""
    readers: dict[str, RowReader] = {}
    splits: list[Split] = []
    num_left = config.max_pairs
    for file in files:
        if num_left == 0:
            break
        container = sniff_container(file)
        readers[file.name] = _choose_reader(config, whole_file(file, container))
        parts = split_file(file, container, split_bytes=config.split_bytes)
        if num_left is not None:
            parts, num_taken = limit_rows(parts, num_left)
            num_left -= num_taken
        splits.extend(parts)
    return readers, splits


def _choose_reader(config: ValidateConfig, whole: Split) -> RowReader:
    """Say how a file is read: as the recipe says, or as a sample of its rows tells."""
    file = whole.file
    sample = list(islice(read_rows(whole), _SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{file.name} has no rows. Remove it from stages.validate.inputs.")
    rows = [row.content for row in sample if not isinstance(row.content, Finding)]
    name = file.config.format or config.format
    if file.config.map is not None:
        check_columns(file.config.map, rows, file=file.name)
        name = MAP
    elif name == AUTO:
        name = recognise_format(rows, file=file.name)
    return RowReader(
        format=name,
        column_map=file.config.map,
        pair_policy=config.pair_policy,
        min_margin=config.min_margin,
    )


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


def _describe_split(split: Split) -> str:
    unit = "row groups" if split.container == "parquet" else "bytes"
    rows = "" if split.max_rows is None else f", {split.max_rows} rows"
    return f"{split.file.name} ({split.container}, {unit} {split.begin} to {split.end}{rows})"
