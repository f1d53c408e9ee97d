"""Access to the Ray services of a run, which listen on every interface: only with its token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RUN = """
import os, subprocess, sys
import psutil
from pipeline.ray.mapper import open_mapper
from stages.store.filesystems import Folder
with open_mapper(None, is_local=False, store=Folder(sys.argv[1])):
    import ray
    address = ray.get_runtime_context().gcs_address
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('in')"
    strangers = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    guess = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", code, address], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True
        )
        for environment in (strangers, {**strangers, **guess}, os.environ)
    ]
    for caller in callers:
        print("in" if caller.communicate()[0].strip() == "in" else "refused", flush=True)
    ports = {c.laddr.port for p in psutil.Process().children(recursive=True)
             for c in p.net_connections("inet") if c.status == "LISTEN"}
    print("dashboard" if 8265 in ports else "no dashboard")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_only_who_has_the_runs_token_may_talk_to_its_ray(tmp_path: Path) -> None:
    """No token and a guessed one are refused; the run's own is accepted; there is no dashboard."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split("\n")[:4] == ["refused", "refused", "in", "no dashboard"], done.stderr
