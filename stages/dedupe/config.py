"""Settings of the stage dedupe, and the codes that it gives to pairs."""

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from schemas.config import config_class

DUP_EXACT = "DUP_EXACT"
DUP_NEAR = "DUP_NEAR"
LABEL_CONFLICT = "LABEL_CONFLICT"
SPLIT_LEAK = "SPLIT_LEAK"
EVAL_CONTAMINATED = "EVAL_CONTAMINATED"
PROMPT_CAP = "PROMPT_CAP"
PREFERENCE_CYCLE = "PREFERENCE_CYCLE"
NEAR_DUP_KEPT = "NEAR_DUP_KEPT"

REASONS = {
    DUP_EXACT: "Prompt and answers are the same as another pair's.",
    DUP_NEAR: "Prompt and answers are nearly the same as another pair's.",
    LABEL_CONFLICT: "Another pair has the same prompt and answers with the opposite label.",
    SPLIT_LEAK: "A training pair whose prompt is the same, or nearly the same, as a held-out one.",
    EVAL_CONTAMINATED: "The prompt or the chosen answer contains a benchmark's.",
    PROMPT_CAP: "The prompt has more pairs than max_pairs_per_prompt allows.",
}
"""Codes of rejected pairs."""

WARNINGS = {
    PREFERENCE_CYCLE: "The preferences among the answers to this prompt form a cycle.",
    NEAR_DUP_KEPT: "Nearly the same as another kept pair, except a number, operator or negation.",
}
"""Codes of warnings on kept pairs."""

CODES = {**REASONS, **WARNINGS}
ConflictPolicy = Literal["drop_all", "majority", "larger_margin"]


@config_class
class NearConfig:
    """Thresholds above which two pairs are near-duplicates."""

    threshold: float = Field(default=0.7, ge=0.5, le=1)
    """Jaccard similarity of the word 3-grams of prompt and both answers, at or above which two
    pairs are near-duplicates."""
    answer_threshold: float = Field(default=0.5, ge=0, le=1)
    """Similarity that each answer must also have to its counterpart, so that a long shared prompt
    or one long shared answer does not make two pairs near-duplicates."""


@config_class
class LeaksConfig:
    """Threshold above which a training prompt is too close to a held-out one."""

    threshold: float = Field(default=0.8, ge=0.5, le=1)
    """Jaccard similarity of the word 3-grams of two prompts, without system messages, at or above
    which the training pair is rejected."""


@config_class
class BenchmarkConfig:
    """Prompts that must not be trained on."""

    path: str
    """A .txt file with one prompt a line, a .jsonl or .parquet file, or a list that `hash-prompts`
    wrote."""
    name: str | None = None
    """Name of the benchmark in reports; absent = the file's name without its suffix."""
    prompt_column: str | None = None
    """Column that holds the prompt; absent = `prompt`, else `text`."""
    answer_column: str | None = None
    """Column that holds the answer, to be searched for in chosen answers; absent = `answer`, if
    there is one."""


def _block_or_none(value: object) -> object:
    """Accept `off`, which YAML reads as false, for null."""
    return None if value is False else value


def _expand_path(value: object) -> object:
    """Accept a plain string for a block with only a path."""
    return {"path": value} if isinstance(value, str) else value


Benchmarks = list[Annotated[BenchmarkConfig, BeforeValidator(_expand_path)]]


@config_class
class DedupeConfig:
    """Which pairs count as duplicates, which of them are kept, and how large the shards are."""

    rows_per_shard: int = Field(default=25_000, ge=1)
    """Average number of pairs in a shard, here and in every later stage."""
    source_priority: list[str] = dataclasses.field(default_factory=list)
    """Sources in order of preference when one of several duplicates is kept; sources that are not
    listed come last."""
    conflict_policy: ConflictPolicy = "drop_all"
    """What to keep of pairs that differ only in which answer is preferred: none, the direction with
    more rows, or the direction with the larger margin (none on a tie or without margins)."""
    near: Annotated[NearConfig | None, BeforeValidator(_block_or_none)] = NearConfig()
    """Search for near-duplicates; null or off = only exact duplicates are removed."""
    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """Largest number of pairs to keep for one prompt, the best first; null = no limit."""
    leaks: Annotated[LeaksConfig | None, BeforeValidator(_block_or_none)] = LeaksConfig()
    """Reject training pairs whose prompt is a held-out one, or nearly; null or off = they are
    kept."""
    benchmarks: Benchmarks = dataclasses.field(default_factory=list)
    """Files of benchmark prompts, as paths or blocks with `path`; pairs that contain one are
    rejected."""
