"""Runs one stage in this process over hand-made inputs, for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.ray.mapper import InProcessMapper
from schemas.manifest import Counts, Manifest, ShardRecord
from stages.stage import Execution, Pin, Resources, StageContext
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, open_stage_dir, read_file

FINGERPRINT = "0123456789ab"


class QuietProgress:
    """A Progress that counts and shows nothing."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.notes: list[str] = []
        self.parts: list[tuple[float, str]] = []

    def start(self, label: str, total: int, unit: str) -> None:
        self.total, self.done = total, 0

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        self.notes.append(note)

    def show_parts(self, amount: float, note: str) -> None:
        self.parts.append((amount, note))


def stage_dir(folder: Path, stage: str) -> StageDir:
    return open_stage_dir(Folder(str(folder)), stage, FINGERPRINT, 1)


def make_context(
    out: StageDir,
    inputs: Mapping[str, StageOutput],
    *,
    pins: Mapping[str, Pin] | None = None,
    execution: Any = None,
) -> StageContext:
    return StageContext(
        inputs=inputs,
        pins=pins or {},
        out=out,
        store=Folder(out.folder.uri.rsplit("/", 2)[0]),
        attempt=1,
        versions={"torch": "1.0"},
        started_at="2026-01-01T00:00:00+00:00",
        execution=execution or Execution(),
        resources=Resources(num_workers=1),
        mapper=InProcessMapper(),
        progress=QuietProgress(),
        is_local=True,
    )


def open_output(
    out: StageDir,
    stage: str,
    records: Sequence[ShardRecord],
    *,
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> StageOutput:
    """Build a stage's output as its readers get it, without finishing the stage."""
    manifest = Manifest(
        stage=stage,
        version=1,
        fingerprint=FINGERPRINT,
        attempt=1,
        inputs={},
        config=dict(config or {}),
        settings={},
        shards=list(records),
        files=[],
        counts=Counts.total(record.counts for record in records),
        summary=dict(summary or {}),
        versions={},
        host="here",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
    return StageOutput(folder=out.folder, manifest=manifest)


def read_rows(
    out: StageDir, role: str = "data", *, only: int | None = None
) -> list[dict[str, Any]]:
    """Read the committed rows of a stage, or of one shard."""
    rows = []
    for index, record in sorted(out.committed().items()):
        if only is None or index == only:
            rows += read_file(out.folder, record.files[role]).to_pylist()
    return rows
