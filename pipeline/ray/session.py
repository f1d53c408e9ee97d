"""The Ray session: the one `ray.init`, the capacity of the machines, and checks of their nodes."""

import atexit
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.provenance import host_name, package_versions
from pipeline.ray.compat import submitter_sent_checkout
from schemas.errors import ConfigError
from stages.stage import Execution, Resources
from stages.store.filesystems import Folder

logger = logging.getLogger(__name__)

_CHECKOUT = Path(__file__).resolve().parents[2]
_CHECK_TIMEOUT_S = 60.0
"""Seconds that a node has to answer the check."""
_PORT_TIMEOUT_S = 10.0
_CLUSTER_TIMEOUT_S = 40.0
"""Seconds that a cluster's port has to open, and the cluster to tell its status. Without these
checks ray.init would go on trying for a quarter of an hour."""
_CLIENT_SCHEME = "ray://"
_PROBE = ".seen-by-all-nodes-"
_SESSION_PREFIX = "offline-dpo-ray-"
_SESSION_LOCK = "lock"
_LONGEST_BASE = 11
"""Bytes of the longest folder that session folders may be made in."""
_OBJECT_STORE_BYTES = 200 << 20
"""Only small records travel through it, so a laptop's cluster gets little more than the minimum."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Cores and GPUs of a machine or cluster."""

    num_cpus: int
    num_gpus: int
    num_cpus_per_node: int


def find_capacity(ray_address: str | None, *, is_local: bool) -> Capacity:
    """Count the CPU cores and GPUs of the cluster to be used, or of this machine.

    Counting a cluster's connects to it; counting this machine's does not start Ray.
    """
    if ray_address is None or is_local:
        num_cpus = len(os.sched_getaffinity(0))
        return Capacity(num_cpus=num_cpus, num_gpus=_count_gpus(), num_cpus_per_node=num_cpus)
    import ray

    connect(ray_address)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        num_gpus=int(sum(node.get("GPU", 0) for node in nodes)),
        num_cpus_per_node=int(max(node.get("CPU", 0) for node in nodes)),
    )


def resolve_resources(execution: Execution, capacity: Capacity) -> Resources:
    """Replace every `auto` of an execution block by a number that fits the machines."""
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
def open_session(ray_address: str | None) -> Iterator[None]:
    """Connect to a cluster for the block, or start one on this machine that ends with the block."""
    if ray_address is None:
        _require_token()
    import ray

    was_running = ray.is_initialized()
    connect(ray_address)
    try:
        yield
    finally:
        if not was_running:
            ray.shutdown()
            _close_session()


def connect(ray_address: str | None) -> None:
    """Connect to the cluster at an address, or start one here; do nothing if connected.

    Raises:
        ConfigError: no cluster that this process can use answers at the address.
    """
    import ray

    if ray.is_initialized():
        return
    if ray_address is not None:
        _join_cluster(ray_address)
        return
    # Only for a cluster that we start; the owner of a shared one has decided about it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Silences the warning that workers without GPUs will not see accelerators in later versions.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _kept_sigterm(), _variable("RAY_TMPDIR", _open_session()):
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
        )


def _join_cluster(address: str) -> None:
    import ray

    modules = [str(_CHECKOUT / name) for name in ("pipeline", "stages", "schemas")]
    try:
        if not address.startswith(_CLIENT_SCHEME):  # Ray's client has a time limit of its own.
            _require_answer(address)
        with _kept_sigterm():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if submitter_sent_checkout() else {"py_modules": modules},
            )
    except (OSError, RuntimeError, ValueError) as error:
        is_variable = os.environ.get("RAY_ADDRESS") == address
        raise ConfigError(
            f"No usable Ray cluster answers at {address}, which "
            f"{'the variable RAY_ADDRESS' if is_variable else '--ray-address'} names: {error}\n"
            "Start it, name another, or "
            f"{'unset RAY_ADDRESS' if is_variable else 'leave the option out'} "
            "to start Ray on this machine."
        ) from error


def _require_answer(address: str) -> None:
    """Open a cluster's port, and ask the cluster for its status.

    Raises:
        OSError: there is no such port, or no status comes from it.
    """
    place = urlsplit(f"//{address}")
    if place.hostname is not None and place.port is not None:
        socket.create_connection((place.hostname, place.port), _PORT_TIMEOUT_S).close()
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ray_command = shutil.which("ray", path=folders)
    if ray_command is None:  # Ray was installed without its commands.
        return
    try:
        done = subprocess.run(
            [ray_command, "status", "--address", address],
            capture_output=True,
            text=True,
            timeout=_CLUSTER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"no answer within {_CLUSTER_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConnectionError(last)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _require_token() -> None:
    """Require this run's token from every client of the services of a cluster that we start.

    They listen on every interface, and a client can run code. Ray reads these variables when it is
    imported.
    """
    if "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which ray.init replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


_session = contextlib.ExitStack()
"""Deletes the folder of the cluster that this process started."""


def _open_session() -> str:
    """Make the folder for a cluster's sockets and logs, and delete folders of killed runs.

    Each folder holds a lock that dies with its process: a folder whose lock is free belongs to a
    killed run.
    """
    # Ray puts sockets below it, and a socket's path may have at most 107 bytes.
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
    """Count this machine's NVIDIA GPUs by asking the driver, without importing torch."""
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


class NodeCheck:
    """Checks each node once: whether it reaches the store and has this process's versions."""

    def __init__(self, store: Folder) -> None:
        self._store = store
        self._known: set[str] = set()

    def check_new(self) -> None:
        """Check the nodes that have joined since the last call.

        Raises:
            ConfigError: a node does not see what this process writes to the store.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {
            node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]
        }
        if len(nodes) == 1:
            return  # The node of this process.
        name = f"{_PROBE}{uuid.uuid4().hex}"
        self._store.create()
        self._store.write_bytes(name, name.encode())
        inspect = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
        views = {
            node: inspect.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            ).remote(self._store, name)
            for node in nodes.keys() - self._known
        }
        try:
            for node, ref in views.items():
                try:
                    self._judge(nodes[node], ray.get(ref, timeout=_CHECK_TIMEOUT_S), node)
                except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                    logger.warning("node %s left before it was checked", nodes[node])
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
    """What a process on a node finds."""

    host: str
    versions: dict[str, str]
    trouble: str | None
    """Why the node does not share the store; None if it does."""


def inspect_node(store: Folder, name: str) -> NodeView:
    """Inspect this process's node: its versions, and whether its store has the driver's file."""
    trouble = None
    try:
        if not store.exists(name):
            trouble = "a file that the driver wrote to it does not appear there"
        else:
            store.write_bytes(f"{name}.{uuid.uuid4().hex}", b"")
    except OSError as error:
        trouble = str(error)
    return NodeView(host=host_name(), versions=package_versions(), trouble=trouble)
