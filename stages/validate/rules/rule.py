"""Record of a rule, and the thresholds that rules compare with."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import Field

from schemas.config import config_class
from stages.validate.findings import Level
from stages.validate.rules.pair_view import PairView

Spots = Iterator[tuple[str, str]]
"""Places that break a rule: a dotted path and the detail of each."""


@config_class
class Thresholds:
    """Numbers that some rules compare with."""

    max_text_chars: int = Field(default=1_000_000, ge=1)
    """FIELD_TOO_LONG: largest number of characters of a text."""
    max_name_bytes: int = Field(default=256, ge=1)
    """SOURCE_UNSAFE_NAME: largest number of UTF-8 bytes of a source or source_id."""
    near_jaccard: float = Field(default=0.95, gt=0, le=1)
    """CHOSEN_NEAR_REJECTED: smallest Jaccard similarity of the answers' words, 0 to 1."""
    repeated_share: float = Field(default=0.3, gt=0, lt=1)
    """REPETITION: share of an answer's words, 0 to 1, that one repeated run of ten must exceed."""


Screen = Callable[[PairView, Thresholds], bool]


class Rule(NamedTuple):
    """What a pair must satisfy: its code's level and meaning, and the function that checks it."""

    level: Level
    """Its level unless stages.validate.rules sets another."""
    meaning: str
    """One sentence for the documentation and for messages."""
    check: Callable[[PairView, Thresholds], Spots]
    screen: Screen | None = None
    """A cheap test that skips `check`; it may return False only for pairs that satisfy the rule."""
    threshold: str | None = None
    """The field of Thresholds that `check` compares with."""
    why_fixed: str | None = None
    """Why a recipe cannot change the level; None means that it can."""
