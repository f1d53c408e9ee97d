"""The page that compares several runs: results, differing settings, curves and generations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.report.charts import (
    STEP_LABEL,
    Chart,
    Dash,
    Key,
    Line,
    Numbers,
    describe_tails,
    draw_histogram,
    draw_lines,
    list_bins,
)
from pipeline.report.data import (
    Generation,
    StageProvenance,
    describe_provenance,
    describe_scoring,
    flatten,
    has_stages,
    last_value,
    make_histogram,
    measure_training,
    model_folder,
    read_curves,
    read_generations,
    summarise_evaluation,
)
from pipeline.report.text import (
    MINUS,
    Message,
    count,
    duration,
    interval,
    join_words,
    number,
    one_line,
    percent,
    plain,
    signed,
    size,
)
from pipeline.runs import Run
from schemas.fingerprint import attempt_folder

_ABSENT = "\u2013"
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dashdot", "dotted", "solid", "dashed")
_MAX_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table with one column per run."""

    label: str
    values: list[str]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One prompt and the generations of every run's model."""

    prompt: list[Message]
    before: str
    after: list[str]
    chosen: list[Message]


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """Content of the page that compares several runs."""

    names: list[str]
    keys: list[Key]
    headline: str
    remark: str
    outcomes: list[Row]
    differences: list[Row]
    charts: list[Chart]
    answers: list[Answers]
    provenance: list[tuple[str, list[StageProvenance]]]


def describe_comparison(runs: Sequence[Run]) -> ComparisonPage:
    """Read the tables of two or more runs and compose the page."""
    names = [one_line(run.name) for run in runs]
    charts = [
        _chart_curves(runs, "loss", "loss", "The loss"),
        _chart_curves(
            runs, "rewards/margins", f"chosen {MINUS} rejected reward, nats", "The reward margin"
        ),
        _chart_curves(
            runs, "rewards/accuracies", "share of margins above 0", "Reward accuracy", show=percent
        ),
        _chart_curves(
            runs, "rewards/chosen", "reward of chosen answers, nats", "The chosen reward"
        ),
        _chart_held_out(runs),
    ]
    return ComparisonPage(
        names=names,
        keys=[_key(place, name) for place, name in enumerate(names)],
        headline=_headline(runs),
        remark=_remark(runs),
        outcomes=_outcomes(runs),
        differences=list_differences(runs),
        charts=[chart for chart in charts if chart is not None],
        answers=_answers(runs),
        provenance=[
            (name, describe_provenance(run)) for name, run in zip(names, runs, strict=True)
        ],
    )


def list_differences(runs: Sequence[Run]) -> list[Row]:
    """List all settings, stage versions and package versions that differ between runs."""
    by_run = [_list_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for settings in by_run for key in settings))
    rows = []
    for key in keys:
        found = [settings.get(key, _ABSENT) for settings in by_run]
        if len(set(found)) > 1:
            rows.append(Row(label=one_line(key), values=found))
    return rows


def _list_settings(run: Run) -> dict[str, str]:
    """Collect settings, the digests they resolved to, and versions of all stages."""
    listed = {}
    for stage in run.outputs:
        manifest = run.manifest(stage)
        settings = dict(flatten(manifest.settings))
        for key, value in settings.items():
            listed[f"{stage}.{key}"] = _show_value(value)
        for key, value in flatten(manifest.config):
            if key not in settings:
                listed[f"{stage}.{key}, digest"] = _show_value(value)
        listed[f"{stage}, stage version"] = str(manifest.version)
        for package, version in manifest.versions.items():
            listed[f"{stage}, {package}"] = one_line(version)
    return listed


def _show_value(value: Any) -> str:
    if isinstance(value, float):
        return plain(value)
    return one_line(_ABSENT if value is None else str(value), max_characters=120)


def _headline(runs: Sequence[Run]) -> str:
    """Name the best run only if its interval is above all others."""
    found = [(outcome.accuracy, run.name) for run in runs if (outcome := summarise_evaluation(run))]
    if len(found) < 2:
        return f"Comparison of {len(runs)} runs."
    ranked = sorted(found, key=lambda pair: pair[0].value, reverse=True)
    (best, winner), others = ranked[0], [accuracy for accuracy, _ in ranked[1:]]
    if best.interval[0] > max(other.interval[1] for other in others):
        behind = join_words([percent(other.value) for other in others])
        return (
            f"{one_line(winner)} has the highest held-out accuracy: {percent(best.value)}, "
            f"against {behind}."
        )
    values = join_words([percent(accuracy.value) for accuracy, _ in found])
    return f"Held-out accuracy is {values}: the 95 % confidence intervals overlap."


def _remark(runs: Sequence[Run]) -> str:
    """Describe whether the runs were evaluated on the same pairs."""
    evaluated = [run for run in runs if has_stages(run, "encode", "evaluate")]
    if len(evaluated) < 2:
        return ""
    data = {_folder(run, "encode") for run in evaluated}
    if len(data) == 1:
        return "All runs were trained and evaluated on the same encoded pairs."
    return (
        "The runs have different encoded pairs, so their held-out pairs may differ as well: "
        "compare accuracies and margins with care."
    )


def _folder(run: Run, stage: str) -> str:
    manifest = run.manifest(stage)
    return attempt_folder(manifest.fingerprint, manifest.attempt)


def _outcomes(runs: Sequence[Run]) -> list[Row]:
    return [
        Row(label=label, values=[describe(run) or _ABSENT for run in runs])
        for label, describe in _OUTCOMES.items()
    ]


def _show_accuracy(run: Run) -> str:
    outcome = summarise_evaluation(run)
    if outcome is None:
        return ""
    low, high = outcome.accuracy.interval
    return f"{percent(outcome.accuracy.value)} ({interval(low, high)})"


def _show_margin(run: Run) -> str:
    outcome = summarise_evaluation(run)
    return signed(outcome.mean_margin) if outcome is not None else ""


def _show_displaced(run: Run) -> str:
    outcome = summarise_evaluation(run)
    return percent(outcome.displaced.value) if outcome is not None and outcome.displaced else ""


def _show_last(column: str) -> Callable[[Run], str]:
    def show(run: Run) -> str:
        curves = read_curves(run)
        return number(float(curves.smooth(column)[-1])) if curves and curves.num_steps else ""

    return show


def _show_rows(stage: str) -> Callable[[Run], str]:
    def show(run: Run) -> str:
        if not has_stages(run, stage):
            return ""
        counts = run.manifest(stage).counts
        return count(counts.num_in if stage == "validate" else counts.num_out)

    return show


def _show_trained(run: Run) -> str:
    return (
        count(run.manifest("train").summary["num_train_pairs"]) if has_stages(run, "train") else ""
    )


def _show_steps(run: Run) -> str:
    return count(run.manifest("train").summary["num_steps"]) if has_stages(run, "train") else ""


def _show_scoring(run: Run) -> str:
    if not has_stages(run, "score"):
        return ""
    return describe_scoring(run.manifest("score").summary)


def _show_speed(run: Run) -> str:
    speed = measure_training(run)
    return f"{number(speed.pairs_per_second)} pairs/s" if speed is not None else ""


def _show_memory(run: Run) -> str:
    speed = measure_training(run)
    return size(speed.peak_memory_bytes) if speed is not None else ""


def _show_seconds(run: Run) -> str:
    return duration(sum(run.manifest(stage).seconds for stage in run.outputs))


def _show_model(run: Run) -> str:
    return one_line(model_folder(run), max_characters=1000) if has_stages(run, "train") else ""


_OUTCOMES: Mapping[str, Callable[[Run], str]] = {
    "held-out reward accuracy (95 % confidence interval)": _show_accuracy,
    "mean held-out reward margin": _show_margin,
    "pairs with both answers less likely": _show_displaced,
    "training loss, last steps": _show_last("loss"),
    "training reward margin, last steps": _show_last("rewards/margins"),
    "raw rows": _show_rows("validate"),
    "pairs scored": _show_rows("score"),
    "training pairs": _show_trained,
    "optimizer steps": _show_steps,
    "reference scoring rate": _show_scoring,
    "training rate": _show_speed,
    "peak memory per training process": _show_memory,
    "total time of all stages": _show_seconds,
    "model": _show_model,
}


def _key(place: int, label: str) -> Key:
    return Key(label=label, colour=f"run-{place + 1}", mark=_DASHES[place])


def _chart_curves(
    runs: Sequence[Run],
    column: str,
    y_label: str,
    what: str,
    show: Callable[[float], str] = number,
) -> Chart | None:
    curves = {place: read_curves(run) for place, run in enumerate(runs)}
    trained = {place: c for place, c in curves.items() if c is not None and c.num_steps}
    if not trained:
        return None
    lines = []
    for place, curve in trained.items():
        lines.append(
            Line(
                x=curve.steps["step"],
                y=curve.smooth(column),
                colour=f"run-{place + 1}",
                dash=_DASHES[place],
            )
        )
        if curve.held_out is not None:
            held_out = Line(
                x=curve.held_out["step"],
                y=curve.held_out[column],
                colour=f"run-{place + 1}",
                width=0,
                has_dots=True,
            )
            lines.append(held_out)
    ends = [last_value(curve, column) for curve in trained.values()]
    return Chart(
        title=f"{what} ends at {join_words([show(end) for end in ends])}",
        drawing=draw_lines(lines, x_label=STEP_LABEL, y_label=y_label),
        reading="Lines: training batches, smoothed. Dots: held-out pairs.",
        numbers=Numbers(
            header=("run", "first", "last", "held-out, last"),
            rows=[
                (
                    one_line(runs[place].name),
                    show(float(curve.smooth(column)[0])),
                    show(float(curve.smooth(column)[-1])),
                    show(float(curve.held_out[column][-1])) if curve.held_out else _ABSENT,
                )
                for place, curve in trained.items()
            ],
        ),
    )


def _chart_held_out(runs: Sequence[Run]) -> Chart | None:
    """Draw the distributions of all runs' held-out margins, as shares of pairs."""
    places = [p for p, run in enumerate(runs) if summarise_evaluation(run) is not None]
    if len(places) < 2:
        return None
    margins = [
        runs[place].scan("evaluate").select(pl.col("margin").alias(str(place))) for place in places
    ]
    columns = [str(place) for place in places]
    histogram = make_histogram(pl.concat(margins, how="diagonal"), columns)
    assert histogram is not None
    return Chart(
        title="Distribution of held-out reward margins",
        drawing=draw_histogram(
            histogram,
            {str(place): f"run-{place + 1}" for place in places},
            x_label=f"chosen {MINUS} rejected reward, nats",
            is_share=True,
            dashes={str(place): _DASHES[place] for place in places},
        ),
        reading="Right of zero, the chosen answer has the higher reward."
        + describe_tails(histogram),
        numbers=list_bins(histogram, {str(place): one_line(runs[place].name) for place in places}),
    )


def _answers(runs: Sequence[Run]) -> list[Answers]:
    """Collect the generations for prompts that all runs answered."""
    by_run: list[dict[str, Generation]] = [
        {generation.pair_id: generation for generation in read_generations(run) or []}
        for run in runs
    ]
    shared = [pair_id for pair_id in by_run[0] if all(pair_id in found for found in by_run)]
    return [
        Answers(
            prompt=by_run[0][pair_id].prompt,
            before=by_run[0][pair_id].before,
            after=[found[pair_id].after for found in by_run],
            chosen=by_run[0][pair_id].chosen,
        )
        for pair_id in shared[:_MAX_PROMPTS]
    ]
