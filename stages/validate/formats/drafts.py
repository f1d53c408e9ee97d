"""Drafts: the pairs of a row before the rules are applied.

Structs rather than dataclasses: some are made for every row, and that takes a tenth of the time.
As nothing in them points back at them, the garbage collector need not know them (gc=False).
"""

import msgspec

from stages.validate.findings import Finding
from stages.validate.messages import Message


class Draft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row as a pair, before the rules have looked at it."""

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
    tools: object = None
    """Tool definitions as the row holds them, where a format has its own place for them."""
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
    tools: object = None
