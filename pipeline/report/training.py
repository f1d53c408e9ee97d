"""How did training go, step by step?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from pipeline.report.charts import Chart, Key, Level, Line, Numbers, draw_lines
from pipeline.report.histograms import FloatArray
from pipeline.report.scans import has_table
from pipeline.report.sequences import Pictures
from pipeline.report.wording import MINUS, count, number, percent, plain, plural, signed
from pipeline.runs import Run

STEP_LABEL = "optimizer step"
_NUMBERS_ROWS = 12
_VISIBLE_NOISE = 1e-3
"""Narrower bands cannot be seen; float32 has some 1e-6."""
_SMOOTHING_SHARE = 20
"""A smoothed line averages this part of all steps: a twentieth."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The metrics of a training, by column."""

    steps: Mapping[str, FloatArray]
    """Columns of metrics.parquet."""
    held_out: Mapping[str, FloatArray] | None
    """Columns of eval_metrics.parquet; None where nothing was held out."""

    @property
    def num_steps(self) -> int:
        return len(self.steps["step"])

    @property
    def window(self) -> int:
        """How many steps a smoothed value averages."""
        return max(1, round(self.num_steps / _SMOOTHING_SHARE))

    def smooth(self, column: str) -> FloatArray:
        """Average each value with those before it, over the window; all pairs count alike."""
        weights = self.steps["num_pairs"]
        return _trailing_sum(self.steps[column] * weights, self.window) / _trailing_sum(
            weights, self.window
        )


def read_curves(run: Run) -> Curves | None:
    """Read the metrics of all steps; None before train is complete."""
    if not has_table(run, "train", "metrics"):
        return None
    held_out = None
    if has_table(run, "train", "eval_metrics"):
        table = _read_columns(run.scan("train", "eval_metrics"))
        held_out = table if len(table["step"]) else None
    return Curves(steps=_read_columns(run.scan("train", "metrics")), held_out=held_out)


def describe_training(run: Run) -> Pictures | None:
    """Show loss, rewards and optimizer over the steps; None before train is complete."""
    curves = read_curves(run)
    if curves is None:
        return None
    if curves.num_steps == 0:
        return Pictures(lead="There was nothing to train on.", charts=[])
    summary, config = run.manifest("train").summary, run.manifest("train").config
    noise = read_engine_noise(run)
    return Pictures(
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


def read_engine_noise(run: Run) -> float | None:
    """Read what margins scatter by because two engines computed them, in units of reward.

    None where the policy did not start from the reference: the difference is no noise then.
    """
    drift = run.manifest("train").summary["drift"]
    return float(drift["engine_noise"]) if drift is not None and drift["is_reference"] else None


def describe_noise(noise: float | None) -> str:
    """Say what the band around zero is."""
    if noise is None:
        return ""
    return (
        f" Engine noise, what margins scatter by before the first step, is ±{number(noise, 2)}: "
        "differences within it mean nothing."
    )


def noise_key(noise: float | None) -> tuple[Key, ...]:
    """Explain the band around zero, where there is one."""
    if noise is None or noise < _VISIBLE_NOISE:
        return ()
    return (Key(label="engine noise", colour="noise", mark="block"),)


def _lead(curves: Curves, summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    num_pairs = int(curves.steps["num_pairs"].sum())
    what = "An adapter" if config.get("lora") else "All weights"
    drift = summary["drift"]
    if drift is None:
        start = "No reference is involved."
    elif drift["is_reference"]:
        start = (
            f"Before the first step the policy's token log-probs lay within "
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
    """Give the blocks of the losses that were added up, or of the only one."""
    return config["loss"] if isinstance(config["loss"], list) else [config["loss"]]


def _describe_losses(config: Mapping[str, Any]) -> str:
    """Name the losses, with weight and β where they have them."""
    losses = _list_losses(config)
    names = []
    for loss in losses:
        times = f"{plain(loss['weight'])} × " if len(losses) > 1 else ""
        beta = f" (β = {plain(loss['beta'])})" if "beta" in loss else ""
        names.append(f"{times}{loss['kind']}{beta}")
    return f"the loss {' + '.join(names)}"


def _describe_export(summary: Mapping[str, Any]) -> str:
    """Say which step's weights are the model, where that was decided by an evaluation."""
    if summary["eval_best"] is None:
        return ""
    stop = "Training stopped early; the" if summary["stopped_early"] else "The"
    step = count(summary["exported_step"])
    return f" {stop} model is that of step {step}, the best on held-out pairs."


def _chart_loss(curves: Curves, config: Mapping[str, Any]) -> Chart:
    is_sigmoid = [loss["kind"] for loss in _list_losses(config)] == ["sigmoid"]
    return _chart(
        curves,
        "loss",
        title=_movement("The loss", curves, "loss"),
        y_label="loss",
        level=Level(y=math.log(2), label="ln 2: no preference") if is_sigmoid else None,
    )


_REWARDS = {
    "log_ratio": f"β · (policy {MINUS} reference) log-prob of an answer, in nats.",
    "logp": "its log-prob by the policy, in nats.",
    "mean_logp": "its log-prob by the policy, in nats a token, times a factor of the loss.",
}


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
        reading="Before the first step all margins are zero or rounding: their signs mean nothing."
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
        title=f"Chosen answers end at a reward of {signed(chosen)}, "
        f"rejected ones at {signed(rejected)}",
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
        return "Rewards are the policy's own; there is no reference to compare with."
    if both_fall:
        return "Both fall: the policy takes probability away from chosen answers, too, only less."
    return "Below zero an answer has become less likely than under the reference."


def _chart_grad_norm(curves: Curves, config: Mapping[str, Any]) -> Chart:
    values = curves.steps["grad_norm"]
    limit = float(config["max_grad_norm"])
    return Chart(
        title=f"The gradient's norm has a median of {number(float(np.median(values)))}; "
        f"{percent(float((values > limit).mean()))} of steps are clipped to {plain(limit)}",
        drawing=draw_lines(
            [Line(x=curves.steps["step"], y=values, colour="neutral", width=1.4)],
            x_label=STEP_LABEL,
            y_label="norm before clipping",
            starts_at_zero=True,
        ),
        numbers=_list_steps(curves, ["grad_norm"]),
    )


def _chart_learning_rate(curves: Curves) -> Chart:
    values = curves.steps["learning_rate"]
    return Chart(
        title=f"The learning rate peaks at {plain(float(values.max()))} in step "
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
    """Draw a metric: single steps faintly, their trailing mean, and the held-out pairs."""
    steps = curves.steps["step"]
    lines = []
    keys = []
    if curves.window > 1:
        lines.append(Line(x=steps, y=curves.steps[column], colour="chosen", width=1, opacity=0.3))
        keys.append(Key(label=f"batches, mean over {curves.window} steps", colour="chosen"))
    else:
        keys.append(Key(label="batches", colour="chosen"))
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
    """Say how a metric moved: on the held-out pairs where there are some, else on the batches.

    Values within the noise are zero.
    """
    values = curves.smooth(column) if curves.held_out is None else curves.held_out[column]
    where = "" if curves.held_out is None else " on held-out pairs"
    first, last = (float(value) if abs(value) > noise else 0.0 for value in values[[0, -1]])
    if len(values) == 1 or number(first) == number(last):
        return f"{what} is {number(last)}{where}"
    verb = "rises" if last > first else "falls"
    return f"{what} {verb} from {number(first)} to {number(last)}{where}"


def last_value(curves: Curves, column: str) -> float:
    values = curves.smooth(column) if curves.held_out is None else curves.held_out[column]
    return float(values[-1])


def _list_steps(curves: Curves, columns: list[str]) -> Numbers:
    """Write out a dozen steps, the first and the last included, and all held-out evaluations."""
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


def _read_columns(table: pl.LazyFrame) -> dict[str, FloatArray]:
    rows = table.collect()
    return {name: rows[name].cast(pl.Float64).to_numpy() for name in rows.columns}


def _trailing_sum(values: FloatArray, window: int) -> FloatArray:
    sums = np.cumsum(values)
    sums[window:] = sums[window:] - sums[:-window]
    return sums
