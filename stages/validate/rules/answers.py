"""Rules on the two answers: near-identity, reasoning on one side, refusals, repetition."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from stages.validate.rules.pair_view import PairView
from stages.validate.rules.rule import Spots, Thresholds

_RUN_WORDS = 10
_MIN_RUNS = 3
_SPEAKS_AS_AI = re.compile(
    r"\b(?:[Aa]s an?|I(?:['\u2019]m| am)(?: just| only)? an?) "
    r"(?:AI|artificial intelligence|(?:large )?language model)\b"
)
_DECLINES = re.compile(
    r"\W*(?:I(?:['\u2019]m| am)(?: very| so| really)? sorry,? (?:but )?|Sorry,? (?:but )?)?"
    r"I(?: can(?:not|['\u2019]t)|(?: am|['\u2019]m) (?:unable|not able) to)(?: \w+)? "
    r"(?:assist|help|comply|fulfil|provide|answer|engage|support|discuss|create|generate)"
)


def find_near_identity(pair: PairView, thresholds: Thresholds) -> Spots:
    """Find answers with nearly the same words, counted with repetitions, in any order."""
    chosen, rejected = pair.chosen_words, pair.rejected_words
    shorter, longer = sorted((len(chosen), len(rejected)))
    # The answers share at most the words of the shorter one, so lengths decide most pairs.
    if not shorter or shorter < thresholds.near_jaccard * longer:
        return
    ours, theirs = Counter(chosen), Counter(rejected)
    jaccard = (ours & theirs).total() / (ours | theirs).total()
    if jaccard >= thresholds.near_jaccard:
        yield "rejected", f"Jaccard similarity of the words {jaccard:.3f}"


def is_not_plain(pair: PairView, _: Thresholds) -> bool:
    return not pair.is_plain


def find_one_sided_reasoning(pair: PairView, _: Thresholds) -> Spots:
    with_reasoning = [
        side for side, messages in pair.sides() if any(m["reasoning"] for m in messages)
    ]
    if len(with_reasoning) == 1:
        yield with_reasoning[0], "the only one with reasoning"


def find_boilerplate(pair: PairView, _: Thresholds) -> Spots:
    if phrase := find_refusal(pair.chosen_text):
        yield "chosen", ascii(phrase)


def find_refusal(text: str) -> str | None:
    """Return the English phrase in which an answer speaks as an AI model or declines."""
    may_speak = " AI" in text or "artificial" in text or "language model" in text
    found = _SPEAKS_AS_AI.search(text) if may_speak else None
    found = found or _DECLINES.match(text)
    return found[0].strip() if found else None


def find_repetition(pair: PairView, thresholds: Thresholds) -> Spots:
    for side, words in (("chosen", pair.chosen_words), ("rejected", pair.rejected_words)):
        num_runs = max(_MIN_RUNS, math.ceil(thresholds.repeated_share * len(words) / _RUN_WORDS))
        if num_runs * _RUN_WORDS > len(words) or not _may_repeat(words, num_runs):
            continue
        run, count = _find_most_frequent_run(words)
        if count >= num_runs and count * _RUN_WORDS > thresholds.repeated_share * len(words):
            yield side, f"{count} times: {ascii(' '.join(run))[:200]}"


def _may_repeat(words: Sequence[str], num_runs: int) -> bool:
    """Return whether distinct words and pairs of neighbours allow `num_runs` equal runs.

    All runs have the same ten words and nine pairs, so only one run adds distinct ones.
    """
    num_repeated = num_runs - 1
    return (
        len(set(words)) <= len(words) - _RUN_WORDS * num_repeated
        and len(set(pairwise(words))) <= len(words) - 1 - (_RUN_WORDS - 1) * num_repeated
    )


def _find_most_frequent_run(words: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Find the most frequent run of ten words, counted without overlap."""
    counts: Counter[tuple[str, ...]] = Counter()
    free_from: dict[tuple[str, ...], int] = {}
    for at in range(len(words) - _RUN_WORDS + 1):
        run = tuple(words[at : at + _RUN_WORDS])
        if at >= free_from.get(run, 0):
            counts[run] += 1
            free_from[run] = at + _RUN_WORDS
    return counts.most_common(1)[0]
