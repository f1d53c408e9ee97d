"""Interface of a scorer, and the settings that open one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from schemas.config import config_class
from schemas.errors import ConfigError
from stages.policy.groups import Group, IntArray
from stages.stage import Execution, Resources

FloatArray = NDArray[np.float32]
Backend = Literal["vllm", "transformers"]
Dtype = Literal["float32", "bfloat16", "float16"]


@config_class
class ScoringExecution(Execution):
    """How scoring is spread over machines; affects values only by the order of additions."""

    num_cpus_per_worker: float | Literal["auto"] = "auto"
    """CPU cores and threads of a replica; auto = all of a machine, or 1 if it has a GPU."""
    num_gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs of each replica; auto = 1 where there are GPUs, else 0."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """vllm: number of processes, on GPUs one per GPU, over which a replica is split."""
    max_tokens_per_batch: Annotated[int, Field(ge=256)] | Literal["auto"] = "auto"
    """Tokens in a batch, padding included; auto = 16384 on a GPU, else 4096 for vllm and 512 for
    transformers, where larger batches only add padding."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """vllm on a CPU: memory for keys and values, in GiB."""
    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """vllm on a GPU: fraction of the GPU's memory for weights, keys and values."""


PROMPTS_AT_ONCE = {"cpu": 256, "gpu": 4096}
"""Prompts in one call of a scorer: about a minute on a CPU, and enough that a GPU seldom waits for
the last of them. A worker reports its progress between two calls."""


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """Settings with which a worker opens its model."""

    backend: Backend
    dtype: Dtype
    """dtype of weights and activations; log-probabilities are always computed in float32."""
    max_length: int
    """Most tokens in a prompt with its completion."""
    num_threads: int
    """Number of compute threads on a CPU."""
    num_prompts_at_once: int = PROMPTS_AT_ONCE["cpu"]
    """Prompts that a worker hands to the scorer in one call."""
    execution: ScoringExecution = field(default_factory=ScoringExecution)


def plan_scorer(
    execution: ScoringExecution,
    resources: Resources,
    *,
    backend: Backend,
    dtype: Dtype,
    max_length: int,
) -> ScorerSettings:
    """Derive the scorer settings of a stage's workers from its resources.

    Raises:
        ConfigError: a replica would hold more or fewer GPUs than it has processes.
    """
    num_processes, num_gpus = execution.tensor_parallel_size, resources.num_gpus
    if num_gpus > 0 and max(num_gpus, 1) != num_processes:
        raise ConfigError(
            f"A replica of {num_processes} processes (tensor_parallel_size) would hold "
            f"{num_gpus:g} GPUs. Set num_gpus_per_worker of this stage to the same number."
        )
    return ScorerSettings(
        backend=backend,
        dtype=dtype,
        max_length=max_length,
        num_threads=max(1, int(resources.num_cpus)),
        num_prompts_at_once=PROMPTS_AT_ONCE["gpu" if num_gpus > 0 else "cpu"],
        execution=execution,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreStatistics:
    """Work that a scorer has done since it was opened."""

    num_tokens_submitted: int = 0
    """Tokens of all scored sequences, each with its whole prompt."""
    num_tokens_computed: int = 0
    """Tokens that the model computed: shared prompts once, padding included."""

    def since(self, before: "ScoreStatistics") -> "ScoreStatistics":
        """Work done since an earlier reading of the statistics."""
        return ScoreStatistics(
            num_tokens_submitted=self.num_tokens_submitted - before.num_tokens_submitted,
            num_tokens_computed=self.num_tokens_computed - before.num_tokens_computed,
        )


class Scorer(Protocol):
    """A frozen model that returns log-probabilities and greedy answers.

    Results of a call do not depend on earlier calls.
    """

    shares_prompts: bool
    """Whether completions of one prompt share its computation; True when opened. Otherwise every
    sequence is computed whole, which costs more."""

    @property
    def statistics(self) -> ScoreStatistics: ...

    def score(
        self, groups: Sequence[Group], *, in_one_batch: bool = False
    ) -> list[tuple[FloatArray, ...]]:
        """Compute log p(completion token | prompt and the completion tokens before it).

        Args:
            groups: prompts with their completions.
            in_one_batch: whether the engine must compute all of them together, even if that takes
                more memory than its batches usually do.
        Returns:
            For each group one array a completion: float32, nats, one value a token. Length and
            values are arbitrary where the engine failed; stages.scorers.pairs checks them.
        Raises:
            DataError: the engine behaved in a way that makes its values untrustworthy.
        """
        ...

    def generate(self, prompts: Sequence[IntArray], *, max_new_tokens: int) -> list[IntArray]:
        """Continue prompts greedily up to a stop token or the length limit.

        Returns:
            For each prompt the new token ids, int32, including the stop token.
        """
        ...

    def close(self) -> None:
        """Free the model and its memory; the scorer cannot be used afterwards."""
        ...


def read_stop_token_ids(model_path: str) -> list[int]:
    """Read the end-of-sequence ids from generation_config.json and config.json, without repeats."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_path, name)
        eos = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
    return sorted(found)
