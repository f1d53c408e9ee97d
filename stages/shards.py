"""How rows get into the store and out again: write, commit, finish, verify, clean up.

The protocol, for every shard: write under a name of this attempt in `_staging/`, make it durable,
move it to a name made of its content, then publish one commit record that names all files of the
shard, unless another attempt has published before. Readers follow commit records and manifests,
never a listing, so a crash at any moment leaves a whole shard or nothing that anybody reads.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DataError
from schemas.fingerprint import attempt_folder
from schemas.ids import canonical_json
from schemas.manifest import Counts, FileRecord, Layout, Manifest, ShardRecord
from schemas.rows import RowSchema
from stages.folders import Folder, sync_directory, sync_file

MANIFEST = "manifest.json"
_LAYOUT = "_layout.json"
_COMMITS = "_commits"
_STAGING = "_staging"
_WORK = "_work"
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
            folder=self.folder.child(_WORK).child(name),
            footer={**self.footer, "dpo.pass": name},
            # Read once or twice and deleted: time counts, a fifth of the size does not.
            compression="lz4",
        )

    def write_layout(self, shards: Sequence[str]) -> None:
        """Record how the stage is cut, before the first shard is written.

        Raises:
            DataError: an earlier attempt cut it otherwise, so its shards cannot be continued.
        """
        content = msgspec.json.format(msgspec.json.encode(Layout(shards=list(shards))), indent=1)
        if self.folder.create_file(_LAYOUT, content):
            return
        found = msgspec.json.decode(self.folder.read_bytes(_LAYOUT), type=Layout)
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

    def committed(self) -> dict[int, ShardRecord]:
        """Read the commit records: the shards that are done."""
        records = {}
        for name in self.folder.list_files(_COMMITS):
            if name.startswith("part-") and name.endswith(".json"):
                content = self.folder.read_bytes(f"{_COMMITS}/{name}")
                record = msgspec.json.decode(content, type=ShardRecord)
                records[record.index] = record
        return records

    def is_begun(self) -> bool:
        """Say whether an attempt has left anything here, finished or not."""
        return bool(self.folder.list_folders() or self.folder.list_files())

    def manifest(self) -> Manifest | None:
        """Read the manifest, or None while the stage is not complete."""
        return read_manifest(self.folder)

    def finish(self, manifest: Manifest) -> None:
        """Complete the stage: remove what no record names, then write the manifest."""
        named = {file.name for record in manifest.shards for file in record.files.values()}
        for role in sorted({name.split("/", 1)[0] for name in named}):
            for base in self.folder.list_files(role):
                if f"{role}/{base}" not in named:
                    self.folder.delete_file(f"{role}/{base}")
        self.folder.delete_folder(_STAGING)
        self.folder.delete_folder(_WORK)
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        self.folder.write_bytes(MANIFEST, content)


def read_manifest(folder: Folder) -> Manifest | None:
    """Read the manifest of a stage directory, or None while the stage is not complete."""
    if not folder.exists(MANIFEST):
        return None
    try:
        return msgspec.json.decode(folder.read_bytes(MANIFEST), type=Manifest)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{folder.uri}/{MANIFEST} cannot be read ({error}). Delete the directory and run again."
        ) from error


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
        folder.child(_STAGING).create()
        for role, schema in self.schemas.items():
            folder.child(role).create()
            name = f"{_STAGING}/part-{self.index:05d}.{role}.{uuid.uuid4().hex}.parquet"
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
        name = f"{_COMMITS}/part-{self.index:05d}.json"
        folder.child(_COMMITS).create()
        published = folder.create_file(name, msgspec.json.encode(record))
        self._record = record if published else self._published()
        return self._record

    def _published(self) -> ShardRecord:
        name = f"{_COMMITS}/part-{self.index:05d}.json"
        content = self.stage_dir.folder.read_bytes(name)
        return msgspec.json.decode(content, type=ShardRecord)

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
        self, record: ShardRecord, role: str = "data", columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Read one shard whole. Memory is bounded by how the shards were cut."""
        return read_file(self.folder, record.files[role], columns=columns)

    def paths(self, role: str = "data") -> list[str]:
        """List the files of all shards, in order, inside the store's filesystem."""
        return [self.folder.file(shard.files[role].name) for shard in self.manifest.shards]


def read_file(
    folder: Folder, record: FileRecord, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a Parquet file that a record names.

    Raises:
        DataError: it is missing, damaged, or holds another number of rows than its record says.
    """
    try:
        table = pq.read_table(
            folder.file(record.name),
            columns=list(columns) if columns is not None else None,
            filesystem=folder.filesystem,
            partitioning=None,
        )
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{folder.uri}/{record.name} cannot be read ({error}). "
            "Run `python run.py verify RECIPE`, delete the damaged stage directory and run again."
        ) from error
    if table.num_rows != record.num_rows:
        raise DataError(
            f"{folder.uri}/{record.name} holds {table.num_rows} rows, "
            f"its record says {record.num_rows}. Delete the stage directory and run again."
        )
    return table


def find_damage(folder: Folder, manifest: Manifest) -> Iterator[str]:
    """Compare every file of a complete stage with its record, and say what differs."""
    for file in list_files(manifest):
        if not folder.exists(file.name):
            yield f"{folder.uri}/{file.name} is missing."
        elif folder.num_bytes(file.name) != file.num_bytes:
            found = folder.num_bytes(file.name)
            yield f"{folder.uri}/{file.name} has {found} bytes, its record says {file.num_bytes}."
        elif folder.sha256(file.name) != file.sha256:
            yield f"{folder.uri}/{file.name} has other content than its record's sha256."
    named = {file.name for file in list_files(manifest)}
    for role in ("data", "rejected"):
        for base in folder.list_files(role):
            if f"{role}/{base}" not in named:
                yield f"{folder.uri}/{role}/{base} belongs to no shard."


def list_files(manifest: Manifest) -> list[FileRecord]:
    """Give all files that a manifest answers for."""
    of_shards = [file for shard in manifest.shards for file in shard.files.values()]
    return [*of_shards, *manifest.files]
