"""Tests of the sentence that names the exported step."""

import pytest

from pipeline.report.training_sections import _describe_export


@pytest.mark.parametrize(
    ("stopped_early", "said"),
    [
        (False, " The exported model is that of step 1,200, the best on held-out pairs."),
        (True, " Training stopped early; the exported model is that of step 1,200, the best on"),
    ],
)
def test_the_best_step_is_named(stopped_early: bool, said: str) -> None:
    summary = {
        "eval_best": {"step": 1200, "loss": 0.5},
        "exported_step": 1200,
        "stopped_early": stopped_early,
    }
    assert _describe_export(summary).startswith(said)


def test_the_last_step_is_not_mentioned() -> None:
    assert _describe_export({"eval_best": None, "exported_step": 5, "stopped_early": False}) == ""
