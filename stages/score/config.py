"""Settings of the score stage, and the codes of its rejected rows and warnings."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.config import config_class
from stages.scorers.protocol import Backend, ScoringExecution

REASONS = {
    "REF_LENGTH": "An answer got another number of values than it has tokens, also when alone.",
    "REF_NONFINITE": "A log-probability is NaN or infinite, also when scored alone.",
    "REF_POSITIVE": "A log-probability is above 0, also when scored alone.",
    "REF_MISSING": "import: the table holds no values of an answer.",
}
"""Reasons for rejecting a pair, by code."""

WARNINGS = {
    "REF_OUTLIER": "The reference gives an answer less than -15 nats a token in the mean: mostly "
    "the template or the tokenizer is another model's.",
}
"""Warnings about pairs that are kept, by code."""


@config_class
class ScoreConfig:
    """The reference model and the engine that computes with it."""

    model: str = "sample:smollm2-135m-instruct"
    """The reference: a Hugging Face id with an optional @revision, a folder, or sample:NAME."""
    adapter: str | None = None
    """A LoRA adapter, such as one of supervised fine-tuning, merged into the model first: a Hugging
    Face id or a folder. The policy starts with the same adapter merged."""
    backend: Backend | Literal["import"] = "vllm"
    """Engine: vllm, or transformers (the code that also trains); import = read values from
    `table`."""
    table: str | None = None
    """import: a Parquet file or folder with a log-probability for every completion token."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of weights and activations; auto = bfloat16 on GPUs, float32 on CPUs. import: the dtype
    in which the table's values were computed, which cannot be auto."""

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        if (self.backend == "import") != (self.table is not None):
            raise ValueError("backend: import and table go together")
        if self.backend == "import" and self.dtype == "auto":
            raise ValueError("backend: import needs the dtype that its values were computed in")
        return self


@config_class
class ScoreExecution(ScoringExecution):
    """How scoring is spread over machines, and which other stores to reuse values from."""

    reuse_from: list[str] = Field(default_factory=list)
    """Other stores (paths or URIs) from which values of the same reference are reused."""
