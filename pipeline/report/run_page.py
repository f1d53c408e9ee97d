"""The page about one run: headline, key figures, and a section for each part of the pipeline."""

from dataclasses import dataclass

import polars as pl

from pipeline.report.charts import STEP_LABEL, Chart, Line, Numbers, draw_lines
from pipeline.report.data import (
    Generation,
    StageProvenance,
    TrainingSpeed,
    describe_provenance,
    describe_scoring,
    has_stages,
    measure_training,
    model_folder,
    read_curves,
    read_generations,
    summarise_evaluation,
)
from pipeline.report.data_sections import (
    ChartSection,
    DataSetSection,
    Funnel,
    ReferenceSection,
    describe_data_set,
    describe_funnel,
    describe_lengths,
    describe_reference,
)
from pipeline.report.dynamics_section import DynamicsSection, describe_dynamics
from pipeline.report.text import (
    count,
    duration,
    interval,
    number,
    one_line,
    percent,
    plural,
    signed,
    size,
)
from pipeline.report.training_sections import (
    EvaluationSection,
    describe_evaluation,
    describe_training,
)
from pipeline.runs import Run
from schemas.manifest import Manifest

_SPEED_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A key figure at the top of the page."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    stage: str
    seconds: float
    rows: str
    """Rows or steps, with their unit."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    stages: list[StageTime]
    facts: list[tuple[str, str]]
    """Label and value of rates and sizes."""
    charts: list[Chart]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def longest(self) -> float:
        return max([stage.seconds for stage in self.stages] or [1.0])


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """Content of the page about one run; None where the stage is not complete."""

    name: str
    headline: str
    abstract: str
    figures: list[Figure]
    model_folder: str | None
    funnel: Funnel | None
    data: DataSetSection | None
    lengths: ChartSection | None
    reference: ReferenceSection | None
    training: ChartSection | None
    dynamics: DynamicsSection | None
    evaluation: EvaluationSection | None
    generations: list[Generation] | None
    timing: Timing
    provenance: list[StageProvenance]


def describe_run(run: Run) -> RunPage:
    """Read a run's tables and compose the page."""
    return RunPage(
        name=one_line(run.name),
        headline=_headline(run),
        abstract=_abstract(run),
        figures=_figures(run),
        model_folder=one_line(model_folder(run), max_characters=1000)
        if has_stages(run, "train")
        else None,
        funnel=describe_funnel(run),
        data=describe_data_set(run),
        lengths=describe_lengths(run),
        reference=describe_reference(run),
        training=describe_training(run),
        dynamics=describe_dynamics(run),
        evaluation=describe_evaluation(run),
        generations=read_generations(run),
        timing=describe_timing(run),
        provenance=describe_provenance(run),
    )


def _headline(run: Run) -> str:
    outcome = summarise_evaluation(run)
    if outcome is not None:
        accuracy = outcome.accuracy
        return (
            f"The trained model prefers the chosen answer in {count(accuracy.num_true)} of "
            f"{plural(accuracy.num_pairs, 'held-out pair')}."
        )
    if has_stages(run, "train"):
        return "Training is complete; no held-out pairs have been evaluated."
    if has_stages(run, "score"):
        pairs = plural(run.manifest("score").counts.num_out, "pair")
        return f"The reference model has scored {pairs}; training is not complete."
    if has_stages(run, "validate"):
        return "The data is being prepared; no pair is scored yet."
    return "No stage is complete yet."


def _abstract(run: Run) -> str:
    """Summarise the run in two or three sentences."""
    sentences = []
    if has_stages(run, "validate"):
        raw = plural(run.manifest("validate").counts.num_in, "raw row")
        last = next(s for s in ("score", "encode", "dedupe", "validate") if has_stages(run, s))
        left = plural(run.manifest(last).counts.num_out, "pair")
        sentences.append(f"{raw} gave {left} after {last}.")
    curves = read_curves(run)
    if curves is not None and curves.num_steps:
        first, end = (curves.smooth("loss")[place] for place in (0, -1))
        pairs = plural(run.manifest("train").summary["num_train_pairs"], "pair")
        sentences.append(
            f"{plural(curves.num_steps, 'step')} on {pairs} changed the loss from "
            f"{number(float(first))} to {number(float(end))}."
        )
    outcome = summarise_evaluation(run)
    if outcome is not None:
        low, high = outcome.accuracy.interval
        sentences.append(
            f"On held-out pairs the reward accuracy is {percent(outcome.accuracy.value)} "
            f"(95\u00a0% confidence interval {percent(low)} to {percent(high)}) with a mean reward "
            f"margin of {signed(outcome.mean_margin)}"
            + (
                f"; both answers became less likely in {percent(outcome.displaced.value)}."
                if outcome.displaced
                else "."
            )
        )
    return " ".join(sentences)


def _figure_of_scoring(score: Manifest) -> Figure:
    num_scored, num_reused = (
        score.summary[f"num_sequences_{what}"] for what in ("scored", "reused")
    )
    share = percent(num_reused / (num_scored + num_reused)) if num_reused else ""
    if share and not num_scored:
        return Figure(
            value=share,
            label="of reference log-probs reused",
            note=f"{plural(num_reused, 'sequence')}, none computed",
        )
    return Figure(
        value=number(score.summary["pairs_per_second"]),
        label="pairs per second scored by the reference",
        note=f"{plural(score.counts.num_out, 'pair')}, engine start-up excluded"
        + (f"; {share} of sequences reused" if share else ""),
    )


def _figures(run: Run) -> list[Figure]:
    figures = []
    outcome = summarise_evaluation(run)
    if outcome is not None:
        low, high = outcome.accuracy.interval
        spread = f"95\u00a0% confidence interval {interval(low, high)}"
        figures += [
            Figure(
                value=percent(outcome.accuracy.value),
                label="held-out reward accuracy",
                note=f"{plural(outcome.accuracy.num_pairs, 'pair')}, {spread}",
            ),
            Figure(
                value=signed(outcome.mean_margin),
                label="mean held-out reward margin",
                note="chosen minus rejected, nats",
            ),
        ]
    if has_stages(run, "train"):
        summary = run.manifest("train").summary
        figures.append(
            Figure(
                value=count(summary["num_train_pairs"]),
                label="training pairs",
                note=plural(summary["num_steps"], "step"),
            )
        )
    if has_stages(run, "score"):
        figures.append(_figure_of_scoring(run.manifest("score")))
    total = sum(run.manifest(stage).seconds for stage in run.outputs)
    figures.append(
        Figure(
            value=duration(total),
            label="total time of all stages",
            note=plural(len(run.outputs), "stage"),
        )
    )
    return figures


def describe_timing(run: Run) -> Timing:
    """Describe time by stage, rates and memory of the complete stages."""
    stages = []
    for name in run.outputs:
        manifest = run.manifest(name)
        rows = f"{count(manifest.counts.num_in)} rows" if manifest.shards else ""
        if name == "train":
            rows = f"{count(manifest.summary['num_steps'])} steps"
        stages.append(StageTime(stage=name, seconds=manifest.seconds, rows=rows))
    facts = []
    if has_stages(run, "score"):
        facts.append(("Reference scoring", describe_scoring(run.manifest("score").summary)))
    speed = measure_training(run)
    charts = []
    if speed is not None:
        facts += [
            (
                "Training",
                f"{number(speed.pairs_per_second)} pairs/s, "
                f"{count(speed.tokens_per_second)} tokens/s",
            ),
            ("Peak memory per training process", size(speed.peak_memory_bytes)),
            ("Device", str(run.manifest("train").summary["device"])),
        ]
        charts.append(_chart_speed(run, speed))
    return Timing(stages=stages, facts=facts, charts=charts)


def _chart_speed(run: Run, speed: TrainingSpeed) -> Chart:
    rows = run.scan("train", "timings").select("step", "tokens_per_second").collect()
    quantiles = [rows["tokens_per_second"].quantile(share) for share in _SPEED_QUANTILES]
    return Chart(
        title=f"Training processes {count(speed.tokens_per_second)} tokens per second",
        drawing=draw_lines(
            [
                Line(
                    x=rows["step"].cast(pl.Float64).to_numpy(),
                    y=rows["tokens_per_second"].to_numpy(),
                    colour="neutral",
                    width=1.4,
                )
            ],
            x_label=STEP_LABEL,
            y_label="tokens per second",
            starts_at_zero=True,
        ),
        reading="Padding excluded.",
        numbers=Numbers(
            header=("quantile of steps", "tokens/s"),
            rows=[
                (f"{share * 100:.0f} %", count(quantile or 0.0))
                for share, quantile in zip(_SPEED_QUANTILES, quantiles, strict=True)
            ],
        ),
    )
