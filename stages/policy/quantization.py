"""NF4 quantisation of a frozen model's linear layers, by bitsandbytes.

Each weight becomes one of 16 values, scaled by the largest of its block of 64; the blocks' scales
are quantised again (Dettmers et al. 2023, arXiv:2305.14314). A layer's weights are dequantised when
it computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel


def quantize_nf4(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Make the arguments with which `from_pretrained` quantises all linear layers but the output.

    Args:
        dtype: dtype of matrix products and of all other weights.
        device: where the quantised weights are made and stay.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable_format(model: PreTrainedModel) -> None:
    """Stop layers on a CPU from repacking their weights at a forward pass without gradients.

    On processors with AVX512-BF16, bitsandbytes does so for layers in evaluation mode, as all
    layers of a policy are. It rounds the blocks' scales to bfloat16, and fails for rows that are no
    multiple of a block.
    """
    for layer in _find_layers(model):
        layer.support_avx512bf16_for_cpu = False


@contextmanager
def float32_products(model: PreTrainedModel) -> Iterator[None]:
    """Multiply with dequantised weights in float32 for a block."""
    layers = _find_layers(model)
    dtypes = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, dtypes, strict=True):
            layer.compute_dtype = dtype


def _find_layers(model: nn.Module) -> list[Any]:
    # It takes seconds, and only quantised models need it.
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

    return [module for module in model.modules() if isinstance(module, Linear4bit)]
