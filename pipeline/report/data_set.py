"""What do the pairs have in common that no single one of them shows?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.scans import has_stages
from pipeline.report.shares import Share, ShareChart
from pipeline.report.wording import count, one_line, percent, plural
from pipeline.runs import Run

_SHARES = {
    "chosen_longer": "the chosen answer is the longer one",
    "rejected_longer": "the rejected answer is the longer one",
    "near_identical": "both answers use nearly the same words",
    "only_chosen_declines": "only the chosen answer declines",
    "only_rejected_declines": "only the rejected answer declines",
}


@dataclass(frozen=True, kw_only=True)
class NotableFinding:
    """Something about the data as a whole that is worth a look."""

    code: str
    found: str
    when: str
    """From where on it is noted."""
    advice: str


@dataclass(frozen=True, kw_only=True)
class FrequencyTable:
    """The most frequent of something."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A section of the page: what validate found of all pairs that it kept."""

    lead: str
    notable: list[NotableFinding]
    shares: ShareChart | None
    tables: list[FrequencyTable]


def describe_data_set(run: Run) -> DataSet | None:
    """Show the findings of validate; None before it is complete."""
    if not has_stages(run, "validate"):
        return None
    found = run.manifest("validate").summary["findings"]
    num_pairs = found["num_pairs"]
    if num_pairs == 0:
        return DataSet(lead="No pair got this far.", notable=[], shares=None, tables=[])
    lead = (
        f"In {plural(num_pairs, 'pair')} that validate kept, a chosen answer has "
        f"{count(found['mean_chosen_chars'])} characters on average, a rejected one "
        f"{count(found['mean_rejected_chars'])}."
    )
    notable = [
        NotableFinding(
            code=one["code"],
            found=f"{one_line(one['found'])}.",
            when=one["when"],
            advice=one["advice"],
        )
        for one in found["notable"]
    ]
    if not notable:
        lead += " Nothing about them as a whole stands out."
    return DataSet(
        lead=lead, notable=notable, shares=_chart_shares(found), tables=_list_tables(found)
    )


def _chart_shares(found: Mapping[str, Any]) -> ShareChart:
    num_pairs = found["num_pairs"]
    longer = percent(found["chosen_longer"])
    return ShareChart(
        title=f"The chosen answer has more characters in {longer} of pairs",
        shares=[
            Share(label=label, num_true=round(found[key] * num_pairs), num_pairs=num_pairs)
            for key, label in _SHARES.items()
            if found[key] is not None
        ],
    )


def _list_tables(found: Mapping[str, Any]) -> list[FrequencyTable]:
    lists = {
        ("Sources with the most pairs", "source"): found["sources"],
        ("Chosen answers that stand in several pairs", "it begins with"): found["repeated_chosen"],
    }
    return [
        _list_frequencies(title, column, ranked)
        for (title, column), ranked in lists.items()
        if ranked
    ]


def _list_frequencies(
    title: str, column: str, ranked: Sequence[Mapping[str, Any]]
) -> FrequencyTable:
    rows = [
        [one_line(one["text"]), count(one["num_pairs"]), percent(one["share"])] for one in ranked
    ]
    return FrequencyTable(title=title, header=[column, "pairs", "share"], rows=rows)
