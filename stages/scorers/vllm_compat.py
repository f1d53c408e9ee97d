"""Private parts of vLLM, and of Python's multiprocessing below it, that the vLLM scorer relies on.

Tested with vLLM 0.32. tests/stages/scorers/test_vllm_compat.py names each of them and fails when an
upgrade moves one.
"""

import contextlib
import gc
import inspect
import multiprocessing.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any


def block_size(engine: Any) -> int:
    """Tokens in a block of the prefix cache: vLLM may raise the one that was asked for."""
    size: int = engine.llm_engine.vllm_config.cache_config.block_size
    return size


def has_token_logprobs(engine: Any) -> bool:
    """Whether the engine runs Model Runner V2, which scores only the tokens that it is given.

    vLLM decides this by platform and architecture and has no public question for it.
    """
    return bool(engine.llm_engine.vllm_config.use_v2_model_runner)


def find_executor(engine: Any) -> Any:
    """Reach the executor of an engine that runs in this process.

    It holds the worker processes. The public API can neither tell that one was lost nor end them.
    """
    return engine.llm_engine.engine_core.engine_core.model_executor


def lost_process(engine: Any) -> bool:
    """Whether one of several worker processes has ended.

    The exception does not tell: it says "cancelled", "Executor failed" or something about a
    follower node.
    """
    return bool(find_executor(engine).is_failed)


def end_processes(engine: Any) -> None:
    """Kill the worker processes: one that waits for a lost one is told nothing."""
    if engine.llm_engine.vllm_config.parallel_config.world_size > 1:
        for worker in find_executor(engine).workers:
            worker.proc.kill()
            worker.proc.join()


def shut_down(engine: Any) -> None:
    """Stop an engine; LLM has no public method for it."""
    engine.llm_engine.engine_core.shutdown()
    end_processes(engine)
    del engine.llm_engine
    gc.collect()
    restore_transformers_classes()


def restore_transformers_classes() -> None:
    """Undo what vLLM did to classes of transformers.

    vLLM runs architectures that it lacks through transformers' own classes, and makes them read its
    configuration when they are built and called (vllm/compilation/decorators.py,
    _support_torch_compile). No other part of the process could build such a model any more.
    """
    from transformers import PreTrainedModel
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    for changed in TorchCompileWithNoGuardsWrapper.__subclasses__():
        if issubclass(changed, PreTrainedModel):
            changed.__init__ = inspect.getclosurevars(changed.__init__).nonlocals["old_init"]
            del changed.__call__
            changed.__bases__ = tuple(
                base for base in changed.__bases__ if base is not TorchCompileWithNoGuardsWrapper
            )


@contextlib.contextmanager
def kept_set_num_threads() -> Iterator[None]:
    """Restore torch.set_num_threads.

    vLLM's CPU worker replaces it, for all later users of torch in the process, with a function that
    does nothing (vllm/v1/worker/cpu_worker.py, skip_set_num_threads).
    """
    import torch

    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads


@contextlib.contextmanager
def socket_folder() -> Iterator[None]:
    """Keep the sockets of an engine's processes in a folder that is removed once they connect.

    vLLM leaves them behind when a process is killed, and nothing opens them by name any more.
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
    """Choose one folder a process: vLLM reads the variable only once."""
    return Path(tempfile.mkdtemp(prefix="vllm-"))


def unlink_names(engine: Any) -> None:
    """Remove the names of files and shared memory that the engine's processes have opened.

    With a name, they outlive a process that is killed (vllm-project/vllm#8933 and #51317 report
    such leaks); without one, the system frees them with the last process that has them open.
    """
    engine.collective_rpc(unlink_worker_names)
    if engine.llm_engine.vllm_config.parallel_config.world_size > 1:
        # vLLM freezes the garbage collector when it has started, which hides its objects from gc.
        queue = find_executor(engine).rpc_broadcast_mq
        unlink_shared_memory([queue.buffer, queue.tensor_arena])


def unlink_worker_names(worker: Any) -> None:
    """Remove the names that this worker process was found by; vLLM calls it in each of them."""
    Path(worker.distributed_init_method.removeprefix("file://")).unlink(missing_ok=True)
    # Set by the CPU worker for memory that its collectives share; vLLM never deletes it.
    if identity := os.environ.get("VLLM_DIST_IDENT"):
        for path in Path("/dev/shm").glob(f"{identity}-*"):
            path.unlink(missing_ok=True)
    if worker.parallel_config.world_size > 1:
        unlink_shared_memory(gc.get_objects())


def unlink_shared_memory(objects: Iterable[Any]) -> None:
    """Remove the names of this process's locks, and of the queues among some objects.

    Python's resource tracker would do so at exit, but Ray kills the tracker together with an actor.
    """
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
    from vllm.distributed.device_communicators.shm_tensor_arena import ShmTensorArena

    for held in objects:
        if type(held) in (ShmRingBuffer, ShmTensorArena) and held.is_creator:
            held.shared_memory.unlink()
            held.is_creator = False  # The creator unlinks at exit, which would now fail.
    registry = multiprocessing.util._finalizer_registry  # type: ignore[attr-defined]
    for finalizer in list(registry.values()):
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            finalizer()
