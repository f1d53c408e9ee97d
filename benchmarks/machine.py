"""Properties of the machine, its matmul peak, and the load from other processes."""

import importlib.metadata
import os
import platform
import resource
import time
from pathlib import Path

from pipeline.provenance import package_versions

_BENCHMARK_PACKAGES = ("trl", "accelerate", "datasets")
_PROC_STAT = Path("/proc/stat")


def describe_machine() -> dict[str, str | int]:
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "system": platform.platform(),
    }


def list_versions() -> dict[str, str]:
    benchmark = {name: importlib.metadata.version(name) for name in _BENCHMARK_PACKAGES}
    return {**package_versions(), **benchmark}


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class OthersWatch:
    """Counts the cores kept busy by processes other than this one and its children."""

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), _others_seconds()

    def cores(self) -> float:
        """Return the average since the start; a child counts as ours only after it has ended."""
        seconds = time.perf_counter() - self._began
        return max(0.0, (_others_seconds() - self._before) / seconds)


def _others_seconds() -> float:
    """Return the processor seconds of all others since boot, or 0 where the system hides them."""
    if not _PROC_STAT.exists():
        return 0.0
    fields = [int(field) for field in _PROC_STAT.read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _waiting, irq, softirq, steal = fields
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in usages)
