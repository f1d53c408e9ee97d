"""How long are the pairs, and what did the reference think of them before any training?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.report.charts import (
    Chart,
    Key,
    describe_tails,
    draw_histogram,
    list_bins,
)
from pipeline.report.histograms import make_histogram
from pipeline.report.scans import has_stages, scan_scored
from pipeline.report.shares import ShareChart, compare_sources
from pipeline.report.wording import MINUS, count, number, percent, plural, signed
from pipeline.runs import Run

CHOSEN = Key(label="chosen", colour="chosen", mark="area")
REJECTED = Key(label="rejected", colour="rejected", mark="area")
NOTHING = "No pair got this far."


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A section of the page: what it says, then its charts."""

    lead: str
    charts: list[Chart]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the reference thinks of the pairs."""

    lead: str
    charts: list[Chart]
    by_source: ShareChart | None
    """How often the reference prefers the chosen answer."""


def describe_lengths(run: Run) -> Pictures | None:
    """Show how many tokens prompts and answers have; None before encode is complete."""
    if not has_stages(run, "encode"):
        return None
    pairs = run.scan("encode").select(
        prompt="num_prompt_tokens",
        chosen="num_chosen_tokens",
        rejected="num_rejected_tokens",
        difference=pl.col("num_chosen_tokens") - pl.col("num_rejected_tokens"),
        truncated="truncated",
    )
    facts = pairs.select(
        pl.len().alias("pairs"),
        pl.col("prompt", "chosen", "rejected", "difference").median().name.suffix(" median"),
        pl.col("prompt", "chosen", "rejected").max().name.suffix(" max"),
        pl.sum_horizontal("prompt", "chosen", "rejected").sum().alias("tokens"),
        (pl.col("difference") > 0).mean().alias("chosen longer"),
        (pl.col("truncated") != 0).sum().alias("cut"),
    ).collect(engine="streaming")
    fact = facts.row(0, named=True)
    if fact["pairs"] == 0:
        return Pictures(lead=NOTHING, charts=[])
    cut = plural(fact["cut"], "pair") if fact["cut"] else "no pair"
    lead = (
        f"{plural(fact['pairs'], 'pair')} hold {count(fact['tokens'])} tokens, prompts counted "
        f"once a pair; {cut} had to be cut to fit."
    )
    return Pictures(
        lead=lead,
        charts=[
            _chart_prompts(pairs, fact),
            _chart_answers(pairs, fact),
            _chart_differences(pairs, fact),
        ],
    )


def _chart_prompts(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["prompt"], is_whole=True)
    assert histogram is not None
    return Chart(
        title=f"Half of the prompts have at most {count(fact['prompt median'])} tokens, "
        f"the longest {count(fact['prompt max'])}",
        drawing=draw_histogram(histogram, {"prompt": "neutral"}, x_label="prompt tokens"),
        reading="With the chat template around them." + describe_tails(histogram),
        numbers=list_bins(histogram, {"prompt": "pairs"}),
    )


def _chart_answers(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["chosen", "rejected"], is_whole=True)
    assert histogram is not None
    return Chart(
        title=f"The median chosen answer has {count(fact['chosen median'])} tokens, "
        f"the rejected {count(fact['rejected median'])}",
        drawing=draw_histogram(
            histogram, {"chosen": "chosen", "rejected": "rejected"}, x_label="answer tokens"
        ),
        keys=(CHOSEN, REJECTED),
        reading=f"The longest have {count(fact['chosen max'])} and {count(fact['rejected max'])}."
        + describe_tails(histogram),
        numbers=list_bins(histogram, {"chosen": "chosen", "rejected": "rejected"}),
    )


def _chart_differences(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["difference"], is_whole=True)
    assert histogram is not None
    return Chart(
        title=f"The chosen answer is the longer one in {percent(fact['chosen longer'])} of pairs",
        drawing=draw_histogram(
            histogram,
            {"difference": "neutral"},
            x_label=f"chosen {MINUS} rejected tokens",
            splits_at_zero=True,
        ),
        keys=(
            Key(label="chosen at least as long", colour="chosen", mark="area"),
            Key(label="rejected longer", colour="rejected", mark="area"),
        ),
        reading=f"The median difference is {signed(fact['difference median'], 2)} tokens. A "
        "lopsided picture teaches length along with quality." + describe_tails(histogram),
        numbers=list_bins(histogram, {"difference": "pairs"}),
    )


def describe_reference(run: Run) -> Reference | None:
    """Show the reference's log-probabilities; None before score is complete."""
    if not has_stages(run, "encode", "score"):
        return None
    pairs = scan_scored(run).select(
        "source",
        chosen="ref_chosen_logp",
        rejected="ref_rejected_logp",
        margin=pl.col("ref_chosen_logp") - pl.col("ref_rejected_logp"),
        margin_per_token=pl.col("ref_chosen_logp") / pl.col("num_chosen_tokens")
        - pl.col("ref_rejected_logp") / pl.col("num_rejected_tokens"),
    )
    facts = pairs.select(
        pl.len().alias("pairs"),
        pl.col("chosen", "rejected", "margin").median().name.suffix(" median"),
        (pl.col("margin") > 0).mean().alias("prefers"),
        (pl.col("margin_per_token") > 0).mean().alias("prefers per token"),
    ).collect(engine="streaming")
    fact = facts.row(0, named=True)
    if fact["pairs"] == 0:
        return Reference(lead=NOTHING, charts=[], by_source=None)
    settings, found = run.manifest("score").settings, run.manifest("score").summary
    recomputed = found["recomputed"]
    lead = (
        f"{_describe_making(settings, plural(fact['pairs'], 'pair'))} It finds the chosen answer "
        f"the more likely one in {percent(fact['prefers'])} of pairs, and in "
        f"{percent(fact['prefers per token'])} where each log-probability is divided by its tokens."
    )
    if recomputed:
        lead += (
            f" {count(recomputed['num_sequences'])} sequences recomputed with plain float32 differ "
            f"by at most {number(recomputed['token_max'], 2)} nats in a token."
        )
    if num_reused := found["num_sequences_reused"]:
        num_all = num_reused + found["num_sequences_scored"]
        lead += (
            f" Of {plural(num_all, 'distinct sequence')}, {count(num_reused)} were reused from "
            f"{plural(len(found['reused_from']), 'earlier score')}."
        )
    return Reference(
        lead=lead,
        charts=[_chart_logps(pairs, fact), _chart_margins(pairs, fact)],
        by_source=compare_sources(
            pairs,
            pl.col("margin") > 0,
            title="The share where the reference prefers the chosen answer",
        ),
    )


def _describe_making(settings: Mapping[str, Any], pairs: str) -> str:
    """Say who computed the values, with what. Scores of earlier versions name no adapter."""
    model, dtype = settings["model"], settings["dtype"]
    if adapter := settings.get("adapter"):
        model = f"{model} with {adapter} merged into it"
    if settings["backend"] == "import":
        return f"For {pairs}, values of {model} in {dtype} were taken from {settings['table']}."
    return f"{model} scored {pairs} with {settings['backend']} in {dtype}."


def _chart_logps(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["chosen", "rejected"])
    assert histogram is not None
    return Chart(
        title=f"To the reference, chosen answers have a median log-prob of "
        f"{number(fact['chosen median'])}, rejected ones {number(fact['rejected median'])}",
        drawing=draw_histogram(
            histogram,
            {"chosen": "chosen", "rejected": "rejected"},
            x_label="log-prob of the whole answer, nats",
        ),
        keys=(CHOSEN, REJECTED),
        reading="Longer answers lie further left: every token costs." + describe_tails(histogram),
        numbers=list_bins(histogram, {"chosen": "chosen", "rejected": "rejected"}),
    )


def _chart_margins(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["margin"])
    assert histogram is not None
    return Chart(
        title=f"The reference already prefers the chosen answer in {percent(fact['prefers'])} "
        "of pairs",
        drawing=draw_histogram(
            histogram,
            {"margin": "neutral"},
            x_label=f"chosen {MINUS} rejected log-prob, nats",
            splits_at_zero=True,
        ),
        keys=(
            Key(label="prefers chosen", colour="chosen", mark="area"),
            Key(label="prefers rejected", colour="rejected", mark="area"),
        ),
        reading=f"The median margin is {signed(fact['margin median'])} nats. DPO moves policies "
        "relative to this picture, not to zero." + describe_tails(histogram),
        numbers=list_bins(histogram, {"margin": "pairs"}),
    )
