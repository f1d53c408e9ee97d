"""Training dynamics: what each pair's margins say about it, as polars functions.

A *visit* of a pair is a step that trained on it, before its update, or an evaluation of it. Its
margin is the reward of the chosen minus that of the rejected answer, so a pair is *learnt* at a
visit if the margin is above zero.

- Mean margin: the area under the margin (Pleiss et al. 2020, arXiv:2001.10528): correct labels have
  larger margins over a training, because other pairs teach the same.
- Never learnt, forgotten: Toneva et al. 2019, arXiv:1812.05159.
- Probably mislabelled: low margins throughout are often a wrong label (dataset cartography,
  Swayamdipta et al. 2020, arXiv:2009.10795). Pairs that are merely rare or hard look alike
  (arXiv:2210.15031), so these are pairs to look at, not pairs to drop unseen. In the end training
  fits wrong labels, too (arXiv:2404.04102), so the first visit counts as much as the last.
"""

from typing import Literal

import polars as pl

TableName = Literal["dynamics", "eval_dynamics"]
"""Of what train records at each step, and at each evaluation of the held-out pairs."""

TIMES_NOISE = 2.0
"""Margins within so many standard deviations of the engine noise count as zero."""
SUSPICIOUS = -1.5
"""Mean distance from the trend, in standard deviations, below which a pair is suspicious."""
_BY_VISIT = ("source", "visit")


def is_learnt(noise: float) -> pl.Expr:
    """Whether the margin of a visit is above zero.

    Args:
        noise: standard deviation of margins that are zero but for rounding.
    """
    return pl.col("margin") > TIMES_NOISE * noise


def count_forgotten(noise: float) -> pl.Expr:
    """Count forgetting events: visits at which a pair is not learnt, but was at the one before.

    An aggregation over the visits of one pair, sorted by step.
    """
    learnt = is_learnt(noise)
    return (learnt.shift(1) & ~learnt).sum()


def is_displaced() -> pl.Expr:
    """Whether both answers are less likely than under the reference; null without one."""
    return (pl.col("policy_chosen_logp") < pl.col("ref_chosen_logp")) & (
        pl.col("policy_rejected_logp") < pl.col("ref_rejected_logp")
    )


def relate_to_trend(visits: pl.LazyFrame, *, noise: float) -> pl.LazyFrame:
    """Add `relative_margin`: how far a visit's margin is from the trend of its source.

    Margins grow during training, and differ between sources by the lengths of answers and by how
    hard they are. The trend is the least-squares line of margin over step, of all pairs of a source
    in the same epoch or evaluation; the distance is in standard deviations from this line. It is 0
    where the margins are all alike or noise, as in the evaluation before training.

    Args:
        visits: with `source`, `visit` (the epoch, or the step of an evaluation), `step`, `margin`.
        noise: standard deviation of margins that are zero but for rounding.
    """
    step, margin = pl.col("step").cast(pl.Float64), pl.col("margin").cast(pl.Float64)
    sums = visits.group_by(_BY_VISIT).agg(
        step.mean().alias("mean_step"),
        margin.mean().alias("mean_margin"),
        step.var(ddof=0).alias("var_step"),
        margin.var(ddof=0).alias("var_margin"),
        pl.cov(step, margin, ddof=0).alias("covariance"),
    )
    slope = pl.when(pl.col("var_step") > 0).then(pl.col("covariance") / pl.col("var_step"))
    trends = sums.with_columns(slope=slope.otherwise(0.0)).with_columns(
        deviation=(pl.col("var_margin") - pl.col("slope") * pl.col("covariance")).clip(0).sqrt()
    )
    line = pl.col("mean_margin") + pl.col("slope") * (step - pl.col("mean_step"))
    is_told_apart = pl.col("deviation") > max(TIMES_NOISE * noise, 1e-9)
    return visits.join(trends, on=_BY_VISIT).with_columns(
        relative_margin=pl.when(is_told_apart)
        .then((margin - line) / pl.col("deviation"))
        .otherwise(0.0)
    )


def scan_dynamics(
    table: TableName, rows: pl.LazyFrame, pairs: pl.LazyFrame, *, noise: float
) -> pl.LazyFrame:
    """Join recorded rows with their pairs, and sum up each pair's visits.

    Args:
        table: that the rows are from.
        rows: one a visit.
        pairs: all pairs of the run, as `pipeline.runs.Run.pairs` scans them.
        noise: standard deviation of margins that are zero but for rounding.
    Returns:
        One row a pair; `pipeline.runs.Run.dynamics` lists the columns.
    """
    known = pairs.collect_schema().names()
    reference = [
        pl.col(name) if name in known else pl.lit(None, pl.Float64).alias(name)
        for name in ("ref_chosen_logp", "ref_rejected_logp")
    ]
    visits = rows.join(pairs.select("pair_id", "prompt_id", "source", *reference), on="pair_id")
    if table == "dynamics":
        return sum_up_pairs(visits.with_columns(visit=pl.col("epoch").cast(pl.Int64)), noise=noise)
    visits = visits.with_columns(visit=pl.col("step"), gradient_share=pl.lit(0.0))
    return sum_up_pairs(visits, noise=noise).drop("gradient_share")


def sum_up_pairs(visits: pl.LazyFrame, *, noise: float) -> pl.LazyFrame:
    """Sum up each pair's visits in one row.

    Args:
        visits: the columns of the recorded table, `visit` as in `relate_to_trend`, and `source`,
            `prompt_id` and the reference's log-probs (null without a reference) of the pair.
        noise: standard deviation of margins that are zero but for rounding.
    """
    visits = relate_to_trend(visits, noise=noise)
    relative = pl.col("relative_margin")
    # Sorted as a whole: polars would sort the visits of every pair anew for each aggregation.
    pairs = (
        visits.sort("step", maintain_order=True)
        .group_by("pair_id", maintain_order=True)
        .agg(
            pl.col("prompt_id", "source").first(),
            pl.len().alias("num_visits"),
            pl.col("margin").first().alias("first_margin"),
            pl.col("margin").last().alias("last_margin"),
            pl.col("margin").mean().alias("mean_margin"),
            relative.mean(),
            (~is_learnt(noise).any()).alias("never_learnt"),
            count_forgotten(noise).alias("num_forgotten"),
            is_displaced().last().alias("displaced"),
            (relative.mean() < SUSPICIOUS).alias("suspicious"),
            pl.col("gradient_share").cast(pl.Float64).sum(),
        )
    )
    return pairs.with_columns(pl.col("gradient_share") / pl.col("gradient_share").sum())
