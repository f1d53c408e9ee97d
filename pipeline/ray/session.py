"""Where the work runs: the one `ray.init`, and the mapper over Ray actors or in this process."""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from pipeline.provenance import host_name, package_versions
from schemas.errors import ConfigError, ShardError, StageFailed
from schemas.manifest import ShardRecord
from stages.stage import Execution, MakeWorker, Resources, ShardMapper, ShardTask, ShardWorker, T
from stages.store.filesystems import Folder

logger = logging.getLogger(__name__)

_CHECKOUT = Path(__file__).resolve().parents[2]
_MAX_LOST_PROCESSES = 3
"""How often a shard is given to another process after the one that had it was lost."""
_MAX_EQUAL_FAILURES = 10
"""So many failures in a row with one cause mean that the rest would fail too."""
_MAX_LOST_STARTS = 20
"""How often a process may be lost before it could take a shard, as on nodes that come and go."""
_LOOK_SECONDS = 5.0
"""How often is looked whether the cluster has grown."""
_PATIENCE_SECONDS = 60.0
"""How long nothing may happen before is said what the run waits for."""
_PROBE = ".seen-by-all-nodes-"
_SESSION_PREFIX = "offline-dpo-ray-"
_SESSION_LOCK = "lock"
_LONGEST_BASE = 15
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
    return Resources(
        num_workers=num_workers,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        may_grow=execution.num_workers == "auto",
    )


@contextlib.contextmanager
def open_mapper(ray_address: str | None, *, is_local: bool, store: Folder) -> Iterator[ShardMapper]:
    """Give the mapper of a run; a cluster that is started for it ends with it.

    Raises:
        ConfigError: a node of the cluster does not reach the store.
    """
    if is_local:
        yield InProcessMapper()
        return
    if ray_address is None:
        _lock_services()
    import ray

    was_running = ray.is_initialized()
    _connect(ray_address)
    nodes = NodeCheck(store)
    try:
        nodes.look()
        yield RayMapper(nodes)
    finally:
        if not was_running:
            ray.shutdown()
            _close_session()


def _connect(ray_address: str | None) -> None:
    """Connect to the cluster at an address, or start one on this machine; twice is fine."""
    import ray

    if ray.is_initialized():
        return
    if ray_address is not None:
        modules = [str(_CHECKOUT / name) for name in ("pipeline", "stages", "schemas")]
        with _signals_as_before():
            ray.init(
                address=ray_address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if _submitter_brought_checkout() else {"py_modules": modules},
            )
        return
    # Only for a cluster that we start: whoever runs a shared one has decided about it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The warning that accelerators will once be hidden from workers that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _signals_as_before():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
            _temp_dir=_open_session(),
        )


def _lock_services() -> None:
    """Let only who has this run's token talk to the services of a cluster that we start.

    They listen on every interface, and whoever may talk to them can run code. Ray reads these when
    it is imported.
    """
    if "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _submitter_brought_checkout() -> bool:
    """Say whether `ray job submit --working-dir` started this process: workers then have it all."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return bool(job.get("runtime_env", {}).get("working_dir"))


@contextlib.contextmanager
def _signals_as_before() -> Iterator[None]:
    """Keep ray.init from deciding what SIGTERM means."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


_session = contextlib.ExitStack()
"""Deletes the folder of the cluster that this process started."""


def _open_session() -> str:
    """Make the folder for a cluster's sockets and logs, and delete those that were left behind.

    A lock that dies with its process tells which belong to nobody: those of killed runs.
    """
    # Ray puts sockets below it, whose paths have at most 107 bytes.
    base = tempfile.gettempdir()
    base = base if len(base) <= _LONGEST_BASE else "/tmp"
    for left in Path(base).glob(f"{_SESSION_PREFIX}*"):
        with contextlib.suppress(OSError), open(left / _SESSION_LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=_SESSION_PREFIX, dir=base)
    held = os.open(f"{folder}/{_SESSION_LOCK}", os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    _session.callback(os.close, held)
    _session.callback(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(_close_session)
    return folder


def _close_session() -> None:
    _session.close()


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


class NodeCheck:
    """Looks, once on each node, whether it reaches the store and has our versions."""

    def __init__(self, store: Folder) -> None:
        self._store = store
        self._known: set[str] = set()

    def look(self) -> None:
        """Look at the nodes that have joined since the last call.

        Raises:
            ConfigError: a node does not see what this process writes to the store.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {
            node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]
        }
        if len(nodes) == 1:
            return  # This process's own.
        name = f"{_PROBE}{uuid.uuid4().hex}"
        self._store.create()
        self._store.write_bytes(name, name.encode())
        look = ray.remote(num_cpus=0, max_retries=0)(look_around)
        found = {
            node: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            ).remote(self._store, name)
            for node in nodes.keys() - self._known
        }
        try:
            for node, ref in found.items():
                try:
                    self._judge(nodes[node], ray.get(ref, timeout=_PATIENCE_SECONDS), node)
                except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                    logger.warning("node %s left before it was looked at", nodes[node])
        finally:
            for base in self._store.list_files():
                if base.startswith(name):
                    self._store.delete_file(base)

    def _judge(self, address: str, view: "NodeView", node: str) -> None:
        if view.trouble is not None:
            raise ConfigError(
                f"Node {address} ({view.host}) does not reach the store {self._store.uri}: "
                f"{view.trouble}. With several nodes the store must be a folder that all of them "
                "share, or a URI such as s3://bucket/store for which each of them has credentials."
            )
        ours = package_versions()
        different = [
            f"{package} {view.versions.get(package, 'absent')} (here {ours.get(package, 'absent')})"
            for package in sorted(ours.keys() | view.versions.keys())
            if view.versions.get(package) != ours.get(package)
        ]
        if different:
            logger.warning(
                "node %s (%s) has other versions: %s. Numbers may depend on who computes them.",
                address,
                view.host,
                ", ".join(different),
            )
        self._known.add(node)


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """What a node sees."""

    host: str
    versions: dict[str, str]
    trouble: str | None
    """Why it does not share the store; None if it does."""


def look_around(store: Folder, name: str) -> NodeView:
    """Say what is seen from here: versions, and whether the store is the one with this file."""
    trouble = None
    try:
        if not store.exists(name):
            trouble = "what the driver writes there is not seen there"
        else:
            store.write_bytes(f"{name}.{uuid.uuid4().hex}", b"")
    except OSError as error:
        trouble = str(error)
    return NodeView(host=host_name(), versions=package_versions(), trouble=trouble)


class RayMapper:
    """Runs shards on a pool of Ray actors, one shard in flight on each.

    What travels is a task and a commit record, both small. A Python exception is not retried; a
    lost process is replaced, and its shard given to another at most three times. A shard is given
    only to a process that has started, so that one for which the cluster has no room, because a
    node was lost or is still to come, keeps nothing from being done. Actors wait for the next pass
    of their stage, because a process takes seconds to start, unless they hold a GPU.
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
        self._nodes.look()
        if resources != self._idle_resources:
            self.release()
            self._idle_resources = resources
        _RayPass(make_worker, tasks, resources, on_done, idle=self._idle).run()

    def release(self) -> None:
        """End the processes that wait, so that they hold neither cores nor memory."""
        import ray

        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()


class _RayPass(Generic[T]):
    """One pass of a RayMapper: actors start, take a shard at a time, and are replaced if lost."""

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
        # What Ray's memory monitor ends is reported by an exception that is none of an actor's.
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
        """Actors, by what tells that they have started."""
        self._running: dict[Any, tuple[T, Any]] = {}
        """Shards and the actors that have them, by what tells that they are done."""
        self._num_lost: dict[int, int] = {}
        """Lost processes, by the shard that they had."""
        self._num_lost_starts = 0
        self._last_look = self._last_event = time.monotonic()

    def run(self) -> None:
        try:
            for _ in range(self._num_slots):
                self._start_actor()
            while self._waiting or self._running:
                done, _ = self._ray.wait([*self._running, *self._starting], timeout=_LOOK_SECONDS)
                self._grow()
                if not done:
                    self._complain()
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

    def _go_on(self, actor: Any) -> None:
        """Give an actor its next shard, or let it go."""
        if self._waiting:
            task = self._waiting.popleft()
            self._running[actor.process.remote(task)] = (task, actor)
        elif self._resources.num_gpus:  # For others, who have work for it.
            self._ray.kill(actor)
        else:
            self._idle.append(actor)

    def _grow(self) -> None:
        """Start more actors where nodes have joined, every now and then."""
        now = time.monotonic()
        if not self._resources.may_grow or now - self._last_look < _LOOK_SECONDS:
            return
        self._last_look = now
        num_useful = len(self._running) + len(self._waiting)
        wanted = min(_count_room(self._resources), num_useful) if self._waiting else 0
        for _ in range(wanted - len(self._running) - len(self._starting)):
            self._start_actor()

    def _complain(self) -> None:
        """Say what is waited for when nothing has happened for long."""
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
                raise StageFailed(f"Its processes are lost at once: {error}") from error
            self._start_actor()
        else:
            self._go_on(actor)

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
        self._go_on(actor)

    def _give_again(self, task: T, error: Exception) -> None:
        """Put back the shard of a process that was lost, and start another in its place."""
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
    """Count how many such workers the nodes that are there could hold."""
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
