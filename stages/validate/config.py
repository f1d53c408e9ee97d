"""Config of validate."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from schemas.config import config_class
from stages.validate.codes import check_levels
from stages.validate.findings import Level
from stages.validate.formats import AUTO
from stages.validate.formats.pair_policy import PairPolicy
from stages.validate.inputs import FormatName, Inputs
from stages.validate.rules.rule import Thresholds


def _read_level(value: object) -> object:
    """Read a bare `off`, which YAML parses as false."""
    return "off" if value is False else value


Levels = Annotated[
    dict[str, Annotated[Level, BeforeValidator(_read_level)]], AfterValidator(check_levels)
]


@config_class
class ValidateConfig:
    """Which rows are read, how they become pairs, and what rejects them."""

    inputs: Inputs = Field(min_length=1)
    """Raw preference data: paths, folders or globs, or blocks with `path` and more keys."""
    format: FormatName = AUTO
    """Format of the rows; auto = recognised for each file from its first 1,000 rows. Plain strings
    become messages of a user and an assistant, character for character."""
    pair_policy: PairPolicy = "best_vs_worst"
    """Pairs made from a ranked list of answers: best_vs_worst, best_vs_random (one pair each),
    adjacent (each answer with the next worse one), or all (weighted: the list counts as one)."""
    min_margin: float = Field(default=0.0, ge=0)
    """Scores that differ by no more than this are a tie and give no pair."""
    eval_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the prompts that are held out (split = eval), each with all of its pairs."""
    split_seed: int = 0
    """Seed of the held-out split; another seed holds out other prompts."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Number of rows to read, from the start of the first input, for a first try; null = all."""
    max_reject_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of rejected rows, 0 to 1; above it the stage fails. Ties are not counted."""
    rules: Levels = Field(default_factory=dict)
    """Levels by code: reject, warn or off; docs/reference/rules.md lists which can be set."""
    thresholds: Thresholds = Field(default_factory=Thresholds)
    """Numbers that some rules compare with."""
    split_bytes: int = Field(default=64 << 20, ge=1)
    """Bytes of input in one shard, uncompressed. Parquet row groups and Arrow record batches are
    not split; a file of any other kind than plain JSONL is one shard."""
