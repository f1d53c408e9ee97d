"""Renders plans, runs and stages for a terminal and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.commands.show_pairs import show_pairs
from pipeline.plan import Plan, PlannedStage
from pipeline.runs import Run
from schemas.manifest import Manifest
from stages.stage import FindingsTable, Stage
from stages.store.filesystems import Folder

_MARKS = {"done": "✓ done", "resume": "… resume", "run": "→ run", "damaged": "✗ damaged"}
_NUM_EXAMPLE_ROWS = 3


def show_plan(plan: Plan) -> RenderableType:
    table = _make_table("stage", "state", "why", "directory")
    for stage in plan.stages:
        table.add_row(
            stage.name, _MARKS[stage.state], _plain(stage.why), _plain(stage.out.folder.uri)
        )
    return table


def plan_to_dict(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage.name,
            "state": stage.state,
            "why": stage.why,
            "fingerprint": stage.fingerprint,
            "attempt": stage.attempt,
            "directory": stage.out.folder.uri,
        }
        for stage in plan.stages
    ]


def show_nothing_to_do(plan: Plan) -> RenderableType:
    names = ", ".join(stage.name for stage in plan.stages if stage.is_selected)
    return Text(f"Nothing to do: {names} done already.\n")


def show_state(plan: Plan) -> RenderableType:
    """Show every stage of a recipe with its counts."""
    table = _make_table("stage", "state", "rows in", "kept", "rejected", "seconds", "directory")
    for column in table.columns[2:6]:
        column.justify = "right"
    for stage in plan.stages:
        manifest = stage.out.manifest()
        record = stage.resolved.stage
        counts = _count_cells(record, manifest) if manifest else ["", "", "", ""]
        table.add_row(
            stage.name,
            _show_state(stage),
            *counts,
            _plain(stage.out.folder.uri),
        )
    return table


def _show_state(stage: PlannedStage) -> Text:
    mark = _MARKS[stage.state]
    return _plain(f"{mark}: {stage.why}" if stage.state == "resume" else mark)


def state_to_dict(plan: Plan) -> list[dict[str, Any]]:
    return [{"state": stage.state, **stage_to_dict(stage)} for stage in plan.stages]


def _count_cells(stage: Stage[Any], manifest: Manifest) -> list[str]:
    counts = manifest.counts
    cells = ["", "", ""]
    if manifest.shards:
        kept = stage.describe_kept(counts).removesuffix(" kept")
        cells = [f"{counts.num_in:,}", kept, f"{counts.num_rejected:,}"]
    return [*cells, f"{manifest.seconds:.1f}"]


def stage_to_dict(planned: PlannedStage) -> dict[str, Any]:
    manifest = planned.out.manifest()
    if manifest is None:
        return {"stage": planned.name, "state": planned.state, "why": planned.why}
    content: dict[str, Any] = msgspec.to_builtins(manifest)
    return content


def show_stage(planned: PlannedStage) -> RenderableType:
    """Show one stage: counts by code, findings, quantiles of its numbers, and a few rows."""
    manifest = planned.out.manifest()
    if manifest is None:
        return Text(f"{planned.name}: {_MARKS[planned.state]}, {_plain(planned.why)}")
    stage = planned.resolved.stage
    parts: list[RenderableType] = [
        Text(f"{planned.name}  {planned.out.folder.uri}", style="bold"),
        Text(f"finished {manifest.started_at}, {manifest.seconds:.1f} s, on {manifest.host}"),
    ]
    if manifest.shards:
        counts = manifest.counts
        kept = stage.describe_kept(counts)
        parts.append(Text(f"{counts.num_in:,} rows in, {kept}, {len(manifest.shards)} shards"))
        parts += _show_counts("rejected, by code", counts.reasons, stage.codes)
        parts += _show_counts("kept with a warning, by code", counts.warnings, stage.codes)
        parts += _show_counts("counted", counts.more)
    parts += _show_findings(manifest.summary)
    parts += [_show_table(table) for table in stage.display.list_tables(manifest)]
    parts += _show_rows(planned.out.folder, manifest)
    return Group(*parts)


def _show_counts(
    title: str, counts: Mapping[str, int], sentences: Mapping[str, str] | None = None
) -> list[RenderableType]:
    """Show counts by code, with the meanings of the codes where they are given."""
    if not counts:
        return []
    table = _make_table(f"\n{title}", "", *([""] if sentences else []))
    for code, count in sorted(counts.items(), key=lambda item: -item[1]):
        meaning = [sentences.get(code, "")] if sentences else []
        table.add_row(code, f"{count:,}", *meaning)
    return [table]


def _show_findings(summary: Mapping[str, Any]) -> list[RenderableType]:
    if not summary:
        return []
    table = _make_table("\nfindings", "")
    for key, value in _flatten(summary):
        table.add_row(key, _plain(_format(value)))
    return [table]


def _show_table(found: FindingsTable) -> RenderableType:
    table = _make_table(f"\n{found.title}", *found.columns)
    for row in found.rows:
        table.add_row(*(_plain(cell) for cell in row))
    return table


def _flatten(value: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, inner in value.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(inner, list) and any(isinstance(item, dict) for item in inner):
            continue  # Records are shown in tables of their own.
        flat += _flatten(inner, dotted) if isinstance(inner, dict) else [(dotted, inner)]
    return flat


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _show_rows(folder: Folder, manifest: Manifest) -> list[RenderableType]:
    names = [shard.files["data"].name for shard in manifest.shards]
    names = names or [file.name for file in manifest.files if file.name == "metrics.parquet"]
    if not names:
        return []
    rows = pl.scan_parquet([f"{folder.uri}/{name}" for name in names])
    pairs = show_pairs(folder, manifest, num_pairs=_NUM_EXAMPLE_ROWS)
    return [*_show_quantiles(rows), *(pairs or _show_examples(rows))]


def _show_quantiles(rows: pl.LazyFrame) -> list[RenderableType]:
    numeric = [name for name, kind in rows.collect_schema().items() if kind.is_numeric()]
    if not numeric:
        return []
    levels = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
    found = rows.select(
        pl.col(name).cast(pl.Float64).quantile(level).alias(f"{name} {title}")
        for name in numeric
        for title, level in levels.items()
    ).collect()
    table = _make_table("\ncolumn", *levels)
    for name in numeric:
        values = [found[f"{name} {title}"][0] for title in levels]
        table.add_row(name, *("" if value is None else f"{value:.4g}" for value in values))
    return [table]


def _show_examples(rows: pl.LazyFrame) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for number, row in enumerate(rows.head(_NUM_EXAMPLE_ROWS).collect().to_dicts(), 1):
        table = _make_table(f"\nrow {number}", "")
        for name, value in row.items():
            table.add_row(name, _plain(_shorten(value)))
        parts.append(table)
    return parts


def _shorten(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = " | ".join(f"{message['role']}: {message['content']}" for message in value)
    text = _format(value)
    return text if len(text) <= 160 else f"{text[:150]} … ({len(text):,} characters)"


def _make_table(*headings: str) -> Table:
    """Make a table without lines that never cuts a cell, so that paths can be copied."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _plain(text: str) -> Text:
    """Show text literally: without markup, and with control characters made visible."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return Text(visible)


def show_run(
    run: Run, stages: Sequence[Stage[Any]], *, report: str | None = None
) -> RenderableType:
    """Sum up a run: rows by stage, what the stages highlight, and where their products are."""
    complete = [stage for stage in stages if stage.name in run.outputs]
    table = _make_table(run.name, "")
    for label, value in _sum_up(run, complete):
        table.add_row(label, _plain(value))
    for stage in complete:
        for label, path in stage.display.products.items():
            table.add_row(label, _plain(run.outputs[stage.name].folder.child(path).uri))
    if report is not None:
        table.add_row("report", _plain(report))
    return table


def _sum_up(run: Run, stages: Sequence[Stage[Any]]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for stage in stages:
        if not stage.reads_every_row:
            continue
        counts = run.manifest(stage.name).counts
        if not lines:
            lines.append(("rows in", f"{counts.num_in:,}"))
        reasons = sorted(counts.reasons.items(), key=lambda item: -item[1])
        rejected = ", ".join(f"{code} {count:,}" for code, count in reasons)
        kept = f"{stage.describe_kept(counts)}, {counts.num_rejected:,} rejected"
        lines.append((stage.name, f"{kept}: {rejected}" if rejected else kept))
    for stage in stages:
        lines += stage.display.list_highlights(run.manifest(stage.name))
    return lines
