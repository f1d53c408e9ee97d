"""Statistics of all pairs together: lengths by side, frequent answers, refusals.

The workers write a table of counts, of bounded size, beside each shard's rows; the driver adds the
tables up.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from schemas.rows import Column, RowSchema
from stages.validate.findings import make_printable
from stages.validate.rules.answers import find_refusal
from stages.validate.rules.pair_view import PairView

OVERVIEW = RowSchema(
    "overview",
    1,
    (
        Column("kind", pa.string(), "sum, source, or chosen for an answer.", nullable=False),
        Column("key", pa.string(), "Name of the sum or source; digest of it.", nullable=False),
        Column("text", pa.string(), "The beginning of the source's name or of the answer."),
        Column("count", pa.int64(), "The sum, or at most how many pairs have it.", nullable=False),
    ),
)

MAX_EXCERPT_CHARS = 120
_MAX_HELD_CHARS = 2000
_MAX_LISTED = 5
CAPACITY = 1000
"""Counters kept; no count is too low by more than 1/1,001 of all values."""


class HeavyHitters:
    """Frequent values counted in bounded memory (Misra and Gries 1982; merge: Agarwal et al. 2012).

    After n values, merged counters included, a value's counter is never above its true count, and
    never below it by more than n / (capacity + 1). So every value whose share is above 1 /
    (capacity + 1) has a counter.

    Args:
        capacity: number of counters.
        counts: counters to start from, at most `capacity`.
    """

    def __init__(
        self, *, capacity: int = CAPACITY, counts: Mapping[str, int] | None = None
    ) -> None:
        self._capacity = capacity
        self.counts = dict(counts or {})
        """Counter of each value, never above its true count."""

    def add(self, value: str) -> None:
        """Count a value."""
        counts = self.counts
        if value in counts:
            counts[value] += 1
        elif len(counts) < self._capacity:
            counts[value] = 1
        else:
            # This value cancels one of every counted value.
            self.counts = {kept: count - 1 for kept, count in counts.items() if count > 1}

    @classmethod
    def merge(
        cls, parts: Iterable[Mapping[str, int]], *, capacity: int = CAPACITY
    ) -> "HeavyHitters":
        """Merge the counters of several instances of one capacity."""
        merged: dict[str, int] = {}
        for counts in parts:
            for value, count in counts.items():
                merged[value] = merged.get(value, 0) + count
            if len(merged) > capacity:
                # The largest count without a counter is subtracted from all counts.
                excess = sorted(merged.values(), reverse=True)[capacity]
                merged = {value: n - excess for value, n in merged.items() if n > excess}
        return cls(capacity=capacity, counts=merged)


class Notable(NamedTuple):
    """A property of a whole data set that is worth a look."""

    code: str
    when: str
    """The condition under which it is noted."""
    advice: str


LENGTH_BIAS = Notable(
    "LENGTH_BIAS",
    "one side is the longer one in more than 70 % of at least 100 pairs",
    "Training can learn the length instead of the preference. Compare answer lengths before and "
    "after training; use a length-normalised loss, or balance the data.",
)
SOURCE_SKEW = Notable(
    "SOURCE_SKEW",
    "of several sources one has more than 80 % of the pairs",
    "The others hardly count. Take fewer rows of the large one, or weight the small ones up.",
)
CHOSEN_REPEATED = Notable(
    "CHOSEN_REPEATED",
    "one chosen answer stands in more than 1 % of the pairs, and in at least 10",
    "Training will make the model say it everywhere. Look at the rows that have it, and drop "
    "those where it is no answer to the question.",
)
NEARLY_EQUAL_ANSWERS = Notable(
    "NEARLY_EQUAL_ANSWERS",
    "more than 5 % of the pairs have CHOSEN_NEAR_REJECTED",
    "Such pairs teach little and push both answers down. Set stages.validate.rules to "
    "{CHOSEN_NEAR_REJECTED: reject} to train without them.",
)
ONE_SIDED_REFUSALS = Notable(
    "ONE_SIDED_REFUSALS",
    "in more than 10 % of the pairs only one side declines or speaks as an AI model, and four of "
    "five of these are on one side",
    "Training will mostly teach to refuse, or not to. Compare refusals before and after training "
    "on harmless questions.",
)
NOTABLE = (
    LENGTH_BIAS,
    SOURCE_SKEW,
    CHOSEN_REPEATED,
    NEARLY_EQUAL_ANSWERS,
    ONE_SIDED_REFUSALS,
)


class ShardOverview:
    """Counts of the pairs of one shard."""

    def __init__(self) -> None:
        self._num_pairs = 0
        self._chosen_chars = 0
        self._rejected_chars = 0
        self._num_chosen_longer = 0
        self._num_rejected_longer = 0
        self._num_only_chosen_declines = 0
        self._num_only_rejected_declines = 0
        self._sources = HeavyHitters()
        self._answers = HeavyHitters()

    def add(self, pair: PairView, source: str) -> None:
        """Count a pair that is kept."""
        num_chosen, num_rejected = len(pair.chosen_text), len(pair.rejected_text)
        self._num_pairs += 1
        self._chosen_chars += num_chosen
        self._rejected_chars += num_rejected
        self._num_chosen_longer += num_chosen > num_rejected
        self._num_rejected_longer += num_chosen < num_rejected
        chosen_declines = find_refusal(pair.chosen_text) is not None
        rejected_declines = find_refusal(pair.rejected_text) is not None
        self._num_only_chosen_declines += chosen_declines and not rejected_declines
        self._num_only_rejected_declines += rejected_declines and not chosen_declines
        self._sources.add(_shorten(source))
        self._answers.add(_shorten(pair.chosen_text))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of OVERVIEW, in an order that depends on the counts alone."""
        sums = {
            "num_pairs": self._num_pairs,
            "chosen_chars": self._chosen_chars,
            "rejected_chars": self._rejected_chars,
            "num_chosen_longer": self._num_chosen_longer,
            "num_rejected_longer": self._num_rejected_longer,
            "num_only_chosen_declines": self._num_only_chosen_declines,
            "num_only_rejected_declines": self._num_only_rejected_declines,
        }
        return [
            *({"kind": "sum", "key": key, "count": count} for key, count in sums.items()),
            *_list_counts("source", self._sources),
            *_list_counts("chosen", self._answers),
        ]


def _shorten(text: str) -> str:
    """Replace most of a long text by its digest, to bound memory."""
    if len(text) <= _MAX_HELD_CHARS:
        return text
    return text[:MAX_EXCERPT_CHARS] + hashlib.sha256(text.encode()).hexdigest()


def _list_counts(kind: str, counted: HeavyHitters) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "key": hashlib.sha256(text.encode()).hexdigest()[:32],
            "text": make_printable(text[:MAX_EXCERPT_CHARS])[:MAX_EXCERPT_CHARS],
            "count": count,
        }
        for text, count in sorted(counted.counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def sum_up(tables: Iterable[pa.Table], *, num_near: int | None) -> dict[str, Any]:
    """Add up the overviews of all shards and list notable findings.

    Args:
        tables: with the columns of OVERVIEW, by shard.
        num_near: pairs with the warning CHOSEN_NEAR_REJECTED; None if that is no warning.
    Returns:
        The manifest's summary.findings:

        num_pairs: pairs kept.
        chosen_longer, rejected_longer: share of the pairs in which that side has more characters.
        mean_chosen_chars, mean_rejected_chars: mean length of that side.
        only_chosen_declines, only_rejected_declines: share of the pairs in which only that side
            declines, or speaks as an AI model.
        near_identical: share of the pairs with CHOSEN_NEAR_REJECTED; null if that is no warning,
            because such pairs were rejected or not looked for.
        sources, repeated_chosen: up to five of the most frequent, as {text, num_pairs, share};
            num_pairs may be too low by a thousandth of all pairs. Answers of one pair are left out.
        notable: a list of {code, found, when, advice}.
    """
    sums: Counter[str] = Counter()
    counted: dict[str, list[dict[str, int]]] = {"source": [], "chosen": []}
    texts: dict[str, str] = {}
    for table in tables:
        of_shard: dict[str, dict[str, int]] = {"source": {}, "chosen": {}}
        for row in table.to_pylist():
            if row["kind"] == "sum":
                sums[row["key"]] += row["count"]
            else:
                of_shard[row["kind"]][row["key"]] = row["count"]
                texts.setdefault(row["key"], row["text"])
        for kind, counts in of_shard.items():
            counted[kind].append(counts)
    num_pairs = sums["num_pairs"]
    ranked = {
        kind: _rank(HeavyHitters.merge(parts).counts, texts, num_pairs)
        for kind, parts in counted.items()
    }

    def share(count: int) -> float:
        return round(count / max(num_pairs, 1), 6)

    found = {
        "num_pairs": num_pairs,
        "chosen_longer": share(sums["num_chosen_longer"]),
        "rejected_longer": share(sums["num_rejected_longer"]),
        "mean_chosen_chars": round(sums["chosen_chars"] / max(num_pairs, 1), 1),
        "mean_rejected_chars": round(sums["rejected_chars"] / max(num_pairs, 1), 1),
        "only_chosen_declines": share(sums["num_only_chosen_declines"]),
        "only_rejected_declines": share(sums["num_only_rejected_declines"]),
        "near_identical": None if num_near is None else share(num_near),
        "sources": ranked["source"],
        "repeated_chosen": [one for one in ranked["chosen"] if one["num_pairs"] > 1],
    }
    return {**found, "notable": [_describe(*one) for one in _find_notable(found)]}


def _rank(
    counts: Mapping[str, int], texts: Mapping[str, str], num_pairs: int
) -> list[dict[str, Any]]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_LISTED]
    return [
        {"text": texts[key], "num_pairs": count, "share": round(count / num_pairs, 6)}
        for key, count in ranked
    ]


def _describe(notable: Notable, found: str) -> dict[str, str]:
    return {
        "code": notable.code,
        "found": found,
        "when": notable.when,
        "advice": notable.advice,
    }


def _find_notable(found: Mapping[str, Any]) -> list[tuple[Notable, str]]:
    notable = []
    num_pairs = found["num_pairs"]
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if num_pairs >= 100 and found[f"{side}_longer"] > 0.7:
            means = f"{found[f'mean_{side}_chars']:,.0f} characters against "
            means += f"{found[f'mean_{other}_chars']:,.0f} on average"
            said = f"the {side} answer is the longer one in {found[f'{side}_longer']:.1%}, {means}"
            notable.append((LENGTH_BIAS, said))
    sources: Sequence[Mapping[str, Any]] = found["sources"]
    if len(sources) > 1 and sources[0]["share"] > 0.8:
        said = f"{sources[0]['share']:.1%} of the pairs are from {sources[0]['text']}"
        notable.append((SOURCE_SKEW, said))
    for answer in found["repeated_chosen"]:
        if answer["num_pairs"] >= 10 and answer["share"] > 0.01:
            said = (
                f"{answer['num_pairs']:,} pairs ({answer['share']:.1%}) have it: {answer['text']}"
            )
            notable.append((CHOSEN_REPEATED, said))
    if (found["near_identical"] or 0) > 0.05:
        notable.append((NEARLY_EQUAL_ANSWERS, f"{found['near_identical']:.1%} of the pairs"))
    of_chosen, of_rejected = found["only_chosen_declines"], found["only_rejected_declines"]
    if of_chosen + of_rejected > 0.1 and max(of_chosen, of_rejected) >= 0.8 * (
        of_chosen + of_rejected
    ):
        said = f"only the chosen answer in {of_chosen:.1%}, only the rejected in {of_rejected:.1%}"
        notable.append((ONE_SIDED_REFUSALS, said))
    return notable
