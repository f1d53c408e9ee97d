"""Tests of the Ray session: capacity, resources, and folders of killed runs."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.ray import session
from pipeline.ray.session import Capacity, find_capacity, resolve_resources
from schemas.errors import ConfigError
from stages.stage import Execution, Resources


def test_auto_resources_follow_the_machine() -> None:
    gpus = Capacity(num_cpus=64, num_gpus=8, num_cpus_per_node=32)
    cpus = Capacity(num_cpus=8, num_gpus=0, num_cpus_per_node=8)
    scoring = Execution(num_gpus_per_worker="auto", num_cpus_per_worker="auto")
    assert resolve_resources(scoring, gpus) == Resources(
        num_workers=8, num_cpus=1, num_gpus=1, may_grow=True
    )
    assert resolve_resources(scoring, cpus) == Resources(num_workers=1, num_cpus=8, may_grow=True)
    assert resolve_resources(Execution(), cpus) == Resources(
        num_workers=8, num_cpus=1, may_grow=True
    )
    two = Execution(num_workers=2, num_gpus_per_worker=4)
    assert resolve_resources(two, gpus) == Resources(num_workers=2, num_cpus=1, num_gpus=4)


def test_capacity_of_this_machine_is_found_without_ray() -> None:
    found = find_capacity(None, is_local=False)
    assert found.num_cpus == found.num_cpus_per_node == len(os.sched_getaffinity(0))


def test_sessions_of_killed_runs_are_removed_and_those_of_living_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that ends with its process tells the two apart."""
    monkeypatch.setattr(session, "_LONGEST_BASE", 1000)
    # This process may have a cluster, whose session must stay open.
    monkeypatch.setattr(session, "_session", contextlib.ExitStack())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import sys, time; from pipeline.ray import session; session._LONGEST_BASE = 1000; "
        "print(session._open_session(), flush=True); time.sleep(600)"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    folders = []
    for other in others:
        assert other.stdout is not None
        folders.append(Path(other.stdout.readline().strip()))
    try:
        others[0].kill()
        others[0].wait()
        ours = Path(session._open_session())
        assert set(tmp_path.iterdir()) == {folders[1], ours}
        session._close_session()
        assert set(tmp_path.iterdir()) == {folders[1]}
    finally:
        others[1].kill()
        for other in others:
            other.communicate()


@pytest.mark.parametrize("by", ["option", "variable"])
def test_an_address_where_nothing_answers_is_named(by: str, tmp_path: Path) -> None:
    """The socket is bound and does not listen, so no other program can answer at its port."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("store: ./store\nstages: {validate: {inputs: [pipeline/sample/chat.jsonl]}}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        option = ["--ray-address", address] if by == "option" else []
        variable = {"RAY_ADDRESS": address} if by == "variable" else {}
        done = subprocess.run(
            [sys.executable, "run.py", "plan", recipe, *option],
            cwd=Path(__file__).parents[3],
            env={**os.environ, **variable},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert f"No usable Ray cluster answers at {address}" in done.stderr
    assert "refused" in done.stderr
    assert ("unset RAY_ADDRESS" in done.stderr) == (by == "variable")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "127.0.0.1:abc", "auto"])
def test_an_address_of_no_cluster_is_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match=f"answers at {address}"):
        session._join_cluster(address)


def test_a_port_of_another_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port accepts connections and never says anything, as many a service does."""
    monkeypatch.setattr(session, "_CLUSTER_TIMEOUT_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no answer within 4 s"):
            session._join_cluster(address)
