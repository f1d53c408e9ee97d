"""How does vLLM give the log-probabilities of completion tokens, and only those?

The engine lives in this process. Every response to one prompt shares the prompt's prefill through
the prefix cache, which vLLM turns off for such requests, for a reason: positions that come from the
cache are never computed, and where the cached part reaches past the last prompt token, completion
tokens are among them. The V1 model runner then hands back uninitialised memory for them. So each
request is decided on before it is submitted, and its num_cached_tokens is checked afterwards.

V1 also runs the output layer, and a log_softmax over the vocabulary, for every token of a request
that asks for log-probabilities. So there the whole blocks of a prompt are submitted first, as a
request that asks for none: it fills the cache, and the completions read it. No token is computed
twice for that, and the output layer is left with the completions and the prompt's last block.
"""

import contextlib
import gc
import multiprocessing.util
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import DataError
from stages.policy.groups import Group, IntArray
from stages.policy.memory import keep_freed_memory, return_freed_memory
from stages.scorers.protocol import (
    FloatArray,
    ScorerSettings,
    ScoreStatistics,
    read_stop_token_ids,
)

GIB = 1 << 30
CPU_BLOCK_SIZE = 32
"""Tokens in a block of the cache: the fewest that CPU attention takes. The default is 128."""

ENVIRONMENT = {
    # The engine runs in this process: it starts in a fraction of the time, and cannot outlive it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # The threads stay where the scheduler, or Ray, puts them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # max_model_len is one more than the model may have positions for, and that one is never run.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # Anything less computes float32 products in a lower precision, which no fingerprint would see.
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with one completion, or the beginning of a prompt, which only fills the cache."""

    prompt_ids: IntArray
    completion_ids: IntArray
    """Empty where nothing is to be scored."""
    skips_cache: bool = False
    """Whether everything is to be computed."""

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
    """Give the requests that score groups, in the order of submission, to an empty cache.

    Args:
        groups: what is to be scored.
        block_size: tokens in a block of the cache.
        shares_prompts: whether the cache is read at all.
        fills_cache: whether a prompt's whole blocks are submitted before its completions. Its last
            token is never among them, for it predicts the first completion token: so they make no
            trap that the completions would not make.
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
    """Find the requests whose cached part could reach past their last prompt token.

    The cache holds every run of leading whole blocks of every request before. It is not enough to
    look at siblings: in conversations the prompt of one pair may begin with prompt and answer of
    another.

    Args:
        requests: in the order of submission, to an empty cache.
        block_size: tokens in a block of the cache.
    Returns:
        One a request: whether it must not read the cache.
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
    """Hash the first block, the first two, …. Equal hashes of unequal runs do no harm here."""
    content = token_ids.tobytes()
    num_bytes = block_size * token_ids.itemsize
    runs = []
    run = 0
    for start in range(0, len(content) - num_bytes + 1, num_bytes):
        run = hash((run, content[start : start + num_bytes]))
        runs.append(run)
    return runs


class VllmScorer:
    """A model in a vLLM engine."""

    def __init__(self, model_path: str, settings: ScorerSettings) -> None:
        self._settings = settings
        self._stop_token_ids = read_stop_token_ids(model_path)
        self._statistics = ScoreStatistics()
        self.shares_prompts = True
        self._llm = open_engine(model_path, settings)
        # Also when the scorer is dropped without close(), and before the interpreter ends.
        self._shut_down = weakref.finalize(self, shut_down, self._llm)
        config = self._llm.llm_engine.vllm_config
        self._block_size: int = config.cache_config.block_size
        self._gives_token_logprobs: bool = config.use_v2_model_runner

    @property
    def statistics(self) -> ScoreStatistics:
        return self._statistics

    def score(self, groups: Sequence[Group]) -> list[tuple[FloatArray, ...]]:
        requests = list(
            plan_requests(
                groups,
                block_size=self._block_size,
                shares_prompts=self.shares_prompts,
                fills_cache=not self._gives_token_logprobs,
            )
        )
        self._empty_cache()
        outputs = self._run(
            [request.token_ids for request in requests],
            [
                ask_for_completion(request, gives_token_logprobs=self._gives_token_logprobs)
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
        """Hand requests to the engine.

        Raises:
            RuntimeError: one of its processes was lost.
        """
        num_processes = self._settings.execution.tensor_parallel_size
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in token_ids]
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            # vLLM says "cancelled", "Executor failed" or something about a follower node.
            if num_processes == 1 or not find_executor(self._llm).is_failed:
                raise
            end_processes(self._llm)
            raise RuntimeError(
                f"One of the {num_processes} processes of vLLM's engine was lost: killed, or out "
                "of memory. Run again to go on."
            ) from error

    def _empty_cache(self) -> None:
        """Forget earlier calls: what they left decides which requests are traps."""
        if not self._llm.reset_prefix_cache():
            raise DataError("vLLM's prefix cache could not be emptied: a request is still running.")

    def _completion_logps(self, request: Request, output: Any) -> FloatArray:
        if self._gives_token_logprobs:
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
    """Start vLLM."""
    num_processes = settings.execution.tensor_parallel_size
    # Read when vLLM is imported, or when the engine starts.
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)

    import torch
    from vllm import LLM
    from vllm.platforms import current_platform

    set_num_threads = torch.set_num_threads
    set_num_threads(settings.num_threads)
    if current_platform.is_cpu():
        keep_freed_memory()
        device_settings: dict[str, Any] = {
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int(settings.execution.kv_cache_gib * GIB),
        }
    else:
        device_settings = {"gpu_memory_utilization": settings.execution.gpu_memory_fraction}
    max_tokens = settings.execution.max_tokens_per_batch
    with socket_folder():
        engine = LLM(
            model=model_path,
            # Left to itself, vLLM would prefer params.json and consolidated*.safetensors, which are
            # not what was pinned.
            config_format="hf",
            load_format="safetensors",
            dtype=settings.dtype,
            # A sequence of exactly max_model_len tokens is refused.
            max_model_len=settings.max_length + 1,
            max_num_batched_tokens=4096 if max_tokens == "auto" else max_tokens,
            tensor_parallel_size=num_processes,
            # Left to itself, vLLM would choose Ray inside a placement group.
            distributed_executor_backend="uni" if num_processes == 1 else "mp",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            generation_config="vllm",
            use_tqdm_on_load=False,
            seed=0,
            **device_settings,
        )
        engine.collective_rpc(unlink_meeting_places)
        if num_processes > 1:
            # vLLM hides from the garbage collector what it has when it has started.
            queue = find_executor(engine).rpc_broadcast_mq
            unlink_shared_memory([queue.buffer, queue.tensor_arena])
    # On a CPU vLLM replaces it by a function that does nothing, for every later user of torch.
    torch.set_num_threads = set_num_threads
    return engine


@contextlib.contextmanager
def socket_folder() -> Iterator[None]:
    """Have the sockets of an engine's processes in a folder that is there until they are connected.

    vLLM deletes them only where nothing is killed, and nothing looks for them by name any more.
    """
    folder = _choose_socket_folder()
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)


@cache
def _choose_socket_folder() -> Path:
    """Choose it once: vLLM reads once a process where it is."""
    return Path(tempfile.mkdtemp(prefix="vllm-"))


def unlink_meeting_places(worker: Any) -> None:
    """Take their names from what an engine's processes found each other by; called in each.

    That is a file, and memory that they share. All have them open by now, and with a name they
    would outlive a process that is killed.
    """
    Path(worker.distributed_init_method.removeprefix("file://")).unlink(missing_ok=True)
    if identity := os.environ.get("VLLM_DIST_IDENT"):  # On a CPU; vLLM never deletes it.
        for path in Path("/dev/shm").glob(f"{identity}-*"):
            path.unlink(missing_ok=True)
    if worker.parallel_config.world_size > 1:
        unlink_shared_memory(gc.get_objects())


def unlink_shared_memory(objects: Iterable[Any]) -> None:
    """Take their names from this process's locks, and from the queues among some objects.

    Python's resource tracker would see to it, but Ray kills that together with an actor.
    """
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
    from vllm.distributed.device_communicators.shm_tensor_arena import ShmTensorArena

    for held in objects:
        if type(held) in (ShmRingBuffer, ShmTensorArena) and held.is_creator:
            held.shared_memory.unlink()
            held.is_creator = False  # Who made it unlinks it in the end, which is done.
    registry = multiprocessing.util._finalizer_registry  # type: ignore[attr-defined]
    for finalizer in list(registry.values()):
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            finalizer()


def ask_for_completion(request: Request, *, gives_token_logprobs: bool) -> Any:
    """Ask for the log-probabilities of completion tokens, if there are any.

    One token is generated, because vLLM insists on it, and ignored.

    Args:
        request: what is to be scored.
        gives_token_logprobs: whether the engine has Model Runner V2, which runs the output layer
            for completion tokens only; V1 does so for all that it computes.
    """
    from vllm import SamplingParams

    if not request.is_scored:
        wanted: dict[str, Any] = {}
    elif gives_token_logprobs:
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
    """Stop an engine and free its memory."""
    engine.llm_engine.engine_core.shutdown()
    end_processes(engine)
    del engine.llm_engine
    gc.collect()
    return_freed_memory()


def find_executor(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.model_executor


def end_processes(engine: Any) -> None:
    """Kill what is left of an engine's processes: one that waits for a lost one hears nothing."""
    if engine.llm_engine.vllm_config.parallel_config.world_size > 1:
        for worker in find_executor(engine).workers:
            worker.proc.kill()
            worker.proc.join()


def check_cached_tokens(request: Request, num_cached_tokens: int | None) -> None:
    """Make sure that every completion token was computed for this request.

    Raises:
        DataError: the values of some were never computed.
    """
    num_prompt_tokens = len(request.prompt_ids)
    if not request.is_scored:
        return
    if num_cached_tokens is None or num_cached_tokens > num_prompt_tokens - 1:
        raise DataError(
            f"vLLM took {num_cached_tokens} tokens of a sequence from its prefix cache, but its "
            f"prompt has {num_prompt_tokens}: values of completion tokens would not have been "
            "computed. This vLLM caches otherwise than the tested one; set stages.score.backend "
            "to transformers, or install the pinned vLLM."
        )


def rows_of_completion(scores: np.ndarray | None) -> FloatArray:
    """Take the values that Model Runner V2 gives; None is how it says that it has none."""
    if scores is None:
        return np.empty(0, np.float32)
    return np.ascontiguousarray(scores[:, 0], dtype=np.float32)


def end_of_prompt(request: Request, prompt_logprobs: Any) -> FloatArray:
    """Cut the completion's values from the sequence's, which has one a token after the first.

    Raises:
        DataError: the values are of other tokens.
    """
    num_tokens = len(request.completion_ids)
    if prompt_logprobs is None:
        return np.empty(0, np.float32)
    token_ids = np.asarray(prompt_logprobs.token_ids[-num_tokens:])
    if not np.array_equal(token_ids, request.completion_ids):
        raise DataError("vLLM gave log-probabilities of other tokens than those submitted.")
    return np.asarray(prompt_logprobs.logprobs[-num_tokens:], dtype=np.float32)
