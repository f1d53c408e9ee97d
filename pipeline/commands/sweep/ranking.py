"""The result of a sweep: its runs, best first, with the page that compares them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.commands.sweep.plan import SweepPlan, Trial
from pipeline.commands.sweep.record import SWEEPS, Rung
from pipeline.commands.sweep.run_sweep import Outcome
from pipeline.report import write_report
from pipeline.report.charts import NUM_RUN_COLOURS
from pipeline.report.data import (
    Share,
    model_folder,
    read_held_out_loss,
    summarise_evaluation,
)
from pipeline.runs import open_run


@dataclass(frozen=True, kw_only=True)
class RankedRun:
    """One run of a sweep, as it ended."""

    name: str
    settings: Mapping[str, str]
    state: str
    """done, stopped or failed."""
    why: str
    """Where it was stopped, or why it failed."""
    accuracy: Share | None
    """Held-out pairs whose chosen answer has the higher reward; None without evaluation."""
    mean_margin: float | None
    loss: float | None
    """Of the held-out pairs, at the step that was exported."""
    rungs: list[Rung]
    model: str | None
    """Path of the trained model."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The runs of a sweep, best first: complete ones by accuracy, then stopped, then failed."""

    name: str
    runs: list[RankedRun]
    page: str | None
    """Page that compares the best complete runs; None without any."""

    @property
    def best(self) -> RankedRun | None:
        """The first run, if there are held-out pairs to tell."""
        first = self.runs[0]
        return first if first.accuracy is not None else None


def rank_runs(sweep: SweepPlan, outcome: Outcome) -> Ranking:
    """Rank the runs by held-out accuracy, and write the page that compares the best.

    Accuracy is what runs of any loss and beta have in common. Ties go to the lower held-out loss
    where the runs have one loss, then to the name that sorts first.
    """
    store = sweep.trials[0].plan.store
    runs = sorted(
        (_read_run(trial, outcome) for trial in sweep.trials),
        key=lambda run: (*_place(run, sweep), run.name),
    )
    complete = [run.name for run in runs if run.state == "done"][:NUM_RUN_COLOURS]
    page = None
    if complete:
        folder = store.child(SWEEPS)
        folder.create()
        opened = [open_run(store.uri, name) for name in complete]
        page = write_report(opened, store, output=folder.locate(f"{sweep.name}.html"))
    return Ranking(name=sweep.name, runs=runs, page=page)


def _place(run: RankedRun, sweep: SweepPlan) -> tuple[float, ...]:
    """Return what runs are sorted by: their state, then the metrics that the state has."""
    if run.state == "failed":
        return (2,)
    if run.state == "stopped":
        last = run.rungs[-1]
        return 1, -last.fraction, sweep.value_of(last.metrics)
    if run.accuracy is None:
        return (0,)
    loss = run.loss if sweep.has_equal_losses else None
    return 0, -run.accuracy.value, loss or 0.0


def _read_run(trial: Trial, outcome: Outcome) -> RankedRun:
    """Read how a run of a sweep has ended."""
    name = trial.name
    state, why = "done", ""
    if name in outcome.failures:
        state, why = "failed", outcome.failures[name]
    elif name in outcome.stopped:
        rung = outcome.stopped[name]
        state, why = "stopped", f"after step {rung.step} of {rung.num_steps}"
    run = open_run(trial.plan.store.uri, name) if state == "done" else None
    found = summarise_evaluation(run) if run is not None else None
    return RankedRun(
        name=name,
        settings=trial.combination.settings,
        state=state,
        why=why,
        accuracy=found.accuracy if found is not None else None,
        mean_margin=found.mean_margin if found is not None else None,
        loss=read_held_out_loss(run) if run is not None else None,
        rungs=outcome.record.rungs.get(name, []),
        model=model_folder(run) if run is not None else None,
    )


def show_ranking(ranking: Ranking) -> RenderableType:
    """Show the runs as a table, best first, then the best model and the page."""
    table = Table(box=None, pad_edge=False)
    headings = [*ranking.runs[0].settings, "accuracy", "95 % interval", "margin", "loss"]
    for heading in ("", *headings, "state", "run"):
        table.add_column(heading, overflow="fold")
    for place, run in enumerate(ranking.runs, start=1):
        accuracy = interval = ""
        if run.accuracy is not None:
            low, high = run.accuracy.interval
            accuracy, interval = f"{run.accuracy.value:.1%}", f"{low:.1%} to {high:.1%}"
        table.add_row(
            str(place) if run.accuracy is not None else "",
            *(Text(value) for value in run.settings.values()),
            accuracy,
            interval,
            "" if run.mean_margin is None else f"{run.mean_margin:+.3f}",
            "" if run.loss is None else f"{run.loss:.4f}",
            Text(f"{run.state} {run.why}".strip()),
            Text(run.name),
        )
    return Group(table, Text(f"\n{_sum_up(ranking)}"))


def _sum_up(ranking: Ranking) -> str:
    lines = []
    best = ranking.best
    if best is None:
        lines.append("No complete run was evaluated on held-out pairs, so none is the best.")
    else:
        lines.append(f"best model: {best.model}")
        others = [run for run in ranking.runs[1:] if run.accuracy is not None]
        close = [run for run in others if run.accuracy and _overlap(best.accuracy, run.accuracy)]
        if close:
            lines.append(
                f"The best run's interval overlaps with those of {len(close)} of {len(others)} "
                "others: more held-out pairs would tell them apart."
            )
    if ranking.page is not None:
        lines.append(f"page: {ranking.page}")
    return "\n".join(lines)


def _overlap(best: Share | None, other: Share) -> bool:
    return best is not None and other.interval[1] >= best.interval[0]


def ranking_to_dict(ranking: Ranking) -> dict[str, Any]:
    best = ranking.best
    return {
        "name": ranking.name,
        "runs": [
            {
                "name": run.name,
                "settings": run.settings,
                "state": run.state,
                "why": run.why,
                "accuracy": run.accuracy.value if run.accuracy is not None else None,
                "interval": run.accuracy.interval if run.accuracy is not None else None,
                "num_held_out_pairs": run.accuracy.num_pairs if run.accuracy is not None else 0,
                "mean_margin": run.mean_margin,
                "loss": run.loss,
                "rungs": run.rungs,
                "model": run.model,
            }
            for run in ranking.runs
        ],
        "best_run": best.name if best is not None else None,
        "best_model": best.model if best is not None else None,
        "page": ranking.page,
    }
