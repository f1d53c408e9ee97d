"""Choose the device that has room for a model, from the headers of its weights."""

import logging
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

MEMORY_PER_WEIGHT = 1.25
"""Memory that a model needs on a GPU, activations included, as a multiple of its weights."""

logger = logging.getLogger(__name__)


def choose_device(weight_bytes: int) -> torch.device:
    """Choose the first GPU if it has room for the model, else the CPU.

    A model that vLLM splits over several GPUs may not fit on one of them in float32, the dtype in
    which vLLM's values are checked.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_free_bytes, _ = torch.cuda.mem_get_info()
    if weight_bytes * MEMORY_PER_WEIGHT <= num_free_bytes:
        return torch.device("cuda")
    logger.warning(
        "a model of %.0f GB runs on the CPU: the GPU has %.0f GB free",
        weight_bytes / 1e9,
        num_free_bytes / 1e9,
    )
    return torch.device("cpu")


def count_weights(model_path: str) -> int:
    """Count the weights in a folder's safetensors files from their headers."""
    num_weights = 0
    for path in Path(model_path).glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        num_weights += sum(map(prod, shapes))
    return num_weights


def count_free_bytes() -> int | None:
    """Read the memory that is available on this machine; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
