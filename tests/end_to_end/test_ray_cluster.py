"""Ray clusters of several nodes: the same bytes while nodes join, leave or are lost."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import open_run
from pipeline.stage_list import STAGE_NAMES
from tests.end_to_end.conftest import ROOT, TIMEOUT_S, Undisturbed, wait_until
from tests.object_store import free_ports
from tests.stages.train.test_ray import find_owner

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ONE_CORE = (
    "--set=execution.train.num_cpus_per_worker=1",
    "--set=execution.score.num_cpus_per_worker=1",
    "--set=execution.evaluate.num_cpus_per_worker=1",
)
"""Fits every worker onto a node of the cluster, which has one core."""


@dataclass
class Nodes:
    """A cluster on this machine: a head node without cores, and nodes with one core each."""

    cluster: Any
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **resources: Any) -> Any:
        return self.cluster.add_node(
            num_cpus=1, object_store_memory=80 << 20, wait=True, **resources
        )

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def find(self, process: psutil.Process) -> Any:
        """Find the node whose raylet is among a process's parents."""
        parents = {parent.pid for parent in process.parents()}
        [node] = [node for node in self.cluster.list_all_nodes() if raylet_pid(node) in parents]
        return node

    def run(self, code_or_command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            code_or_command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**self.environment, **more},
        )


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Three nodes beside the head, with health checks short enough to notice a lost one soon."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # In Ray's default folder, a bare ray.init() of any other program would find this cluster.
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 80 << 20,
                "_system_config": {
                    "health_check_initial_delay_ms": 500,
                    "health_check_period_ms": 500,
                    "health_check_timeout_ms": 10000,
                    "health_check_failure_threshold": 3,
                },
            },
        )
        try:
            started = Nodes(cluster, {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
            for _ in range(3):
                started.add()
            yield started
        finally:
            cluster.shutdown()
            if before is None:
                del os.environ["RAY_TMPDIR"]
            else:
                os.environ["RAY_TMPDIR"] = before


PLACEMENT = """
import json, os, sys, time
from dataclasses import dataclass
import ray
from pipeline.ray.mapper import RayMapper
from pipeline.ray.session import NodeCheck, connect
from schemas.manifest import Counts, ShardRecord
from stages.stage import Resources
from stages.store.filesystems import Folder

@dataclass
class Task:
    index: int
    description: str = "a shard"

os.makedirs(sys.argv[2])

def make_worker(started=sys.argv[2]):
    def work(task):
        open(os.path.join(started, str(os.getpid())), "w").close()
        deadline = time.monotonic() + 120  # The first worker may be much faster to start.
        while len(os.listdir(started)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
        held = f"{os.getpid()} {ray.get_gpu_ids()}"
        return ShardRecord(index=task.index, files={}, counts=Counts(), seconds=0, writer=held)
    return work

def free(name):
    deadline = time.monotonic() + 120
    while (now := ray.available_resources().get(name, 0)) != ray.cluster_resources()[name]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return now

connect(sys.argv[1])
mapper, records, cpu = RayMapper(NodeCheck(Folder(sys.argv[3]))), [], []
one_core = ray.remote(num_cpus=1)(lambda: "ran")

def on_done(record):
    records.append(record)
    if len(records) == 2:  # The other workers hold the GPU now.
        cpu.append(ray.get([one_core.remote() for _ in range(2)], timeout=240))

share = Resources(num_workers=4, num_cpus=0, num_gpus=0.5)
mapper.map(make_worker, [Task(n) for n in range(8)], share, on_done)
print(json.dumps({"held": [r.writer for r in records], "cpu": cpu, "free": free("GPU")}))
"""


def test_a_gpu_is_shared_in_parts_held_only_for_work_and_blocks_no_core(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Four workers ask for half a GPU each; the node declares one GPU, so two run at a time."""
    node = nodes.add(num_gpus=1)
    try:
        folders = [str(tmp_path / "started"), str(tmp_path / "store")]
        command = [sys.executable, "-c", PLACEMENT, nodes.address, *folders]
        done = nodes.run(command)
    finally:
        nodes.kill(node)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["held"]) == 8
    assert len(set(found["held"])) == 2  # Pairs of a process and the GPU it holds.
    assert {held.split(" ", 1)[1] for held in found["held"]} == {"[0]"}
    assert found["cpu"] == [["ran", "ran"]]
    assert found["free"] == 1


def start_node_apart(
    nodes: Nodes, name: str, script: str = "", **more: str
) -> subprocess.Popen[bytes]:
    """Start a node whose processes see other mounts or variables than the other nodes.

    Args:
        name: of a resource that only this node has.
    """
    command = (
        f"{script} exec {sys.executable} -m ray.scripts.scripts start --block "
        f"--address={nodes.address} --num-cpus=1 --object-store-memory={80 << 20} "
        f"--resources='{json.dumps({name: 1})}'"
    )
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**nodes.environment, **more},
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate `ray start --block`, which then ends the processes that it started."""
    process.terminate()
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


WAIT = """
import sys, time
import ray

address, name, timeout_s = sys.argv[1:]
ray.init(address=address, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + float(timeout_s)
while name not in ray.cluster_resources():
    assert time.monotonic() < deadline
    time.sleep(0.2)
"""


def wait_for_node(nodes: Nodes, name: str) -> None:
    """Wait for the node that has a resource of this name."""
    done = nodes.run([sys.executable, "-c", WAIT, nodes.address, name, str(TIMEOUT_S - 60)])
    assert done.returncode == 0, done.stderr


needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="only a user who may mount can start a node that sees other files",
)


@needs_mounts
def test_a_store_that_a_node_does_not_share_is_refused_before_anything_runs(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """One node has an empty file system where the others have the store."""
    store = tmp_path / "shared" / "store"
    store.parent.mkdir()
    apart = start_node_apart(nodes, "other_mounts", f"mount -t tmpfs none {store.parent} &&")
    try:
        wait_for_node(nodes, "other_mounts")
        done = nodes.run(undisturbed.command(store, *ONE_CORE, "--ray-address", nodes.address))
    finally:
        end(apart)
    assert done.returncode == 2, done.stderr
    assert "does not reach the store" in done.stderr
    assert str(store) in done.stderr
    assert "Traceback" not in done.stderr
    assert {entry.name for entry in store.iterdir()} <= {"runs"}  # No stage began.


def test_a_node_with_other_versions_is_named(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """One node finds another peft installed; the run finds the cluster by RAY_ADDRESS."""
    (tmp_path / "peft-9.9.9.dist-info").mkdir()
    (tmp_path / "peft-9.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n"
    )
    apart = start_node_apart(nodes, "other_versions", PYTHONPATH=str(tmp_path))
    try:
        wait_for_node(nodes, "other_versions")
        command = undisturbed.command(tmp_path / "store", *ONE_CORE, "--until", "validate")
        done = nodes.run(command, RAY_ADDRESS=nodes.address)
    finally:
        end(apart)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "has other versions" in line]
    assert "peft 9.9.9 (here " in line
    undisturbed.assert_same(tmp_path / "store", ("validate",))


@pytest.mark.long
def test_nodes_are_lost_stopped_and_added_while_every_stage_gives_the_same_bytes(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """A node is killed in validate, dedupe, score and train, and one is stopped for a while.

    Each lost node is replaced, as by an autoscaler.
    """
    store = tmp_path / "store"
    process = subprocess.Popen(
        undisturbed.command(store, *ONE_CORE, "--ray-address", nodes.address),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=nodes.environment,
    )
    done: list[str] = []

    def replace_one(stage: str) -> Callable[[], None]:
        def act() -> None:
            node = find_node_at_work(nodes, store, stage)
            nodes.kill(node)
            assert not any(store.glob(f"{stage}/*/manifest.json"))
            nodes.add()
            done.append(f"replaced in {stage}")

        return act

    def freeze_and_thaw() -> None:
        raylet = raylet_pid(nodes.cluster.list_all_nodes()[-1])
        os.kill(raylet, signal.SIGSTOP)
        time.sleep(1.5)  # Too short for the head to give the node up.
        os.kill(raylet, signal.SIGCONT)
        done.append("thawed")

    def has(pattern: str, count: int = 1) -> Callable[[], bool]:
        return lambda: len(list(store.glob(pattern))) >= count

    def when(is_time: Callable[[], bool], act: Callable[[], None]) -> None:
        wait_until(process, is_time)
        act()

    try:
        when(has("validate/*/_commits/part-*.json"), replace_one("validate"))
        when(has("dedupe/*/_work/*"), replace_one("dedupe"))
        when(has("score/*/_commits/part-*.json", 2), replace_one("score"))
        when(has("score/*/_commits/part-*.json", 6), freeze_and_thaw)
        when(has("train/*/checkpoints/*/commit.json"), replace_one("train"))
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    replaced = [f"replaced in {stage}" for stage in ("validate", "dedupe", "score")]
    assert done == [*replaced, "thawed", "replaced in train"]
    assert "lost a training worker (1)" in printed
    undisturbed.assert_same(store)


def find_node_at_work(nodes: Nodes, store: Path, stage: str) -> Any:
    """Find the node of train's worker; for other stages any node, as all three have workers."""
    if stage != "train":
        return next(iter(nodes.cluster.worker_nodes))
    [log] = store.glob("train/*/metrics.jsonl")
    return nodes.find(find_owner(log))


WATCH_GROUPS = """
import json, sys, time
import ray
ray.init(address=sys.argv[1], logging_level="ERROR")
deadline = time.monotonic() + float(sys.argv[2])
while time.monotonic() < deadline:
    groups = ray.util.placement_group_table().values()
    for group in groups:
        if group["state"] == "CREATED":
            print(json.dumps(list(group["bundles"].values())), flush=True)
            sys.exit()
    time.sleep(0.05)
"""


@pytest.mark.long
def test_training_has_a_placement_group_of_all_its_workers(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """All workers get their cores together, or none of them holds one while it waits."""
    store = tmp_path / "store"
    undisturbed.copy_stages(store, before="train")
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH_GROUPS, nodes.address, str(TIMEOUT_S)],
        stdout=subprocess.PIPE,
        text=True,
        env=nodes.environment,
    )
    try:
        command = undisturbed.command(store, *ONE_CORE, "--ray-address", nodes.address)
        done = nodes.run([*command, "--only=train", "--set=execution.train.num_workers=2"])
        bundles = json.loads(watch.communicate(timeout=TIMEOUT_S)[0])
    finally:
        watch.kill()
    assert done.returncode == 0, done.stderr
    assert [bundle["CPU"] for bundle in bundles] == [1, 1]
    assert open_run(str(store), "tiny").manifest("train").summary["num_workers"] == 2


@pytest.mark.long
def test_a_job_that_is_submitted_brings_its_code_along(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """It runs on a cluster that has no checkout, only a `python` with the packages."""
    store = tmp_path / "store"
    folder = tempfile.mkdtemp(prefix="j", dir="/tmp")
    environment = {
        **os.environ,
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    environment.pop("PYTHONPATH", None)
    port, dashboard, agent = free_ports(3)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = subprocess.Popen(
        [
            *(*ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
            *("--include-dashboard=true", f"--dashboard-port={dashboard}"),
            # Another cluster may use the default port; without an agent there is no jobs API.
            f"--dashboard-agent-listen-port={agent}",
            *(f"--object-store-memory={80 << 20}", f"--temp-dir={folder}"),
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs_api(address, head)
        entry = undisturbed.command(store, *ONE_CORE, "--until", "train")
        done = subprocess.run(
            [
                *(*ray, "job", "submit", "--address", address, "--working-dir", str(ROOT)),
                *("--", "python", *entry[1:]),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
        )
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    undisturbed.assert_same(store, STAGE_NAMES[:-1])


def wait_for_jobs_api(address: str, head: "subprocess.Popen[bytes]") -> None:
    """Wait until the jobs API answers; a refusal for lack of a token is an answer."""
    deadline = time.monotonic() + TIMEOUT_S
    is_there = False
    while not is_there:
        assert head.poll() is None
        assert time.monotonic() < deadline
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5)
        except urllib.error.HTTPError as error:
            is_there = error.code == 401
        except OSError:
            time.sleep(0.5)
        else:
            is_there = True
