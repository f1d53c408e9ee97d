"""Where the work runs: the one `ray.init`, and the mapper over Ray actors or in this process."""

import contextlib
import logging
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import ShardError, StageFailed
from schemas.manifest import ShardRecord
from stages.base import Execution, MakeWorker, Resources, ShardMapper, ShardTask, ShardWorker, T

logger = logging.getLogger(__name__)

_CHECKOUT = Path(__file__).resolve().parent.parent
_MAX_LOST_PROCESSES = 3
"""How often a shard is given to another process after the one that had it was lost."""
_MAX_EQUAL_FAILURES = 10
"""So many failures in a row with one cause mean that the rest would fail too."""
_OBJECT_STORE_BYTES = 200 << 20
"""Only small records travel through it, so a laptop's cluster gets little more than the minimum."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a machine or cluster has."""

    num_cpus: int
    num_gpus: int
    num_cpus_per_node: int


def find_capacity(ray_address: str | None, *, is_local: bool) -> Capacity:
    """Count CPU cores and GPUs of the cluster to be used, or of this machine.

    A cluster is connected to for it; this machine is looked at without starting Ray.
    """
    if ray_address is None or is_local:
        num_cpus = len(os.sched_getaffinity(0))
        return Capacity(num_cpus=num_cpus, num_gpus=_count_gpus(), num_cpus_per_node=num_cpus)
    import ray

    _connect(ray_address)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        num_gpus=int(sum(node.get("GPU", 0) for node in nodes)),
        num_cpus_per_node=int(max(node.get("CPU", 0) for node in nodes)),
    )


def resolve_resources(execution: Execution, capacity: Capacity) -> Resources:
    """Replace every `auto` of an execution block by what the machines have."""
    num_gpus = execution.num_gpus_per_worker
    if num_gpus == "auto":
        num_gpus = 1 if capacity.num_gpus else 0
    num_cpus = execution.num_cpus_per_worker
    if num_cpus == "auto":
        num_cpus = 1 if num_gpus else capacity.num_cpus_per_node
    if execution.num_workers == "auto":
        room = capacity.num_gpus / num_gpus if num_gpus else capacity.num_cpus / max(num_cpus, 0.01)
        num_workers = max(1, int(room))
    else:
        num_workers = execution.num_workers
    return Resources(num_workers=num_workers, num_cpus=num_cpus, num_gpus=num_gpus)


@contextlib.contextmanager
def open_mapper(ray_address: str | None, *, is_local: bool) -> Iterator[ShardMapper]:
    """Give the mapper of a run; a cluster that is started for it ends with it."""
    if is_local:
        yield InProcessMapper()
        return
    import ray

    was_running = ray.is_initialized()
    _connect(ray_address)
    try:
        yield RayMapper()
    finally:
        if not was_running:
            ray.shutdown()


def _connect(ray_address: str | None) -> None:
    """Connect to the cluster at an address, or start one on this machine; twice is fine."""
    import ray

    if ray.is_initialized():
        return
    if ray_address is not None:
        inside_job = "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        modules = [str(_CHECKOUT / name) for name in ("pipeline", "stages", "schemas")]
        ray.init(
            address=ray_address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # A job's submitter has already brought the checkout as its working directory.
            runtime_env=None if inside_job else {"py_modules": modules},
        )
        return
    # Only for a cluster that we start: whoever runs a shared one has decided about it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The warning that accelerators will once be hidden from workers that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
    )


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(_CHECKOUT), *([inherited] if inherited else [])])


def _count_gpus() -> int:
    """Count this machine's NVIDIA GPUs as its driver sees them, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


@dataclass
class _Failures:
    """Decides when failing shards end a stage: after the others, or at once."""

    num_tasks: int
    num_slots: int
    causes: dict[str, str] = field(default_factory=dict)
    num_done: int = 0
    _in_a_row: list[str] = field(default_factory=list)

    def record_success(self) -> None:
        self.num_done += 1
        self._in_a_row.clear()

    def record_failure(self, shard: str, cause: str) -> None:
        """Note a shard that failed.

        Raises:
            StageFailed: what has failed so far shows that the rest would fail too.
        """
        logger.error("shard %s failed: %s", shard, cause)
        self.causes[shard] = cause
        self._in_a_row.append(cause)
        all_failed = self.num_done == 0 and len(self.causes) >= 2 * self.num_slots
        same = self._in_a_row[-_MAX_EQUAL_FAILURES:]
        if all_failed or (len(same) == _MAX_EQUAL_FAILURES and len(set(same)) == 1):
            raise StageFailed(self._message("Stopped early, for the rest would fail as well."))

    def raise_if_any(self) -> None:
        if self.causes:
            raise StageFailed(self._message("The other shards are done; run again to redo these."))

    def _message(self, advice: str) -> str:
        lines = [f"{len(self.causes)} of {self.num_tasks} shards failed. {advice}"]
        lines += [f"  {shard}: {cause}" for shard, cause in list(self.causes.items())[:5]]
        if len(self.causes) > 5:
            lines.append(f"  … and {len(self.causes) - 5} more")
        return "\n".join(lines)


class _WorkerHost:
    """Builds a worker when its first shard arrives, so that its failure has a cause to report."""

    def __init__(self) -> None:
        self._make_worker: Callable[[], ShardWorker[Any]] | None = None
        self._worker: ShardWorker[Any] | None = None

    def take_over(self, make_worker: Callable[[], ShardWorker[Any]]) -> None:
        """Change to another kind of work; what the last one held is let go."""
        self._make_worker, self._worker = make_worker, None

    def process(self, task: ShardTask) -> ShardRecord:
        if self._worker is None:
            assert self._make_worker is not None, "take_over comes first"
            try:
                self._worker = self._make_worker()
            except Exception as error:
                raise StageFailed(f"The worker cannot start: {_name_cause(error)}") from error
        try:
            return self._worker(task)
        except Exception as error:
            raise ShardError(_name_cause(error)) from error


def _name_cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class InProcessMapper:
    """Runs every shard in this process, one after the other: for tests, debugging, `--local`."""

    def map(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        failures = _Failures(num_tasks=len(tasks), num_slots=1)
        host = _WorkerHost()
        host.take_over(make_worker)
        for task in tasks:
            try:
                record = host.process(task)
            except ShardError as error:
                logger.debug("traceback of the failed shard", exc_info=error)
                failures.record_failure(task.description, str(error))
                continue
            failures.record_success()
            on_done(record)
        failures.raise_if_any()

    def release(self) -> None:
        """Nothing is kept between passes."""


class RayMapper:
    """Runs shards on a pool of Ray actors, one shard in flight on each.

    What travels is a task and a commit record, both small. A Python exception is not retried; a
    lost process is replaced, and its shard given to another at most three times. Actors wait for
    the next pass of their stage, because a process takes seconds to start.
    """

    def __init__(self) -> None:
        self._idle: list[Any] = []
        self._idle_resources: Resources | None = None

    def map(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        import ray

        num_slots = min(resources.num_workers, len(tasks))
        actor_class = ray.remote(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        )(_WorkerHost)
        if resources != self._idle_resources:
            self.release()
            self._idle_resources = resources
        failures = _Failures(num_tasks=len(tasks), num_slots=num_slots)
        waiting = deque(tasks)
        num_lost: dict[int, int] = {}
        running: dict[Any, tuple[T, Any]] = {}

        def start_actor() -> Any:
            actor: Any = self._idle.pop() if self._idle else actor_class.remote()
            actor.take_over.remote(make_worker)
            return actor

        def start_on(actor: Any) -> None:
            if waiting:
                task = waiting.popleft()
                running[actor.process.remote(task)] = (task, actor)
            else:
                self._idle.append(actor)

        try:
            for _ in range(num_slots):
                start_on(start_actor())
            while running:
                [done], _ = ray.wait(list(running), num_returns=1)
                task, actor = running.pop(done)
                try:
                    record = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, StageFailed):
                        raise error.cause from error
                    logger.debug("traceback of the failed shard", exc_info=error)
                    failures.record_failure(task.description, str(error.cause))
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                    num_lost[task.index] = num_lost.get(task.index, 0) + 1
                    ray.kill(actor)
                    actor = start_actor()
                    if num_lost[task.index] > _MAX_LOST_PROCESSES:
                        failures.record_failure(
                            task.description, f"its process was lost four times: {error}"
                        )
                    else:
                        logger.warning("the process of shard %s was lost", task.description)
                        waiting.append(task)
                else:
                    failures.record_success()
                    on_done(record)
                start_on(actor)
        finally:
            for _, actor in running.values():
                ray.kill(actor)
        failures.raise_if_any()

    def release(self) -> None:
        """End the processes that wait, so that they hold neither cores nor memory."""
        import ray

        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()
