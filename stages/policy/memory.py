"""How does a process keep memory for the next tensors, and what does it say when there is none?"""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

from schemas.errors import StageFailed

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of mallopt(3)."""
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the C library give freed tensors' memory to the next tensors, not back to the system.

    By default glibc returns large blocks at once, and the system clears every page again when it
    is next touched: of a training step on a CPU that took a sixth. The most that is held at a time
    stays the same. Where the C library is not glibc, nothing changes.
    """
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Give back what `keep_freed_memory` has kept, once a model is closed."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


_SHORTAGES = ("can't allocate memory", "bad_alloc", "could not create a primitive")
"""What torch says where it raises a plain RuntimeError; the last is oneDNN's."""


@contextlib.contextmanager
def explained_shortage(advice: str) -> Iterator[None]:
    """Say what to change where memory does not suffice for the block.

    Raises:
        StageFailed: it did not.
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
