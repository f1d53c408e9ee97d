"""How long did it take, how fast did it go, and how much memory did training need?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.report.charts import Chart, Line, Numbers, draw_lines
from pipeline.report.scans import has_stages, has_table
from pipeline.report.training import STEP_LABEL
from pipeline.report.wording import count, number, size
from pipeline.runs import Run

_FAST_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    stage: str
    seconds: float
    rows: str
    """How much it did, in words."""


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """What the steps of a training took, taken together."""

    seconds: float
    pairs_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    stages: list[StageTime]
    facts: list[tuple[str, str]]
    """Rates and sizes, in words."""
    charts: list[Chart]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def longest(self) -> float:
        return max([stage.seconds for stage in self.stages] or [1.0])


def measure_training(run: Run) -> TrainingSpeed | None:
    """Add up the steps' timings; None before train is complete."""
    if not has_table(run, "train", "timings"):
        return None
    seconds, pairs, tokens, memory = (
        run.scan("train", "timings")
        .select(
            pl.col("seconds").sum(),
            (pl.col("pairs_per_second") * pl.col("seconds")).sum().alias("pairs"),
            (pl.col("tokens_per_second") * pl.col("seconds")).sum().alias("tokens"),
            pl.col("memory_bytes").max(),
        )
        .collect()
        .row(0)
    )
    if not seconds:
        return None
    return TrainingSpeed(
        seconds=seconds,
        pairs_per_second=pairs / seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=memory,
    )


def describe_scoring(found: Mapping[str, Any]) -> str:
    """Say how fast score was, without what it reused."""
    if "num_sequences_imported" in found:
        return "imported"
    if not found["num_sequences_scored"] and found["num_sequences_reused"]:
        return "all reused"
    return f"{number(found['pairs_per_second'])} pairs/s"


def describe_timing(run: Run) -> Timing:
    """Show seconds by stage, rates and memory, as far as stages are complete."""
    stages = []
    for name in run.outputs:
        manifest = run.manifest(name)
        rows = f"{count(manifest.counts.num_in)} rows" if manifest.shards else ""
        if name == "train":
            rows = f"{count(manifest.summary['num_steps'])} steps"
        stages.append(StageTime(stage=name, seconds=manifest.seconds, rows=rows))
    facts = []
    if has_stages(run, "score"):
        facts.append(("Reference scoring", describe_scoring(run.manifest("score").summary)))
    speed = measure_training(run)
    charts = []
    if speed is not None:
        facts += [
            (
                "Training",
                f"{number(speed.pairs_per_second)} pairs/s, "
                f"{count(speed.tokens_per_second)} tokens/s",
            ),
            ("Peak memory of a training process", size(speed.peak_memory_bytes)),
            ("Device", str(run.manifest("train").summary["device"])),
        ]
        charts.append(_chart_speed(run, speed))
    return Timing(stages=stages, facts=facts, charts=charts)


def _chart_speed(run: Run, speed: TrainingSpeed) -> Chart:
    rows = run.scan("train", "timings").select("step", "tokens_per_second").collect()
    quantiles = [rows["tokens_per_second"].quantile(share) for share in _FAST_QUANTILES]
    return Chart(
        title=f"Training computes {count(speed.tokens_per_second)} tokens a second",
        drawing=draw_lines(
            [
                Line(
                    x=rows["step"].cast(pl.Float64).to_numpy(),
                    y=rows["tokens_per_second"].to_numpy(),
                    colour="neutral",
                    width=1.4,
                )
            ],
            x_label=STEP_LABEL,
            y_label="tokens per second",
            starts_at_zero=True,
        ),
        reading="Padding is not counted.",
        numbers=Numbers(
            header=("quantile of steps", "tokens/s"),
            rows=[
                (f"{share * 100:.0f} %", count(quantile or 0.0))
                for share, quantile in zip(_FAST_QUANTILES, quantiles, strict=True)
            ],
        ),
    )
