"""Tests of the plain progress lines: counts, and the time that is left."""

import logging
from types import SimpleNamespace

import pytest

from pipeline import progress


def test_parts_of_shards_count_for_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four shards is done after 60 s and half of another at 90 s: 2.5 are left, 60 s each.

    Lines are ten seconds apart, and parts are replaced, never added up.
    """
    times = iter([0.0, 0.0, 60.0, 80.0, 85.0, 90.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    caplog.set_level(logging.INFO)
    with progress.open_progress("score") as shown:
        shown.start("", total=4, unit="shards")
        shown.advance(1, "first")
        for amount in (0.25, 0.4, 0.5):
            shown.show_parts(amount, f"part {amount}")
    assert [record.getMessage() for record in caplog.records] == [
        "score: 1/4 shards, 60 s, about 180 s left; first",
        "score: 1/4 shards, 80 s, about 176 s left; part 0.25",
        "score: 1/4 shards, 90 s, about 150 s left; part 0.5",
    ]
