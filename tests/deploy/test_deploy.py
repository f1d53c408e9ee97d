"""The cluster files pass linters and schemas, and every documented command exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import typer
import yaml

import run
from tests.end_to_end.conftest import plan_recipe, recipe_path

__all__ = ["recipe_path"]  # a pytest fixture

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCUMENTS = [*sorted(DEPLOY.iterdir()), ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""Files that contain commands of run.py."""

# KubeRay v1.5.1, ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go; Kubernetes'
# core/v1. Not complete: add a key here after looking it up there.
RAY_JOB = {
    "entrypoint": str,
    "submissionMode": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "runtimeEnvYAML": str,
    "suspend": bool,
    "rayClusterSpec": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str},
        "headGroupSpec": {"rayStartParams": dict, "serviceType": str, "template": dict},
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "numOfHosts": int,
                "rayStartParams": dict,
                "template": dict,
            }
        ],
    },
}
POD = {
    "spec": {
        "containers": [
            {
                "name": str,
                "image": str,
                "envFrom": [{"secretRef": {"name": str}}],
                "resources": {"requests": dict, "limits": dict},
                "securityContext": {
                    "allowPrivilegeEscalation": bool,
                    "runAsNonRoot": bool,
                    "capabilities": {"drop": list},
                },
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [{"name": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
    }
}


def find_commands(text: str, program: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of a program, up to the end of the command."""
    text = re.sub(r"\\\n[ #]*", " ", text)
    for line in text.splitlines():
        # Two spaces after `run.py`, or no word, mean that it is mentioned and not called.
        for called in re.split(rf"{re.escape(program)} (?! )", line)[1:]:
            command = re.split(r"\s#|`|\||&|;|…|$", called.replace('"${options[@]}"', ""))[0]
            yield shlex.split(command.replace("'", '"'))


def test_every_documented_command_of_run_py_exists_with_its_options() -> None:
    cli = typer.main.get_command(run.app)
    num_found = 0
    for path in DOCUMENTS:
        for words in find_commands(path.read_text(), "run.py"):
            if not words or words[0] in ("--help", '"$recipe"') or words[0].startswith("-"):
                continue
            arguments = [word for word in words[1:] if word not in ("[STAGE]", "$@")]
            command = cli.commands.get(words[0])  # type: ignore[attr-defined]
            assert command is not None, f"{path.name}: run.py {words}"
            arguments += ["RECIPE"] * (not arguments)
            if words[0] == "path" and len(arguments) == 1:
                arguments.append("score")
            with command.make_context(words[0], arguments):
                num_found += 1
    assert num_found > 15


def test_an_unknown_option_is_found() -> None:
    [words] = find_commands("python run.py run \\\n    x.yaml --untill score  # this", "run.py")
    assert words == ["run", "x.yaml", "--untill", "score"]
    command = typer.main.get_command(run.app).commands["run"]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="untill"):
        command.make_context("run", words[1:])


def test_every_option_of_ray_start_exists() -> None:
    ray_program = Path(sys.executable).with_name("ray")
    shown = subprocess.run([ray_program, "start", "--help"], capture_output=True, text=True)
    known = set(re.findall(r"--[a-z][a-z-]+", shown.stdout))
    num_found = 0
    for path in sorted(DEPLOY.iterdir()):
        for words in find_commands(path.read_text(), "ray start"):
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            assert options <= known, f"{path.name}: {options - known}"
            num_found += len(options)
    assert num_found > 5


def test_the_cluster_file_fits_rays_own_schema() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    folder = Path(ray.autoscaler.__file__).parent
    schema = json.loads((folder / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 8}, schema)
    assert config["head_node_type"] in config["available_node_types"]
    head, *_ = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head


def check(value: Any, shape: Any, path: str) -> None:
    """Check that a value has only known keys, and values of the right types."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), path
        for key, inner in value.items():
            assert key in shape, f"{path}.{key}: unknown key"
            check(inner, shape[key], f"{path}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), path
        for item in value:
            check(item, shape[0], f"{path}[]")
    else:
        assert type(value) is shape, f"{path}: {value!r}"


def test_the_ray_job_has_only_keys_that_kuberay_knows() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check(job["spec"], RAY_JOB, "spec")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        check(group["template"], POD, "template")
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        [container] = group["template"]["spec"]["containers"]
        assert container["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes


def lint(program: str, *arguments: str | Path) -> None:
    path = Path(sys.executable).with_name(program)
    assert path.exists(), f"{program} is missing; install the development packages"
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_and_the_script_pass_their_linters() -> None:
    lint("hadolint", DEPLOY / "Dockerfile")
    lint("shellcheck", DEPLOY / "slurm.sh", ROOT / ".ci" / "run")


def test_the_dockerfile_copies_the_files_that_setup_reads() -> None:
    """The image runs `make setup` before the code is copied."""
    text = (DEPLOY / "Dockerfile").read_text()
    before = text[: text.index("RUN make setup")]
    copied = " ".join(line for line in before.splitlines() if line.startswith("COPY"))
    for name in ("pyproject.toml", "Makefile", "requirements", "README.md", "LICENSE"):
        assert name in copied
        assert (ROOT / name).exists()


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/scontrol.log"
[[ $1 == show ]] && echo 127.0.0.1 || true
"""


@pytest.mark.ray
@pytest.mark.slow
def test_the_slurm_script_starts_a_cluster_and_runs_a_recipe(
    recipe_path: Path, tmp_path: Path
) -> None:
    """Fake `srun` and `scontrol` offer a single node: this machine."""
    fakes, checkout = tmp_path / "bin", tmp_path / "checkout"
    fakes.mkdir()
    checkout.mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (fakes / name).write_text(content)
        (fakes / name).chmod(0o755)
    for name in ("run.py", "pipeline", "stages", "schemas"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / ".venv").symlink_to(sys.prefix)
    environment = {
        **os.environ,
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(checkout),
        "RAY_TMPDIR": str(short := Path("/tmp") / f"slurm-{os.getpid()}"),
    }
    try:
        done = subprocess.run(
            ["bash", DEPLOY / "slurm.sh", recipe_path, "--until", "encode"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = plan_recipe(recipe_path)
    assert plan.stage("encode").state == "done"
    assert "requeue" not in (fakes / "scontrol.log").read_text()
