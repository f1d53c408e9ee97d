"""What became of every raw row, and why did some of them go?"""

from dataclasses import dataclass

import polars as pl

from pipeline.report.scans import SPLITS, count_by, has_stages, scan_scored
from pipeline.report.wording import decode, one_line, visible
from pipeline.runs import Run

_ROW_STAGES = ("validate", "dedupe", "encode", "score")
_EXAMPLES_PER_CODE = 2
_MAX_EXAMPLE_CODES = 24
_RAW_CHARACTERS = 700


@dataclass(frozen=True, kw_only=True)
class FunnelStep:
    """What a stage took in and let through."""

    stage: str
    num_in: int
    num_rows_kept: int
    """Rows that were not rejected; validate may make several pairs of one."""
    kept: dict[str, int]
    """Rows by split."""
    reasons: dict[str, int]
    """Rejected rows by code, the most frequent first."""
    warnings: dict[str, int]
    """Rows kept with a doubt, by code, the most frequent first."""

    @property
    def num_kept(self) -> int:
        return sum(self.kept.values())

    @property
    def num_rejected(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True, kw_only=True)
class RejectedExample:
    """A row that did not pass."""

    place: str
    """Where it came from, as well as its stage knows."""
    field: str
    detail: str
    raw: str
    """The row as read, decoded and cut; empty after validate."""


@dataclass(frozen=True, kw_only=True)
class RejectedCode:
    """Some of the rows that a stage rejected for one reason."""

    stage: str
    code: str
    num_rows: int
    examples: list[RejectedExample]


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """The way from raw rows to pairs that can be trained on."""

    num_raw: int
    steps: list[FunnelStep]
    rejected: list[RejectedCode]

    @property
    def widest(self) -> int:
        """The number of rows that a full bar stands for."""
        return max(self.num_raw, *(step.num_kept + step.num_rejected for step in self.steps), 1)


def describe_funnel(run: Run) -> Funnel | None:
    """Count what each stage kept and rejected; None before validate is complete."""
    stages = [stage for stage in _ROW_STAGES if has_stages(run, stage)]
    if "validate" not in stages:
        return None
    return Funnel(
        num_raw=run.manifest("validate").counts.num_in,
        steps=[_describe_step(run, stage) for stage in stages],
        rejected=_pick_examples(run, stages),
    )


def _describe_step(run: Run, stage: str) -> FunnelStep:
    counts = run.manifest(stage).counts
    rows = scan_scored(run) if stage == "score" else run.scan(stage)
    by_split = count_by(rows, "split")
    return FunnelStep(
        stage=stage,
        num_in=counts.num_in,
        num_rows_kept=counts.num_rows_kept,
        kept={split: by_split.get(split, 0) for split in SPLITS},
        reasons=_most_frequent_first(counts.reasons),
        warnings=_most_frequent_first(counts.warnings),
    )


def _pick_examples(run: Run, stages: list[str]) -> list[RejectedCode]:
    found = [
        (stage, code, amount)
        for stage in stages
        for code, amount in _most_frequent_first(run.manifest(stage).counts.reasons).items()
    ]
    return [
        RejectedCode(
            stage=stage,
            code=code,
            num_rows=amount,
            examples=_read_examples(run.scan(stage, "rejected"), code),
        )
        for stage, code, amount in found[:_MAX_EXAMPLE_CODES]
    ]


def _read_examples(rejected: pl.LazyFrame, code: str) -> list[RejectedExample]:
    columns = ("field", "detail", "source_file", "source_row", "pair_id", "raw")
    rows = rejected.filter(pl.col("code") == code).select(columns).head(_EXAMPLES_PER_CODE)
    return [
        RejectedExample(
            place=_describe_place(row["source_file"], row["source_row"], row["pair_id"]),
            field=one_line(row["field"] or ""),
            detail=visible(row["detail"] or "", max_characters=500),
            raw=visible(decode(row["raw"] or b""), max_characters=_RAW_CHARACTERS),
        )
        for row in rows.collect().to_dicts()
    ]


def _describe_place(file: str | None, row: int | None, pair_id: str | None) -> str:
    places = []
    if file is not None:
        places.append(one_line(file) if row is None else f"{one_line(file)}, row {row:,}")
    if pair_id is not None:
        places.append(f"pair {pair_id[:12]}…")
    return ", ".join(places)


def _most_frequent_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
