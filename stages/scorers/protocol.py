"""What can a scorer do, and what does opening one take?"""

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
    """How scoring is spread over machines. All of it only changes the order of additions."""

    num_cpus_per_worker: float | Literal["auto"] = "auto"
    """CPU cores, and threads, of a replica; auto = all of a machine, or 1 beside a GPU."""
    num_gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs that each replica holds; auto = 1 where there are GPUs, else 0."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """vllm: processes (on GPUs: GPUs) that share one replica."""
    max_tokens_per_batch: Annotated[int, Field(ge=256)] | Literal["auto"] = "auto"
    """Tokens that go through the model at once, padding included; auto = 512 for transformers on a
    CPU, where longer batches only pad more, else 4096."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """vllm on a CPU: memory for keys and values, in GiB."""
    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """vllm on a GPU: share of the GPU's memory for weights, keys and values."""


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """How a model is to be opened."""

    backend: Backend
    dtype: Dtype
    """Of weights and activations; log-probabilities are always computed in float32."""
    max_length: int
    """Tokens of the longest prompt with completion."""
    num_threads: int
    """Threads that compute on a CPU."""
    execution: ScoringExecution = field(default_factory=ScoringExecution)


def plan_scorer(
    execution: ScoringExecution,
    resources: Resources,
    *,
    backend: Backend,
    dtype: Dtype,
    max_length: int,
) -> ScorerSettings:
    """Settle how the workers of a stage open their model.

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
        execution=execution,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreStatistics:
    """What a scorer has done since it was opened."""

    num_tokens_submitted: int = 0
    """Tokens of all sequences, each with its whole prompt."""
    num_tokens_computed: int = 0
    """Tokens that went through the model: shared prompts once, padding included."""

    def since(self, before: "ScoreStatistics") -> "ScoreStatistics":
        """What was done after an earlier moment."""
        return ScoreStatistics(
            num_tokens_submitted=self.num_tokens_submitted - before.num_tokens_submitted,
            num_tokens_computed=self.num_tokens_computed - before.num_tokens_computed,
        )


class Scorer(Protocol):
    """A frozen model that is asked for log-probabilities.

    What a call gives does not depend on the calls before it.
    """

    shares_prompts: bool
    """Whether the completions of a prompt may share its computation, as they do at first; if not,
    each sequence is computed by itself, at the full price."""

    @property
    def statistics(self) -> ScoreStatistics: ...

    def score(self, groups: Sequence[Group]) -> list[tuple[FloatArray, ...]]:
        """Compute log p(completion token | prompt and the completion tokens before it).

        Returns:
            For each group one array a completion: float32, nats, one value a token. Where the
            engine failed, its length and values are arbitrary; stages.scorers.pairs checks them.
        Raises:
            DataError: the engine broke a promise that the values rest on.
        """
        ...

    def generate(self, prompts: Sequence[IntArray], *, max_new_tokens: int) -> list[IntArray]:
        """Continue prompts greedily, until the model ends its answer or the length runs out.

        Returns:
            For each prompt the new token ids, int32, with the one that ended it.
        """
        ...

    def close(self) -> None:
        """Free what the scorer holds. It cannot be used afterwards."""
        ...


def read_stop_token_ids(model_path: str) -> list[int]:
    """Read which tokens end an answer, as the model's folder says in either of two files."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_path, name)
        eos = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
    return sorted(found)
