"""Config and reason codes of the stage dedupe."""

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
    DUP_EXACT: "Prompt and answers read the same as another pair's.",
    DUP_NEAR: "Prompt and answers are nearly the same as another pair's.",
    LABEL_CONFLICT: "The same two answers to this prompt stand elsewhere with opposite labels.",
    SPLIT_LEAK: "A pair for training whose prompt is, nearly, one that is held out.",
    EVAL_CONTAMINATED: "The prompt or the chosen answer holds a benchmark's.",
    PROMPT_CAP: "The prompt has more pairs than max_pairs_per_prompt allows.",
}
"""Why a pair goes."""

WARNINGS = {
    PREFERENCE_CYCLE: "Preferences among answers to this prompt go round in a circle.",
    NEAR_DUP_KEPT: "Nearly another kept pair, but a number, an operator or a negation differs.",
}
"""What is noted on pairs that stay."""

CODES = {**REASONS, **WARNINGS}
ConflictPolicy = Literal["drop_all", "majority", "larger_margin"]


@config_class
class NearConfig:
    """When two pairs are so similar that one of them is enough."""

    threshold: float = Field(default=0.7, ge=0.5, le=1)
    """Jaccard similarity of the word 3-grams of prompt and both answers from which on two pairs are
    near-duplicates."""
    answer_threshold: float = Field(default=0.5, ge=0, le=1)
    """Similarity that each answer must have to its counterpart besides: a long prompt or one long
    answer in common does not make two pairs the same."""


@config_class
class LeaksConfig:
    """When a training prompt is too close to a held-out one."""

    threshold: float = Field(default=0.8, ge=0.5, le=1)
    """Jaccard similarity of two prompts' word 3-grams, system messages left out, from which on the
    pair for training goes."""


@config_class
class BenchmarkConfig:
    """Prompts that must not be trained on."""

    path: str
    """Lines of a .txt file, rows of .jsonl or .parquet, or a list that `hash-prompts` made."""
    name: str | None = None
    """What reports call it; absent = the file's name without its suffix."""
    prompt_column: str | None = None
    """Where the prompt stands in a row; absent = `prompt`, else `text`."""
    answer_column: str | None = None
    """Where its answer stands, which chosen answers are held against; absent = `answer`, if any."""


def _block_or_none(value: object) -> object:
    """Let `off`, which YAML reads as false, mean the same as null."""
    return None if value is False else value


def _expand_path(value: object) -> object:
    """Take a plain string for the block that names only a path."""
    return {"path": value} if isinstance(value, str) else value


Benchmarks = list[Annotated[BenchmarkConfig, BeforeValidator(_expand_path)]]


@config_class
class DedupeConfig:
    """Which pairs are the same, which of them stays, and how large the shards are."""

    rows_per_shard: int = Field(default=25_000, ge=1)
    """Pairs a shard holds on average; the layout of every later stage."""
    source_priority: list[str] = dataclasses.field(default_factory=list)
    """Sources whose copy of a duplicate is kept, the best first; others come after them."""
    conflict_policy: ConflictPolicy = "drop_all"
    """What stays of pairs that differ only in which answer is preferred: none, the direction with
    more rows, or the one with the larger margin (none where both are equal or unknown)."""
    near: Annotated[NearConfig | None, BeforeValidator(_block_or_none)] = NearConfig()
    """Near-duplicates; null or off = only exact ones are sought."""
    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """The best pairs of a prompt that stay, in the order of survivors; null = all."""
    leaks: Annotated[LeaksConfig | None, BeforeValidator(_block_or_none)] = LeaksConfig()
    """Training pairs whose prompt is, nearly, a held-out one go; null or off = not sought."""
    benchmarks: Benchmarks = dataclasses.field(default_factory=list)
    """Files of benchmark prompts: pairs that contain one go; paths, or blocks with `path`."""
