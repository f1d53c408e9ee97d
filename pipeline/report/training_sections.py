"""Sections of a run's page about its policy: training curves and held-out evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from pipeline.report.charts import (
    STEP_LABEL,
    Chart,
    Key,
    Level,
    Line,
    Numbers,
    describe_tails,
    draw_histogram,
    draw_lines,
    draw_scatter,
    list_bins,
)
from pipeline.report.data import (
    Curves,
    EvaluationSummary,
    FloatArray,
    Share,
    ShareChart,
    compare_sources,
    has_stages,
    last_value,
    make_histogram,
    read_curves,
    read_engine_noise,
    summarise_evaluation,
)
from pipeline.report.data_sections import ChartSection
from pipeline.report.text import MINUS, count, number, percent, plain, plural, signed
from pipeline.runs import Run

_NUMBERS_ROWS = 12
_VISIBLE_NOISE = 1e-3
"""Narrower bands are invisible; two float32 engines differ by about 1e-6."""
_REWARDS = {
    "log_ratio": f"β · (policy {MINUS} reference) log-prob of the answer, in nats.",
    "logp": "its log-prob under the policy, in nats.",
    "mean_logp": "its log-prob per token under the policy, in nats, times a factor of the loss.",
}
_SCATTER_CELLS = 60
"""Cells per axis that pairs are grouped into."""


def describe_training(run: Run) -> ChartSection | None:
    """Describe loss, rewards and optimizer by step; None if train is not complete."""
    curves = read_curves(run)
    if curves is None:
        return None
    if curves.num_steps == 0:
        return ChartSection(lead="There were no training pairs.", charts=[])
    summary, config = run.manifest("train").summary, run.manifest("train").config
    noise = read_engine_noise(run)
    return ChartSection(
        lead=_lead(curves, summary, config),
        charts=[
            _chart_loss(curves, config),
            _chart_margins(curves, noise, summary["reward"]),
            _chart_accuracies(curves, starts_at_zero=noise is not None),
            _chart_rewards(curves, summary["reward"]),
            _chart_grad_norm(curves, config),
            _chart_learning_rate(curves),
        ],
    )


def describe_noise(noise: float | None) -> str:
    """Explain the noise band in a caption."""
    if noise is None:
        return ""
    return (
        f" Engine noise, the spread of margins before the first step, is ±{number(noise, 2)}: "
        "smaller differences are not meaningful."
    )


def noise_key(noise: float | None) -> tuple[Key, ...]:
    """Return the legend entry of the noise band, if the band is visible."""
    if noise is None or noise < _VISIBLE_NOISE:
        return ()
    return (Key(label="engine noise", colour="noise", mark="block"),)


def _lead(curves: Curves, summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    num_pairs = int(curves.steps["num_pairs"].sum())
    what = "A LoRA adapter was" if config.get("lora") else "All weights were"
    drift = summary["drift"]
    if drift is None:
        start = "This loss uses no reference model."
    elif drift["is_reference"]:
        start = (
            f"Before the first step the policy's token log-probs were within "
            f"{number(drift['max'], 2)} nats of the stored reference "
            f"({plural(drift['num_sequences'], 'sequence')})."
        )
    else:
        start = "The policy did not start from the reference, so its rewards do not start at zero."
    return (
        f"{what} trained for {plural(curves.num_steps, 'step')} on "
        f"{plural(summary['num_train_pairs'], 'pair')} ({plural(num_pairs, 'pair')} seen, "
        f"{plain(float(curves.steps['epoch'][-1]))} epochs) with {_describe_losses(config)}. "
        f"{start}{_describe_export(summary)}"
    )


def _list_losses(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the configs of all summed losses."""
    return config["loss"] if isinstance(config["loss"], list) else [config["loss"]]


def _describe_losses(config: Mapping[str, Any]) -> str:
    """Name the losses with their weights and β."""
    losses = _list_losses(config)
    names = []
    for loss in losses:
        times = f"{plain(loss['weight'])} × " if len(losses) > 1 else ""
        beta = f" (β = {plain(loss['beta'])})" if "beta" in loss else ""
        names.append(f"{times}{loss['kind']}{beta}")
    return f"the loss {' + '.join(names)}"


def _describe_export(summary: Mapping[str, Any]) -> str:
    """Name the exported step, if held-out evaluations selected it."""
    if summary["eval_best"] is None:
        return ""
    stop = "Training stopped early; the" if summary["stopped_early"] else "The"
    step = count(summary["exported_step"])
    return f" {stop} exported model is that of step {step}, the best on held-out pairs."


def _chart_loss(curves: Curves, config: Mapping[str, Any]) -> Chart:
    is_sigmoid = [loss["kind"] for loss in _list_losses(config)] == ["sigmoid"]
    return _chart(
        curves,
        "loss",
        title=_movement("The loss", curves, "loss"),
        y_label="loss",
        level=Level(y=math.log(2), label="ln 2: no preference") if is_sigmoid else None,
    )


def _chart_margins(curves: Curves, noise: float | None, reward: Mapping[str, Any]) -> Chart:
    return _chart(
        curves,
        "rewards/margins",
        title=_movement("The reward margin", curves, "rewards/margins", noise=noise or 0.0),
        y_label=f"chosen {MINUS} rejected reward",
        noise=noise,
        reading=f"An answer's reward is {_REWARDS[reward['of']]}" + describe_noise(noise),
    )


def _chart_accuracies(curves: Curves, *, starts_at_zero: bool) -> Chart:
    return _chart(
        curves,
        "rewards/accuracies",
        title=f"Reward accuracy ends at {percent(last_value(curves, 'rewards/accuracies'))}"
        + " on held-out pairs" * (curves.held_out is not None),
        y_label="share of margins above 0",
        y_range=(-0.02, 1.04),
        level=Level(y=0.5, label="chance"),
        reading="Before the first step all margins are zero up to rounding: their signs are noise."
        if starts_at_zero
        else "",
    )


def _chart_rewards(curves: Curves, reward: Mapping[str, Any]) -> Chart:
    chosen, rejected = (float(curves.smooth(f"rewards/{s}")[-1]) for s in ("chosen", "rejected"))
    steps = curves.steps["step"]
    lines = []
    for side in ("chosen", "rejected"):
        column = f"rewards/{side}"
        if curves.window > 1:
            lines.append(Line(x=steps, y=curves.steps[column], colour=side, width=1, opacity=0.25))
        lines.append(Line(x=steps, y=curves.smooth(column), colour=side))
        if curves.held_out is not None:
            lines.append(_held_out_line(curves.held_out, column, side))
    both_fall = rejected < chosen < 0
    return Chart(
        title=f"The reward ends at {signed(chosen)} for chosen answers, "
        f"{signed(rejected)} for rejected answers",
        drawing=draw_lines(
            lines, x_label=STEP_LABEL, y_label="reward, nats", level=Level(y=0, label="")
        ),
        keys=(
            Key(label="chosen", colour="chosen"),
            Key(label="rejected", colour="rejected"),
            *_held_out_key(curves, "neutral"),
        ),
        reading=_read_rewards(reward, both_fall=both_fall),
        numbers=_list_steps(curves, ["rewards/chosen", "rewards/rejected"]),
    )


def _read_rewards(reward: Mapping[str, Any], *, both_fall: bool) -> str:
    if reward["of"] != "log_ratio":
        return "Rewards depend on the policy alone: this loss uses no reference model."
    if both_fall:
        return "Both fall: chosen answers lose probability as well, only less than rejected ones."
    return "Below zero, an answer is less likely than under the reference."


def _chart_grad_norm(curves: Curves, config: Mapping[str, Any]) -> Chart:
    values = curves.steps["grad_norm"]
    limit = float(config["max_grad_norm"])
    return Chart(
        title=f"The median gradient norm is {number(float(np.median(values)))}; "
        f"{percent(float((values > limit).mean()))} of steps are clipped to {plain(limit)}",
        drawing=draw_lines(
            [Line(x=curves.steps["step"], y=values, colour="neutral", width=1.4)],
            x_label=STEP_LABEL,
            y_label="gradient norm before clipping",
            starts_at_zero=True,
        ),
        numbers=_list_steps(curves, ["grad_norm"]),
    )


def _chart_learning_rate(curves: Curves) -> Chart:
    values = curves.steps["learning_rate"]
    return Chart(
        title=f"The learning rate peaks at {plain(float(values.max()))} at step "
        f"{count(curves.steps['step'][int(values.argmax())])}",
        drawing=draw_lines(
            [Line(x=curves.steps["step"], y=values, colour="neutral", width=1.4)],
            x_label=STEP_LABEL,
            y_label="learning rate",
            starts_at_zero=True,
        ),
        numbers=_list_steps(curves, ["learning_rate"]),
    )


def _chart(
    curves: Curves,
    column: str,
    *,
    title: str,
    y_label: str,
    level: Level | None = None,
    noise: float | None = None,
    y_range: tuple[float, float] | None = None,
    reading: str = "",
) -> Chart:
    """Draw a metric: single steps (faint), their trailing mean, and held-out values."""
    steps = curves.steps["step"]
    lines = []
    keys = []
    if curves.window > 1:
        lines.append(Line(x=steps, y=curves.steps[column], colour="chosen", width=1, opacity=0.3))
        keys.append(
            Key(label=f"training batches, mean over {curves.window} steps", colour="chosen")
        )
    else:
        keys.append(Key(label="training batches", colour="chosen"))
    lines.append(Line(x=steps, y=curves.smooth(column), colour="chosen"))
    if curves.held_out is not None:
        lines.append(_held_out_line(curves.held_out, column, "held-out"))
    return Chart(
        title=title,
        drawing=draw_lines(
            lines, x_label=STEP_LABEL, y_label=y_label, level=level, noise=noise, y_range=y_range
        ),
        keys=(*keys, *_held_out_key(curves, "held-out"), *noise_key(noise)),
        reading=reading,
        numbers=_list_steps(curves, [column]),
    )


def _held_out_line(held_out: Mapping[str, FloatArray], column: str, colour: str) -> Line:
    return Line(
        x=held_out["step"],
        y=held_out[column],
        colour=colour,
        width=1.2,
        dash="dashed",
        has_dots=True,
    )


def _held_out_key(curves: Curves, colour: str) -> tuple[Key, ...]:
    if curves.held_out is None:
        return ()
    return (Key(label="held-out pairs", colour=colour, mark="dot"),)


def _movement(what: str, curves: Curves, column: str, *, noise: float = 0.0) -> str:
    """Describe a metric's first and last value: held-out if there are any, else of training.

    Values within the noise count as zero.
    """
    values = curves.smooth(column) if curves.held_out is None else curves.held_out[column]
    where = "" if curves.held_out is None else " on held-out pairs"
    first, last = (float(value) if abs(value) > noise else 0.0 for value in values[[0, -1]])
    if len(values) == 1 or number(first) == number(last):
        return f"{what} is {number(last)}{where}"
    verb = "rises" if last > first else "falls"
    return f"{what} {verb} from {number(first)} to {number(last)}{where}"


def _list_steps(curves: Curves, columns: list[str]) -> Numbers:
    """List a dozen steps, including the first and the last, and all held-out evaluations."""
    places = np.unique(np.linspace(0, curves.num_steps - 1, _NUMBERS_ROWS).round().astype(int))
    rows = [
        (count(curves.steps["step"][p]), *(number(float(curves.steps[c][p]), 4) for c in columns))
        for p in places
    ]
    held_out = curves.held_out
    if held_out is not None and all(column in held_out for column in columns):
        rows += [
            (
                f"{count(step)}, held out",
                *(number(float(held_out[column][place]), 4) for column in columns),
            )
            for place, step in enumerate(held_out["step"])
        ]
    return Numbers(header=("step", *columns), rows=rows)


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """Held-out evaluation."""

    lead: str
    charts: list[Chart]
    by_source: ShareChart | None
    """Reward accuracy."""


def describe_evaluation(run: Run) -> EvaluationSection | None:
    """Describe margins, accuracy and displacement; None if evaluate is not complete."""
    if not has_stages(run, "evaluate"):
        return None
    outcome = summarise_evaluation(run)
    if outcome is None:
        return EvaluationSection(lead="No pairs were held out.", charts=[], by_source=None)
    pairs = run.scan("evaluate").select(
        "source",
        "margin",
        "correct",
        chosen=pl.col("policy_chosen_logp") - pl.col("ref_chosen_logp"),
        rejected=pl.col("policy_rejected_logp") - pl.col("ref_rejected_logp"),
    )
    accuracy = outcome.accuracy
    low, high = accuracy.interval
    lead = (
        f"{count(accuracy.num_true)} of {plural(accuracy.num_pairs, 'held-out pair')} have a "
        f"reward margin above zero: {percent(accuracy.value)} (95\u00a0% confidence interval "
        f"{percent(low)} to {percent(high)}). "
        f"The mean reward margin is {signed(outcome.mean_margin)}."
    )
    return EvaluationSection(
        lead=lead,
        charts=[
            _chart_held_out_margins(pairs, outcome),
            *([_chart_displacement(pairs, outcome.displaced)] if outcome.displaced else []),
        ],
        by_source=compare_sources(pairs, pl.col("correct"), title="Held-out accuracy"),
    )


def _chart_held_out_margins(pairs: pl.LazyFrame, outcome: EvaluationSummary) -> Chart:
    histogram = make_histogram(pairs, ["margin"])
    assert histogram is not None
    return Chart(
        title=f"{percent(outcome.accuracy.value)} of held-out reward margins are above zero; "
        f"the mean is {signed(outcome.mean_margin)}",
        drawing=draw_histogram(
            histogram,
            {"margin": "neutral"},
            x_label=f"chosen {MINUS} rejected reward, nats",
            splits_at_zero=True,
            noise=outcome.noise,
        ),
        keys=(
            Key(label="prefers chosen", colour="chosen", mark="area"),
            Key(label="prefers rejected", colour="rejected", mark="area"),
            *noise_key(outcome.noise),
        ),
        reading="Right of zero, the chosen answer has the higher reward."
        + describe_noise(outcome.noise)
        + describe_tails(histogram),
        numbers=list_bins(histogram, {"margin": "pairs"}),
    )


def _chart_displacement(pairs: pl.LazyFrame, displaced: Share) -> Chart:
    pairs = pairs.filter(pl.col("chosen").is_finite() & pl.col("rejected").is_finite())
    places, amounts = _gather_cells(pairs)
    means = pairs.select(pl.col("chosen", "rejected").mean()).collect().row(0)
    return Chart(
        title=f"In {percent(displaced.value)} of held-out pairs both answers became less likely",
        drawing=draw_scatter(
            places,
            amounts,
            x_label="change of the rejected answer's log-prob, nats",
            y_label="change of the chosen answer's log-prob, nats",
            colour="held-out",
        ),
        reading="A dot is a pair; larger dots are several pairs. Above the dashed line the margin "
        "is positive. At the lower left, both answers lost probability (likelihood displacement).",
        numbers=Numbers(
            header=("answer", "mean change, nats"),
            rows=[("chosen", signed(means[0])), ("rejected", signed(means[1]))],
        ),
    )


def _gather_cells(pairs: pl.LazyFrame) -> tuple[FloatArray, FloatArray]:
    """Group pairs into cells of a grid, so that the number of dots is bounded."""
    lowest_x, highest_x, lowest_y, highest_y = (
        pairs.select(
            pl.col("rejected").min().alias("x0"),
            pl.col("rejected").max().alias("x1"),
            pl.col("chosen").min().alias("y0"),
            pl.col("chosen").max().alias("y1"),
        )
        .collect(engine="streaming")
        .row(0)
    )
    width = max(highest_x - lowest_x, highest_y - lowest_y, 1e-9) / _SCATTER_CELLS
    cells = (
        pairs.group_by(
            ((pl.col("rejected") - lowest_x) / width).floor().alias("x"),
            ((pl.col("chosen") - lowest_y) / width).floor().alias("y"),
        )
        .len()
        .sort("x", "y")
        .collect(engine="streaming")
    )
    corners = cells.select("x", "y").to_numpy()
    places = (corners + 0.5) * width + np.array([lowest_x, lowest_y])
    return places, cells["len"].to_numpy().astype(np.float64)
