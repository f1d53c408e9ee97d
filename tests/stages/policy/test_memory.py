"""Memory of freed tensors is kept and returned, and a lack of memory becomes an error."""

import platform
import subprocess
import sys

import pytest
import torch

from schemas.errors import StageFailed
from stages.policy.memory import explained_shortage

MEASURE = """
import torch
from stages.policy.memory import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

if {is_kept}:
    keep_freed_memory()
before = resident()
tensors = [torch.ones(4 << 20) for _ in range(16)]  # 16 MiB each, 256 MiB in all.
del tensors
freed = resident()
return_freed_memory()
print(freed - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
@pytest.mark.parametrize("is_kept", [True, False])
def test_freed_memory_is_kept_until_it_is_returned(is_kept: bool) -> None:
    output = subprocess.run(
        [sys.executable, "-c", MEASURE.format(is_kept=is_kept)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    after_free, after_return = map(int, output.split())
    assert (after_free > 200 << 20) == is_kept
    assert after_return < 64 << 20


def test_a_failed_allocation_of_torch_becomes_an_error_with_advice() -> None:
    with (
        pytest.raises(StageFailed, match=r"Out of memory \(.*can't allocate memory.*\): buy more"),
        explained_shortage("buy more"),
    ):
        torch.empty(1 << 50)


def test_a_memory_error_of_python_becomes_an_error_with_advice() -> None:
    with (
        pytest.raises(StageFailed, match=r"Out of memory \(MemoryError\): buy more"),
        explained_shortage("buy more"),
    ):
        bytearray(1 << 62)


def test_other_errors_pass_through_unchanged() -> None:
    with pytest.raises(RuntimeError, match="size") as caught, explained_shortage("buy more"):
        torch.ones(2) + torch.ones(3)
    assert not isinstance(caught.value, StageFailed)
