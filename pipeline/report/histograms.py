"""How are millions of values brought down to some thirty bins, without holding them?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

MAX_BINS = 32
_TAIL = 0.005
"""Share of the values, at either end, that may fall into the outermost bins from beyond."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)

FloatArray = NDArray[np.float64]
CountArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of one or more columns over common bins; each bin holds its left edge."""

    edges: FloatArray
    """[bins + 1], multiples of the bin width, so that 0 is never inside a bin."""
    counts: Mapping[str, CountArray]
    """[bins] by column. The outermost bins also hold what lies beyond them."""
    holds_lower: bool
    """Whether the first bin holds values from below it."""
    holds_higher: bool
    """Whether the last bin holds values from above it."""


def make_histogram(
    frame: pl.LazyFrame, columns: Sequence[str], *, is_whole: bool = False
) -> Histogram | None:
    """Count the values of some numeric columns over common bins.

    Args:
        frame: where the columns are; only they are read.
        columns: at least one.
        is_whole: whether the values are whole numbers, so that no bin is narrower than 1.
    Returns:
        None where there is no finite value.
    """
    values = frame.select(pl.col(columns).cast(pl.Float64))
    spans = values.select(
        *[pl.col(c).filter(pl.col(c).is_finite()).min().alias(f"{c} lowest") for c in columns],
        *[pl.col(c).filter(pl.col(c).is_finite()).max().alias(f"{c} highest") for c in columns],
        *[_quantile(c, _TAIL).alias(f"{c} low") for c in columns],
        *[_quantile(c, 1 - _TAIL).alias(f"{c} high") for c in columns],
    ).collect(engine="streaming")
    found = spans.row(0, named=True)
    present = [c for c in columns if found[f"{c} lowest"] is not None]
    if not present:
        return None
    low = min(found[f"{c} low"] for c in present)
    high = max(found[f"{c} high"] for c in present)
    edges = choose_edges(low, high, is_whole=is_whole)
    return Histogram(
        edges=edges,
        counts={c: _count(values, c, edges) for c in columns},
        holds_lower=min(found[f"{c} lowest"] for c in present) < float(edges[0]),
        holds_higher=max(found[f"{c} highest"] for c in present) >= float(edges[-1]),
    )


def choose_edges(low: float, high: float, *, is_whole: bool) -> FloatArray:
    """Cut [low, high] into at most MAX_BINS bins, 1, 2, 2.5 or 5 times a power of ten wide."""
    width = _choose_width((high - low) / (MAX_BINS - 2))
    if is_whole:
        width = max(1.0, math.ceil(width))
    first = math.floor(low / width)
    last = math.floor(high / width) + 1
    return np.arange(first, last + 1, dtype=np.float64) * width


def _choose_width(at_least: float) -> float:
    if at_least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(step * power for step in _STEPS if step * power >= at_least * (1 - 1e-9))


def _quantile(column: str, share: float) -> pl.Expr:
    return pl.col(column).filter(pl.col(column).is_finite()).quantile(share, "nearest")


def _count(values: pl.LazyFrame, column: str, edges: FloatArray) -> CountArray:
    num_bins = len(edges) - 1
    width = float(edges[-1] - edges[0]) / num_bins
    first = round(float(edges[0]) / width)
    # Divided before anything is subtracted: a value of 0 must not slip below the edge at 0.
    place = ((pl.col(column) / width).floor() - first).clip(0, num_bins - 1)
    found = (
        values.filter(pl.col(column).is_finite())
        .group_by(place.cast(pl.Int64).alias("bin"))
        .len()
        .collect(engine="streaming")
    )
    counts = np.zeros(num_bins, dtype=np.int64)
    counts[found["bin"].to_numpy()] = found["len"].to_numpy()
    return counts
