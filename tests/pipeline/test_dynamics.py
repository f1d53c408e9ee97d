"""Pairs are summed up over their visits as the definitions say, worked out by hand or by numpy."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.dynamics import relate_to_trend, sum_up_rows

MARGINS = {
    "learnt": [0.0, 0.5, 0.9],
    "never": [0.0, -0.2, -0.1],
    "forgotten": [0.3, -0.1, 0.4],
    "twice": [0.1, -0.1, 0.2, -0.3],
    "noisy": [0.02, -0.2, 0.1],
}


def make_visits(margins: dict[str, list[float]]) -> pl.LazyFrame:
    """Make rows as training records them, a step for each pair in each epoch, in its order."""
    rows = [
        {
            "pair_id": pair_id,
            "step": 1 + epoch * len(margins) + place,
            "epoch": 1 + epoch,
            "margin": values[epoch],
            "policy_chosen_logp": -10.0 + 5 * values[epoch],
            "policy_rejected_logp": -12.0,
            "gradient_share": 0.5 if pair_id == "never" else 0.25,
        }
        for epoch in range(max(map(len, margins.values())))
        for place, (pair_id, values) in enumerate(margins.items())
        if epoch < len(values)
    ]
    return pl.LazyFrame(rows)


def make_pairs(pair_ids: list[str], **columns: Any) -> pl.LazyFrame:
    return pl.LazyFrame(
        {"pair_id": pair_ids, "prompt_id": ["p"] * len(pair_ids), "source": ["s"] * len(pair_ids)}
    ).with_columns(**{name: pl.lit(value) for name, value in columns.items()})


def read(visits: pl.LazyFrame, pairs: pl.LazyFrame, noise: float) -> dict[str, dict[str, Any]]:
    found = sum_up_rows(visits, pairs, held_out=False, noise=noise).collect().to_dicts()
    return {row.pop("pair_id"): row for row in found}


def test_learnt_forgotten_and_displaced_pairs() -> None:
    """With noise 0.01, margins up to 0.02 are zero: `noisy` is first learnt at its last visit.

    Chosen falls below its reference of -10 where the margin is negative, and rejected is below its
    own of -11 everywhere. `never` takes half of each of its three steps, all others a quarter of
    theirs: 1.5 of 1.5 + 0.25 · 13.
    """
    pairs = make_pairs(list(MARGINS), ref_chosen_logp=-10.0, ref_rejected_logp=-11.0)
    found = read(make_visits(MARGINS), pairs, 0.01)
    assert found.keys() == MARGINS.keys()
    for pair_id, margins in MARGINS.items():
        row = found[pair_id]
        assert row["num_visits"] == len(margins)
        assert (row["first_margin"], row["last_margin"]) == (margins[0], margins[-1])
        assert row["mean_margin"] == pytest.approx(sum(margins) / len(margins))
    assert {pair_id for pair_id, row in found.items() if row["never_learnt"]} == {"never"}
    forgotten = {pair_id: row["num_forgotten"] for pair_id, row in found.items()}
    assert forgotten == {"learnt": 0, "never": 0, "forgotten": 1, "twice": 2, "noisy": 0}
    displaced = {pair_id for pair_id, row in found.items() if row["displaced"]}
    assert displaced == {"never", "twice"}
    assert found["never"]["gradient_share"] == pytest.approx(1.5 / 4.75)


def test_without_a_reference_nothing_is_displaced() -> None:
    found = read(make_visits(MARGINS), make_pairs(list(MARGINS)), 0.0)
    assert [row["displaced"] for row in found.values()] == [None] * len(MARGINS)


def test_margins_are_compared_with_their_source_at_the_same_time() -> None:
    """Worked out in numpy, row by row. Two epochs of 200 steps are parts of 20 steps each.

    Margins grow from noise: in the first part of each epoch they are too small to tell anything.
    """
    rng = np.random.default_rng(0)
    steps = np.arange(1, 401)
    margins = 0.1 * ((steps - 1) % 200 // 20) * (1 + steps % 3 + rng.normal(size=400))
    sources, epochs = np.array(["a", "b", "c"])[steps % 3], 1 + (steps - 1) // 200
    rows = {"source": sources, "visit": epochs, "step": steps, "margin": margins}
    found = relate_to_trend(pl.LazyFrame(rows), noise=1e-3).sort("step").collect()
    for epoch in (1, 2):
        ratios = np.full(400, np.nan)
        for part in range(10):
            begin = 200 * (epoch - 1) + 20 * part
            of_part = margins[begin : begin + 20]
            if part > 0:
                ratios[begin : begin + 20] = of_part / np.abs(of_part).mean()
        for place in np.flatnonzero(epochs == epoch):
            of_source = ratios[(sources == sources[place]) & ~np.isnan(ratios)]
            expected = (of_source.sum() + 20 * np.nanmean(ratios)) / (len(of_source) + 20)
            wanted = np.nan_to_num((ratios[place] - expected) / np.nanstd(ratios))
            assert found["relative_margin"][int(place)] == pytest.approx(wanted, abs=1e-9)


def test_swapped_pairs_are_suspicious_and_margins_that_are_noise_are_not() -> None:
    """Of fifty pairs five fall while all others rise; at the first visit, all are noise."""
    rng = np.random.default_rng(1)
    margins = {
        f"{number:02}": [
            rng.normal(0, 1e-6),
            *(sign * epoch * 0.5 + rng.normal(0, 0.1) for epoch in (1, 2)),
        ]
        for number in range(50)
        for sign in [-1 if number % 10 == 0 else 1]
    }
    visits = make_visits(margins)
    found = read(visits, make_pairs(list(margins)), 1e-6)
    suspicious = {pair_id for pair_id, row in found.items() if row["suspicious"]}
    assert suspicious == {"00", "10", "20", "30", "40"}
    found = read(visits.filter(pl.col("epoch") == 1), make_pairs(list(margins)), 1e-6)
    assert {row["relative_margin"] for row in found.values()} == {0.0}


def test_evaluations_are_visits_of_held_out_pairs() -> None:
    visits = make_visits(MARGINS).drop("epoch", "gradient_share")
    found = sum_up_rows(visits, make_pairs(list(MARGINS)), held_out=True, noise=0.0).collect()
    assert found.height == len(MARGINS)
    assert "gradient_share" not in found.columns
