"""Attention over packed rows: each completion sees only its own prompt and itself.

transformers calls it by its registered name and hands it the mask unchanged, which here is a small
table of where the parts of groups start and end, in the main memory. A CPU computes it in blocks
(cpu/blocks.py), a GPU by a variable-length kernel (cuda/varlen.py). Neither makes a mask of the
row's length squared, nor a score that such a mask would hide.

Shape suffixes: L tokens of the row, H heads of queries, K of keys and values, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.policy.cpu.blocks import attend_in_blocks
from stages.policy.cuda.varlen import attend_by_sequence, has_kernel
from stages.policy.transformers_compat import attention_name

PACKED_ATTENTION = "packed"
"""Name of the packed attention in transformers' registry."""


@torch.compiler.disable
def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a layer, with the signature that transformers calls.

    It branches by the values of the mask, which a compiler could not trace.

    Args:
        module: the layer.
        query: [1, H, L, D].
        key: [1, K, L, D].
        value: [1, K, L, D].
        attention_mask: int64 [1, 1, completions, 6], `spans_C6` of `lay_out`. With any other mask,
            or none, SDPA computes the attention.
        scaling: factor of the scores; None means 1 / sqrt(D).
        sliding_window: positions that a query sees, its own included; None means all.
        **kwargs: passed on to SDPA.
    Returns:
        [1, L, H, D], and None for the attention weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    attend = attend_in_blocks if query.device.type == "cpu" else attend_by_sequence
    output_HLD = attend(
        query[0],
        key[0],
        value[0],
        spans=tuple(map(tuple, attention_mask[0, 0].tolist())),
        scaling=scaling or query.shape[-1] ** -0.5,
        window=sliding_window,
    )
    return output_HLD.to(query.dtype).transpose(0, 1)[None], None


def pack_rows(model: PreTrainedModel) -> bool:
    """Replace SDPA by packed attention in a model, and return whether that was done.

    Raises:
        ConfigError: the GPU's kernel computes something else.
    """
    is_cuda = model.device.type == "cuda"
    if attention_name(model) == "sdpa" and (not is_cuda or has_kernel(model.device)):
        model.set_attn_implementation(PACKED_ATTENTION)
    return attention_name(model) == PACKED_ATTENTION


def unpack_rows(model: PreTrainedModel) -> None:
    """Undo `pack_rows`."""
    model.set_attn_implementation("sdpa")


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
