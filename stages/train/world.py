"""The processes that train together, and the collectives between them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")

_BUCKET_ELEMENTS = 1 << 25
"""Gradient values per all-reduce: 128 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A process's view of all processes of a training, which are torch's default group."""

    rank: int = 0
    size: int = 1
    device: torch.device
    """Of this process."""

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may do, such as writing files."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Open the process group that FSDP2 needs, in a process that trains alone.

        Several processes have joined theirs before they get a World.
        """
        if dist.is_initialized():
            yield
            return
        assert self.size == 1
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        store = dist.HashStore()  # type: ignore[attr-defined]  # Documented, but not in stubs.
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum tensors of equal shape over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes; unused parameters get a gradient of 0.

        The backward pass has already summed those of a sharded policy. The others are summed here
        instead of by DistributedDataParallel, which rebuilds its buckets after the first step, so
        that with three or more processes a resumed run would add in another order.
        """
        gradients_of_all = [_gradient(parameter) for parameter in parameters]
        is_sharded = any(isinstance(gradient, DTensor) for gradient in gradients_of_all)
        if self.size == 1 or is_sharded:
            return
        for gradients in _cut_buckets(gradients_of_all):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def from_first(self, value: T) -> T:
        """Broadcast the first process's value, which is small and picklable."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self._object_device)
        received: T = box[0]
        return received

    def gather(self, value: T) -> list[T]:
        """Gather every process's value, small and picklable, on all of them, ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @property
    def _object_device(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, 0 if no token of this process used it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _cut_buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    num_elements = 0
    for gradient in gradients:
        if bucket and num_elements + gradient.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, num_elements = [], 0
        bucket.append(gradient)
        num_elements += gradient.numel()
    if bucket:
        yield bucket
