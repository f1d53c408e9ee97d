"""What a stage is, what it is given when it runs, and what it tells the engine about itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from schemas.config import config_class
from schemas.manifest import Counts, FileRecord, Manifest, ShardRecord
from stages.cost import Lengths, Measured, TokenCount, Workload, count_shards, measure_rows
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput
from stages.store.worker_logs import LOGS, LoggedWorkers


class ShardTask(Protocol):
    """One unit of work; small and picklable, because it travels to a worker."""

    @property
    def index(self) -> int: ...

    @property
    def description(self) -> str:
        """What the shard holds, for the layout and for error messages."""
        ...


T = TypeVar("T", bound=ShardTask)
C = TypeVar("C")

ShardWorker = Callable[[T], ShardRecord]
"""Produces one shard, commits it, and returns its commit record."""

MakeWorker = Callable[[], ShardWorker[T]]
"""Called once in the process that does the work: loads the model or tokenizer. Must pickle."""


@config_class
class Execution:
    """Settings that spread a stage over machines. None of them changes what is written."""

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
    """Workers of a stage and what each of them holds, with every `auto` resolved."""

    num_workers: int
    num_cpus: float = 1
    num_gpus: float = 0
    may_grow: bool = False
    """Whether more workers may start when nodes join, because their number was `auto`."""


class ShardMapper(Protocol):
    """Runs a worker over shards, under Ray or in this process."""

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
        """Free what is kept for further passes of a stage; called when the stage ends."""
        ...


class Progress(Protocol):
    """Display of how far a stage is."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin counting `total` units, such as pairs or steps."""
        ...

    def advance(self, amount: int, note: str = "") -> None:
        """Count units as done; the note holds what else is worth seeing, such as the loss."""
        ...

    def show_parts(self, amount: float, note: str) -> None:
        """Show the done part of units that are not counted yet; the next call replaces it."""
        ...


class Pin(Protocol):
    """A moving name (a branch, a folder, a pattern of files) fixed to content."""

    def identity(self) -> Any:
        """Return what is hashed: content digests, never names that could move."""
        ...


@runtime_checkable
class TextPin(Pin, Protocol):
    """A word, or the name of a file with a text, fixed to its content."""

    @property
    def text(self) -> str:
        """The word, which is also its identity, or the file's text, which is hashed."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage returns when all of its work is committed."""

    shards: Sequence[ShardRecord] = ()
    files: Sequence[FileRecord] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a running stage is given. The driver holds paths and small records, never rows."""

    inputs: Mapping[str, StageOutput]
    """The complete stages that it reads, by name."""
    pins: Mapping[str, Pin]
    """Its moving names by config field, fixed to content."""
    out: StageDir
    store: Folder
    """The store that holds the outputs of all stages."""
    attempt: int
    """1, or the number of this `--again`."""
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
        """Produce the shards that are not committed yet, and return all records in order.

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
    """Task of a stage that is 1:1 with its inputs: shard k of each of them."""

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


# --- what a stage sees before it runs -----------------------------------------------------------


class RecipeView(Protocol):
    """The settings of all stages of a recipe, as one stage may read them before anything runs."""

    @property
    def has_gpus(self) -> bool:
        """Whether the stages will run where there are GPUs."""
        ...

    def config(self, stage: str) -> Any:
        """Return a stage's config, completed."""
        ...

    def pin(self, stage: str, name: str) -> Pin | None:
        """Fix the moving name in a field of a stage's config, or take what the field inherits.

        Returns:
            None where the field is None and inherits nothing.
        """
        ...


def auto_dtype(recipe: RecipeView) -> Literal["bfloat16", "float32"]:
    """Return what `dtype: auto` means on the machines of a recipe."""
    return "bfloat16" if recipe.has_gpus else "float32"


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One planned stage, as its own functions see it."""

    config: Any
    """Its config, completed."""
    execution: Any
    """Its block under `execution:`."""
    pins: Mapping[str, Pin]
    """Its moving names by config field, fixed to content."""
    out: StageDir
    store: Folder
    attempt: int
    """1, or the number of this `--again`."""
    recipe: RecipeView


class EarlierOutput(Protocol):
    """An output in this or another store from which a stage can take values."""

    @property
    def folder(self) -> Folder: ...

    @property
    def versions(self) -> Sequence[Mapping[str, str]]:
        """Versions, by package, of all software that computed its values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """How a stage takes values from earlier outputs of its kind instead of computing them."""

    unit: str
    """Name of what is reused, such as sequences."""
    index: str
    """Directory of the store with the entries `<key>/<output>.json` that name reusable outputs."""
    find: Callable[[StageView], Sequence[EarlierOutput]]
    """Lists the outputs that the stage would take values from."""
    measure_share: Callable[
        [StageView, Sequence[EarlierOutput], Mapping[str, StageOutput]], float | None
    ]
    """Measures which share of its units those outputs hold, 0 to 1, given its complete inputs; None
    where it reuses nothing."""
    read_versions: Callable[[Manifest], Sequence[Mapping[str, str]]]
    """Reads the versions that computed what a complete output has reused."""
    describe_reused: Callable[[Counts], str]
    """Describes how much was reused, such as `3 of 40 sequences`; empty if nothing."""
    describe_value: Callable[[Counts], str]
    """Describes what later runs could reuse of these shards; empty if nothing."""


def _count_pairs(stage: StageView, load: Workload) -> float:
    return load.num_pairs


def _store_nothing(stage: StageView, load: Workload) -> float:
    return 0.0


def _count_no_tokens(stage: StageView, load: Workload) -> TokenCount:
    return TokenCount()


def count_aligned_shards(stage: StageView, load: Workload) -> float:
    """Count the shards of a stage that is 1:1 with dedupe's layout."""
    return count_shards(load.num_pairs, stage.recipe.config("dedupe").rows_per_shard)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How the time and the bytes of a stage are estimated."""

    unit: Literal["rows", "flops"] = "rows"
    """What its work is counted in: rows, or floating-point operations."""
    count_work: Callable[[StageView, Workload], float] = _count_pairs
    """Counts the work that a workload is, in `unit`."""
    rate_per_core: float = 1000.0
    """Units a second of one CPU core, assumed where nothing was measured."""
    start_seconds: float = 60.0
    """Seconds until the first shard is at work, assumed where nothing was measured."""
    count_bytes: Callable[[StageView, Workload], float] = _store_nothing
    """Counts the bytes that it adds to the store, where no bytes a pair were measured."""
    max_workers: Callable[[StageView, Workload], float] = _count_pairs
    """Counts the workers that find something to do."""
    measure: Callable[[Manifest, Folder], Measured | None] = measure_rows
    """Measures a complete output of the store; None where there is nothing to measure."""
    rate_of: str | None = None
    """The stage whose measured rate is taken; its own unless given."""
    count_tokens: Callable[[StageView, Workload], TokenCount] = _count_no_tokens
    """Counts the tokens that a model computes in it."""
    measure_lengths: Callable[[StageOutput], Lengths] | None = None
    """Measures the lengths of the pairs, in the stage whose output tells them."""


@dataclass(frozen=True, kw_only=True)
class FindingsTable:
    """A table of what a stage found, as text."""

    title: str
    columns: Sequence[str]
    """Headings of the columns after the first."""
    rows: Sequence[Sequence[str]]


def _show_nothing(manifest: Manifest) -> Sequence[Any]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Display:
    """What the commands show of a stage besides its counts."""

    list_highlights: Callable[[Manifest], Sequence[tuple[str, str]]] = _show_nothing
    """Lists the lines, label and value, that sum up the stage at the end of a run."""
    list_tables: Callable[[Manifest], Sequence[FindingsTable]] = _show_nothing
    """Lists the tables that `show RECIPE STAGE` adds."""
    products: Mapping[str, str] = field(default_factory=dict)
    """What a user takes away: label, and path below the stage's directory."""
    describe_progress: Callable[[Folder], str] = lambda folder: ""
    """Describes how far an unfinished output without shards is; empty where that is unknown."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Where an unfinished stage was stopped by its execution settings."""

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    """Of the held-out pairs at this step, by name, such as loss."""


def _find_no_stop(out: StageDir) -> Stop | None:
    return None


def _keep_config(config: C, recipe: RecipeView) -> C:
    return config


def _inherit_nothing(config: C, recipe: RecipeView) -> Mapping[str, Pin]:
    return {}


def _check_nothing(stage: StageView) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[C]):
    """A stage's record: all that the engine knows of it."""

    name: str
    """Its word on the command line, its key in the recipe, its directory in the store."""
    version: int
    """Raised when equal config would now give other rows or weights."""
    needs: Callable[[C], tuple[str, ...]]
    """The stages whose output it reads, as a function of its config."""
    reads_if_there: tuple[str, ...] = ()
    """Stages that it also reads where another stage needs them."""
    needed_when: str = ""
    """A sentence on when other stages read it, where that depends on their settings."""
    config: type[C]
    """Its block under `stages:`; every field is identity, and hashed."""
    execution: type
    """Its block under `execution:`; nothing in it is hashed."""
    run: Callable[[C, StageContext], StageResult]

    complete: Callable[[C, RecipeView], C] = _keep_config
    """Fills in the settings that it takes from other stages or from the machine, such as `auto`."""
    pins: Mapping[str, Callable[[Any], Pin]] = field(default_factory=dict)
    """Config fields that hold moving names, and the function that fixes the field's value."""
    inherit_pins: Callable[[C, RecipeView], Mapping[str, Pin]] = _inherit_nothing
    """Fixes the fields that are None because another stage names what they mean, and names of
    other stages for which it has no field."""
    check: Callable[[StageView], None] = _check_nothing
    """Raises ConfigError for settings that cannot work together. Every plan in which the stage
    would begin calls it, so it reads small files only."""

    codes: Mapping[str, str] = field(default_factory=dict)
    """Meanings of the codes of its rejected rows and of its warnings, a sentence each."""
    row_name: str = "rows"
    """What the rows that it writes are called, in the plural."""
    reads_every_row: bool = False
    """Whether it keeps or rejects every row of its first input, so that the counts must agree."""

    numeric_packages: tuple[str, ...] = ()
    """Packages whose version may change the last digits of its numbers."""
    reuse: Reuse | None = None
    """How it reuses values of earlier outputs; None where it reuses none."""
    is_redone_whole: bool = False
    """Whether a damaged output is made again as a whole, together with the stages that read it,
    because its shards or files do not come out the same a second time."""
    side_folders: tuple[str, ...] = ()
    """Folders in a complete output whose files no manifest names, such as checkpoints."""
    names_runs: bool = False
    """Whether its fingerprint is part of a run's default name. `sweep` runs several of its outputs
    at once, and everything before it once."""
    read_stop: Callable[[StageDir], Stop | None] = _find_no_stop
    """Reads where an output was last stopped, by `stop_after` in its execution block."""
    cost: Cost = Cost()
    display: Display = Display()

    def describe_kept(self, counts: Counts) -> str:
        """Describe how many rows were kept, and what they became where that is another number."""
        if counts.num_rows_kept == counts.num_out:
            return f"{counts.num_out:,} kept"
        return f"{counts.num_rows_kept:,} as {counts.num_out:,} {self.row_name} kept"
