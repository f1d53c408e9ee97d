"""Binning in polars against numpy, and the shape of the bins."""

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.histograms import MAX_BINS, make_histogram


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=300))
def test_counts_agree_with_numpy(values: list[int]) -> None:
    """Whole numbers, whose edges are exact; what lies beyond is clipped into the outermost bins."""
    found = make_histogram(pl.LazyFrame({"x": values}), ["x"], is_whole=True)
    assert found is not None
    clipped = np.clip(values, found.edges[0], found.edges[-1] - 1)
    expected, _ = np.histogram(clipped, found.edges)
    assert found.counts["x"].tolist() == expected.tolist()
    assert found.counts["x"].sum() == len(values)
    assert len(found.edges) - 1 <= MAX_BINS


def test_zero_lies_right_of_an_edge_whatever_the_width() -> None:
    """The edges come out 0.20000000000000004 apart, and 13 times that over itself is below 13.

    So a zero would fall left of its edge, were the first edge subtracted before dividing.
    """
    found = make_histogram(pl.LazyFrame({"x": [-2.48, -0.001, 0.0, 0.0, 2.01]}), ["x"])
    assert found is not None
    is_left = found.edges[:-1] < -1e-12
    assert is_left.sum() == 13
    assert found.counts["x"][is_left].sum() == 2


def test_long_tails_do_not_stretch_the_picture() -> None:
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


def test_columns_share_bins_and_what_is_not_finite_is_left_out() -> None:
    frame = pl.LazyFrame({"a": [0.0, None, float("nan")], "b": [9.0, 9.0, float("inf")]})
    found = make_histogram(frame, ["a", "b"])
    assert found is not None
    assert {name: int(counts.sum()) for name, counts in found.counts.items()} == {"a": 1, "b": 2}
    assert make_histogram(pl.LazyFrame({"a": [float("nan")]}), ["a"]) is None
