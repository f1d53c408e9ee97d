"""Stage validate: turn input rows into preference pairs, and reject the others with a code."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from schemas.manifest import Manifest, ShardRecord
from stages.cost import Workload
from stages.faults import refuse_faulty_rows
from stages.stage import (
    Cost,
    Display,
    Execution,
    FindingsTable,
    Stage,
    StageContext,
    StageResult,
    StageView,
)
from stages.store.shards import StageDir, read_file
from stages.validate.check_rows import CheckRows
from stages.validate.codes import CODES, describe_code
from stages.validate.config import ValidateConfig
from stages.validate.inputs import InputFiles, find_inputs
from stages.validate.overview import sum_up
from stages.validate.shard_layout import plan_shards

_NOT_FAULTS = frozenset({"TIE"})
"""Codes that describe the data rather than a fault in it."""


def run(config: ValidateConfig, ctx: StageContext) -> StageResult:
    """Validate all input rows.

    Raises:
        ConfigError: a file's format is not recognised.
        DataError: a file cannot be read, or too many rows are rejected.
    """
    inputs = ctx.pins["inputs"]
    assert isinstance(inputs, InputFiles)
    plan = plan_shards(config, inputs.files, ctx)
    worker = CheckRows(
        out=ctx.out,
        eval_fraction=config.eval_fraction,
        split_seed=config.split_seed,
        levels=config.rules,
        thresholds=config.thresholds,
    )
    shards = ctx.map_shards(worker, plan.tasks)
    refuse_faulty_rows(
        shards,
        ctx.out,
        max_reject_fraction=config.max_reject_fraction,
        describe_code=describe_code,
        advise=functools.partial(_advise, out=ctx.out),
        not_faults=_NOT_FAULTS,
    )
    num_rows = sum(shard.counts.num_in for shard in shards)
    seconds = sum(shard.seconds for shard in shards)
    summary: dict[str, Any] = {
        "formats": plan.formats,
        "rows_per_second_per_worker": round(num_rows / max(seconds, 0.001)),
        "findings": sum_up(
            (read_file(ctx.out.folder, shard.files["overview"]) for shard in shards),
            num_near=_count_near(shards, config),
        ),
    }
    if plan.rows_before_sampling:
        summary["rows_before_sampling"] = plan.rows_before_sampling
    return StageResult(shards=shards, summary=summary)


def _count_near(shards: Sequence[ShardRecord], config: ValidateConfig) -> int | None:
    """Count the pairs with CHOSEN_NEAR_REJECTED; None if that code is no warning."""
    code = "CHOSEN_NEAR_REJECTED"
    if config.rules.get(code, CODES[code].level) != "warn":
        return None
    return sum(shard.counts.warnings.get(code, 0) for shard in shards)


def _advise(faults: Counter[str], fraction: float, *, out: StageDir) -> str:
    """Name the fixes for faulty rows, their folder, and the key that lets the run continue."""
    return (
        f"All of them, with the rows as they were read, are in {out.folder.uri}/rejected/. "
        "Fix the input, name another stages.validate.format, or go on without these rows:\n"
        f"stages: {{validate: {{max_reject_fraction: {fraction}}}}}"
        f"{_suggest_levels(faults)}"
    )


def _suggest_levels(faults: Counter[str]) -> str:
    """Return advice on how to keep the rows of the most frequent code whose level can be set."""
    settable = [code for code, _ in faults.most_common() if CODES[code].why_fixed is None]
    if not settable:
        return ""
    return (
        "\nor keep those that break a rule whose level can be set (docs/reference/rules.md), "
        "such as:\n"
        f"stages: {{validate: {{rules: {{{settable[0]}: warn}}}}}}"
    )


def list_tables(manifest: Manifest) -> list[FindingsTable]:
    """List the tables about all pairs together: sources, repeated answers, notable findings."""
    found, tables = manifest.summary["findings"], []
    for title, key in (("largest sources", "sources"), ("repeated answers", "repeated_chosen")):
        if found[key]:
            shares = [
                (one["text"], f"{one['num_pairs']:,}", f"{one['share']:.1%}") for one in found[key]
            ]
            tables.append(FindingsTable(title=title, columns=("pairs", "share"), rows=shares))
    if found["notable"]:
        notes = [
            (one["code"], f"{one['found']}. Noted where {one['when']}. {one['advice']}")
            for one in found["notable"]
        ]
        tables.append(FindingsTable(title="worth a look", columns=("",), rows=notes))
    return tables


def _count_workers(stage: StageView, load: Workload) -> float:
    return load.num_pairs if load.num_shards is None else load.num_shards


STAGE = Stage(
    name="validate",
    version=4,
    needs=lambda config: (),
    config=ValidateConfig,
    execution=Execution,
    run=run,
    pins={"inputs": find_inputs},
    codes={code: described.meaning for code, described in CODES.items()},
    row_name="pairs",
    reads_every_row=True,
    cost=Cost(
        rate_per_core=7000.0,  # Measured: docs/explanation/measurements.md.
        start_seconds=3.0,
        # Bytes a token, measured: docs/explanation/scale.md.
        count_bytes=lambda stage, load: 2.0 * load.num_tokens,
        max_workers=_count_workers,
    ),
    display=Display(list_tables=list_tables),
)
