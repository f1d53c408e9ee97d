"""In which share of the pairs does something hold, how sure is that, and how is it by source?"""

import math
from dataclasses import dataclass

import polars as pl

from pipeline.report.wording import one_line, percent

_MAX_SOURCES = 8
_LARGE_SOURCE_PAIRS = 20
"""Below this a source's share says too little to stand in a title."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of some pairs, with its 95 % Wilson interval."""

    label: str
    num_true: int
    num_pairs: int

    @property
    def value(self) -> float:
        return self.num_true / self.num_pairs

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_true, self.num_pairs)


@dataclass(frozen=True, kw_only=True)
class ShareChart:
    """Shares under one another."""

    title: str
    shares: list[Share]
    """All pairs first, then by source."""


def wilson_interval(num_true: int, num_all: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Give the score interval of a proportion (Wilson 1927), which holds for few trials, too.

    Args:
        num_true: successes.
        num_all: trials, at least 1.
        z: how many standard errors to either side; by default 95 %.
    """
    share = num_true / num_all
    centre = (share + z * z / (2 * num_all)) / (1 + z * z / num_all)
    spread = math.sqrt(share * (1 - share) / num_all + (z / (2 * num_all)) ** 2)
    half = z / (1 + z * z / num_all) * spread
    return max(0.0, centre - half), min(1.0, centre + half)


def compare_sources(pairs: pl.LazyFrame, claim: pl.Expr, *, title: str) -> ShareChart | None:
    """Count where a claim holds: over all pairs, then by source, the largest sources first.

    Args:
        pairs: with a column source.
        claim: true or false for each pair.
        title: completed by the range of the shares of sources large enough to have one.
    Returns:
        None where there is no more than one source. Beyond eight the rest is one entry.
    """
    counted = (
        pairs.group_by("source")
        .agg(pl.len().alias("pairs"), claim.sum().alias("true"))
        .collect(engine="streaming")
        .sort(["pairs", "source"], descending=[True, False])
    )
    rows = [
        Share(label=one_line(source, max_characters=60), num_true=true, num_pairs=amount)
        for source, amount, true in counted.select("source", "pairs", "true").rows()
    ]
    if len(rows) < 2:
        return None
    rest = rows[_MAX_SOURCES:]
    others = [_sum_up(f"{len(rest)} more sources", rest)] if rest else []
    values = [share.value for share in rows if share.num_pairs >= _LARGE_SOURCE_PAIRS]
    found = f", is {percent(min(values))} to {percent(max(values))}" if len(values) > 1 else ""
    return ShareChart(
        title=f"{title}, by source{found}",
        shares=[_sum_up("all pairs", rows), *rows[:_MAX_SOURCES], *others],
    )


def _sum_up(label: str, shares: list[Share]) -> Share:
    return Share(
        label=label,
        num_true=sum(share.num_true for share in shares),
        num_pairs=sum(share.num_pairs for share in shares),
    )
