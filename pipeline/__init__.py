"""The engine: plans, runs and shows the stages. `open_run` opens a run's tables in a notebook."""

from pipeline.runs import Run, open_run

__all__ = ["Run", "open_run"]
