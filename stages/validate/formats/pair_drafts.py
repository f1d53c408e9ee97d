"""Pair drafts: the pairs of a row before the rules are applied, and what they are made from.

They are structs because some are created for every row, which takes a tenth of a dataclass's time.
They are in no reference cycles, so the garbage collector skips them (gc=False).
"""

import msgspec

from stages.validate.findings import Finding
from stages.validate.messages import Message


class PairDraft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A pair of a row, before the rules are applied."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: str | None
    score_chosen: float | None
    score_rejected: float | None
    margin: float | None
    weight: float
    source: str | None
    """The row's own source; None means that the file's name is used."""
    source_id: str | None
    extra: str | None
    warnings: tuple[Finding, ...]


class Sides(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Result of a conversion whose row says which answer is better."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    score_chosen: float | None = None
    score_rejected: float | None = None
    margin: float | None = None
    """The format's own measure of how much better the chosen answer is, if it has one."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One of several answers to a prompt."""

    messages: list[Message]
    score: float
    """Higher is better; a rank is negated."""


class Ranking(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Result of a conversion whose row scores or ranks a list of answers."""

    prompt: list[Message]
    answers: list[Answer]
    """At least two, in the row's order."""


class Unpaired(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Result of a conversion whose row holds one answer, and whether it is a good one."""

    prompt: list[Message]
    answer: list[Message]
    is_good: bool


Converted = Sides | list[Sides] | Ranking | Unpaired
"""Result of a conversion; a list gives a pair for each of its items."""


class UnpairedDraft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An answer of one row, before it is paired with the answer of another one."""

    prompt: list[Message]
    answer: list[Message]
    is_good: bool
    tools: str | None
    weight: float
    source: str | None
    """As in PairDraft."""
    source_id: str | None
    extra: str | None
    warnings: tuple[Finding, ...]
