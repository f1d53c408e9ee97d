"""Whether a run's files are what their records say, and whether every row is accounted for."""

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

_ONE_TO_ONE = ("dedupe", "encode", "score")
"""Stages of which every row in is a row kept or a row rejected."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is not as it was written."""

    stage: str
    sentence: str
    """With the path of the file, where it is about one."""
    file: str | None = None
    """What is damaged, below the stage's directory, and goes when it is mended."""
    record: str | None = None
    """What goes when it is mended, besides the manifest: a commit record, and so its shard is done
    again, or the layout."""


@dataclass(kw_only=True)
class Verdict:
    """What `verify` found."""

    rows: list[tuple[str, Counts]] = field(default_factory=list)
    """Counts by complete stage, in order."""
    num_files: int = 0
    faults: list[Fault] = field(default_factory=list)
    """Empty = all is well."""
    missing: list[str] = field(default_factory=list)
    """Stages that are not complete; of those only what is committed was checked."""
    digest: str = ""
    """Of all manifests, 64 hex digits: kept elsewhere, it tells whether anything was changed since,
    by whomever."""


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
    """Take away what is damaged, so that the next run does it again, and say what that will be.

    Shards are done again one by one, and every stage but train gives the bytes that it gave before
    (on a GPU: the values, within their tolerance). A training is done again as a whole, and
    evaluate after it, because another training on a GPU is another model.
    """
    redone: list[str] = []
    for stage in plan.stages:
        faults = [fault for fault in verdict.faults if fault.stage == stage.name]
        if not faults:
            continue
        folder = stage.out.folder
        if folder.exists(MANIFEST):  # First: without it, nobody reads the rest.
            folder.delete_file(MANIFEST)
        if stage.name == "train":
            for cleared in (plan.stage("evaluate"), stage):
                plan.store.delete_folder(f"{cleared.name}/{cleared.ref.folder}")
            return [*redone, "train and evaluate"]
        for fault in faults:
            if fault.file and folder.exists(fault.file):
                folder.delete_file(fault.file)
        records = sorted({fault.record for fault in faults if fault.record})
        for record in records:
            if folder.exists(record):
                folder.delete_file(record)
        redone.append(f"{stage.name}: {', '.join(records) or MANIFEST}")
    return redone


def _read_commits(stage: PlannedStage, verdict: Verdict) -> dict[int, ShardRecord]:
    """Read the commit records that can be read; the others are faults, and so is such a layout."""
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
        sentence = f"{path}: {COMMITS}/part-{index:05d}.json is of no shard in it."
        yield Fault(stage=stage.name, sentence=sentence)
    if manifest.counts != Counts.total(record.counts for record in manifest.shards):
        sentence = f"{path}: its counts are not the sum of its shards'."
        yield Fault(stage=stage.name, sentence=sentence)


def _find_strangers(stage: PlannedStage, manifest: Manifest) -> Iterator[Fault]:
    """List files in a complete stage that no record names."""
    named = {file.name for file in list_files(manifest)} | {MANIFEST, LAYOUT, LOCK}
    for file in stage.out.folder.walk():
        if file.name not in named and file.name.split("/")[0] not in (COMMITS, STAGING, WORK, LOGS):
            sentence = f"{stage.out.folder.uri}/{file.name} is named by no record."
            yield Fault(stage=stage.name, sentence=sentence)


def _find_miscounts(
    stage: PlannedStage, manifest: Manifest, manifests: dict[str, Manifest]
) -> Iterator[Fault]:
    """Compare the rows in the files with the counts, and the counts of a stage with its input's."""
    for sentence in _list_miscounts(stage, manifest, manifests):
        yield Fault(stage=stage.name, sentence=sentence)


def _list_miscounts(
    stage: PlannedStage, manifest: Manifest, manifests: dict[str, Manifest]
) -> list[str]:
    faults = []
    counts = manifest.counts
    if stage.name == "validate":
        # A row may give several pairs, so rows are what must add up.
        if counts.num_in != counts.num_rows_kept + counts.num_rejected:
            faults.append(
                f"validate: {counts.num_in} rows in, but {counts.num_rows_kept} kept "
                f"and {counts.num_rejected} rejected."
            )
        if counts.num_out < counts.num_rows_kept:
            faults.append(
                f"validate: {counts.num_rows_kept} rows kept gave only {counts.num_out} pairs."
            )
    if stage.name in _ONE_TO_ONE:
        before = manifests.get(next(iter(stage.inputs)))
        if counts.num_in != counts.num_out + counts.num_rejected:
            faults.append(
                f"{stage.name}: {counts.num_in} rows in, but {counts.num_out} kept "
                f"and {counts.num_rejected} rejected."
            )
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
    """Show what was found, and what the next run will do again where it was taken away."""
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
        lines.append(Text(f"not complete, checked as far as committed: {names}"))
    if not verdict.faults:
        lines.append(
            Text(f"✓ {verdict.num_files} files match their hashes; every row is accounted for.")
        )
        lines.append(Text(f"digest of all manifests: {verdict.digest}"))
    elif redone is not None:
        lines.append(Text(f"Taken away. The next run does again: {'; '.join(redone)}."))
    else:
        lines.append(
            Text("Add --repair: the next run then does again what is damaged, and only that.")
        )
    return Group(table, *lines)
