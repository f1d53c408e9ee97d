"""Memory of tensors on a CPU: reuse, alignment, and the error when it runs out."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch
from torch import nn

from schemas.errors import StageFailed

ALIGNMENT_BYTES = 64
"""Alignment of torch's own CPU allocations, and the one for which MKL is reproducible."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of mallopt(3)."""
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system.

    By default glibc returns large blocks at once, and the system clears every page again at its
    next use, which took a sixth of a training step on a CPU. Peak memory stays the same. Does
    nothing where the C library is not glibc.
    """
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Return the memory that `keep_freed_memory` holds to the system, after a model is closed."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def align_parameters(model: nn.Module) -> None:
    """Copy CPU parameters that do not start at a multiple of 64 bytes into torch's own memory.

    Weights that are memory-mapped from safetensors start wherever their file has them, often at 8
    modulo 64. MKL promises equal results from run to run only for buffers aligned to 64 bytes
    (oneMKL Developer Guide, "Obtaining Numerically Reproducible Results"). One tensor is copied at
    a time, and tied weights stay tied.
    """
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT_BYTES:
            key = (parameter.data_ptr(), parameter.shape, parameter.stride())
            if key not in copies:
                copies[key] = parameter.detach().clone()
            parameter.data = copies[key]


_SHORTAGES = ("can't allocate memory", "bad_alloc", "could not create a primitive")
"""Messages of torch's plain RuntimeErrors for a lack of memory; the last is oneDNN's."""


@contextlib.contextmanager
def explained_shortage(advice: str) -> Iterator[None]:
    """Add advice to the error of a block that runs out of memory.

    Raises:
        StageFailed: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        is_shortage = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_shortage and not any(words in said for words in _SHORTAGES):
            raise
        raise StageFailed(f"Out of memory ({said or type(error).__name__}): {advice}") from error


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
