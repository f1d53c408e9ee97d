"""Whatever knows more than one stage. `open_run` gives a run's tables to a notebook."""

from pipeline.runs import Run, open_run

__all__ = ["Run", "open_run"]
