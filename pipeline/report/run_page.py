"""What does the page about one run say first, and which sections follow?"""

from dataclasses import dataclass

from pipeline.report.data_set import DataSet, describe_data_set
from pipeline.report.evaluation import (
    Evaluation,
    Generation,
    describe_evaluation,
    read_generations,
    summarise_evaluation,
)
from pipeline.report.funnel import Funnel, describe_funnel
from pipeline.report.provenance import StageProvenance, describe_provenance, model_folder
from pipeline.report.scans import has_stages
from pipeline.report.sequences import (
    Pictures,
    Reference,
    describe_lengths,
    describe_reference,
)
from pipeline.report.timing import Timing, describe_timing
from pipeline.report.training import describe_training, read_curves
from pipeline.report.wording import (
    count,
    duration,
    interval,
    number,
    one_line,
    percent,
    plural,
    signed,
)
from pipeline.runs import Run
from schemas.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number worth reading first."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """Everything that the page about one run shows; None where a stage is missing."""

    name: str
    headline: str
    abstract: str
    figures: list[Figure]
    model_folder: str | None
    funnel: Funnel | None
    data: DataSet | None
    lengths: Pictures | None
    reference: Reference | None
    training: Pictures | None
    evaluation: Evaluation | None
    generations: list[Generation] | None
    timing: Timing
    provenance: list[StageProvenance]


def describe_run(run: Run) -> RunPage:
    """Read a run's tables and put the page together."""
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
        return "A model is trained; no held-out pairs have been looked at."
    if has_stages(run, "score"):
        pairs = plural(run.manifest("score").counts.num_out, "pair")
        return f"The reference has scored {pairs}; nothing is trained yet."
    if has_stages(run, "validate"):
        return "The data is being prepared; nothing is scored yet."
    return "Nothing is complete yet."


def _abstract(run: Run) -> str:
    """Sum the run up in two or three sentences."""
    sentences = []
    if has_stages(run, "validate"):
        raw = plural(run.manifest("validate").counts.num_in, "raw row")
        last = next(s for s in ("score", "encode", "dedupe", "validate") if has_stages(run, s))
        left = plural(run.manifest(last).counts.num_out, "pair")
        sentences.append(f"From {raw}, {left} came through {last}.")
    curves = read_curves(run)
    if curves is not None and curves.num_steps:
        first, end = (curves.smooth("loss")[place] for place in (0, -1))
        pairs = plural(run.manifest("train").summary["num_train_pairs"], "pair")
        sentences.append(
            f"{plural(curves.num_steps, 'step')} on {pairs} took the loss from "
            f"{number(float(first))} to {number(float(end))}."
        )
    outcome = summarise_evaluation(run)
    if outcome is not None:
        low, high = outcome.accuracy.interval
        sentences.append(
            f"On held-out pairs the reward accuracy is {percent(outcome.accuracy.value)} "
            f"(95 % interval {percent(low)} to {percent(high)}) with a mean margin of "
            f"{signed(outcome.mean_margin)}"
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
            label="of the reference reused",
            note=f"{plural(num_reused, 'sequence')}, none computed",
        )
    return Figure(
        value=number(score.summary["pairs_per_second"]),
        label="reference pairs scored a second",
        note=f"{plural(score.counts.num_out, 'pair')}, start of the engine left out"
        + (f"; {share} of the sequences reused" if share else ""),
    )


def _figures(run: Run) -> list[Figure]:
    figures = []
    outcome = summarise_evaluation(run)
    if outcome is not None:
        low, high = outcome.accuracy.interval
        spread = f"95 % interval {interval(low, high)}"
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
                label="pairs trained on",
                note=plural(summary["num_steps"], "step"),
            )
        )
    if has_stages(run, "score"):
        figures.append(_figure_of_scoring(run.manifest("score")))
    total = sum(run.manifest(stage).seconds for stage in run.outputs)
    figures.append(
        Figure(
            value=duration(total),
            label="all stages together",
            note=plural(len(run.outputs), "stage"),
        )
    )
    return figures
