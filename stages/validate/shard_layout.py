"""Cut the input files into shards: byte ranges or whole files, with format and first row number."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import ConfigError, DataError
from schemas.manifest import Counts, ShardRecord
from schemas.rows import Column, RowSchema
from stages.stage import ShardWorker, StageContext
from stages.store.shards import StageDir, read_file
from stages.validate.config import ValidateConfig
from stages.validate.findings import Finding, make_printable
from stages.validate.formats import AUTO, recognise_format
from stages.validate.formats.column_map import MAP, check_columns
from stages.validate.formats.row_reader import RowReader
from stages.validate.inputs import InputFile, SampledInput
from stages.validate.reading import (
    RawRow,
    Sample,
    Split,
    count_lines,
    limit_rows,
    read_rows,
    sample_key,
    sniff_container,
    split_file,
    whole_file,
)
from stages.validate.reading.json_tables import MAX_TABLE_BYTES
from stages.validate.unpaired import UnpairedTask, gather_unpaired

_SAMPLE_ROWS = 1000
_SHOWN_ROWS = 5
_KEYS_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True)
class ValidateTask:
    """One shard: a part of a file and the reader of its rows."""

    index: int
    split: Split
    reader: RowReader

    @property
    def description(self) -> str:
        return f"{self.split.description} as {self.reader.format}"


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """One shard of a pass over parts of files, before rows are validated."""

    index: int
    split: Split

    @property
    def description(self) -> str:
        return self.split.description


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The stage's shards, and what is known of the files before they are read in full."""

    tasks: list[ValidateTask | UnpairedTask]
    formats: dict[str, str]
    """Format of each file, by name."""
    rows_before_sampling: dict[str, int]
    """Number of rows of each file of a sampled input, by name."""


def plan_shards(config: ValidateConfig, files: Sequence[InputFile], ctx: StageContext) -> ShardPlan:
    """Lay out the stage's shards: the parts of all files in source order, then unpaired rows.

    Raises:
        ConfigError: a file's format is not recognised, or `max_rows` and `max_pairs` are both set.
        DataError: a file cannot be read.
    """
    if config.max_pairs is not None and any(file.sampled for file in files):
        raise ConfigError(
            "stages.validate.max_pairs: it takes the first rows, and an input's max_rows takes a "
            "sample of them. Set only one of the two."
        )
    readers, splits = _plan_splits(config, files)
    splits = _take_samples(_number_rows(splits, ctx), ctx)
    paired = [split for split in splits if not readers[split.file.name].is_unpaired]
    unpaired = [split for split in splits if readers[split.file.name].is_unpaired]
    num_rows: Counter[str] = Counter()
    for split in splits:
        if split.sample is not None:
            num_rows[split.file.name] += split.sample.num_rows
    return ShardPlan(
        tasks=[
            *(
                ValidateTask(index=index, split=split, reader=readers[split.file.name])
                for index, split in enumerate(paired)
            ),
            *gather_unpaired(
                [(split, readers[split.file.name]) for split in unpaired],
                split_bytes=config.split_bytes,
                first=len(paired),
                ctx=ctx,
            ),
        ],
        formats={split.file.name: readers[split.file.name].format for split in splits},
        rows_before_sampling=dict(num_rows),
    )


@dataclass(frozen=True, kw_only=True)
class _CountLines:
    """Makes the worker that counts the lines of byte ranges, so that rows can be numbered."""

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
    """Return the reader of each file, and the parts of all files."""
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
    """Return a file's reader, from the recipe or from a sample of its rows."""
    file = whole.file
    sample = list(islice(read_rows(whole), _SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{file.name} has no rows. Remove it from stages.validate.inputs.")
    rows = [row.content for row in sample if not isinstance(row.content, Finding)]
    name = file.format or config.format
    if file.map is not None:
        check_columns(file.map, rows, file=file.name)
        name = MAP
    elif name == AUTO:
        if not rows:
            raise DataError(_describe_unreadable(file.name, whole, sample))
        name = recognise_format(rows, file=file.name)
    return RowReader(
        format=name,
        column_map=file.map,
        pair_policy=config.pair_policy,
        min_margin=config.min_margin,
    )


def _describe_unreadable(file: str, whole: Split, sample: Sequence[RawRow]) -> str:
    """Describe a file whose first rows all have faults, by the codes of the first of them."""
    found = [
        f"{row.place}: {row.content.code} ({_describe_fault(row.content)})"
        for row in sample[:_SHOWN_ROWS]
        if isinstance(row.content, Finding)
    ]
    more = "; …" if len(sample) > len(found) else ""
    advice = ""
    if whole.container.kind.startswith("json"):
        advice = (
            " A JSON file holds one object a line, an array of objects, or one object around all "
            f"rows ({MAX_TABLE_BYTES >> 20} MiB at most)."
        )
    return (
        f"{file}: none of its first {len(sample):,} rows can be read as {whole.container.kind}: "
        f"{'; '.join(found)}{more}. Mend them, or remove the file from stages.validate.inputs."
        f"{advice}"
    )


def _describe_fault(fault: Finding) -> str:
    field = "" if fault.field is None else f"{fault.field}: "
    return make_printable(f"{field}{fault.detail}")[:200]


def _number_rows(splits: Sequence[Split], ctx: StageContext) -> list[Split]:
    """Set the number of the first row of each byte range of a file.

    The workers count the newlines in all ranges but the last of each file.
    """
    followed = [
        before
        for before, after in pairwise(splits)
        if after.container.is_cut_by_bytes and after.file == before.file
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
        if split.container.is_cut_by_bytes and split.begin > 0:
            before = numbered[-1]
            first_row = before.first_row + num_lines[before.file.name, before.begin]
            split = replace(split, first_row=first_row)
        numbered.append(split)
    return numbered


_KEYS = RowSchema("keys", 1, (Column("key", pa.uint64(), "Of a row, by seed and content."),))


@dataclass(frozen=True, kw_only=True)
class _FindKeys:
    """Makes the worker that finds the smallest keys of parts of a sampled input.

    `max_rows` + 1 keys are enough to find where the sample ends.
    """

    out: StageDir

    def __call__(self) -> ShardWorker[CountTask]:
        return self._find

    def _find(self, task: CountTask) -> ShardRecord:
        file = task.split.file
        file.check_size()
        assert file.sampled is not None
        num_rows, wanted = 0, file.sampled.max_rows + 1
        keys = np.empty(0, np.uint64)
        rows = read_rows(task.split)
        while found := [sample_key(row, file.sampled.seed) for row in islice(rows, _KEYS_AT_ONCE)]:
            num_rows += len(found)
            keys = np.sort(np.concatenate([keys, np.array(found, np.uint64)]))[:wanted]
        with self.out.write_shard(task.index, {"data": _KEYS}) as shard:
            shard.write("data", pa.table({"key": keys}))
            return shard.commit(Counts(num_in=num_rows))


def _take_samples(splits: Sequence[Split], ctx: StageContext) -> list[Split]:
    """Choose the rows of inputs with `max_rows`, by a pass over their parts."""
    parts = [split for split in splits if split.file.sampled]
    tasks = [CountTask(index=index, split=split) for index, split in enumerate(parts)]
    work = ctx.out.work("sample")
    records = ctx.map_shards(_FindKeys(out=work), tasks, into=work, label="sample") if tasks else []
    smallest: dict[SampledInput, npt.NDArray[np.uint64]] = {}
    for split, record in zip(parts, records, strict=True):
        assert split.file.sampled is not None
        keys = read_file(work.folder, record.files["data"])["key"].to_numpy()
        before = smallest.get(split.file.sampled, np.empty(0, np.uint64))
        both = np.sort(np.concatenate([before, keys]))
        smallest[split.file.sampled] = both[: split.file.sampled.max_rows + 1]
    num_rows = iter(record.counts.num_in for record in records)
    return [
        replace(
            split,
            sample=Sample(
                seed=sampled.seed,
                max_key=find_max_key(smallest[sampled], sampled.max_rows),
                num_rows=next(num_rows),
            ),
        )
        if (sampled := split.file.sampled)
        else split
        for split in splits
    ]


def find_max_key(keys: npt.NDArray[np.uint64], max_rows: int) -> int:
    """Return the largest key of a sample of at most `max_rows` rows.

    Args:
        keys: uint64, ascending: the smallest keys of the input, `max_rows` + 1 of them if there are
            as many.
    Returns:
        The key; -1 if more than `max_rows` rows share the smallest key, so that none is taken.
    """
    if len(keys) <= max_rows:
        return int(keys[-1]) if len(keys) else -1
    # Rows of one key are taken together, so the first key left out bounds the sample.
    taken = keys[keys < keys[max_rows]]
    return int(taken[-1]) if len(taken) else -1
