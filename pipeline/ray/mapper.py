"""Mappers of shards: over Ray actors, or one after the other in this process."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from pipeline.ray.session import NodeCheck, open_session
from schemas.errors import ShardError, StageFailed
from schemas.manifest import ShardRecord
from stages.stage import MakeWorker, Resources, ShardMapper, ShardTask, ShardWorker, T
from stages.store.filesystems import Folder

logger = logging.getLogger(__name__)

_MAX_LOST_PROCESSES = 3
"""How often a shard is given to another process after its process was lost."""
_MAX_EQUAL_FAILURES = 10
"""Failures in a row with one cause after which a stage stops, because the rest would fail too."""
_MAX_LOST_STARTS = 20
"""How often a process may be lost before it has taken a shard, as on nodes that come and go."""
_POLL_SECONDS = 5.0
"""Seconds between checks for new nodes."""
_PATIENCE_SECONDS = 60.0
"""Seconds without any event after which the log says what the run waits for."""


@contextlib.contextmanager
def open_mapper(ray_address: str | None, *, is_local: bool, store: Folder) -> Iterator[ShardMapper]:
    """Open the mapper of a run; a cluster that is started for it ends with it.

    Raises:
        ConfigError: a node of the cluster does not reach the store.
    """
    if is_local:
        yield InProcessMapper()
        return
    with open_session(ray_address):
        nodes = NodeCheck(store)
        nodes.check_new()
        yield RayMapper(nodes)


@dataclass
class _Failures:
    """Decides whether failing shards end a stage after the others are done, or at once."""

    num_tasks: int
    num_slots: int
    causes: dict[str, str] = field(default_factory=dict)
    num_done: int = 0
    _in_a_row: list[str] = field(default_factory=list)

    def record_success(self) -> None:
        self.num_done += 1
        self._in_a_row.clear()

    def record_failure(self, shard: str, cause: str) -> None:
        """Record a shard that failed.

        Raises:
            StageFailed: what has failed so far shows that the rest would fail too.
        """
        logger.error("shard %s failed: %s", shard, cause)
        self.causes[shard] = cause
        self._in_a_row.append(cause)
        all_failed = self.num_done == 0 and len(self.causes) >= 2 * self.num_slots
        same = self._in_a_row[-_MAX_EQUAL_FAILURES:]
        if all_failed or (len(same) == _MAX_EQUAL_FAILURES and len(set(same)) == 1):
            raise StageFailed(self._message("Stopped early, because the rest would fail as well."))

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
    """Builds a worker when its first shard arrives, so that a failure to start is reported."""

    def __init__(self) -> None:
        self._make_worker: Callable[[], ShardWorker[Any]] | None = None
        self._worker: ShardWorker[Any] | None = None

    def take_over(self, make_worker: Callable[[], ShardWorker[Any]]) -> None:
        """Change to another kind of work, and drop the worker of the last one."""
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
    """Runs every shard in this process, one after the other, for tests, debugging and `--local`."""

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

    Only a task and a commit record travel, both small. A Python exception is not retried; a lost
    process is replaced, and its shard is given to another process at most three times. Only a
    process that has started gets a shard, so an actor for which the cluster has no room (a node was
    lost, or is still to come) delays nothing. Actors are kept for the next pass of their stage,
    because a process takes seconds to start; actors that hold a GPU are not.
    """

    def __init__(self, nodes: NodeCheck) -> None:
        self._nodes = nodes
        self._idle: list[Any] = []
        self._idle_resources: Resources | None = None

    def map(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        self._nodes.check_new()
        if resources != self._idle_resources:
            self.release()
            self._idle_resources = resources
        _RayPass(make_worker, tasks, resources, on_done, idle=self._idle).run()

    def release(self) -> None:
        """End the idle processes, which hold cores and memory."""
        import ray

        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()


class _RayPass(Generic[T]):
    """One pass of a RayMapper: starts actors, gives them shards, and replaces lost ones."""

    def __init__(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
        *,
        idle: list[Any],
    ) -> None:
        import ray

        self._ray = ray
        # Ray's memory monitor ends processes with an exception that is no RayActorError.
        self._lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
        self._make_worker, self._resources, self._on_done = make_worker, resources, on_done
        self._idle = idle
        self._actor_class = ray.remote(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        )(_WorkerHost)
        self._num_slots = min(resources.num_workers, len(tasks))
        self._failures = _Failures(num_tasks=len(tasks), num_slots=self._num_slots)
        self._waiting = deque(tasks)
        self._starting: dict[Any, Any] = {}
        """Starting actors, by the reference that resolves when one has started."""
        self._running: dict[Any, tuple[T, Any]] = {}
        """Shards and their actors, by the reference that resolves when the shard is done."""
        self._num_lost: dict[int, int] = {}
        """Number of lost processes, by the shard that they had."""
        self._num_lost_starts = 0
        self._last_poll = self._last_event = time.monotonic()

    def run(self) -> None:
        try:
            for _ in range(self._num_slots):
                self._start_actor()
            while self._waiting or self._running:
                done, _ = self._ray.wait([*self._running, *self._starting], timeout=_POLL_SECONDS)
                self._grow()
                if not done:
                    self._warn_if_stuck()
                    continue
                self._last_event = time.monotonic()
                if done[0] in self._starting:
                    self._take_started(done[0])
                else:
                    self._take_done(done[0])
        finally:
            for actor in [
                *self._starting.values(),
                *(actor for _, actor in self._running.values()),
            ]:
                self._ray.kill(actor)
        self._failures.raise_if_any()

    def _start_actor(self) -> None:
        actor: Any = self._idle.pop() if self._idle else self._actor_class.remote()
        self._starting[actor.take_over.remote(self._make_worker)] = actor

    def _give_next(self, actor: Any) -> None:
        """Send the next shard to an actor; keep or end the actor if none waits."""
        if self._waiting:
            task = self._waiting.popleft()
            self._running[actor.process.remote(task)] = (task, actor)
        elif self._resources.num_gpus:  # Others have work for the GPU.
            self._ray.kill(actor)
        else:
            self._idle.append(actor)

    def _grow(self) -> None:
        """Start more actors if nodes have joined since the last check."""
        now = time.monotonic()
        if not self._resources.may_grow or now - self._last_poll < _POLL_SECONDS:
            return
        self._last_poll = now
        num_useful = len(self._running) + len(self._waiting)
        wanted = min(_count_room(self._resources), num_useful) if self._waiting else 0
        for _ in range(wanted - len(self._running) - len(self._starting)):
            self._start_actor()

    def _warn_if_stuck(self) -> None:
        """Log what the run waits for when nothing has happened for long."""
        now = time.monotonic()
        if not self._running and now - self._last_event > _PATIENCE_SECONDS:
            self._last_event = now
            logger.warning("waiting for a node with room for %s", self._resources)

    def _take_started(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._lost as error:
            self._num_lost_starts += 1
            if self._num_lost_starts > _MAX_LOST_STARTS:
                raise StageFailed(
                    f"Its processes are lost as soon as they start: {error}"
                ) from error
            self._start_actor()
        else:
            self._give_next(actor)

    def _take_done(self, ref: Any) -> None:
        task, actor = self._running.pop(ref)
        try:
            record = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StageFailed):
                raise error.cause from error
            logger.debug("traceback of the failed shard", exc_info=error)
            self._failures.record_failure(task.description, str(error.cause))
        except self._lost as error:
            self._ray.kill(actor)
            self._give_again(task, error)
            return
        else:
            self._failures.record_success()
            self._on_done(record)
        self._give_next(actor)

    def _give_again(self, task: T, error: Exception) -> None:
        """Put back the shard of a lost process, and start another process in its place."""
        num_lost = self._num_lost[task.index] = self._num_lost.get(task.index, 0) + 1
        if num_lost > _MAX_LOST_PROCESSES:
            self._failures.record_failure(
                task.description, f"its process was lost four times: {error}"
            )
        else:
            logger.warning("the process of shard %s was lost", task.description)
            self._waiting.append(task)
        if self._waiting:
            self._start_actor()


def _count_room(resources: Resources) -> int:
    """Count how many such workers the present nodes could hold."""
    import ray

    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            amounts = [("CPU", resources.num_cpus), ("GPU", resources.num_gpus)]
            room += min(
                (
                    int(node["Resources"].get(name, 0) / amount)
                    for name, amount in amounts
                    if amount
                ),
                default=0,
            )
    return room
