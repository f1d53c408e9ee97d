"""Operations that a training step needs, and operations a second that the device can do."""

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.measurement import find_device, now
from stages.train.microbatch import StepBatch


def measure_matmul_peak(dtype: str, *, size: int = 2048, repeats: int = 10) -> float:
    """Return the operations per second of the fastest of some products of square matrices."""
    left, right = torch.rand(2, size, size, device=find_device(), dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(repeats):
        start = now()
        left @ right
        seconds.append(now() - start)
    return 2 * size**3 / min(seconds)


def count_flops(model: PreTrainedModel, batch: StepBatch) -> float:
    """Count two operations per weight and token forward and four backward, two if it is frozen.

    The output layer is needed only for completion tokens; embeddings are look-ups.
    """
    output_layer = model.get_output_embeddings()
    num_completion = sum(len(one.batch.target_ids_N) for one in batch.microbatches)
    num_flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            num_tokens = num_completion if module is output_layer else batch.num_tokens
            num_operations = 6 if module.weight.requires_grad else 4
            num_flops += num_operations * module.weight.numel() * num_tokens
    return num_flops
