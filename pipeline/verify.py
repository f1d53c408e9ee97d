"""Whether a run's files are what their records say, and whether every row is accounted for."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.plan import Plan, PlannedStage
from schemas.manifest import Counts, Manifest
from stages.shards import StageOutput, find_damage

_ONE_TO_ONE = ("dedupe", "encode", "score")
"""Stages of which every row in is a row kept or a row rejected."""


@dataclass(kw_only=True)
class Verdict:
    """What `verify` found."""

    rows: list[tuple[str, Counts]] = field(default_factory=list)
    """Counts by complete stage, in order."""
    num_files: int = 0
    faults: list[str] = field(default_factory=list)
    """One sentence each; empty = all is well."""
    missing: list[str] = field(default_factory=list)
    """Stages that are not complete."""


def find_faults(plan: Plan) -> Verdict:
    """Check all complete stages of a recipe: files against hashes, rows against counts."""
    verdict = Verdict()
    manifests: dict[str, Manifest] = {}
    for stage in plan.stages:
        manifest = stage.out.manifest()
        if manifest is None:
            verdict.missing.append(stage.name)
            continue
        manifests[stage.name] = manifest
        damage = list(find_damage(stage.out.folder, manifest))
        verdict.faults += damage
        verdict.num_files += len(manifest.files)
        verdict.num_files += sum(len(shard.files) for shard in manifest.shards)
        if manifest.shards:
            verdict.rows.append((stage.name, manifest.counts))
        if not damage:
            verdict.faults += _find_miscounts(stage, manifest, manifests)
    return verdict


def _find_miscounts(
    stage: PlannedStage, manifest: Manifest, manifests: dict[str, Manifest]
) -> list[str]:
    """Compare the rows in the files with the counts, and the counts of a stage with its input's."""
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


def verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "ok": not verdict.faults,
        "num_files": verdict.num_files,
        "faults": verdict.faults,
        "incomplete_stages": verdict.missing,
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


def show_verdict(verdict: Verdict) -> Group:
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
    lines = [Text(f"✗ {fault}", style="red") for fault in verdict.faults]
    if verdict.missing:
        lines.append(Text(f"not complete, not checked: {', '.join(verdict.missing)}"))
    if not verdict.faults:
        lines.append(
            Text(f"✓ {verdict.num_files} files match their hashes; every row is accounted for.")
        )
    return Group(table, *lines)
