"""Section of a run's page about what each pair did in training."""

from dataclasses import dataclass

import polars as pl

from pipeline.dynamics import SUSPICIOUS
from pipeline.report.charts import Chart, Key, describe_tails, draw_histogram, list_bins
from pipeline.report.data import (
    Conversation,
    has_stages,
    has_table,
    make_histogram,
    read_conversations,
)
from pipeline.report.data_sections import FrequencyTable
from pipeline.report.text import count, one_line, percent, plain, plural, signed
from pipeline.runs import Run

_MAX_SUSPECTS = 8
_MAX_SOURCES = 20
_TEXT_CHARACTERS = 700
_KINDS = ("never learnt", "forgotten", "displaced", "suspicious")


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A pair whose label may be wrong."""

    facts: str
    """Its margins, its source and its id."""
    conversation: Conversation | None
    """None if dedupe's output was deleted."""


@dataclass(frozen=True, kw_only=True)
class DynamicsSection:
    """Training pairs by what they did; only a lead if training recorded none."""

    lead: str
    by_source: FrequencyTable | None = None
    charts: tuple[Chart, ...] = ()
    suspects: tuple[Suspect, ...] = ()


def describe_dynamics(run: Run) -> DynamicsSection | None:
    """Count pairs by what they did in training, by source; None if train is not complete."""
    if not has_stages(run, "train"):
        return None
    if not has_table(run, "train", "dynamics"):
        return DynamicsSection(
            lead="This run was trained before training recorded its pairs; `--again train` does."
        )
    pairs = run.dynamics().collect(engine="streaming")
    if pairs.is_empty():
        return DynamicsSection(lead="There were no training pairs.")
    suspects = pairs.filter("suspicious").sort("relative_margin", "pair_id").head(_MAX_SUSPECTS)
    return DynamicsSection(
        lead=_lead(pairs),
        by_source=_tabulate_sources(pairs),
        charts=_chart_relative_margins(pairs),
        suspects=_show_suspects(run, suspects),
    )


def _lead(pairs: pl.DataFrame) -> str:
    suspects = pairs.filter("suspicious")
    most = int(pairs["num_visits"].max())  # type: ignore[arg-type]  # There are rows.
    again = "" if most > 1 else " Each pair was trained on once, so none could be forgotten."
    share = float(suspects["gradient_share"].sum())
    taken = f", and took {percent(share)} of the gradient" if suspects.height else ""
    num_never = pairs.filter("never_learnt").height
    return (
        f"Of {plural(pairs.height, 'training pair')}, {count(num_never)} never "
        f"had a margin above zero when they were trained on. The margins of "
        f"{count(suspects.height)} were far below the trend of their source{taken}: their labels "
        f"may be wrong.{again}"
    )


def _tabulate_sources(pairs: pl.DataFrame) -> FrequencyTable:
    counted = (
        pairs.group_by("source")
        .agg(
            pl.len().alias("pairs"),
            pl.col("never_learnt").sum().alias("never learnt"),
            (pl.col("num_forgotten") > 0).sum().alias("forgotten"),
            # Null, not 0, without a reference.
            pl.when(pl.col("displaced").count() > 0)
            .then(pl.col("displaced").sum())
            .alias("displaced"),
            pl.col("suspicious").sum().alias("suspicious"),
        )
        .sort(["pairs", "source"], descending=[True, False])
    )
    return FrequencyTable(
        title="Training pairs by source",
        header=["source", "pairs", *_KINDS],
        rows=[
            [
                one_line(row["source"], max_characters=60),
                *("" if row[kind] is None else count(row[kind]) for kind in ("pairs", *_KINDS)),
            ]
            for row in counted.head(_MAX_SOURCES).to_dicts()
        ],
    )


def _chart_relative_margins(pairs: pl.DataFrame) -> tuple[Chart, ...]:
    histogram = make_histogram(pairs.lazy(), ["relative_margin"])
    if histogram is None:
        return ()
    num_suspicious = int(pairs["suspicious"].sum())
    return (
        Chart(
            title=f"{plural(num_suspicious, 'pair')} of {count(pairs.height)} "
            "far below the trend of their source",
            drawing=draw_histogram(
                histogram,
                {"relative_margin": "neutral"},
                x_label="mean distance from the trend, standard deviations",
                splits_at_zero=True,
            ),
            keys=(
                Key(label="above the trend", colour="chosen", mark="area"),
                Key(label="below the trend", colour="rejected", mark="area"),
            ),
            reading="The trend is what other pairs of the same source had at about the same step. "
            f"Pairs below {plain(SUSPICIOUS)} are suspicious." + describe_tails(histogram),
            numbers=list_bins(histogram, {"relative_margin": "pairs"}),
        ),
    )


def _show_suspects(run: Run, suspects: pl.DataFrame) -> tuple[Suspect, ...]:
    known: dict[str, Conversation] = {}
    if has_stages(run, "dedupe"):
        known = read_conversations(
            run.scan("dedupe"), suspects["pair_id"].to_list(), max_characters=_TEXT_CHARACTERS
        )
    return tuple(
        Suspect(
            facts=f"{signed(row['relative_margin'])} standard deviations from the trend; margin "
            f"{signed(row['first_margin'])} at first, {signed(row['last_margin'])} at last; "
            f"{one_line(row['source'], max_characters=60)}, pair {row['pair_id']}",
            conversation=known.get(row["pair_id"]),
        )
        for row in suspects.to_dicts()
    )
