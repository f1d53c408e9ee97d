"""Rows in the store: the commit protocol that writes them in shards, and the reads that check them.

An attempt writes each shard under its own name in `_staging/`, makes it durable, moves it to a name
made of its content, and publishes one commit record that names all files of the shard, unless
another attempt has published one before. Readers follow commit records and manifests, never a
listing, so a crash at any moment leaves either a whole shard or nothing that anybody reads.
"""

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DataError
from schemas.fingerprint import attempt_folder
from schemas.ids import canonical_json
from schemas.manifest import (
    Counts,
    FileRecord,
    Layout,
    Manifest,
    ShardRecord,
    decode_record,
    encode_record,
)
from schemas.rows import RowSchema
from stages.store.filesystems import Folder, is_half_written, sync_directory, sync_file

MANIFEST = "manifest.json"
LAYOUT = "_layout.json"
COMMITS = "_commits"
LOCK = "_lock"
STAGING = "_staging"
WORK = "_work"
ADVICE = "`python run.py verify RECIPE --repair` makes the next run redo the damaged parts."
"""Last sentence of every error about a stored file that cannot be used."""
R = TypeVar("R", bound=msgspec.Struct)
_NUM_READERS = 16
"""Small files read in parallel: on an object store each takes a round trip."""
_ROW_GROUP_BYTES = 32 << 20
_ROW_GROUP_ROWS = 8192


def open_stage_dir(
    store: Folder,
    stage: str,
    fingerprint: str,
    attempt: int,
    *,
    inputs: Mapping[str, str] | None = None,
) -> "StageDir":
    """Return the directory of one attempt at a stage, without creating it.

    Args:
        store: the whole store.
        stage: name of the stage.
        fingerprint: of the stage's output.
        attempt: 1, or the number of the `--again`.
        inputs: attempt folders of the inputs by stage, for the files' footers.
    """
    folder = store.child(stage).child(attempt_folder(fingerprint, attempt))
    footer = {
        "dpo.stage": stage,
        "dpo.fingerprint": attempt_folder(fingerprint, attempt),
        "dpo.inputs": canonical_json(dict(inputs or {})).decode(),
    }
    return StageDir(folder=folder, footer=footer)


@dataclass(frozen=True, kw_only=True)
class StageDir:
    """A directory that shards are committed to: that of a stage, or of a pass inside a stage."""

    folder: Folder
    footer: dict[str, str]
    """Provenance written into the footer of every Parquet file of the directory."""
    compression: str = "zstd"
    """Parquet codec of every column."""

    def work(self, name: str) -> "StageDir":
        """Return the directory of a pass inside the stage; finishing the stage deletes it."""
        return StageDir(
            folder=self.folder.child(WORK).child(name),
            footer={**self.footer, "dpo.pass": name},
            # These files are read once or twice and deleted: speed matters more than 20 % of size.
            compression="lz4",
        )

    def write_layout(self, shards: Sequence[str]) -> None:
        """Record the shards' descriptions before the first shard is written.

        Raises:
            DataError: an earlier attempt recorded another layout, so it cannot be continued.
        """
        content = encode_record(Layout(shards=list(shards)))
        if self.folder.create_file(LAYOUT, content):
            return
        found = self._read_record(LAYOUT, Layout)
        if found.shards != list(shards):
            raise DataError(
                f"{self.folder.uri} was begun with {len(found.shards)} shards laid out otherwise "
                f"than the {len(shards)} of this run. Delete that directory and run again."
            )

    def write_shard(
        self,
        index: int,
        schemas: Mapping[str, RowSchema],
        *,
        rows_per_group: Mapping[str, int] | None = None,
    ) -> "ShardWriter":
        """Return a writer for a shard, with one Parquet file for each role (data, rejected, ...).

        Args:
            index: number of the shard.
            schemas: columns of each role's file.
            rows_per_group: most rows in a row group, for roles whose readers want few rows at once.
        """
        return ShardWriter(
            stage_dir=self,
            index=index,
            schemas=dict(schemas),
            rows_per_group=dict(rows_per_group or {}),
        )

    def layout(self) -> Layout | None:
        """Read the recorded layout, or return None before one is recorded.

        Raises:
            DataError: the record is damaged.
        """
        return self._read_record(LAYOUT, Layout) if self.folder.exists(LAYOUT) else None

    def committed(self) -> dict[int, ShardRecord]:
        """Read the commit records of all finished shards, by index.

        Raises:
            DataError: a record is damaged.
        """
        names = [
            name
            for name in self.folder.list_files(COMMITS)
            if name.startswith("part-") and name.endswith(".json")
        ]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            records = list(pool.map(self.read_commit, names))
        return {record.index: record for record in records}

    def read_commit(self, name: str) -> ShardRecord:
        """Read one commit record, such as part-00000.json.

        Raises:
            DataError: the record is damaged.
        """
        return self._read_record(f"{COMMITS}/{name}", ShardRecord)

    def _read_record(self, name: str, kind: type[R]) -> R:
        try:
            return decode_record(self.folder.read_bytes(name), kind)
        except msgspec.DecodeError as error:
            raise DataError(
                f"{self.folder.uri}/{name} cannot be read ({error}). {ADVICE}"
            ) from error

    def is_begun(self) -> bool:
        """Return whether the directory holds anything, of a finished attempt or not."""
        return bool(self.folder.list_folders() or self.folder.list_files())

    def is_complete(self) -> bool:
        """Return whether the stage has a manifest, without reading it."""
        return self.folder.exists(MANIFEST)

    def manifest(self) -> Manifest | None:
        """Read the manifest, or return None while the stage is not complete.

        Raises:
            DataError: the manifest is damaged.
        """
        return read_manifest(self.folder)

    def finish(self, manifest: Manifest) -> None:
        """Complete the stage: delete files that no record names, then write the manifest.

        If two runs finish a stage, the first manifest stands.
        """
        named = {file.name for record in manifest.shards for file in record.files.values()}
        for role in sorted({name.split("/", 1)[0] for name in named}):
            for base in self.folder.list_files(role):
                if f"{role}/{base}" not in named:
                    self.folder.delete_file(f"{role}/{base}")
        for place in ("", f"{COMMITS}/"):
            for base in self.folder.list_files(place.rstrip("/")):
                if is_half_written(base):
                    self.folder.delete_file(f"{place}{base}")
        self.folder.delete_folder(STAGING)
        self.folder.delete_folder(WORK)
        self.folder.create_file(MANIFEST, encode_record(manifest))


def read_manifest(folder: Folder) -> Manifest | None:
    """Read the manifest of a stage directory, or return None while the stage is not complete.

    Raises:
        DataError: the manifest is damaged.
    """
    if not folder.exists(MANIFEST):
        return None
    try:
        return decode_record(folder.read_bytes(MANIFEST), Manifest)
    except msgspec.DecodeError as error:
        raise DataError(f"{folder.uri}/{MANIFEST} cannot be read ({error}). {ADVICE}") from error


def describe_stored_file(folder: Folder, name: str, *, num_rows: int | None = None) -> FileRecord:
    """Make the record of a file that a stage wrote besides its shards."""
    return FileRecord(
        name=name,
        num_bytes=folder.num_bytes(name),
        sha256=folder.sha256(name),
        num_rows=num_rows,
    )


def write_table(stage_dir: StageDir, name: str, table: pa.Table, schema: RowSchema) -> FileRecord:
    """Write a small table of a stage besides its shards, atomically."""
    sink = pa.BufferOutputStream()
    footer = {**stage_dir.footer, "dpo.schema": schema.label}
    arrow = schema.arrow.with_metadata(footer)
    with pq.ParquetWriter(sink, arrow, **_parquet_options(stage_dir.compression)) as writer:
        writer.write_table(table.cast(schema.arrow).replace_schema_metadata(footer))
    stage_dir.folder.write_bytes(name, sink.getvalue().to_pybytes())
    return describe_stored_file(stage_dir.folder, name, num_rows=table.num_rows)


def write_long_table(
    stage_dir: StageDir,
    name: str,
    tables: Iterable[pa.Table],
    schema: RowSchema,
    *,
    rows_per_group: int,
) -> FileRecord:
    """Write a table of any size besides a stage's shards, atomically, one row group at a time.

    Args:
        stage_dir: the stage's directory.
        name: of the file.
        tables: the rows; the file's bytes do not depend on where a table ends and the next begins.
        schema: columns of the file.
        rows_per_group: rows in each row group, except the last.
    """
    folder = stage_dir.folder
    arrow = schema.arrow.with_metadata({**stage_dir.footer, "dpo.schema": schema.label})
    options = _parquet_options(stage_dir.compression)
    # On an object store a file appears when it is closed.
    written = f".{name}.{uuid.uuid4().hex}" if folder.is_local else name
    num_rows = 0
    with pq.ParquetWriter(
        folder.file(written), arrow, filesystem=folder.filesystem, **options
    ) as writer:
        for group in _cut_groups(tables, schema.arrow, rows_per_group):
            writer.write_table(group.replace_schema_metadata(arrow.metadata))
            num_rows += group.num_rows
    if folder.is_local:
        sync_file(folder.file(written))
        folder.move(written, name)
        sync_directory(folder.path)
    return describe_stored_file(folder, name, num_rows=num_rows)


def _cut_groups(
    tables: Iterable[pa.Table], schema: pa.Schema, rows_per_group: int
) -> Iterator[pa.Table]:
    waiting = schema.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table.cast(schema)]).combine_chunks()
        while waiting.num_rows >= rows_per_group:
            yield waiting.slice(0, rows_per_group)
            waiting = waiting.slice(rows_per_group)
    if waiting.num_rows:
        yield waiting


def _parquet_options(compression: str) -> dict[str, object]:
    return {
        "compression": compression,
        "compression_level": 3 if compression == "zstd" else None,
        "write_page_index": True,
        "use_dictionary": ["source", "source_file", "split", "code"],
    }


@dataclass(kw_only=True)
class ShardWriter:
    """Writes one shard, as a context manager; readers see nothing of it before `commit`."""

    stage_dir: StageDir
    index: int
    schemas: dict[str, RowSchema]
    rows_per_group: dict[str, int] = field(default_factory=dict)
    _files: dict[str, "_StagedFile"] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)
    _record: ShardRecord | None = None

    def __enter__(self) -> "ShardWriter":
        folder = self.stage_dir.folder
        folder.child(STAGING).create()
        for role, schema in self.schemas.items():
            folder.child(role).create()
            name = f"{STAGING}/part-{self.index:05d}.{role}.{uuid.uuid4().hex}.parquet"
            footer = {
                **self.stage_dir.footer,
                "dpo.schema": schema.label,
                "dpo.shard": str(self.index),
            }
            rows_per_group = self.rows_per_group.get(role, _ROW_GROUP_ROWS)
            options = _parquet_options(self.stage_dir.compression)
            self._files[role] = _StagedFile(folder, name, schema, footer, rows_per_group, options)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._record is None:
            for staged in self._files.values():
                staged.abandon()

    def write(self, role: str, table: pa.Table) -> None:
        """Append rows to a role's file; row groups are bounded by bytes and rows."""
        self._files[role].write(table)

    def write_rows(self, role: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Append rows given as dicts."""
        self.write(role, pa.Table.from_pylist(list(rows), schema=self.schemas[role].arrow))

    def num_rows(self, role: str) -> int:
        """Return how many rows have been written to a role's file."""
        return self._files[role].num_rows

    def commit(self, counts: Counts, *, prompt_range: tuple[str, str] | None = None) -> ShardRecord:
        """Publish the shard; if another attempt was faster, return that attempt's record.

        Args:
            counts: of the shard's rows.
            prompt_range: lowest and highest prompt_id, for readers that look for prompts.
        Raises:
            DataError: a staged file does not hold the rows that were written to it.
        """
        folder = self.stage_dir.folder
        try:
            files = {role: self._place(role, staged) for role, staged in self._files.items()}
        except FileNotFoundError:
            # Another run finished this stage meanwhile and deleted our staging files.
            self._record = self._published()
            return self._record
        record = ShardRecord(
            index=self.index,
            files=files,
            counts=counts,
            seconds=round(time.perf_counter() - self._started, 3),
            writer=f"{socket.gethostname()}:{os.getpid()}",
            prompt_range=prompt_range,
        )
        name = f"{COMMITS}/part-{self.index:05d}.json"
        folder.child(COMMITS).create()
        published = folder.create_file(name, encode_record(record, is_indented=False))
        self._record = record if published else self._published()
        return self._record

    def _published(self) -> ShardRecord:
        return self.stage_dir.read_commit(f"part-{self.index:05d}.json")

    def _place(self, role: str, staged: "_StagedFile") -> FileRecord:
        """Close a file and move it to the name made of its content."""
        folder = self.stage_dir.folder
        staged.close()
        if folder.is_local:
            sync_file(folder.file(staged.name))
        found = pq.read_metadata(folder.file(staged.name), filesystem=folder.filesystem).num_rows
        if found != staged.num_rows:
            raise DataError(
                f"{folder.uri}/{staged.name} holds {found} rows, {staged.num_rows} were written."
            )
        sha256 = folder.sha256(staged.name)
        name = f"{role}/part-{self.index:05d}-{sha256[:8]}.parquet"
        record = FileRecord(
            name=name,
            num_bytes=folder.num_bytes(staged.name),
            sha256=sha256,
            num_rows=found,
        )
        folder.move(staged.name, name)
        if folder.is_local:
            sync_directory(folder.file(role))
        return record


class _StagedFile:
    """A Parquet file in `_staging/` that is being written."""

    def __init__(
        self,
        folder: Folder,
        name: str,
        schema: RowSchema,
        footer: dict[str, str],
        rows_per_group: int,
        options: dict[str, object],
    ) -> None:
        self.name = name
        self.num_rows = 0
        self._folder = folder
        self._schema = schema.arrow.with_metadata(footer)
        self._writer = pq.ParquetWriter(
            folder.file(name), self._schema, filesystem=folder.filesystem, **options
        )
        self._rows_per_group = rows_per_group
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0

    def write(self, table: pa.Table) -> None:
        if table.num_rows == 0:
            return
        table = table.select(self._schema.names).cast(self._schema.remove_metadata())
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        self.num_rows += table.num_rows
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        self._waiting.clear()
        self._writer.close()
        if self._folder.exists(self.name):
            self._folder.delete_file(self.name)

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting).replace_schema_metadata(self._schema.metadata)
        rows_per_group = max(1, _ROW_GROUP_BYTES * table.num_rows // max(table.nbytes, 1))
        self._writer.write_table(table, row_group_size=min(rows_per_group, self._rows_per_group))
        self._waiting.clear()
        self._waiting_bytes = 0


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """A complete stage, for the stages and commands that read it."""

    folder: Folder
    manifest: Manifest

    def read(
        self,
        record: ShardRecord,
        role: str = "data",
        columns: Sequence[str] | None = None,
        *,
        is_checked: bool = True,
    ) -> pa.Table:
        """Read one role's file of a shard whole; arguments and errors are those of `read_file`."""
        file = record.files[role]
        return read_file(self.folder, file, columns=columns, is_checked=is_checked)

    def paths(self, role: str = "data") -> list[str]:
        """List the files of a role in shard order, as paths inside the store's filesystem."""
        return [self.folder.file(shard.files[role].name) for shard in self.manifest.shards]


def read_file(
    folder: Folder,
    record: FileRecord,
    *,
    columns: Sequence[str] | None = None,
    is_checked: bool = True,
) -> pa.Table:
    """Read a Parquet file that a record names.

    Args:
        folder: the stage's directory.
        record: the committed file.
        columns: names of the columns to read; all by default.
        is_checked: whether to compare the file's sha256 with the record first, so that nothing is
            computed from other bytes than the committed ones. Otherwise only `columns` are read.
    Raises:
        DataError: the file is missing, or differs from what was committed.
    """
    name = f"{folder.uri}/{record.name}"
    try:
        source: str | pa.BufferReader = folder.file(record.name)
        if is_checked:
            content = folder.read_bytes(record.name)
            if hashlib.sha256(content).hexdigest() != record.sha256:
                raise DataError(f"{name} is not what was committed: its sha256 differs. {ADVICE}")
            source = pa.BufferReader(content)
        filesystem = None if is_checked else folder.filesystem
        with pq.ParquetFile(source, filesystem=filesystem, pre_buffer=not is_checked) as file:
            # In one thread: a thread of Arrow's pool may release the Python bytes later than this
            # returns, and aborts the process if that falls into the interpreter's end.
            table = file.read(None if columns is None else list(columns), use_threads=False)
        if columns is not None:
            table = table.select(list(columns))  # Refuses a column that the file lacks.
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DataError(f"{name} cannot be read ({error}). {ADVICE}") from error
    if table.num_rows != record.num_rows:
        found = f"{table.num_rows} rows, its record says {record.num_rows}"
        raise DataError(f"{name} holds {found}. {ADVICE}")
    return table


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that differs from its record, or has none."""

    name: str
    """Path below the stage's directory."""
    sentence: str
    """What was found and what was expected, with the whole path."""


def find_damage(folder: Folder, files: Sequence[FileRecord]) -> Iterator[Damage]:
    """Compare files with their records, several in parallel, and yield the differences."""

    def describe(file: FileRecord) -> str:
        if not folder.exists(file.name):
            return "is missing."
        if (found := folder.num_bytes(file.name)) != file.num_bytes:
            return f"has {found} bytes, its record says {file.num_bytes}."
        if folder.sha256(file.name) != file.sha256:
            return "has other content than its record's sha256."
        return ""

    with ThreadPoolExecutor(_NUM_READERS) as pool:  # Hashing and reading release the GIL.
        for file, found in zip(files, pool.map(describe, files), strict=True):
            if found:
                yield Damage(name=file.name, sentence=f"{folder.uri}/{file.name} {found}")


def list_files(manifest: Manifest) -> list[FileRecord]:
    """List the records of all files of a complete stage."""
    of_shards = [file for shard in manifest.shards for file in shard.files.values()]
    return [*of_shards, *manifest.files]
