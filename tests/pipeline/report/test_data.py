"""Tests of histograms against numpy, and of shares with their confidence intervals."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.data import MAX_BINS, compare_sources, make_histogram, wilson_interval

_Z_SQUARED = 1.959964**2


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=300))
def test_counts_agree_with_numpy(values: list[int]) -> None:
    """Integers have exact edges; values beyond the edges count in the outermost bins."""
    found = make_histogram(pl.LazyFrame({"x": values}), ["x"], is_whole=True)
    assert found is not None
    clipped = np.clip(values, found.edges[0], found.edges[-1] - 1)
    expected, _ = np.histogram(clipped, found.edges)
    assert found.counts["x"].tolist() == expected.tolist()
    assert found.counts["x"].sum() == len(values)
    assert len(found.edges) - 1 <= MAX_BINS


def test_zero_lies_right_of_an_edge_whatever_the_width() -> None:
    """The bin width is 0.20000000000000004, and 13 times it divided by it is below 13.

    Subtracting the first edge before dividing would put zeros left of the edge at 0.
    """
    found = make_histogram(pl.LazyFrame({"x": [-2.48, -0.001, 0.0, 0.0, 2.01]}), ["x"])
    assert found is not None
    is_left = found.edges[:-1] < -1e-12
    assert is_left.sum() == 13
    assert found.counts["x"][is_left].sum() == 2


def test_long_tails_do_not_stretch_the_axis() -> None:
    values = [*np.linspace(0, 10, 2000), 5000.0, -700.0]
    found = make_histogram(pl.LazyFrame({"x": values}), ["x"])
    assert found is not None
    assert found.edges[0] >= -1
    assert found.edges[-1] <= 12
    assert found.holds_lower
    assert found.holds_higher
    assert found.counts["x"].sum() == 2002


def test_whole_numbers_get_bins_of_whole_width() -> None:
    found = make_histogram(pl.LazyFrame({"x": [3, 4, 4, 7]}), ["x"], is_whole=True)
    assert found is not None
    assert found.edges.tolist() == [3, 4, 5, 6, 7, 8]
    assert found.counts["x"].tolist() == [1, 2, 0, 0, 1]


def test_columns_share_bins_and_values_that_are_not_finite_are_ignored() -> None:
    frame = pl.LazyFrame({"a": [0.0, None, float("nan")], "b": [9.0, 9.0, float("inf")]})
    found = make_histogram(frame, ["a", "b"])
    assert found is not None
    assert {name: int(counts.sum()) for name, counts in found.counts.items()} == {"a": 1, "b": 2}
    assert make_histogram(pl.LazyFrame({"a": [float("nan")]}), ["a"]) is None


def test_interval_of_all_and_of_none() -> None:
    """With p = 1 the formula gives an interval from n / (n + z²) to 1."""
    low, high = wilson_interval(10, 10)
    assert (low, high) == pytest.approx((10 / (10 + _Z_SQUARED), 1))
    assert wilson_interval(0, 10) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("num_true", "num_all"), [(1, 3), (57, 64), (900, 2000)])
def test_ends_are_where_the_score_test_rejects(num_true: int, num_all: int) -> None:
    """By definition the share is z standard errors of q away from either end q."""
    share = num_true / num_all
    for end in wilson_interval(num_true, num_all):
        assert (share - end) ** 2 == pytest.approx(_Z_SQUARED * end * (1 - end) / num_all)


def test_sources_beyond_eight_are_one_entry() -> None:
    sources = [f"s{place:02d}" for place in range(15) for _ in range(30 - place)]
    pairs = pl.LazyFrame({"source": sources, "correct": [name < "s03" for name in sources]})
    chart = compare_sources(pairs, pl.col("correct"), title="It")
    assert chart is not None
    assert chart.title == "It by source: 0 % to 100 %".replace(" %", "\u00a0%")
    assert [share.label for share in chart.shares] == [
        "all pairs",
        *[f"s{place:02d}" for place in range(8)],
        "7 more sources",
    ]
    assert (chart.shares[0].num_true, chart.shares[0].num_pairs) == (87, 345)
    assert (chart.shares[-1].num_true, chart.shares[-1].num_pairs) == (0, sum(range(16, 23)))


def test_tiny_sources_do_not_count_in_the_title() -> None:
    pairs = pl.LazyFrame({"source": ["a", *["b"] * 30], "correct": [False, *[True] * 30]})
    chart = compare_sources(pairs, pl.col("correct"), title="It")
    assert chart is not None
    assert chart.title == "It by source"


def test_a_single_source_is_not_compared() -> None:
    pairs = pl.LazyFrame({"source": ["a", "a"], "correct": [True, False]})
    assert compare_sources(pairs, pl.col("correct"), title="It is") is None
