"""On a cluster of several nodes: the same bytes, whatever joins, leaves or is lost meanwhile."""

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
import yaml

from pipeline import open_run
from pipeline.stage_list import STAGE_NAMES
from tests.end_to_end.conftest import (
    list_contents,
    plan_recipe,
    run_recipe,
    tiny_recipe,
    write_pairs,
)
from tests.object_store import free_ports
from tests.stages.train.test_ray import find_owner

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
NUM_FILES = 6
"""Of pairs: validate has so many shards."""
SETTINGS = (
    "stages.dedupe.rows_per_shard=1",
    "execution.train.checkpoint_every_steps=2",
    "execution.train.num_cpus_per_worker=1",
    "execution.score.num_cpus_per_worker=1",
    "execution.evaluate.num_cpus_per_worker=1",
)


@dataclass
class Nodes:
    """A cluster on this machine: a head for the driver, and nodes with a core each."""

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
        """Give the node on which a process works: its raylet is among its parents."""
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
    """Three nodes beside the head; a lost one is noticed in a second instead of sixteen."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Else a bare ray.init() anywhere on this machine would find this cluster.
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


@dataclass(frozen=True)
class Undisturbed:
    """A recipe that has run in one process."""

    recipe: Path
    store: Path

    def command(self, store: Path, *arguments: str) -> list[str]:
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        places = [str(self.recipe), "--store", str(store)]
        return [sys.executable, "run.py", "run", *places, *settings, *arguments]

    def stage_path(self, store: Path, stage: str) -> Path:
        plan = plan_recipe(self.recipe, *SETTINGS, store=store)
        return Path(plan.stage(stage).out.folder.path)

    def assert_same(self, store: Path, stages: tuple[str, ...] = STAGE_NAMES) -> None:
        ours, theirs = (open_run(str(place), "tiny") for place in (store, self.store))
        assert list_contents(ours, stages) == list_contents(theirs, stages)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_pairs(folder / "pairs.jsonl")
    content = tiny_recipe(folder, tiny_model)
    content["stages"]["validate"]["inputs"] = split_lines(folder / "pairs.jsonl", NUM_FILES)
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(content))
    run_recipe(recipe, *SETTINGS)
    return Undisturbed(recipe, folder / "store")


def split_lines(path: Path, num_files: int) -> list[str]:
    lines = path.read_bytes().splitlines(keepends=True)
    parts = [path.with_name(f"part-{number}.jsonl") for number in range(num_files)]
    for number, part in enumerate(parts):
        part.write_bytes(b"".join(lines[number::num_files]))
    return [str(part) for part in parts]


def when(is_time: Callable[[], bool], act: Callable[[], None], process: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_time():
        assert process.poll() is None, f"the run ended before: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    act()


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

def make_worker():
    def work(task):
        time.sleep(0.3)
        held = f"{os.getpid()} {ray.get_gpu_ids()}"
        return ShardRecord(index=task.index, files={}, counts=Counts(), seconds=0, writer=held)
    return work

def free(name):
    deadline = time.monotonic() + 30
    while (now := ray.available_resources().get(name, 0)) != ray.cluster_resources()[name]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return now

connect(sys.argv[1])
mapper, records, cpu = RayMapper(NodeCheck(Folder(sys.argv[2]))), [], []
one_core = ray.remote(num_cpus=1)(lambda: "ran")

def on_done(record):
    records.append(record)
    if len(records) == 2:  # While the others hold the GPU.
        cpu.append(ray.get([one_core.remote() for _ in range(2)], timeout=60))

share = Resources(num_workers=4, num_cpus=0, num_gpus=0.5)
mapper.map(make_worker, [Task(n) for n in range(8)], share, on_done)
print(json.dumps({"held": [r.writer for r in records], "cpu": cpu, "free": free("GPU")}))
"""


def test_a_gpu_is_shared_in_parts_held_only_for_work_and_blocks_no_core(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Of four workers that want half a GPU each, two have room on the only one (which is none)."""
    node = nodes.add(num_gpus=1)
    try:
        command = [sys.executable, "-c", PLACEMENT, nodes.address, str(tmp_path / "store")]
        done = nodes.run(command)
    finally:
        nodes.kill(node)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["held"]) == 8
    assert len(set(found["held"])) == 2  # Processes, with the GPU that each of them holds.
    assert {held.split(" ", 1)[1] for held in found["held"]} == {"[0]"}
    assert found["cpu"] == [["ran", "ran"]]
    assert found["free"] == 1


def start_node_apart(nodes: Nodes, script: str, **more: str) -> subprocess.Popen[bytes]:
    """Start a node whose processes see other mounts or variables than the rest of the machine."""
    command = (
        f"{script} exec {sys.executable} -m ray.scripts.scripts start --block "
        f"--address={nodes.address} --num-cpus=1 --object-store-memory={80 << 20}"
    )
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**nodes.environment, **more},
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End `ray start --block`, which ends what it has started."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def count_nodes(nodes: Nodes) -> int:
    code = (
        "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); "
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    return int(nodes.run([sys.executable, "-c", code, nodes.address]).stdout.split()[-1])


def wait_for_nodes(nodes: Nodes, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while count_nodes(nodes) != count:
        assert time.monotonic() < deadline


needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="nodes that see other files need the right to mount",
)


@needs_mounts
def test_a_store_that_a_node_does_not_share_is_refused_before_anything_runs(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The node has its own, empty file system where the others have the store."""
    store = tmp_path / "shared" / "store"
    store.parent.mkdir()
    apart = start_node_apart(nodes, f"mount -t tmpfs none {store.parent} &&")
    try:
        wait_for_nodes(nodes, 5)
        done = nodes.run(undisturbed.command(store, "--ray-address", nodes.address))
    finally:
        end(apart)
    assert done.returncode == 2, done.stderr
    assert "does not reach the store" in done.stderr
    assert str(store) in done.stderr
    assert "Traceback" not in done.stderr
    assert {entry.name for entry in store.iterdir()} <= {"runs"}  # No stage has begun.


def test_a_node_with_other_versions_is_named(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """A node that finds another peft installed; RAY_ADDRESS says which cluster it is."""
    (tmp_path / "peft-9.9.9.dist-info").mkdir()
    (tmp_path / "peft-9.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n"
    )
    apart = start_node_apart(nodes, "", PYTHONPATH=str(tmp_path))
    try:
        wait_for_nodes(nodes, 5)
        command = undisturbed.command(tmp_path / "store", "--until", "validate")
        done = nodes.run(command, RAY_ADDRESS=nodes.address)
    finally:
        end(apart)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "has other versions" in line]
    assert "peft 9.9.9 (here " in line
    undisturbed.assert_same(tmp_path / "store", ("validate",))


@pytest.mark.long
@pytest.mark.slow
def test_nodes_are_lost_stopped_and_added_while_every_stage_gives_the_same_bytes(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """A node is killed in validate, in dedupe, in score and in train; one is frozen for a while.

    For each that is lost another comes, as from an autoscaler.
    """
    store = tmp_path / "store"
    process = subprocess.Popen(
        undisturbed.command(store, "--ray-address", nodes.address),
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
        time.sleep(1.5)  # Shorter than it takes to be given up.
        os.kill(raylet, signal.SIGCONT)
        done.append("thawed")

    def has(pattern: str, count: int = 1) -> Callable[[], bool]:
        return lambda: len(list(store.glob(pattern))) >= count

    try:
        when(has("validate/*/_commits/part-*.json"), replace_one("validate"), process)
        when(has("dedupe/*/_work/*"), replace_one("dedupe"), process)
        when(has("score/*/_commits/part-*.json", 2), replace_one("score"), process)
        when(has("score/*/_commits/part-*.json", 6), freeze_and_thaw, process)
        when(has("train/*/checkpoints/*/commit.json"), replace_one("train"), process)
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    replaced = [f"replaced in {stage}" for stage in ("validate", "dedupe", "score")]
    assert done == [*replaced, "thawed", "replaced in train"]
    assert "lost a training worker (1)" in printed
    undisturbed.assert_same(store)


def find_node_at_work(nodes: Nodes, store: Path, stage: str) -> Any:
    """Give the node of train's worker, and for other stages any: all three have workers."""
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
@pytest.mark.slow
def test_training_has_a_placement_group_of_all_its_workers(
    nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Either all of them have room, or none of them waits for the others with a core in hand."""
    store = tmp_path / "store"
    before = nodes.run(undisturbed.command(store, "--ray-address", nodes.address, "--until=score"))
    assert before.returncode == 0, before.stderr
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH_GROUPS, nodes.address, str(TIMEOUT_S)],
        stdout=subprocess.PIPE,
        text=True,
        env=nodes.environment,
    )
    try:
        command = undisturbed.command(store, "--ray-address", nodes.address, "--only=train")
        done = nodes.run([*command, "--set", "execution.train.num_workers=2"])
        bundles = json.loads(watch.communicate(timeout=10)[0])
    finally:
        watch.kill()
    assert done.returncode == 0, done.stderr
    assert [bundle["CPU"] for bundle in bundles] == [1, 1]
    assert open_run(str(store), "tiny").manifest("train").summary["num_workers"] == 2


@pytest.mark.long
@pytest.mark.slow
def test_a_job_that_is_submitted_brings_its_code_along(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """To a cluster of its own that knows no checkout; its `python` has the packages."""
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
            # Its usual port may belong to another cluster here; without it there are no jobs.
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
        entry = undisturbed.command(store, "--until", "train")
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
    """Wait until it answers, if only that it wants this user's token."""
    deadline = time.monotonic() + 60
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
