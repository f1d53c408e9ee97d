"""Shares and their intervals."""

import polars as pl
import pytest

from pipeline.report.shares import compare_sources, wilson_interval

_Z_SQUARED = 1.959964**2


def test_interval_of_all_and_of_none() -> None:
    """With share 1 the interval ends at 1 and starts at n / (n + z²): set p = 1 in its formula."""
    low, high = wilson_interval(10, 10)
    assert (low, high) == pytest.approx((10 / (10 + _Z_SQUARED), 1))
    assert wilson_interval(0, 10) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("num_true", "num_all"), [(1, 3), (57, 64), (900, 2000)])
def test_ends_are_where_the_score_test_rejects(num_true: int, num_all: int) -> None:
    """At either end q the share lies z standard errors of q away: that defines the interval."""
    share = num_true / num_all
    for end in wilson_interval(num_true, num_all):
        assert (share - end) ** 2 == pytest.approx(_Z_SQUARED * end * (1 - end) / num_all)


def test_sources_beyond_eight_are_one_entry() -> None:
    sources = [f"s{place:02d}" for place in range(15) for _ in range(30 - place)]
    pairs = pl.LazyFrame({"source": sources, "correct": [name < "s03" for name in sources]})
    chart = compare_sources(pairs, pl.col("correct"), title="It")
    assert chart is not None
    assert chart.title == "It, by source, is 0 % to 100 %".replace(" %", "\u00a0%")
    assert [share.label for share in chart.shares] == [
        "all pairs",
        *[f"s{place:02d}" for place in range(8)],
        "7 more sources",
    ]
    assert (chart.shares[0].num_true, chart.shares[0].num_pairs) == (87, 345)
    assert (chart.shares[-1].num_true, chart.shares[-1].num_pairs) == (0, sum(range(16, 23)))


def test_tiny_sources_make_no_title() -> None:
    pairs = pl.LazyFrame({"source": ["a", *["b"] * 30], "correct": [False, *[True] * 30]})
    chart = compare_sources(pairs, pl.col("correct"), title="It")
    assert chart is not None
    assert chart.title == "It, by source"


def test_a_single_source_is_not_compared() -> None:
    pairs = pl.LazyFrame({"source": ["a", "a"], "correct": [True, False]})
    assert compare_sources(pairs, pl.col("correct"), title="It is") is None
