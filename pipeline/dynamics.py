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

from collections.abc import Mapping

import polars as pl

from schemas.errors import ConfigError
from stages.store.shards import StageOutput

TIMES_NOISE = 2.0
"""Margins within so many standard deviations of the engine noise count as zero."""
SUSPICIOUS = -1.5
"""Relative margin, in standard deviations, below which a pair is suspicious."""
NUM_PARTS = 10
"""Parts of an epoch within which margins are compared by size."""
PRIOR_PAIRS = 20
"""Average pairs that are added to each source."""
_SMALLEST = 1e-9


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
    """Add `relative_margin`: how far a visit's margin is from what its source had then.

    Margins grow during training, so each is divided by the mean absolute margin of all pairs in the
    same tenth of the epoch, or in the same evaluation. What a source has is the mean of these
    ratios over its pairs, as if it had `PRIOR_PAIRS` more pairs that are like all others: a source
    of three pairs tells little. The distance is in standard deviations of the ratios of all pairs.
    It is 0 where margins are noise, as in the first step.

    Args:
        visits: with `source`, `visit` (the epoch, or the step of an evaluation), `step`, `margin`.
        noise: standard deviation of margins that are zero but for rounding.
    """
    step, margin = pl.col("step"), pl.col("margin").cast(pl.Float64)
    spans = visits.group_by("visit").agg(step.min().alias("first"), step.max().alias("last"))
    part = (step - pl.col("first")) * NUM_PARTS // (pl.col("last") - pl.col("first") + 1)
    visits = visits.join(spans, on="visit").with_columns(part=part).drop("first", "last")
    sizes = visits.group_by("visit", "part").agg(size=margin.abs().mean())
    is_above_noise = pl.col("size") > max(TIMES_NOISE * noise, _SMALLEST)
    visits = visits.join(sizes, on=["visit", "part"]).with_columns(
        ratio=pl.when(is_above_noise).then(margin / pl.col("size"))
    )
    ratio = pl.col("ratio")
    overall = visits.group_by("visit").agg(
        ratio.mean().alias("mean"), ratio.std(ddof=0).alias("deviation")
    )
    of_source = visits.group_by("visit", "source").agg(
        ratio.sum().alias("sum"), ratio.count().alias("num_pairs")
    )
    expected = (pl.col("sum") + PRIOR_PAIRS * pl.col("mean")) / (pl.col("num_pairs") + PRIOR_PAIRS)
    distance = (
        pl.when(pl.col("deviation") > _SMALLEST)
        .then((ratio - expected) / pl.col("deviation"))
        .fill_null(0.0)
    )
    return (
        visits.join(overall, on="visit")
        .join(of_source, on=["visit", "source"])
        .with_columns(relative_margin=distance)
    )


def scan_dynamics(
    outputs: Mapping[str, StageOutput], pairs: pl.LazyFrame, *, held_out: bool, run_name: str
) -> pl.LazyFrame:
    """Join recorded rows with their pairs, and sum up each pair's visits.

    Args:
        outputs: the complete stages of a run.
        pairs: all pairs of the run, as `pipeline.runs.Run.pairs` scans them.
        held_out: whether to read the held-out pairs' evaluations instead of the steps.
        run_name: for messages.
    Returns:
        One row a pair; `pipeline.runs.Run.dynamics` lists the columns.
    Raises:
        ConfigError: train is not complete, or was before it recorded pairs.
    """
    table = "eval_dynamics.parquet" if held_out else "dynamics.parquet"
    output = outputs.get("train")
    if output is None:
        raise ConfigError(f"{run_name} has no complete train stage, which records the pairs.")
    if all(file.name != table for file in output.manifest.files):
        raise ConfigError(
            f"{run_name} was trained before training recorded its pairs, so there is no {table}. "
            "Run its recipe with `--again train`."
        )
    drift = output.manifest.summary["drift"]
    noise = drift["engine_noise"] if drift is not None and drift["is_reference"] else 0.0
    rows = pl.scan_parquet(f"{output.folder.uri}/{table}")
    return sum_up_rows(rows, pairs, held_out=held_out, noise=noise)


def sum_up_rows(
    rows: pl.LazyFrame, pairs: pl.LazyFrame, *, held_out: bool, noise: float
) -> pl.LazyFrame:
    """Join recorded rows with their pairs, and sum them up as `scan_dynamics` does.

    Args:
        rows: one a visit, as train records them.
        noise: standard deviation of margins that are zero but for rounding.
    """
    known = pairs.collect_schema().names()
    reference = [
        pl.col(name) if name in known else pl.lit(None, pl.Float64).alias(name)
        for name in ("ref_chosen_logp", "ref_rejected_logp")
    ]
    visits = rows.join(pairs.select("pair_id", "prompt_id", "source", *reference), on="pair_id")
    if not held_out:
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
