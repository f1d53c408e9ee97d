"""Reads a run's tables and manifests for the report: counts, histograms, shares and curves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.report.text import (
    Message,
    duration,
    number,
    one_line,
    percent,
    show_messages,
    visible,
)
from pipeline.runs import Run
from schemas.fingerprint import attempt_folder
from schemas.manifest import Manifest

SPLITS = ("train", "eval")
_SETTINGS_CHARACTERS = 20_000
MAX_BINS = 32
_TAIL = 0.005
"""Share of the values at either end that may lie outside the bins; the outer bins count them."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
FloatArray = NDArray[np.float64]
CountArray = NDArray[np.int64]
_MAX_SOURCES = 8
_MIN_TITLE_PAIRS = 20
"""Pairs that a source needs for its share to count in a chart's title."""
_SMOOTHING_WINDOWS = 20
"""A smoothed curve averages over this fraction of all steps: a twentieth."""
_MAX_GENERATIONS = 12
_TEXT_CHARACTERS = 2000


def has_stages(run: Run, *stages: str) -> bool:
    """Return whether all of these stages are complete in a run."""
    return all(stage in run.outputs for stage in stages)


def has_table(run: Run, stage: str, table: str) -> bool:
    """Return whether a stage wrote a table besides its shards."""
    return stage in run.outputs and any(
        file.name == f"{table}.parquet" for file in run.manifest(stage).files
    )


def scan_scored(run: Run) -> pl.LazyFrame:
    """Scan the pairs that have reference log-probs."""
    return run.pairs().filter(pl.col("ref_chosen_logp").is_not_null())


def count_by(frame: pl.LazyFrame, column: str) -> dict[str, int]:
    """Count rows by the values of a text column, most frequent first."""
    counts = frame.group_by(column).len().collect(engine="streaming")
    rows = counts.sort(["len", column], descending=[True, False]).rows()
    return {str(value): int(amount) for value, amount in rows}


@dataclass(frozen=True, kw_only=True)
class StageProvenance:
    """What made a stage's output, formatted for the page."""

    stage: str
    fingerprint: str
    version: int
    inputs: str
    started_at: str
    host: str
    seconds: str
    versions: str
    folder: str
    settings: str
    """The stage's block of the recipe with all defaults, as JSON."""


def describe_provenance(run: Run) -> list[StageProvenance]:
    """Describe the provenance of every complete stage."""
    return [
        _describe_stage(run.manifest(stage), run.outputs[stage].folder.path)
        for stage in run.outputs
    ]


def read_held_out_loss(run: Run) -> float | None:
    """Read the held-out loss at the step whose weights were exported; None without any."""
    exported = run.manifest("train").summary["exported_step"]
    losses = run.scan("train", "eval_metrics").filter(pl.col("step") == exported).collect()["loss"]
    return float(losses[0]) if len(losses) else None


def model_folder(run: Run) -> str:
    """Return the path of the trained model."""
    return f"{run.outputs['train'].folder.path}/model"


def flatten(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested settings with its dotted key."""
    for key, value in settings.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, dotted)
        else:
            yield dotted, value


def _describe_stage(manifest: Manifest, folder: str) -> StageProvenance:
    settings = msgspec.json.format(msgspec.json.encode(manifest.settings), indent=2).decode()
    return StageProvenance(
        stage=manifest.stage,
        fingerprint=attempt_folder(manifest.fingerprint, manifest.attempt),
        version=manifest.version,
        inputs=", ".join(f"{name} {ref.folder}" for name, ref in manifest.inputs.items()),
        started_at=manifest.started_at,
        host=one_line(manifest.host),
        seconds=duration(manifest.seconds),
        versions=", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        folder=one_line(folder, max_characters=1000),
        settings=visible(settings, max_characters=_SETTINGS_CHARACTERS),
    )


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of one or more columns over shared bins; a bin includes its left edge."""

    edges: FloatArray
    """[bins + 1], multiples of the bin width, so 0 is always an edge."""
    counts: Mapping[str, CountArray]
    """[bins] by column. The outermost bins also count the values beyond them."""
    holds_lower: bool
    """Whether the first bin counts values below its left edge."""
    holds_higher: bool
    """Whether the last bin counts values from its right edge on."""


def make_histogram(
    frame: pl.LazyFrame, columns: Sequence[str], *, is_whole: bool = False
) -> Histogram | None:
    """Count the finite values of numeric columns over shared bins.

    Args:
        frame: has the columns; only these are read.
        columns: at least one.
        is_whole: whether the values are integers, so that no bin is narrower than 1.
    Returns:
        None if there is no finite value.
    """
    values = frame.select(pl.col(columns).cast(pl.Float64))
    spans = values.select(
        *[pl.col(c).filter(pl.col(c).is_finite()).min().alias(f"{c} lowest") for c in columns],
        *[pl.col(c).filter(pl.col(c).is_finite()).max().alias(f"{c} highest") for c in columns],
        *[_quantile(c, _TAIL).alias(f"{c} low") for c in columns],
        *[_quantile(c, 1 - _TAIL).alias(f"{c} high") for c in columns],
    ).collect(engine="streaming")
    found = spans.row(0, named=True)
    present = [c for c in columns if found[f"{c} lowest"] is not None]
    if not present:
        return None
    low = min(found[f"{c} low"] for c in present)
    high = max(found[f"{c} high"] for c in present)
    edges = choose_edges(low, high, is_whole=is_whole)
    return Histogram(
        edges=edges,
        counts={c: _count(values, c, edges) for c in columns},
        holds_lower=min(found[f"{c} lowest"] for c in present) < float(edges[0]),
        holds_higher=max(found[f"{c} highest"] for c in present) >= float(edges[-1]),
    )


def choose_edges(low: float, high: float, *, is_whole: bool) -> FloatArray:
    """Cut [low, high] into at most MAX_BINS bins whose width is 1, 2, 2.5 or 5 times 10^k."""
    width = _choose_width((high - low) / (MAX_BINS - 2))
    if is_whole:
        width = max(1.0, math.ceil(width))
    first = math.floor(low / width)
    last = math.floor(high / width) + 1
    return np.arange(first, last + 1, dtype=np.float64) * width


def _choose_width(at_least: float) -> float:
    if at_least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(step * power for step in _STEPS if step * power >= at_least * (1 - 1e-9))


def _quantile(column: str, share: float) -> pl.Expr:
    return pl.col(column).filter(pl.col(column).is_finite()).quantile(share, "nearest")


def _count(values: pl.LazyFrame, column: str, edges: FloatArray) -> CountArray:
    num_bins = len(edges) - 1
    width = float(edges[-1] - edges[0]) / num_bins
    first = round(float(edges[0]) / width)
    # Divide before subtracting: otherwise rounding can move a 0 into the bin left of the edge at 0.
    place = ((pl.col(column) / width).floor() - first).clip(0, num_bins - 1)
    found = (
        values.filter(pl.col(column).is_finite())
        .group_by(place.cast(pl.Int64).alias("bin"))
        .len()
        .collect(engine="streaming")
    )
    counts = np.zeros(num_bins, dtype=np.int64)
    counts[found["bin"].to_numpy()] = found["len"].to_numpy()
    return counts


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of pairs for which something holds, with its 95 % Wilson interval."""

    label: str
    num_true: int
    num_pairs: int

    @property
    def value(self) -> float:
        return self.num_true / self.num_pairs

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_true, self.num_pairs)


@dataclass(frozen=True, kw_only=True)
class ShareChart:
    """Several shares, drawn as rows."""

    title: str
    shares: list[Share]
    """All pairs first, then by source."""


def wilson_interval(num_true: int, num_all: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Compute the score interval of a proportion (Wilson 1927), which is valid for few trials.

    Args:
        num_true: successes.
        num_all: trials, at least 1.
        z: standard errors on either side; the default covers 95 %.
    """
    share = num_true / num_all
    centre = (share + z * z / (2 * num_all)) / (1 + z * z / num_all)
    spread = math.sqrt(share * (1 - share) / num_all + (z / (2 * num_all)) ** 2)
    half = z / (1 + z * z / num_all) * spread
    return max(0.0, centre - half), min(1.0, centre + half)


def compare_sources(pairs: pl.LazyFrame, claim: pl.Expr, *, title: str) -> ShareChart | None:
    """Count the pairs for which a claim holds: all pairs, then by source, largest source first.

    Args:
        pairs: has a column source.
        claim: true or false for each pair.
        title: the range of shares over the sources with enough pairs is appended.
    Returns:
        None if there is only one source. Sources after the eighth are summed in one entry.
    """
    counted = (
        pairs.group_by("source")
        .agg(pl.len().alias("pairs"), claim.sum().alias("true"))
        .collect(engine="streaming")
        .sort(["pairs", "source"], descending=[True, False])
    )
    rows = [
        Share(label=one_line(source, max_characters=60), num_true=true, num_pairs=amount)
        for source, amount, true in counted.select("source", "pairs", "true").rows()
    ]
    if len(rows) < 2:
        return None
    rest = rows[_MAX_SOURCES:]
    others = [_sum_up(f"{len(rest)} more sources", rest)] if rest else []
    values = [share.value for share in rows if share.num_pairs >= _MIN_TITLE_PAIRS]
    found = f": {percent(min(values))} to {percent(max(values))}" if len(values) > 1 else ""
    return ShareChart(
        title=f"{title} by source{found}",
        shares=[_sum_up("all pairs", rows), *rows[:_MAX_SOURCES], *others],
    )


def _sum_up(label: str, shares: list[Share]) -> Share:
    return Share(
        label=label,
        num_true=sum(share.num_true for share in shares),
        num_pairs=sum(share.num_pairs for share in shares),
    )


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Training metrics by column."""

    steps: Mapping[str, FloatArray]
    """Columns of metrics.parquet."""
    held_out: Mapping[str, FloatArray] | None
    """Columns of eval_metrics.parquet; None if no pairs were held out."""

    @property
    def num_steps(self) -> int:
        return len(self.steps["step"])

    @property
    def window(self) -> int:
        """Steps that a smoothed value averages over."""
        return max(1, round(self.num_steps / _SMOOTHING_WINDOWS))

    def smooth(self, column: str) -> FloatArray:
        """Return the trailing mean over the window, weighted by pairs per step."""
        weights = self.steps["num_pairs"]
        return _trailing_sum(self.steps[column] * weights, self.window) / _trailing_sum(
            weights, self.window
        )


def read_curves(run: Run) -> Curves | None:
    """Read the metrics of all steps; None if train is not complete."""
    if not has_table(run, "train", "metrics"):
        return None
    held_out = None
    if has_table(run, "train", "eval_metrics"):
        table = _read_columns(run.scan("train", "eval_metrics"))
        held_out = table if len(table["step"]) else None
    return Curves(steps=_read_columns(run.scan("train", "metrics")), held_out=held_out)


def read_engine_noise(run: Run) -> float | None:
    """Read the spread of margins that comes from policy and reference being different engines.

    Returns:
        In units of reward; None if the policy did not start from the reference.
    """
    drift = run.manifest("train").summary["drift"]
    return float(drift["engine_noise"]) if drift is not None and drift["is_reference"] else None


def last_value(curves: Curves, column: str) -> float:
    """Return the last held-out value, or the last smoothed training value if there is none."""
    values = curves.smooth(column) if curves.held_out is None else curves.held_out[column]
    return float(values[-1])


def _read_columns(table: pl.LazyFrame) -> dict[str, FloatArray]:
    rows = table.collect()
    return {name: rows[name].cast(pl.Float64).to_numpy() for name in rows.columns}


def _trailing_sum(values: FloatArray, window: int) -> FloatArray:
    sums = np.cumsum(values)
    sums[window:] = sums[window:] - sums[:-window]
    return sums


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """Totals and rates over all training steps."""

    seconds: float
    pairs_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int


def measure_training(run: Run) -> TrainingSpeed | None:
    """Sum the timings of all steps; None if train is not complete."""
    if not has_table(run, "train", "timings"):
        return None
    seconds, pairs, tokens, memory = (
        run.scan("train", "timings")
        .select(
            pl.col("seconds").sum(),
            (pl.col("pairs_per_second") * pl.col("seconds")).sum().alias("pairs"),
            (pl.col("tokens_per_second") * pl.col("seconds")).sum().alias("tokens"),
            pl.col("memory_bytes").max(),
        )
        .collect()
        .row(0)
    )
    if not seconds:
        return None
    return TrainingSpeed(
        seconds=seconds,
        pairs_per_second=pairs / seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=memory,
    )


def describe_scoring(found: Mapping[str, Any]) -> str:
    """Describe the scoring rate from score's summary; reused log-probs do not count."""
    if "num_sequences_imported" in found:
        return "imported"
    if not found["num_sequences_scored"] and found["num_sequences_reused"]:
        return "all reused"
    return f"{number(found['pairs_per_second'])} pairs/s"


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """Metrics over all held-out pairs."""

    accuracy: Share
    mean_margin: float
    displaced: Share | None
    """Pairs whose log-probs both fell; None without a reference."""
    noise: float | None
    """Engine noise in units of reward."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages of one pair, escaped for display."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy answers to one held-out prompt: the initial policy's and the trained policy's."""

    pair_id: str
    prompt: list[Message]
    before: str
    after: str
    chosen: list[Message]
    rejected: list[Message]


def summarise_evaluation(run: Run) -> EvaluationSummary | None:
    """Compute held-out metrics; None if evaluate is not complete or had no pairs."""
    if not has_stages(run, "evaluate"):
        return None
    facts = (
        run.scan("evaluate")
        .select(
            pl.len().alias("pairs"),
            pl.col("correct").sum(),
            pl.col("displaced").sum(),
            pl.col("displaced").count().alias("compared"),
            pl.col("margin").mean(),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    if facts["pairs"] == 0:
        return None
    return EvaluationSummary(
        accuracy=Share(label="accuracy", num_true=facts["correct"], num_pairs=facts["pairs"]),
        mean_margin=facts["margin"],
        displaced=Share(label="displaced", num_true=facts["displaced"], num_pairs=facts["compared"])
        if facts["compared"]
        else None,
        noise=read_engine_noise(run) if has_stages(run, "train") else None,
    )


def read_generations(run: Run) -> list[Generation] | None:
    """Read the first generations with their prompts; None if evaluate is not complete."""
    if not has_table(run, "evaluate", "generations"):
        return None
    texts = ("prompt", "before", "after", "chosen", "rejected")
    rows = (
        run.scan("evaluate", "generations")
        .head(_MAX_GENERATIONS)
        .select("pair_id", pl.col(texts).str.head(_TEXT_CHARACTERS + 1))
        .collect()
    )
    known: dict[str, Conversation] = {}
    if has_stages(run, "dedupe"):
        known = read_conversations(run.scan("dedupe"), rows["pair_id"].to_list())
    return [_make_generation(row, known.get(row["pair_id"])) for row in rows.to_dicts()]


def _make_generation(row: Mapping[str, str], known: Conversation | None) -> Generation:
    def show(column: str) -> list[Message]:
        return [Message(role="", content=visible(row[column], max_characters=_TEXT_CHARACTERS))]

    return Generation(
        pair_id=row["pair_id"],
        prompt=known.prompt if known else show("prompt"),
        before=visible(row["before"], max_characters=_TEXT_CHARACTERS),
        after=visible(row["after"], max_characters=_TEXT_CHARACTERS),
        chosen=known.chosen if known else show("chosen"),
        rejected=known.rejected if known else show("rejected"),
    )


def read_conversations(
    pairs: pl.LazyFrame, pair_ids: Sequence[str], *, max_characters: int = _TEXT_CHARACTERS
) -> dict[str, Conversation]:
    """Look up the messages of some pairs.

    Args:
        pairs: a table of pairs, such as dedupe's.
        pair_ids: a few; those that the table lacks are left out of the result.
        max_characters: of a prompt, and of each answer.
    """
    if not pair_ids:
        return {}
    sides = ("prompt", "chosen", "rejected")
    rows = pairs.filter(pl.col("pair_id").is_in(pair_ids)).select("pair_id", *sides).collect()
    return {
        row["pair_id"]: Conversation(
            **{side: show_messages(row[side], max_characters=max_characters) for side in sides}
        )
        for row in rows.to_dicts()
    }
