"""What a stage is, and what it is given when it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from schemas.config import config_class
from schemas.manifest import FileRecord, ShardRecord
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput
from stages.store.worker_logs import LOGS, LoggedWorkers


class ShardTask(Protocol):
    """One unit of work: small and picklable, because it travels to a worker."""

    @property
    def index(self) -> int: ...

    @property
    def description(self) -> str:
        """What the shard holds, for the layout and for error messages."""
        ...


T = TypeVar("T", bound=ShardTask)
C = TypeVar("C")

ShardWorker = Callable[[T], ShardRecord]
"""Produces one shard, commits it, and gives back its commit record."""

MakeWorker = Callable[[], ShardWorker[T]]
"""Called once in the process that does the work: loads the model or tokenizer. Must pickle."""


@config_class
class Execution:
    """How a stage is spread over machines. Nothing here changes what is written."""

    num_workers: int | Literal["auto"] = "auto"
    """Workers at once; auto = as many as the machine or cluster has room for."""
    num_cpus_per_worker: float | Literal["auto"] = 1
    """CPU cores that each worker holds; auto = a whole machine's where it holds no GPU, else 1."""
    num_gpus_per_worker: float | Literal["auto"] = 0
    """GPUs that each worker holds; auto = 1 where there are GPUs, else 0."""
    keep_logs: bool = False
    """Write what each worker logs into _logs/ of the stage, a file a shard."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each worker of a stage holds, with every `auto` resolved."""

    num_workers: int
    num_cpus: float = 1
    num_gpus: float = 0
    may_grow: bool = False
    """Whether there may be more workers when nodes join; their number was `auto`."""


class ShardMapper(Protocol):
    """Runs a worker over shards: under Ray, or in this process."""

    def map(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        """Process every task, calling `on_done` here for each shard as it is committed.

        Raises:
            StageFailed: some shards could not be produced; the message names them and the cause.
        """
        ...

    def release(self) -> None:
        """Let go of what is kept for further passes of a stage; called when the stage ends."""
        ...


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin counting `total` units, such as pairs or steps."""
        ...

    def advance(self, amount: int, note: str = "") -> None:
        """Count units as done; the note holds what else is worth seeing, such as the loss."""
        ...

    def show_parts(self, amount: float, note: str) -> None:
        """Say how much is done of units that are not counted yet; the next call replaces it."""
        ...


class Pin(Protocol):
    """A moving name (a branch, a folder, a pattern of files) fixed to content."""

    def identity(self) -> Any:
        """Give what is hashed: content digests, never names that could move."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage hands back when all of its work is committed."""

    shards: Sequence[ShardRecord] = ()
    files: Sequence[FileRecord] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a running stage is given. The driver holds paths and small records, never rows."""

    inputs: Mapping[str, StageOutput]
    """The complete stages that it needs."""
    pins: Mapping[str, Pin]
    """Its moving names by config field, fixed to content."""
    out: StageDir
    store: Folder
    """Where the outputs of all stages lie."""
    attempt: int
    """1, or the number of the `--again` that this is."""
    versions: Mapping[str, str]
    """Python and packages of this run, by name."""
    started_at: str
    """UTC, ISO 8601."""
    execution: Any
    """Its block under `execution:`, of the class that the stage's record names."""
    resources: Resources
    mapper: ShardMapper
    progress: Progress
    is_local: bool
    """Whether to stay in this process: no Ray, no Ray Train."""

    def map_shards(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        *,
        into: StageDir | None = None,
        resources: Resources | None = None,
        label: str = "",
        describe: Callable[[ShardRecord], str] = lambda record: "",
    ) -> list[ShardRecord]:
        """Produce the shards that are not committed yet, and give all records in order.

        Args:
            make_worker: builds, in the worker's process, the function applied to each task.
            tasks: the stage's shards, numbered from 0 without a gap.
            into: the directory that they are committed to, the stage's own unless given.
            resources: what each worker holds, the stage's own unless given.
            label: what the progress line calls this pass inside the stage.
            describe: what else the progress line says about a shard that is done.
        """
        target = into or self.out
        target.write_layout([task.description for task in tasks])
        records = target.committed()
        todo = [task for task in tasks if task.index not in records]
        self.progress.start(label, total=len(tasks), unit="shards")
        if records:
            self.progress.advance(len(records), "already done")

        def on_done(record: ShardRecord) -> None:
            records[record.index] = record
            more = describe(record)
            note = f"{record.counts.num_in:,} rows in {record.seconds:.1f} s"
            self.progress.advance(1, f"{note}, {more}" if more else note)

        if self.execution.keep_logs:
            make_worker = LoggedWorkers(make_worker, self.out.folder.child(LOGS), label)
        if todo:
            self.mapper.map(make_worker, todo, resources or self.resources, on_done)
        return [records[task.index] for task in tasks]


@dataclass(frozen=True, kw_only=True)
class AlignedShards:
    """The task of a stage that is 1:1 with its inputs: shard k of each of them."""

    index: int
    records: Mapping[str, ShardRecord]
    """By stage name."""

    @property
    def description(self) -> str:
        return ", ".join(
            f"{stage}/{record.files['data'].name}" for stage, record in self.records.items()
        )


def align_shards(inputs: Mapping[str, StageOutput], names: Sequence[str]) -> list[AlignedShards]:
    """Pair up the shards of stages that share one layout."""
    layouts = [inputs[name].manifest.shards for name in names]
    assert len({len(layout) for layout in layouts}) == 1, f"{names} have different layouts"
    return [
        AlignedShards(index=row[0].index, records=dict(zip(names, row, strict=True)))
        for row in zip(*layouts, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[C]):
    """A stage's entry in the pipeline's list."""

    name: str
    """Its word on the command line, its key in the recipe, its directory in the store."""
    version: int
    """Raised when equal config would now give other rows or weights."""
    needs: Callable[[C], tuple[str, ...]]
    """The stages whose output it reads, as a function of its config."""
    reads_if_there: tuple[str, ...] = ()
    """Stages that it also reads where another stage needs them."""
    config: type[C]
    """Its block under `stages:`; every field is identity, and hashed."""
    execution: type
    """Its block under `execution:`; nothing in it is hashed."""
    run: Callable[[C, StageContext], StageResult]
    pins: Mapping[str, str] = field(default_factory=dict)
    """Config fields that hold moving names, by kind; the pipeline knows how each kind is pinned."""
    codes: Mapping[str, str] = field(default_factory=dict)
    """What the codes of its rejected rows and of its warnings mean, a sentence each."""
