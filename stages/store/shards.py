"""How rows get into the store and out again: write, commit, finish, verify, clean up.

The protocol, for every shard: write under a name of this attempt in `_staging/`, make it durable,
move it to a name made of its content, then publish one commit record that names all files of the
shard, unless another attempt has published before. Readers follow commit records and manifests,
never a listing, so a crash at any moment leaves a whole shard or nothing that anybody reads.
"""

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
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
ADVICE = "`python run.py verify RECIPE --repair` lets the next run do again what is damaged."
"""What ends the message about a stored file that cannot be used."""
R = TypeVar("R", bound=msgspec.Struct)
_NUM_READERS = 16
"""Small files that are read at once: on an object store each takes a round trip."""
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
    """Give the directory of one attempt at one stage; nothing is created yet."""
    folder = store.child(stage).child(attempt_folder(fingerprint, attempt))
    footer = {
        "dpo.stage": stage,
        "dpo.fingerprint": attempt_folder(fingerprint, attempt),
        "dpo.inputs": canonical_json(dict(inputs or {})).decode(),
    }
    return StageDir(folder=folder, footer=footer)


@dataclass(frozen=True, kw_only=True)
class StageDir:
    """A directory that shards are committed to: a stage's, or that of a pass inside a stage."""

    folder: Folder
    footer: dict[str, str]
    """Provenance that every Parquet file of the directory carries in its footer."""
    compression: str = "zstd"
    """Of every column's pages."""

    def work(self, name: str) -> "StageDir":
        """Give the directory of a pass inside the stage; it is deleted when the stage finishes."""
        return StageDir(
            folder=self.folder.child(WORK).child(name),
            footer={**self.footer, "dpo.pass": name},
            # Read once or twice and deleted: time counts, a fifth of the size does not.
            compression="lz4",
        )

    def write_layout(self, shards: Sequence[str]) -> None:
        """Record how the stage is cut, before the first shard is written.

        Raises:
            DataError: an earlier attempt cut it otherwise, so its shards cannot be continued.
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
        """Open a shard for writing: one Parquet file for each role, such as data and rejected.

        Args:
            index: number of the shard.
            schemas: what each role's file holds.
            rows_per_group: for roles of which single rows are read later, rows of a row group.
        """
        return ShardWriter(
            stage_dir=self,
            index=index,
            schemas=dict(schemas),
            rows_per_group=dict(rows_per_group or {}),
        )

    def layout(self) -> Layout | None:
        """Read how the stage is cut, or None before that is known.

        Raises:
            DataError: it cannot be read.
        """
        return self._read_record(LAYOUT, Layout) if self.folder.exists(LAYOUT) else None

    def committed(self) -> dict[int, ShardRecord]:
        """Read the commit records: the shards that are done.

        Raises:
            DataError: one cannot be read.
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
            DataError: it cannot be read.
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
        """Say whether an attempt has left anything here, finished or not."""
        return bool(self.folder.list_folders() or self.folder.list_files())

    def is_complete(self) -> bool:
        """Say whether the stage has a manifest, without reading it."""
        return self.folder.exists(MANIFEST)

    def manifest(self) -> Manifest | None:
        """Read the manifest, or None while the stage is not complete."""
        return read_manifest(self.folder)

    def finish(self, manifest: Manifest) -> None:
        """Complete the stage: remove what no record names, then write the manifest.

        Of two runs that finish a stage, the first one's manifest stands.
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
    """Read the manifest of a stage directory, or None while the stage is not complete."""
    if not folder.exists(MANIFEST):
        return None
    try:
        return decode_record(folder.read_bytes(MANIFEST), Manifest)
    except msgspec.DecodeError as error:
        raise DataError(f"{folder.uri}/{MANIFEST} cannot be read ({error}). {ADVICE}") from error


def write_file_record(folder: Folder, name: str, *, num_rows: int | None = None) -> FileRecord:
    """Describe a file that a stage wrote besides its shards."""
    return FileRecord(
        name=name,
        num_bytes=folder.num_bytes(name),
        sha256=folder.sha256(name),
        num_rows=num_rows,
    )


def write_table(stage_dir: StageDir, name: str, table: pa.Table, schema: RowSchema) -> FileRecord:
    """Write a small table of a stage beside its shards, whole and at once."""
    sink = pa.BufferOutputStream()
    footer = {**stage_dir.footer, "dpo.schema": schema.label}
    arrow = schema.arrow.with_metadata(footer)
    with pq.ParquetWriter(sink, arrow, **_parquet_options(stage_dir.compression)) as writer:
        writer.write_table(table.cast(schema.arrow).replace_schema_metadata(footer))
    stage_dir.folder.write_bytes(name, sink.getvalue().to_pybytes())
    return write_file_record(stage_dir.folder, name, num_rows=table.num_rows)


def _parquet_options(compression: str) -> dict[str, object]:
    return {
        "compression": compression,
        "compression_level": 3 if compression == "zstd" else None,
        "write_page_index": True,
        "use_dictionary": ["source", "source_file", "split", "code"],
    }


@dataclass(kw_only=True)
class ShardWriter:
    """Writes one shard. Use as a context manager; nothing is visible until `commit`."""

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
        """Append rows, in order. They are flushed in row groups bounded by bytes and rows."""
        self._files[role].write(table)

    def write_rows(self, role: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Append rows given as dicts."""
        self.write(role, pa.Table.from_pylist(list(rows), schema=self.schemas[role].arrow))

    def num_rows(self, role: str) -> int:
        return self._files[role].num_rows

    def commit(self, counts: Counts, *, prompt_range: tuple[str, str] | None = None) -> ShardRecord:
        """Publish the shard, or give the record of the attempt that was faster.

        Args:
            counts: what happened to the rows.
            prompt_range: where the shard's rows lie, for readers that look for prompts.
        Raises:
            DataError: a staged file does not hold the rows that were written to it.
        """
        folder = self.stage_dir.folder
        try:
            files = {role: self._place(role, staged) for role, staged in self._files.items()}
        except FileNotFoundError:
            # Another run finished this stage meanwhile and cleaned up our staging area.
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
        """Move a finished file to its content name."""
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
    """One Parquet file while it is being written."""

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
    """A complete stage, as its consumers see it."""

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
        """Read one shard whole. Memory is bounded by how the shards were cut."""
        file = record.files[role]
        return read_file(self.folder, file, columns=columns, is_checked=is_checked)

    def paths(self, role: str = "data") -> list[str]:
        """List the files of all shards, in order, inside the store's filesystem."""
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
        folder: of the stage.
        record: what was committed.
        columns: all unless given.
        is_checked: whether to compare the whole file with its sha256 first, so that nothing is ever
            computed from other bytes than were committed. Without it only the columns are read.
    Raises:
        DataError: it is missing, or not what was committed.
    """
    name = f"{folder.uri}/{record.name}"
    try:
        source: str | pa.Buffer = folder.file(record.name)
        if is_checked:
            content = folder.read_bytes(record.name)
            if hashlib.sha256(content).hexdigest() != record.sha256:
                raise DataError(f"{name} is not what was committed: its sha256 differs. {ADVICE}")
            source = pa.py_buffer(content)
        table = pq.read_table(
            source if isinstance(source, str) else pa.BufferReader(source),
            columns=list(columns) if columns is not None else None,
            filesystem=folder.filesystem if isinstance(source, str) else None,
            partitioning=None,
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name} cannot be read ({error}). {ADVICE}") from error
    if table.num_rows != record.num_rows:
        found = f"{table.num_rows} rows, its record says {record.num_rows}"
        raise DataError(f"{name} holds {found}. {ADVICE}")
    return table


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not what its record says, or that has none."""

    name: str
    """Path below the stage's directory."""
    sentence: str
    """What was found and what was wanted, with the whole path."""


def find_damage(folder: Folder, files: Sequence[FileRecord]) -> Iterator[Damage]:
    """Compare files with their records, several at once, and say what differs."""

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
    """Give all files that a manifest answers for."""
    of_shards = [file for shard in manifest.shards for file in shard.files.values()]
    return [*of_shards, *manifest.files]
