"""What does the trained policy prefer on pairs that it never saw, and what does it say now?"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.report.charts import Chart, Key, Numbers, describe_tails, draw_histogram, draw_plane
from pipeline.report.charts import list_bins as list_histogram_bins
from pipeline.report.histograms import FloatArray, make_histogram
from pipeline.report.scans import has_stages, has_table
from pipeline.report.shares import Share, ShareChart, compare_sources
from pipeline.report.training import describe_noise, noise_key, read_engine_noise
from pipeline.report.wording import MINUS, count, percent, plural, signed, visible
from pipeline.runs import Run

_MAX_GENERATIONS = 12
_TEXT_CHARACTERS = 2000
_PLANE_CELLS = 60
"""Cells that pairs are gathered into, along either axis."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The held-out pairs in numbers."""

    accuracy: Share
    mean_margin: float
    displaced: Share | None
    """None where there is no reference."""
    noise: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The held-out pairs in words and pictures."""

    lead: str
    charts: list[Chart]
    by_source: ShareChart | None
    """Accuracy."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt, answered by the policy's start and by the trained policy."""

    pair_id: str
    prompt: str
    before: str
    after: str
    chosen: str
    rejected: str


def summarise_evaluation(run: Run) -> Outcome | None:
    """Count over the held-out pairs; None before evaluate is complete or without such pairs."""
    if not has_stages(run, "evaluate"):
        return None
    facts = (
        run.scan("evaluate")
        .select(
            pl.len().alias("pairs"),
            pl.col("correct").sum(),
            pl.col("displaced").sum(),
            pl.col("displaced").count().alias("compared"),
            pl.col("margin").mean(),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    if facts["pairs"] == 0:
        return None
    return Outcome(
        accuracy=Share(label="accuracy", num_true=facts["correct"], num_pairs=facts["pairs"]),
        mean_margin=facts["margin"],
        displaced=Share(label="displaced", num_true=facts["displaced"], num_pairs=facts["compared"])
        if facts["compared"]
        else None,
        noise=read_engine_noise(run) if has_stages(run, "train") else None,
    )


def describe_evaluation(run: Run) -> Evaluation | None:
    """Show margins, accuracy and displacement; None before evaluate is complete."""
    if not has_stages(run, "evaluate"):
        return None
    outcome = summarise_evaluation(run)
    if outcome is None:
        return Evaluation(lead="No pair was held out.", charts=[], by_source=None)
    pairs = run.scan("evaluate").select(
        "source",
        "margin",
        "correct",
        chosen=pl.col("policy_chosen_logp") - pl.col("ref_chosen_logp"),
        rejected=pl.col("policy_rejected_logp") - pl.col("ref_rejected_logp"),
    )
    accuracy = outcome.accuracy
    low, high = accuracy.interval
    lead = (
        f"{count(accuracy.num_true)} of {plural(accuracy.num_pairs, 'held-out pair')} have a "
        f"reward margin above zero: {percent(accuracy.value)} (95 % interval {percent(low)} to "
        f"{percent(high)}). The mean margin is {signed(outcome.mean_margin)}."
    )
    return Evaluation(
        lead=lead,
        charts=[
            _chart_margins(pairs, outcome),
            *([_chart_displacement(pairs, outcome.displaced)] if outcome.displaced else []),
        ],
        by_source=compare_sources(pairs, pl.col("correct"), title="Held-out accuracy"),
    )


def _chart_margins(pairs: pl.LazyFrame, outcome: Outcome) -> Chart:
    histogram = make_histogram(pairs, ["margin"])
    assert histogram is not None
    return Chart(
        title=f"{percent(outcome.accuracy.value)} of held-out margins lie above zero, "
        f"{signed(outcome.mean_margin)} on average",
        drawing=draw_histogram(
            histogram,
            {"margin": "neutral"},
            x_label=f"chosen {MINUS} rejected reward, nats",
            splits_at_zero=True,
            noise=outcome.noise,
        ),
        keys=(
            Key(label="prefers chosen", colour="chosen", mark="area"),
            Key(label="prefers rejected", colour="rejected", mark="area"),
            *noise_key(outcome.noise),
        ),
        reading="Right of zero the chosen answer gained more, or lost less, than the rejected one."
        + describe_noise(outcome.noise)
        + describe_tails(histogram),
        numbers=list_histogram_bins(histogram, {"margin": "pairs"}),
    )


def _chart_displacement(pairs: pl.LazyFrame, displaced: Share) -> Chart:
    pairs = pairs.filter(pl.col("chosen").is_finite() & pl.col("rejected").is_finite())
    places, amounts = _gather_cells(pairs)
    means = pairs.select(pl.col("chosen", "rejected").mean()).collect().row(0)
    return Chart(
        title=f"In {percent(displaced.value)} of held-out pairs both answers became less likely",
        drawing=draw_plane(
            places,
            amounts,
            x_label="change of the rejected answer's log-prob, nats",
            y_label="change of the chosen answer's log-prob, nats",
            colour="held-out",
        ),
        reading="A dot is a pair, a larger one several. Above the dashed line the margin is "
        "positive; left of and below both axes, probability went to neither answer (displacement).",
        numbers=Numbers(
            header=("answer", "mean change, nats"),
            rows=[("chosen", signed(means[0])), ("rejected", signed(means[1]))],
        ),
    )


def _gather_cells(pairs: pl.LazyFrame) -> tuple[FloatArray, FloatArray]:
    """Gather pairs into cells of a grid: never more dots than cells, however many pairs."""
    lowest_x, highest_x, lowest_y, highest_y = (
        pairs.select(
            pl.col("rejected").min().alias("x0"),
            pl.col("rejected").max().alias("x1"),
            pl.col("chosen").min().alias("y0"),
            pl.col("chosen").max().alias("y1"),
        )
        .collect(engine="streaming")
        .row(0)
    )
    width = max(highest_x - lowest_x, highest_y - lowest_y, 1e-9) / _PLANE_CELLS
    cells = (
        pairs.group_by(
            ((pl.col("rejected") - lowest_x) / width).floor().alias("x"),
            ((pl.col("chosen") - lowest_y) / width).floor().alias("y"),
        )
        .len()
        .sort("x", "y")
        .collect(engine="streaming")
    )
    corners = cells.select("x", "y").to_numpy()
    places = (corners + 0.5) * width + np.array([lowest_x, lowest_y])
    return places, cells["len"].to_numpy().astype(np.float64)


def read_generations(run: Run) -> list[Generation] | None:
    """Read a few answers from before and after; None before evaluate is complete."""
    if not has_table(run, "evaluate", "generations"):
        return None
    texts = ("prompt", "before", "after", "chosen", "rejected")
    rows = (
        run.scan("evaluate", "generations")
        .head(_MAX_GENERATIONS)
        .select("pair_id", pl.col(texts).str.head(_TEXT_CHARACTERS + 1))
        .collect()
    )
    return [
        Generation(
            pair_id=row["pair_id"],
            **{name: visible(row[name], max_characters=_TEXT_CHARACTERS) for name in texts},
        )
        for row in rows.to_dicts()
    ]
