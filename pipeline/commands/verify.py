"""Verifies a run: files against their hashes, records against each other, and every row's fate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.plan import Plan, PlannedStage
from schemas.errors import DataError
from schemas.fingerprint import stage_fingerprint
from schemas.ids import digest
from schemas.manifest import Counts, FileRecord, Manifest, ShardRecord
from stages.store.shards import (
    COMMITS,
    LAYOUT,
    LOCK,
    MANIFEST,
    STAGING,
    WORK,
    StageOutput,
    find_damage,
    list_files,
)
from stages.store.worker_logs import LOGS


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A difference between what a run's records say and what its files hold."""

    stage: str
    sentence: str
    """Description, with the path of the file if it is about one."""
    file: str | None = None
    """The damaged file, below the stage's directory; a repair deletes it."""
    record: str | None = None
    """What a repair deletes besides the manifest: a commit record, so that its shard is done again,
    or the layout."""


@dataclass(kw_only=True)
class Verdict:
    """Result of `verify`."""

    rows: list[tuple[str, Counts]] = field(default_factory=list)
    """Counts by complete stage, in order."""
    num_files: int = 0
    faults: list[Fault] = field(default_factory=list)
    """Empty if nothing is wrong."""
    missing: list[str] = field(default_factory=list)
    """Stages that are not complete; only their committed shards were checked."""
    digest: str = ""
    """64 hex digits over all manifests. Kept elsewhere, it shows whether anything has been changed
    since, even by somebody who can write to the store."""


def find_faults(plan: Plan) -> Verdict:
    """Check all stages of a recipe: files against hashes, records against each other, rows."""
    verdict = Verdict()
    manifests: dict[str, Manifest] = {}
    for stage in plan.stages:
        commits = _read_commits(stage, verdict)
        files = [file for record in commits.values() for file in record.files.values()]
        try:
            manifest = stage.out.manifest()
        except DataError as error:
            verdict.faults.append(Fault(stage=stage.name, sentence=str(error)))
            manifest = None
        if manifest is None:
            verdict.missing.append(stage.name)
        else:
            manifests[stage.name] = manifest
            files = list_files(manifest)
            if manifest.shards:
                verdict.rows.append((stage.name, manifest.counts))
        verdict.num_files += len(files)
        faults = list(_find_damaged_files(stage, files))
        if manifest is not None:
            faults += _find_contradictions(stage, manifest, commits)
            faults += _find_strangers(stage, manifest)
            if not faults:
                faults += _find_miscounts(stage, manifest, manifests)
        verdict.faults += faults
    verdict.digest = digest(
        {
            stage.name: stage.out.folder.sha256(MANIFEST)
            for stage in plan.stages
            if stage.name in manifests
        }
    )
    return verdict


def repair(plan: Plan, verdict: Verdict) -> list[str]:
    """Delete what is damaged, so that the next run makes it again, and list what that will be.

    Single shards are made again where that gives the same bytes (on a GPU: the same values, within
    their tolerance). A stage that is redone whole is deleted with all stages that read it.
    """
    redone: list[str] = []
    deleted: set[str] = set()
    for stage in plan.stages:
        faults = [fault for fault in verdict.faults if fault.stage == stage.name]
        if not faults or stage.name in deleted:
            continue
        folder = stage.out.folder
        if folder.exists(MANIFEST):  # First, because nobody reads the rest without it.
            folder.delete_file(MANIFEST)
        if stage.resolved.stage.is_redone_whole:
            cleared = [stage, *_find_readers(plan, stage)]
            for each in reversed(cleared):
                plan.store.delete_folder(f"{each.name}/{each.ref.folder}")
            deleted.update(each.name for each in cleared)
            redone.append(" and ".join(each.name for each in cleared))
            continue
        for fault in faults:
            if fault.file and folder.exists(fault.file):
                folder.delete_file(fault.file)
        records = sorted({fault.record for fault in faults if fault.record})
        for record in records:
            if folder.exists(record):
                folder.delete_file(record)
        redone.append(f"{stage.name}: {', '.join(records) or MANIFEST}")
    return redone


def _find_readers(plan: Plan, stage: PlannedStage) -> list[PlannedStage]:
    """List the stages that read a stage's output, directly or through others, in order."""
    names, readers = {stage.name}, []
    for other in plan.stages:
        if names & set(other.inputs):
            names.add(other.name)
            readers.append(other)
    return readers


def _read_commits(stage: PlannedStage, verdict: Verdict) -> dict[int, ShardRecord]:
    """Read the commit records; those that cannot be read, and such a layout, become faults."""
    commits = {}
    try:
        stage.out.layout()
    except DataError as error:
        verdict.faults.append(Fault(stage=stage.name, sentence=str(error), record=LAYOUT))
    for name in stage.out.folder.list_files(COMMITS):
        if (record := _record_of(name)) is None:
            continue
        try:
            commit = stage.out.read_commit(name)
        except DataError as error:
            verdict.faults.append(Fault(stage=stage.name, sentence=str(error), record=record))
        else:
            commits[commit.index] = commit
    return commits


def _record_of(name: str) -> str | None:
    """Name the commit record of a shard's file, such as data/part-00017-0a1b2c3d.parquet."""
    number = name.rsplit("/", 1)[-1].removeprefix("part-")[:5]
    return f"{COMMITS}/part-{number}.json" if number.isdigit() else None


def _find_damaged_files(stage: PlannedStage, files: list[FileRecord]) -> Iterator[Fault]:
    for damage in find_damage(stage.out.folder, files):
        record = _record_of(damage.name)
        yield Fault(stage=stage.name, sentence=damage.sentence, file=damage.name, record=record)


def _find_contradictions(
    stage: PlannedStage, manifest: Manifest, commits: dict[int, ShardRecord]
) -> Iterator[Fault]:
    """Compare a manifest with its place in the store, with its commit records and with itself."""
    path = f"{stage.out.folder.uri}/{MANIFEST}"
    found = stage_fingerprint(manifest.stage, manifest.version, manifest.config, manifest.inputs)
    if found != stage.fingerprint:
        sentence = f"{path} describes a stage with fingerprint {found}, not {stage.fingerprint}."
        yield Fault(stage=stage.name, sentence=sentence)
    for record in manifest.shards:
        if commits.get(record.index) != record:
            name = f"{COMMITS}/part-{record.index:05d}.json"
            sentence = f"{path} and {name} differ."
            yield Fault(stage=stage.name, sentence=sentence, record=name)
    for index in sorted(set(commits) - {record.index for record in manifest.shards}):
        sentence = f"{path}: {COMMITS}/part-{index:05d}.json belongs to no shard in it."
        yield Fault(stage=stage.name, sentence=sentence)
    if manifest.counts != Counts.total(record.counts for record in manifest.shards):
        sentence = f"{path}: its counts are not the sum of its shards'."
        yield Fault(stage=stage.name, sentence=sentence)


def _find_strangers(stage: PlannedStage, manifest: Manifest) -> Iterator[Fault]:
    """List files in a complete stage that no record names."""
    named = {file.name for file in list_files(manifest)} | {MANIFEST, LAYOUT, LOCK}
    left_alone = (COMMITS, STAGING, WORK, LOGS, *stage.resolved.stage.side_folders)
    for file in stage.out.folder.walk():
        if file.name not in named and file.name.split("/")[0] not in left_alone:
            sentence = f"{stage.out.folder.uri}/{file.name} is not named by any record."
            yield Fault(stage=stage.name, sentence=sentence)


def _find_miscounts(
    stage: PlannedStage, manifest: Manifest, manifests: dict[str, Manifest]
) -> Iterator[Fault]:
    """Compare the rows in the files with the counts, and a stage's counts with its input's."""
    for sentence in _list_miscounts(stage, manifest, manifests):
        yield Fault(stage=stage.name, sentence=sentence)


def _list_miscounts(
    stage: PlannedStage, manifest: Manifest, manifests: dict[str, Manifest]
) -> list[str]:
    faults = []
    counts = manifest.counts
    if counts.num_in != counts.num_rows_kept + counts.num_rejected:
        faults.append(
            f"{stage.name}: {counts.num_in} rows in, but {counts.num_rows_kept} kept "
            f"and {counts.num_rejected} rejected."
        )
    # A row may give several rows, but none only if it is in a pair with another one.
    if counts.num_out < counts.num_rows_kept - counts.num_rows_joined:
        row_name = stage.resolved.stage.row_name
        faults.append(
            f"{stage.name}: {counts.num_rows_kept} rows kept gave only {counts.num_out} {row_name}."
        )
    if stage.resolved.stage.reads_every_row and stage.inputs:
        before = manifests.get(next(iter(stage.inputs)))
        if before is not None and before.counts.num_out != counts.num_in:
            faults.append(
                f"{stage.name} read {counts.num_in} rows, "
                f"{before.stage} has {before.counts.num_out}."
            )
    output = StageOutput(folder=stage.out.folder, manifest=manifest)
    for role, expected in (("data", counts.num_out), ("rejected", counts.num_rejected)):
        if all(role in shard.files for shard in manifest.shards):
            found = sum(_num_rows(output, path) for path in output.paths(role))
            if found != expected:
                faults.append(f"{stage.name}: {role}/ holds {found} rows, counted were {expected}.")
    return faults


def _num_rows(output: StageOutput, path: str) -> int:
    return int(pq.read_metadata(path, filesystem=output.folder.filesystem).num_rows)


def verdict_to_dict(verdict: Verdict, *, redone: Sequence[str] | None = None) -> dict[str, Any]:
    return {
        "to_be_redone": list(redone or ()),
        "ok": not verdict.faults,
        "num_files": verdict.num_files,
        "faults": [fault.sentence for fault in verdict.faults],
        "incomplete_stages": verdict.missing,
        "digest": verdict.digest,
        "rows": {
            name: {
                "in": c.num_in,
                "kept": c.num_rows_kept,
                "rejected": c.reasons,
                "written": c.num_out,
            }
            for name, c in verdict.rows
        },
    }


def show_verdict(verdict: Verdict, *, redone: Sequence[str] | None = None) -> Group:
    """Show the verdict, and what the next run will make again after a repair."""
    table = Table("stage", "rows in", "kept", "rejected", "", "written", box=None, pad_edge=False)
    for name, counts in verdict.rows:
        balance = "=" if counts.num_in == counts.num_rows_kept + counts.num_rejected else "≠"
        table.add_row(
            name,
            f"{counts.num_in:,}",
            f"{counts.num_rows_kept:,}",
            f"{counts.num_rejected:,}",
            balance,
            f"{counts.num_out:,}",
        )
    lines = [Text(f"✗ {fault.sentence}", style="red") for fault in verdict.faults]
    if verdict.missing:
        names = ", ".join(verdict.missing)
        lines.append(Text(f"not complete, only committed shards were checked: {names}"))
    if not verdict.faults:
        lines.append(
            Text(f"✓ {verdict.num_files} files match their hashes; every row is accounted for.")
        )
        lines.append(Text(f"digest of all manifests: {verdict.digest}"))
    elif redone is not None:
        lines.append(Text(f"Deleted. The next run makes again: {'; '.join(redone)}."))
    else:
        lines.append(
            Text("Add --repair to delete what is damaged; the next run then makes only that again.")
        )
    return Group(table, *lines)
