"""Canaries of the private parts that stages/scorers/vllm_compat.py uses, each by name."""

import importlib
import inspect
import multiprocessing.util
from multiprocessing.synchronize import SemLock

import pytest


def test_finalizer_registry_holds_the_cleanup_of_a_lock() -> None:
    """multiprocessing.util._finalizer_registry, Finalize._callback and SemLock._cleanup."""

    def count() -> int:
        registry = multiprocessing.util._finalizer_registry  # type: ignore[attr-defined]
        return sum(one._callback is SemLock._cleanup for one in registry.values())  # type: ignore[attr-defined]

    before = count()
    lock = multiprocessing.get_context("spawn").Lock()
    assert count() == before + 1
    del lock


SHM = "vllm.distributed.device_communicators"
EXECUTOR = "vllm.v1.executor.multiproc_executor"

PRIVATE_PARTS = [
    ("vllm.entrypoints.llm", "LLM.__init__", "self.llm_engine ="),
    ("vllm.v1.engine.llm_engine", "LLMEngine.__init__", "self.vllm_config ="),
    ("vllm.v1.engine.llm_engine", "LLMEngine.__init__", "self.engine_core ="),
    ("vllm.v1.engine.core_client", "InprocClient.__init__", "self.engine_core ="),
    ("vllm.v1.engine.core_client", "InprocClient.shutdown", "self.engine_core.shutdown()"),
    ("vllm.v1.engine.core", "EngineCore.__init__", "self.model_executor ="),
    (EXECUTOR, "MultiprocExecutor", "self.is_failed ="),
    (EXECUTOR, "MultiprocExecutor", "self.rpc_broadcast_mq ="),
    (EXECUTOR, "MultiprocExecutor", "self.workers ="),
    (EXECUTOR, "WorkerProcHandle", "proc: BaseProcess"),
    ("vllm.v1.worker.worker_base", "WorkerBase.__init__", "self.distributed_init_method ="),
    ("vllm.v1.worker.worker_base", "WorkerBase.__init__", "self.parallel_config ="),
    ("vllm.v1.worker.cpu_worker", "CPUWorker", "VLLM_DIST_IDENT"),
    ("vllm.v1.worker.cpu_worker", "CPUWorker", "torch.set_num_threads = skip_set_num_threads"),
    (f"{SHM}.shm_broadcast", "MessageQueue", "self.buffer ="),
    (f"{SHM}.shm_broadcast", "MessageQueue", "self.tensor_arena ="),
    (f"{SHM}.shm_broadcast", "ShmRingBuffer", "self.is_creator ="),
    (f"{SHM}.shm_broadcast", "ShmRingBuffer", "self.shared_memory ="),
    (f"{SHM}.shm_tensor_arena", "ShmTensorArena", "self.is_creator ="),
    (f"{SHM}.shm_tensor_arena", "ShmTensorArena", "self.shared_memory ="),
    ("vllm.compilation.decorators", "_support_torch_compile", "old_init = cls.__init__"),
    ("vllm.compilation.decorators", "_support_torch_compile", "cls.__call__ = __call__"),
    ("vllm.config.vllm", "VllmConfig", "def use_v2_model_runner"),
    ("vllm.config.parallel", "ParallelConfig", "world_size"),
    ("vllm.config.cache", "CacheConfig", "block_size:"),
]
"""Module, class or method, and a line of its source that defines what the scorer uses."""


@pytest.mark.vllm
@pytest.mark.parametrize(("module", "owner", "line"), PRIVATE_PARTS)
def test_vllm_still_defines(module: str, owner: str, line: str) -> None:
    found = importlib.import_module(module)
    for name in owner.split("."):
        found = getattr(found, name)
    assert line in inspect.getsource(found)


@pytest.mark.vllm
def test_vllm_still_reads_where_its_sockets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.envs import environment_variables

    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/here")
    assert environment_variables["VLLM_RPC_BASE_PATH"]() == "/here"
