"""Log-probabilities of completion tokens, and of no others, from a vLLM engine in this process.

All completions of one prompt share its prefill through the prefix cache. By default vLLM does not
read that cache for requests with log-probabilities, because positions that come from it are never
computed. Where the cached part reaches past the last prompt token, completion tokens are among
them, and the V1 model runner returns uninitialised memory for those (vllm-project/vllm#42019). So
`find_cache_traps` decides before submission which requests must not read the cache, and
`check_cached_tokens` checks `num_cached_tokens` of every answer.

V1 also runs the output layer, and a log_softmax over the vocabulary, for every token of a request
with log-probabilities. So a prompt's whole blocks are submitted first, as a request without them,
which fills the cache for the completions. No token is computed twice, and the output layer runs
only for the completions and the prompt's last block.
"""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from schemas.errors import DataError
from stages.policy.groups import Group, IntArray
from stages.policy.memory import keep_freed_memory, return_freed_memory
from stages.scorers import vllm_compat
from stages.scorers.protocol import (
    FloatArray,
    ScorerSettings,
    ScoreStatistics,
    read_stop_token_ids,
)

GIB = 1 << 30
CPU_BLOCK_SIZE = 32
"""Tokens in a block of the prefix cache: the fewest that CPU attention takes. vLLM's own is 128."""

MAX_TOKENS_PER_BATCH = {"cpu": 4096, "gpu": 16384}
"""Most tokens of all requests that the engine computes at once, unless the recipe says."""

ENVIRONMENT = {
    # The engine runs in this process: it starts in a fraction of the time and cannot outlive it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # The threads stay where the scheduler, or Ray, puts them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # max_model_len is one more than max_length, which may be all positions of the model. The
    # additional position is never computed.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # Lower settings compute float32 products in a lower precision that no fingerprint records.
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with one completion, or the beginning of a prompt that only fills the cache."""

    prompt_ids: IntArray
    completion_ids: IntArray
    """Empty in a request that only fills the cache."""
    skips_cache: bool = False
    """Whether all tokens are computed, whatever the cache holds."""

    @property
    def token_ids(self) -> IntArray:
        return np.concatenate([self.prompt_ids, self.completion_ids]).astype(np.int32, copy=False)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def is_scored(self) -> bool:
        return len(self.completion_ids) > 0


def plan_requests(
    groups: Sequence[Group], *, block_size: int, shares_prompts: bool, fills_cache: bool
) -> Iterator[Request]:
    """List the requests that score groups, in the order in which an empty cache receives them.

    Args:
        groups: prompts with their completions.
        block_size: tokens in a block of the cache.
        shares_prompts: whether requests read the cache.
        fills_cache: whether a prompt's whole blocks are submitted before its completions. They
            never hold its last token, which predicts the first completion token, so they add no
            trap to those of the completions.
    """
    scored = [
        Request(prompt_ids=single.prompt_ids, completion_ids=single.completions[0])
        for group in groups
        for single in group.split()
    ]
    if not shares_prompts:
        yield from (replace(request, skips_cache=True) for request in scored)
        return
    decided = (
        replace(request, skips_cache=is_trapped)
        for request, is_trapped in zip(
            scored, find_cache_traps(scored, block_size=block_size), strict=True
        )
    )
    for group in groups:
        siblings = [next(decided) for _ in group.completions]
        num_leading = (len(group.prompt_ids) - 1) // block_size * block_size
        if fills_cache and num_leading and not all(request.skips_cache for request in siblings):
            yield Request(
                prompt_ids=group.prompt_ids[:num_leading], completion_ids=np.empty(0, np.int32)
            )
        yield from siblings


def find_cache_traps(requests: Iterable[Request], *, block_size: int) -> list[bool]:
    """Find the requests for which the cache could hold their last prompt token or more.

    The cache holds every run of leading whole blocks of all earlier requests. Siblings are not the
    only ones that matter: in conversations, the prompt of one pair may begin with the prompt and
    the answer of another.

    Args:
        requests: in the order in which an empty cache receives them.
        block_size: tokens in a block of the cache.
    Returns:
        One value a request: whether it must not read the cache.
    """
    cached_runs: set[int] = set()
    is_trapped = []
    for request in requests:
        runs = hash_leading_blocks(request.token_ids, block_size)
        # The fewest whole blocks that reach past the last prompt token.
        num_blocks = -(-len(request.prompt_ids) // block_size)
        is_trapped.append(num_blocks <= len(runs) and runs[num_blocks - 1] in cached_runs)
        cached_runs.update(runs)
    return is_trapped


def hash_leading_blocks(token_ids: IntArray, block_size: int) -> list[int]:
    """Hash the first block, the first two blocks and so on; a collision costs only time."""
    content = token_ids.tobytes()
    num_bytes = block_size * token_ids.itemsize
    runs = []
    run = 0
    for start in range(0, len(content) - num_bytes + 1, num_bytes):
        run = hash((run, content[start : start + num_bytes]))
        runs.append(run)
    return runs


class VllmScorer:
    """A frozen model in a vLLM engine."""

    def __init__(self, model_path: str, settings: ScorerSettings) -> None:
        self._settings = settings
        self._stop_token_ids = read_stop_token_ids(model_path)
        self._statistics = ScoreStatistics()
        self.shares_prompts = True
        self._llm = open_engine(model_path, settings)
        # Runs also when the scorer is dropped without close(), and before the interpreter ends.
        self._shut_down = weakref.finalize(self, shut_down, self._llm)
        self._block_size = vllm_compat.block_size(self._llm)
        self._has_token_logprobs = vllm_compat.has_token_logprobs(self._llm)

    @property
    def statistics(self) -> ScoreStatistics:
        return self._statistics

    def score(
        self, groups: Sequence[Group], *, in_one_batch: bool = False
    ) -> list[tuple[FloatArray, ...]]:
        # vLLM schedules all requests of a call together anyway.
        requests = list(
            plan_requests(
                groups,
                block_size=self._block_size,
                shares_prompts=self.shares_prompts,
                fills_cache=not self._has_token_logprobs,
            )
        )
        self._empty_cache()
        outputs = self._run(
            [request.token_ids for request in requests],
            [
                sampling_params(request, has_token_logprobs=self._has_token_logprobs)
                for request in requests
            ],
        )
        for request, output in zip(requests, outputs, strict=True):
            check_cached_tokens(request, output.num_cached_tokens)
        self._count(requests, [output.num_cached_tokens for output in outputs])
        logps = (
            self._completion_logps(request, output)
            for request, output in zip(requests, outputs, strict=True)
            if request.is_scored
        )
        return [tuple(next(logps) for _ in group.completions) for group in groups]

    def generate(self, prompts: Sequence[IntArray], *, max_new_tokens: int) -> list[IntArray]:
        from vllm import SamplingParams

        if not prompts:
            return []
        self._empty_cache()
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=min(max_new_tokens, self._settings.max_length + 1 - len(prompt_ids)),
                stop_token_ids=self._stop_token_ids,
                detokenize=False,
            )
            for prompt_ids in prompts
        ]
        outputs = self._run(prompts, params)
        return [np.asarray(output.outputs[0].token_ids, dtype=np.int32) for output in outputs]

    def close(self) -> None:
        del self._llm
        self._shut_down()

    def _run(self, token_ids: Sequence[IntArray], params: Sequence[Any]) -> Any:
        """Run requests through the engine.

        Raises:
            RuntimeError: one of several processes of the engine has ended.
        """
        num_processes = self._settings.execution.tensor_parallel_size
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in token_ids]
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            if num_processes == 1 or not vllm_compat.lost_process(self._llm):
                raise
            vllm_compat.end_processes(self._llm)
            raise RuntimeError(
                f"One of the {num_processes} processes of vLLM's engine was lost: killed, or out "
                "of memory. Run again to go on."
            ) from error

    def _empty_cache(self) -> None:
        """Empty the prefix cache: `find_cache_traps` knows only the requests of one call."""
        if not self._llm.reset_prefix_cache():
            raise DataError("vLLM's prefix cache could not be emptied: a request is still running.")

    def _completion_logps(self, request: Request, output: Any) -> FloatArray:
        if self._has_token_logprobs:
            return rows_of_completion(output.prompt_token_id_logprobs)
        return end_of_prompt(request, output.prompt_logprobs)

    def _count(self, requests: Sequence[Request], num_cached_tokens: Sequence[int]) -> None:
        num_tokens = sum(request.num_tokens for request in requests)
        num_scored = sum(request.num_tokens for request in requests if request.is_scored)
        done = self._statistics
        self._statistics = ScoreStatistics(
            num_tokens_submitted=done.num_tokens_submitted + num_scored,
            num_tokens_computed=done.num_tokens_computed + num_tokens - sum(num_cached_tokens),
        )


def open_engine(model_path: str, settings: ScorerSettings) -> Any:
    """Start a vLLM engine."""
    # vLLM reads these when it is imported, or when the engine starts.
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)

    import torch
    from vllm import LLM
    from vllm.platforms import current_platform

    torch.set_num_threads(settings.num_threads)
    is_cpu = current_platform.is_cpu()
    if is_cpu:
        keep_freed_memory()
    with vllm_compat.kept_set_num_threads(), vllm_compat.socket_folder():
        engine = LLM(**engine_arguments(model_path, settings, is_cpu=is_cpu))
        vllm_compat.unlink_names(engine)
    return engine


def engine_arguments(model_path: str, settings: ScorerSettings, *, is_cpu: bool) -> dict[str, Any]:
    """Build the arguments of vllm.LLM."""
    num_processes = settings.execution.tensor_parallel_size
    max_tokens = settings.execution.max_tokens_per_batch
    if is_cpu:
        device_arguments: dict[str, Any] = {
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int(settings.execution.kv_cache_gib * GIB),
        }
    else:
        device_arguments = {"gpu_memory_utilization": settings.execution.gpu_memory_fraction}
    return {
        "model": model_path,
        # By default vLLM prefers params.json and consolidated*.safetensors, which are not the files
        # that were pinned.
        "config_format": "hf",
        "load_format": "safetensors",
        "dtype": settings.dtype,
        # vLLM refuses a sequence of exactly max_model_len tokens.
        "max_model_len": settings.max_length + 1,
        "max_num_batched_tokens": MAX_TOKENS_PER_BATCH["cpu" if is_cpu else "gpu"]
        if max_tokens == "auto"
        else max_tokens,
        "tensor_parallel_size": num_processes,
        # By default vLLM chooses Ray inside a placement group.
        "distributed_executor_backend": "uni" if num_processes == 1 else "mp",
        "enable_prefix_caching": True,
        # Compiling and capturing graphs takes a minute at each start. Graphs serve decoding, and
        # scoring only prefills.
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "seed": 0,
        **device_arguments,
    }


def sampling_params(request: Request, *, has_token_logprobs: bool) -> Any:
    """Build the SamplingParams that return the log-probabilities of a request's completion tokens.

    vLLM must generate at least one token, which is ignored.

    Args:
        request: a prompt with or without a completion.
        has_token_logprobs: whether the engine runs Model Runner V2, which applies the output layer
            to completion tokens only. V1 applies it to every token that it computes.
    """
    from vllm import SamplingParams

    if not request.is_scored:
        wanted: dict[str, Any] = {}
    elif has_token_logprobs:
        # Row i scores its ids as predictions of token prompt_logprob_start + i + 1.
        wanted = {
            "prompt_logprob_token_ids": request.completion_ids[:, None],
            "prompt_logprob_start": len(request.prompt_ids) - 1,
        }
    else:
        wanted = {"prompt_logprobs": 0, "flat_logprobs": True}
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        skip_reading_prefix_cache=request.skips_cache,
        **wanted,
    )


def shut_down(engine: Any) -> None:
    """Stop an engine and return its memory to the system."""
    vllm_compat.shut_down(engine)
    return_freed_memory()


def check_cached_tokens(request: Request, num_cached_tokens: int | None) -> None:
    """Check that the cache held no position that predicts a completion token.

    Raises:
        DataError: it did, or vLLM does not tell, so values of completion tokens may be missing.
    """
    num_prompt_tokens = len(request.prompt_ids)
    if not request.is_scored:
        return
    if num_cached_tokens is None or num_cached_tokens > num_prompt_tokens - 1:
        raise DataError(
            f"vLLM took {num_cached_tokens} tokens of a sequence from its prefix cache, but its "
            f"prompt has {num_prompt_tokens}: values of completion tokens would not have been "
            "computed. This vLLM caches differently from the tested one; set stages.score.backend "
            "to transformers, or install the pinned vLLM."
        )


def rows_of_completion(scores: np.ndarray | None) -> FloatArray:
    """Read the values of Model Runner V2; None means that no values were returned."""
    if scores is None:
        return np.empty(0, np.float32)
    return np.ascontiguousarray(scores[:, 0], dtype=np.float32)


def end_of_prompt(request: Request, prompt_logprobs: Any) -> FloatArray:
    """Take the last values of a sequence, which are those of its completion.

    Raises:
        DataError: the values belong to other tokens.
    """
    num_tokens = len(request.completion_ids)
    if prompt_logprobs is None:
        return np.empty(0, np.float32)
    token_ids = np.asarray(prompt_logprobs.token_ids[-num_tokens:])
    if not np.array_equal(token_ids, request.completion_ids):
        raise DataError("vLLM returned log-probabilities of other tokens than those submitted.")
    return np.asarray(prompt_logprobs.logprobs[-num_tokens:], dtype=np.float32)
