"""The lock files hold what pyproject.toml pins, with hashes; the driver is checked first."""

import importlib.metadata
import os
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_lock(name: str) -> dict[str, list[tuple[str, bool]]]:
    """List the versions of each package, and whether each has a hash."""
    found: dict[str, list[tuple[str, bool]]] = {}
    text = (ROOT / "requirements" / name).read_text()
    for entry in re.split(r"\n(?=\S)", text):
        match = re.match(r"([\w.-]+)==([^\s;]+)", entry)
        if match:
            package = canonicalize_name(match[1])
            found.setdefault(package, []).append((match[2], "--hash=sha256:" in entry))
    return found


def pinned(extra: str) -> list[Requirement]:
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    return [
        Requirement(line) for line in [*PROJECT["dependencies"], *extras[extra], *extras["dev"]]
    ]


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_every_pinned_package_is_locked_at_its_version(accelerator: str) -> None:
    locked = read_lock(f"{accelerator}.txt")
    for requirement in pinned(accelerator):
        name = canonicalize_name(requirement.name)
        if accelerator == "cpu" and name == "torch":  # Installed from torch-cpu.txt.
            locked[name] = read_lock("torch-cpu.txt")[name]
        versions = [version for version, _ in locked[name]]
        assert all(requirement.specifier.contains(version) for version in versions), name


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt", "bench.txt", "docs.txt", "torch-cpu.txt"])
def test_every_locked_package_has_a_hash(name: str) -> None:
    locked = read_lock(name)
    assert locked
    assert all(has_hash for entries in locked.values() for _, has_hash in entries)


def test_the_environment_holds_no_package_that_is_not_locked() -> None:
    """--no-deps installs exactly the files; a package that floats would show here."""
    is_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if not (is_cpu and os.environ.get("CI")):
        pytest.skip("compares a new CPU environment, as in CI, with its lock file")
    locked = read_lock("cpu.txt") | read_lock("torch-cpu.txt") | read_lock("sample-model.txt")
    installed = {
        canonicalize_name(package.name): package.version
        for package in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    missing = {
        name: version
        for name, version in installed.items()
        if name not in locked and name not in ("pip", "setuptools")
    }
    assert not missing
    other = {
        name: version
        for name, version in installed.items()
        if name in locked and version not in [wanted for wanted, _ in locked[name]]
    }
    assert not other


def test_the_lock_knows_what_torchs_cpu_build_requires() -> None:
    text = (ROOT / "requirements" / "lock.py").read_text()
    for line in importlib.metadata.requires("torch") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            assert re.search(rf'"{requirement.name}\W', text), line


@pytest.mark.parametrize(
    ("says", "code", "words"),
    [
        ("580.65.06", 0, ""),
        ("610.1", 0, ""),
        ("570.124.06", 2, "NVIDIA driver 570.124.06"),
        ("550.54.15\n580.65.06", 2, "NVIDIA driver 550.54.15"),
        ("No devices were found", 2, "No devices were found"),
        ("", 2, "nothing"),
    ],
)
def test_a_driver_that_is_too_old_is_named(
    says: str, code: int, words: str, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{says}'\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / "requirements" / "check-driver.sh")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert words in done.stdout
    assert (code == 0) == (not done.stdout)
    if code:
        assert "580" in done.stdout
