"""Pair policies: make pairs from a ranked list of answers."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

from stages.validate.findings import RowFault
from stages.validate.formats.pair_drafts import Answer

PairPolicy = Literal["best_vs_worst", "best_vs_random", "adjacent", "all"]


def choose_pairs(
    answers: Sequence[Answer], *, policy: PairPolicy, min_margin: float, prompt_id: str
) -> list[tuple[Answer, Answer]]:
    """Choose the pairs of answers to compare.

    Answers of equal score keep the row's order, and are never compared with each other.

    Args:
        answers: the answers to one prompt.
        policy: best_vs_worst: one pair. best_vs_random: one pair, the other answer drawn by the
            prompt_id alone. adjacent: each answer with the next worse one. all: every two.
        min_margin: scores that differ by no more are a tie.
        prompt_id: hex digits of a hash of the prompt.
    Returns:
        (better, worse), at least one.
    Raises:
        RowFault: there are fewer than two answers, or all scores are tied.
    """
    if len(answers) < 2:
        raise RowFault("SCHEMA_MISMATCH", None, f"{len(answers)} answers; a pair needs two")
    ordered = sorted(answers, key=lambda answer: -answer.score)
    best = ordered[0]
    if best.score - ordered[-1].score <= min_margin:
        raise _describe_tie(best.score, ordered[-1].score, min_margin)
    if policy == "best_vs_worst":
        return [(best, ordered[-1])]
    if policy == "best_vs_random":
        worse = [answer for answer in ordered if best.score - answer.score > min_margin]
        return [(best, worse[int(prompt_id, 16) % len(worse)])]
    candidates = pairwise(ordered) if policy == "adjacent" else combinations(ordered, 2)
    pairs = [(one, other) for one, other in candidates if one.score - other.score > min_margin]
    if not pairs:
        raise _describe_tie(best.score, ordered[-1].score, min_margin)
    return pairs


def refuse_small_margin(margin: float | None, min_margin: float) -> None:
    """Refuse a pair whose scores hardly differ.

    Raises:
        RowFault: the margin is above 0 and no larger than min_margin.
    """
    if margin is not None and 0 < margin <= min_margin:
        raise RowFault("MARGIN_TOO_SMALL", "margin", f"{margin:g}, more than {min_margin:g} wanted")


def _describe_tie(best: float, worst: float, min_margin: float) -> RowFault:
    detail = f"the scores reach from {worst:g} to {best:g}"
    if best == worst:
        return RowFault("TIE", None, detail)
    return RowFault("MARGIN_TOO_SMALL", None, f"{detail}; min_margin is {min_margin:g}")
