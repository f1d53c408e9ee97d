"""Progress of unfinished shards, as the driver sees it."""

import time
from pathlib import Path

import pytest

from stages.score import progress
from stages.score.progress import PartDone, forget_part, read_parts, report_part, shown_parts
from stages.scorers.protocol import ScoreStatistics
from tests.stages_running import QuietProgress, stage_dir

PART = PartDone(
    num_pairs=1000,
    num_pairs_done=500,
    num_pairs_scored=400,
    seconds=100.0,
    statistics=ScoreStatistics(num_tokens_submitted=1000, num_tokens_computed=700),
)
OTHER = PartDone(
    num_pairs=2000,
    num_pairs_done=500,
    num_pairs_scored=300,
    seconds=50.0,
    statistics=ScoreStatistics(num_tokens_submitted=1000, num_tokens_computed=800),
)


def test_unfinished_shards_are_shown_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One half and one quarter done; 400 in 100 s and 300 in 50 s are 4 and 6 a second; 500 of
    2,000 tokens were not computed. Notes of an earlier, killed run are ignored."""
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    out, shown = stage_dir(tmp_path, "score"), QuietProgress()
    report_part(out, 7, PART)
    with shown_parts(out, shown):
        assert read_parts(out.folder) == []
        report_part(out, 0, PART)
        report_part(out, 1, OTHER)
        deadline = time.monotonic() + 10
        while not (shown.parts and shown.parts[-1][0] == 0.75) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert shown.parts[-1] == (
        0.75,
        "1,000 of 3,000 pairs of unfinished shards, 10.0 pairs/s, 25% of tokens from shared "
        "prompts",
    )


def test_a_finished_shard_has_no_note(tmp_path: Path) -> None:
    out = stage_dir(tmp_path, "score")
    forget_part(out, 0)
    report_part(out, 0, PART)
    report_part(out, 1, OTHER)
    report_part(out, 0, OTHER)
    forget_part(out, 1)
    assert read_parts(out.folder) == [OTHER]
