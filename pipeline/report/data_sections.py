"""Sections of a run's page about its data: row counts, findings, lengths, reference log-probs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.report.charts import Chart, Key, describe_tails, draw_histogram, list_bins
from pipeline.report.data import (
    SPLITS,
    Conversation,
    Share,
    ShareChart,
    compare_sources,
    count_by,
    has_stages,
    make_histogram,
    read_conversations,
    scan_scored,
)
from pipeline.report.text import (
    MINUS,
    count,
    decode,
    number,
    one_line,
    percent,
    plural,
    signed,
    visible,
)
from pipeline.runs import Run

_ROW_STAGES = ("validate", "dedupe", "encode", "score")
_EXAMPLES_PER_CODE = 2
_MAX_EXAMPLE_CODES = 24
_RAW_CHARACTERS = 700
_SHARES = {
    "chosen_longer": "the chosen answer is longer",
    "rejected_longer": "the rejected answer is longer",
    "near_identical": "both answers use nearly the same words",
    "only_chosen_declines": "only the chosen answer is a refusal",
    "only_rejected_declines": "only the rejected answer is a refusal",
}
CHOSEN = Key(label="chosen", colour="chosen", mark="area")
REJECTED = Key(label="rejected", colour="rejected", mark="area")
NO_PAIRS = "No pair passed the earlier stages."


@dataclass(frozen=True, kw_only=True)
class FunnelStep:
    """Rows that a stage read, kept and rejected."""

    stage: str
    num_in: int
    num_rows_kept: int
    """Rows not rejected; validate may make several pairs from one row."""
    kept: dict[str, int]
    """Pairs by split."""
    reasons: dict[str, int]
    """Rejected rows by code, most frequent first."""
    warnings: dict[str, int]
    """Rows kept with a warning by code, most frequent first."""

    @property
    def num_kept(self) -> int:
        return sum(self.kept.values())

    @property
    def num_rejected(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True, kw_only=True)
class RejectedExample:
    """A rejected row."""

    place: str
    """Input file and row, and the pair_id if there is one."""
    field: str
    detail: str
    raw: str
    """The row as read, decoded and cut; only validate stores it."""
    conversation: Conversation | None
    """Its messages; None if the row was rejected before it became a pair."""


@dataclass(frozen=True, kw_only=True)
class RejectedCode:
    """Examples of the rows that a stage rejected with one code."""

    stage: str
    code: str
    num_rows: int
    examples: list[RejectedExample]


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """Row counts from the input files to the pairs that were trained on."""

    num_raw: int
    steps: list[FunnelStep]
    rejected: list[RejectedCode]

    @property
    def widest(self) -> int:
        """Rows that a bar of full width represents."""
        return max(self.num_raw, *(step.num_kept + step.num_rejected for step in self.steps), 1)


def describe_funnel(run: Run) -> Funnel | None:
    """Count the rows that each stage kept and rejected; None if validate is not complete."""
    stages = [stage for stage in _ROW_STAGES if has_stages(run, stage)]
    if "validate" not in stages:
        return None
    return Funnel(
        num_raw=run.manifest("validate").counts.num_in,
        steps=[_describe_step(run, stage) for stage in stages] + _describe_selection(run),
        rejected=_pick_examples(run, stages),
    )


def _describe_step(run: Run, stage: str) -> FunnelStep:
    counts = run.manifest(stage).counts
    rows = scan_scored(run) if stage == "score" else run.scan(stage)
    by_split = count_by(rows, "split")
    return FunnelStep(
        stage=stage,
        num_in=counts.num_in,
        num_rows_kept=counts.num_rows_kept,
        kept={split: by_split.get(split, 0) for split in SPLITS},
        reasons=_most_frequent_first(counts.reasons),
        warnings=_most_frequent_first(counts.warnings),
    )


def _describe_selection(run: Run) -> list[FunnelStep]:
    """Describe the pairs that train's `where` left out; nothing where it has none."""
    manifest = run.manifest("train") if has_stages(run, "train") else None
    if manifest is None or manifest.config.get("where") is None:
        return []
    found = manifest.summary
    num_left_out = found["num_pairs_left_out"]
    reason = one_line(f"not where {manifest.config['where']}")
    kept = {"train": found["num_train_pairs"], "eval": found["num_eval_pairs"]}
    return [
        FunnelStep(
            stage="train",
            num_in=sum(kept.values()) + num_left_out,
            num_rows_kept=sum(kept.values()),
            kept=kept,
            reasons={reason: num_left_out} if num_left_out else {},
            warnings={},
        )
    ]


def _pick_examples(run: Run, stages: list[str]) -> list[RejectedCode]:
    found = [
        (stage, code, amount)
        for stage in stages
        for code, amount in _most_frequent_first(run.manifest(stage).counts.reasons).items()
    ]
    return [
        RejectedCode(
            stage=stage, code=code, num_rows=amount, examples=_read_examples(run, stage, code)
        )
        for stage, code, amount in found[:_MAX_EXAMPLE_CODES]
    ]


def _read_examples(run: Run, stage: str, code: str) -> list[RejectedExample]:
    columns = ("field", "detail", "source_file", "source_row", "pair_id", "raw")
    rejected = run.scan(stage, "rejected").filter(pl.col("code") == code)
    rows = rejected.select(columns).head(_EXAMPLES_PER_CODE).collect().to_dicts()
    conversations = _find_conversations(run, stage, [row["pair_id"] for row in rows])
    return [
        RejectedExample(
            place=_describe_place(row["source_file"], row["source_row"], row["pair_id"]),
            field=one_line(row["field"] or ""),
            detail=visible(row["detail"] or "", max_characters=500),
            raw=visible(decode(row["raw"] or b""), max_characters=_RAW_CHARACTERS),
            conversation=conversations.get(row["pair_id"]),
        )
        for row in rows
    ]


def _find_conversations(
    run: Run, stage: str, pair_ids: Sequence[str | None]
) -> dict[str, Conversation]:
    """Look up rejected pairs in the table that their stage read."""
    source = {"dedupe": "validate", "encode": "dedupe", "score": "dedupe"}.get(stage)
    if source is None or not has_stages(run, source):
        return {}
    known = [pair_id for pair_id in pair_ids if pair_id is not None]
    return read_conversations(run.scan(source), known, max_characters=_RAW_CHARACTERS)


def _describe_place(file: str | None, row: int | None, pair_id: str | None) -> str:
    places = []
    if file is not None:
        places.append(one_line(file) if row is None else f"{one_line(file)}, row {row:,}")
    if pair_id is not None:
        places.append(f"pair {pair_id[:12]}…")
    return ", ".join(places)


def _most_frequent_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, kw_only=True)
class NotableFinding:
    """A finding about the data set as a whole."""

    code: str
    found: str
    when: str
    """The threshold from which it is reported."""
    advice: str


@dataclass(frozen=True, kw_only=True)
class FrequencyTable:
    """The most frequent values of a column."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class DataSetSection:
    """Findings of validate about all pairs that it kept."""

    lead: str
    notable: list[NotableFinding]
    shares: ShareChart | None
    tables: list[FrequencyTable]


def describe_data_set(run: Run) -> DataSetSection | None:
    """Describe the findings of validate; None if it is not complete."""
    if not has_stages(run, "validate"):
        return None
    found = run.manifest("validate").summary["findings"]
    num_pairs = found["num_pairs"]
    if num_pairs == 0:
        return DataSetSection(lead=NO_PAIRS, notable=[], shares=None, tables=[])
    lead = (
        f"validate kept {plural(num_pairs, 'pair')}. Chosen answers have "
        f"{count(found['mean_chosen_chars'])} characters on average, rejected answers "
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
        lead += " No check of the data set as a whole raised a finding."
    return DataSetSection(
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
        ("Largest sources", "source"): found["sources"],
        ("Chosen answers that occur in several pairs", "begins with"): found["repeated_chosen"],
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


@dataclass(frozen=True, kw_only=True)
class ChartSection:
    """A paragraph and charts."""

    lead: str
    charts: list[Chart]


@dataclass(frozen=True, kw_only=True)
class ReferenceSection:
    """Reference log-probs of the pairs."""

    lead: str
    charts: list[Chart]
    by_source: ShareChart | None
    """Share of pairs where the reference prefers the chosen answer."""


def describe_lengths(run: Run) -> ChartSection | None:
    """Describe the token counts of prompts and answers; None if encode is not complete."""
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
        return ChartSection(lead=NO_PAIRS, charts=[])
    cut = plural(fact["cut"], "pair") if fact["cut"] else "none"
    lead = (
        f"{plural(fact['pairs'], 'pair')} contain {count(fact['tokens'])} tokens, counting the "
        f"prompt once per pair. Truncated to the maximum length: {cut}."
    )
    return ChartSection(
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
        reading="Chat template included." + describe_tails(histogram),
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
        reading=f"The longest chosen answer has {count(fact['chosen max'])} tokens, the longest "
        f"rejected answer {count(fact['rejected max'])}." + describe_tails(histogram),
        numbers=list_bins(histogram, {"chosen": "chosen", "rejected": "rejected"}),
    )


def _chart_differences(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["difference"], is_whole=True)
    assert histogram is not None
    return Chart(
        title=f"The chosen answer has more tokens in {percent(fact['chosen longer'])} of pairs",
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
        reading=f"The median difference is {signed(fact['difference median'], 2)} tokens. If "
        "one side is mostly longer, the policy also learns length." + describe_tails(histogram),
        numbers=list_bins(histogram, {"difference": "pairs"}),
    )


def describe_reference(run: Run) -> ReferenceSection | None:
    """Describe the reference log-probs; None if score is not complete."""
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
        return ReferenceSection(lead=NO_PAIRS, charts=[], by_source=None)
    settings, found = run.manifest("score").settings, run.manifest("score").summary
    recomputed = found["recomputed"]
    lead = (
        f"{_describe_making(settings, plural(fact['pairs'], 'pair'))} The reference gives the "
        f"chosen answer the higher log-prob in {percent(fact['prefers'])} of pairs, and the higher "
        f"log-prob per token in {percent(fact['prefers per token'])}."
    )
    if recomputed:
        lead += (
            f" {count(recomputed['num_sequences'])} sequences were recomputed in plain float32: "
            f"token log-probs differ by at most {number(recomputed['token_max'], 2)} nats."
        )
    if num_reused := found["num_sequences_reused"]:
        num_all = num_reused + found["num_sequences_scored"]
        lead += (
            f" Of {plural(num_all, 'distinct sequence')}, {count(num_reused)} were reused from "
            f"{plural(len(found['reused_from']), 'earlier scoring run')}."
        )
    return ReferenceSection(
        lead=lead,
        charts=[_chart_logps(pairs, fact), _chart_margins(pairs, fact)],
        by_source=compare_sources(
            pairs,
            pl.col("margin") > 0,
            title="Pairs where the reference prefers the chosen answer",
        ),
    )


def _describe_making(settings: Mapping[str, Any], pairs: str) -> str:
    """Describe model, backend and dtype. Settings of earlier versions have no adapter key."""
    model, dtype = settings["model"], settings["dtype"]
    if adapter := settings.get("adapter"):
        model = f"{model} with {adapter} merged into it"
    if settings["backend"] == "import":
        return (
            f"Log-probs of {model} in {dtype} for {pairs} were imported from {settings['table']}."
        )
    return f"{model} scored {pairs} with {settings['backend']} in {dtype}."


def _chart_logps(pairs: pl.LazyFrame, fact: dict[str, float]) -> Chart:
    histogram = make_histogram(pairs, ["chosen", "rejected"])
    assert histogram is not None
    return Chart(
        title=f"The median reference log-prob is {number(fact['chosen median'])} for chosen "
        f"answers, {number(fact['rejected median'])} for rejected answers",
        drawing=draw_histogram(
            histogram,
            {"chosen": "chosen", "rejected": "rejected"},
            x_label="log-prob summed over the answer, nats",
        ),
        keys=(CHOSEN, REJECTED),
        reading="Longer answers have lower log-probs: every token adds a negative term."
        + describe_tails(histogram),
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
        reading=f"The median margin is {signed(fact['margin median'])} nats. DPO rewards are "
        "relative to these margins, not to zero." + describe_tails(histogram),
        numbers=list_bins(histogram, {"margin": "pairs"}),
    )
