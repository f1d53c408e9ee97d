"""Unpaired rows: gather the answers to each prompt from all inputs, and pair good with bad ones.

A pass over the parts of the files writes each row under the id of its prompt. Each range of ids is
then one shard of the stage. There, the k-th good answer to a prompt is paired with its k-th bad
one; the shorter list is used again from its start, so every row with an opposite is in some pair.
A row whose pairs break a rule, perhaps by the other row's fault, is paired once more.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from schemas.ids import prompt_id
from schemas.manifest import Counts, ShardRecord
from schemas.rows import Column, RowSchema
from stages.stage import ShardWorker, StageContext
from stages.store.filesystems import Folder
from stages.store.shards import StageDir
from stages.validate.findings import Finding, RowFault
from stages.validate.formats.pair_drafts import PairDraft, UnpairedDraft
from stages.validate.formats.row_reader import RowReader
from stages.validate.inputs import stem_of
from stages.validate.reading import RawRow, Split, read_rows

_BATCH_ROWS = 1000
_RUN_BYTES = 64 << 20
_ROWS_PER_GROUP = 256
"""Small, so that reading one range of ids decodes little else."""
_HEX_DIGITS = 8
"""Ranges are bounded by the first 32 bits of an id."""

GATHERED = RowSchema(
    "unpaired",
    1,
    (
        Column("key", pa.string(), "The prompt's id; of a faulty row, its digest.", nullable=False),
        Column("split", pa.int32(), "Number of the part of the inputs.", nullable=False),
        Column("row", pa.int64(), "Row number in the file.", nullable=False),
        Column("file", pa.string(), "Name of the file.", nullable=False),
        Column("draft", pa.binary(), "The converted row as JSON; null if it is faulty."),
        Column("finding", pa.binary(), "The fault as JSON, of a faulty row."),
        Column("raw", pa.binary(), "The row's first 64 KiB.", nullable=False),
        Column("raw_sha256", pa.string(), "Of the whole row.", nullable=False),
    ),
)
"""Rows as the pass over the parts writes them, in runs that are sorted by key and row."""


@dataclass(frozen=True, kw_only=True)
class GatherTask:
    """A part of a file of unpaired rows."""

    index: int
    split: Split
    reader: RowReader

    @property
    def description(self) -> str:
        return f"{self.split.description} as {self.reader.format}"


@dataclass(frozen=True, kw_only=True)
class UnpairedTask:
    """One shard: all unpaired rows of the prompts in the k-th of n ranges of ids."""

    index: int
    number: int
    """k, from 0."""
    num_ranges: int
    folder: Folder
    """That of the pass that gathered the rows."""
    files: tuple[str, ...]

    @property
    def description(self) -> str:
        return f"unpaired rows, prompts {self.number + 1} of {self.num_ranges}"

    @property
    def ids(self) -> pc.Expression:
        """Select the range's rows."""
        first = f"{math.ceil((self.number << 32) / self.num_ranges):0{_HEX_DIGITS}x}"
        inside = pc.field("key") >= first
        if self.number + 1 == self.num_ranges:
            return inside
        end = f"{math.ceil((self.number + 1 << 32) / self.num_ranges):0{_HEX_DIGITS}x}"
        return inside & (pc.field("key") < end)


class GatheredRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the pass, read again."""

    key: str
    raw: RawRow
    content: UnpairedDraft | Finding


@dataclass(frozen=True, kw_only=True)
class _Gather:
    """Makes the worker that writes the rows of a part under the ids of their prompts."""

    out: StageDir

    def __call__(self) -> ShardWorker[GatherTask]:
        return self._gather

    def _gather(self, task: GatherTask) -> ShardRecord:
        task.split.file.check_size()
        groups = {"data": _ROWS_PER_GROUP}
        num_rows = num_bytes = 0
        with self.out.write_shard(task.index, {"data": GATHERED}, rows_per_group=groups) as shard:
            for rows, size in _cut_runs(_describe(row, task) for row in read_rows(task.split)):
                num_rows += len(rows)
                num_bytes += size
                for begin in range(0, len(rows), _BATCH_ROWS):
                    shard.write_rows("data", rows[begin : begin + _BATCH_ROWS])
            return shard.commit(Counts(num_in=num_rows, more={"num_bytes": num_bytes}))


def _cut_runs(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Cut rows into runs that fit in memory, each sorted by key; return them with their bytes.

    Some files, such as CSV, are one part whatever their size.
    """
    run: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        run.append(row)
        num_bytes += len(row["draft"] or b"") + len(row["raw"])
        if num_bytes >= _RUN_BYTES:
            yield sorted(run, key=itemgetter("key", "row")), num_bytes
            run, num_bytes = [], 0
    if run:
        yield sorted(run, key=itemgetter("key", "row")), num_bytes


def _describe(row: RawRow, task: GatherTask) -> dict[str, Any]:
    """Return a row with the columns of GATHERED."""
    file = task.split.file
    name = row.file or file.name
    raw, sha256 = row.excerpt()
    described = {
        "key": sha256,
        "split": task.index,
        "row": row.number,
        "file": name,
        "draft": None,
        "finding": None,
        "raw": raw,
        "raw_sha256": sha256,
    }
    try:
        if isinstance(row.content, Finding):
            raise RowFault(*row.content)
        draft = task.reader.read_unpaired(row.content)
    except RowFault as fault:
        return described | {"finding": msgspec.json.encode(fault.finding)}
    draft = msgspec.structs.replace(
        draft,
        source=file.source or draft.source or stem_of(name),
        weight=draft.weight * file.weight,
    )
    key = prompt_id(draft.prompt, draft.tools)
    return described | {"key": key, "draft": msgspec.json.encode(draft)}


def gather_unpaired(
    parts: Sequence[tuple[Split, RowReader]], *, split_bytes: int, first: int, ctx: StageContext
) -> list[UnpairedTask]:
    """Gather the rows of all parts by prompt; return the shards that pair them.

    Args:
        parts: the parts of the files of unpaired rows, in source order.
        split_bytes: bytes of rows in one shard.
        first: number of the first of these shards.
        ctx: the stage's context.
    """
    if not parts:
        return []
    tasks = [
        GatherTask(index=index, split=split, reader=reader)
        for index, (split, reader) in enumerate(parts)
    ]
    work = ctx.out.work("unpaired")
    records = ctx.map_shards(_Gather(out=work), tasks, into=work, label="unpaired")
    num_bytes = sum(record.counts.more["num_bytes"] for record in records)
    num_ranges = max(1, math.ceil(num_bytes / split_bytes))
    return [
        UnpairedTask(
            index=first + number,
            number=number,
            num_ranges=num_ranges,
            folder=work.folder,
            files=tuple(record.files["data"].name for record in records),
        )
        for number in range(num_ranges)
    ]


def read_prompts(task: UnpairedTask) -> Iterator[list[GatheredRow]]:
    """Read the rows of each prompt of a range, in source order."""
    paths = [task.folder.file(name) for name in task.files]
    dataset = pads.dataset(paths, format="parquet", filesystem=task.folder.filesystem)
    table = dataset.to_table(filter=task.ids, use_threads=False)
    table = table.sort_by([(name, "ascending") for name in ("key", "split", "row")])
    rows = (
        _restore(row)
        for begin in range(0, table.num_rows, _BATCH_ROWS)
        for row in table.slice(begin, _BATCH_ROWS).to_pylist()
    )
    for _, of_prompt in groupby(rows, key=attrgetter("key")):
        yield list(of_prompt)


def _restore(row: dict[str, Any]) -> GatheredRow:
    content: UnpairedDraft | Finding
    if row["draft"] is None:
        content = msgspec.json.decode(row["finding"], type=Finding)
    else:
        content = msgspec.json.decode(row["draft"], type=UnpairedDraft)
    raw = RawRow(
        number=row["row"],
        content={},
        raw=row["raw"],
        sha256=row["raw_sha256"],
        file=row["file"],
    )
    return GatheredRow(key=row["key"], raw=raw, content=content)


def pair_answers(rows: Sequence[GatheredRow]) -> list[tuple[int, int]]:
    """Pair the rows of one prompt: positions of a good and of a bad answer.

    Each row is in at least one pair if there are answers of both kinds; otherwise none is.
    """
    good, bad = _list_answers(rows, is_good=True), _list_answers(rows, is_good=False)
    if not good or not bad:
        return []
    longer = max(len(good), len(bad))
    return [(good[at % len(good)], bad[at % len(bad)]) for at in range(longer)]


def pair_again(rows: Sequence[GatheredRow], kept: AbstractSet[int]) -> list[tuple[int, int]]:
    """Pair the rows whose pairs all broke a rule with the first kept row of the other label."""
    good, bad = _list_answers(rows, is_good=True), _list_answers(rows, is_good=False)
    first_good, first_bad = ([at for at in answers if at in kept][:1] for answers in (good, bad))
    return [
        *((at, other) for other in first_bad for at in good if at not in kept),
        *((other, at) for other in first_good for at in bad if at not in kept),
    ]


def _list_answers(rows: Sequence[GatheredRow], *, is_good: bool) -> list[int]:
    contents = [(at, row.content) for at, row in enumerate(rows)]
    return [at for at, c in contents if isinstance(c, UnpairedDraft) and c.is_good == is_good]


def join_answers(chosen: GatheredRow, rejected: GatheredRow) -> PairDraft:
    """Make a pair of two rows; it has the first one's source and id, and the mean weight."""
    good, bad = chosen.content, rejected.content
    assert isinstance(good, UnpairedDraft)
    assert isinstance(bad, UnpairedDraft)
    return PairDraft(
        prompt=good.prompt,
        chosen=good.answer,
        rejected=bad.answer,
        tools=good.tools,
        score_chosen=None,
        score_rejected=None,
        margin=None,
        weight=(good.weight + bad.weight) / 2,
        source=good.source,
        source_id=good.source_id,
        extra=_join_extra(good, rejected, bad),
        warnings=good.warnings + bad.warnings,
    )


def _join_extra(good: UnpairedDraft, rejected: GatheredRow, bad: UnpairedDraft) -> str:
    """Keep the columns that both rows have left, and where the rejected answer came from."""
    place = {"source_file": rejected.raw.file, "source_row": rejected.raw.number}
    extra = {
        "chosen": msgspec.Raw((good.extra or "{}").encode()),
        "rejected": msgspec.Raw((bad.extra or "{}").encode()),
        "rejected_from": place | ({"source_id": bad.source_id} if bad.source_id else {}),
    }
    return msgspec.json.encode(extra).decode()
