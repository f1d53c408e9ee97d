"""How do many prompts and completions stand in one row, each seeing only what it should?

The attention of a packed row: every completion sees its own prompt and itself, up to each token.
It is computed group by group, so that neither a mask of row by row exists nor a score that it would
hide. transformers calls it by its name, and passes the mask through as it is: here the mask is a
small table of where groups and completions stand.

Shape suffixes: L tokens of the row, H heads of queries, K of keys and values, G = H / K, D width of
a head, Q queries and S keys of a block.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "packed"
"""By this name it is registered with transformers."""

BLOCK_QUERIES = 96
"""Queries whose scores exist at a time, of each head: they should stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some queries of one completion, and the keys that at least one of them sees."""

    queries: slice
    prefixes: tuple[slice, ...]
    """The prompt's keys that stand elsewhere, in their order: what it has in common with another
    prompt, and its rest. All of them come before the queries."""
    own: slice
    """Keys that stand in a row with the queries; the last of them is the last query's."""
    is_hidden_QS: Tensor
    """Bool: which of the last keys a query must not see; those before them, it sees all."""

    def gather(self, values_KLD: Tensor) -> Tensor:
        """Give the keys' [K, S, D]."""
        own = values_KLD[:, self.own]
        if not self.prefixes:
            return own
        return torch.cat([*(values_KLD[:, prefix] for prefix in self.prefixes), own], dim=1)

    def scatter(self, sums_KLD: Tensor, values_KSD: Tensor) -> None:
        """Add to what the keys have, the inverse of gather."""
        first = 0
        for keys in (*self.prefixes, self.own):
            last = first + keys.stop - keys.start
            sums_KLD[:, keys] += values_KSD[:, first:last]
            first = last


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
    """Compute the attention of a layer, in the form that transformers asks for.

    Args:
        query: [1, H, L, D]; key and value: [1, K, L, D].
        attention_mask: int64 [1, 1, completions, 6], `spans_C6` of `lay_out`: where what each
            completion sees starts and ends in the row: what its prompt has in common with another,
            the rest of its prompt, and itself. Anything else is left to SDPA.
        sliding_window: how many positions a query sees, its own included; None: all.
    Returns:
        [1, L, H, D].
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    output_HLD: Tensor = _PackedAttention.apply(
        query[0],
        key[0],
        value[0],
        _cut_blocks(tuple(map(tuple, attention_mask[0, 0].tolist())), sliding_window),
        scaling or query.shape[-1] ** -0.5,
    )
    return output_HLD.to(query.dtype).transpose(0, 1)[None], None


def pack_rows(model: PreTrainedModel) -> None:
    """Let a model on a CPU compute packed rows, where its attention is SDPA otherwise."""
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(PACKED_ATTENTION)


def packs_rows(model: PreTrainedModel) -> bool:
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


class _PackedAttention(torch.autograd.Function):
    """softmax(scaling * Q K^T) V in float32, block by block; backward computes the shares again."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any,
        query_HLD: Tensor,
        key_KLD: Tensor,
        value_KLD: Tensor,
        blocks: tuple[_Block, ...],
        scaling: float,
    ) -> Tensor:
        query_HLD, key_KLD, value_KLD = query_HLD.float(), key_KLD.float(), value_KLD.float()
        num_heads, num_tokens, width = query_HLD.shape
        output_HLD = torch.empty(num_tokens, num_heads, width).transpose(0, 1)
        for block in blocks:
            query_KQD = _fold(query_HLD[:, block.queries], key_KLD) * scaling
            shares_KQS = _shares(block, query_KQD, block.gather(key_KLD))
            output_KQD = shares_KQS @ block.gather(value_KLD)
            output_HLD[:, block.queries] = output_KQD.view(num_heads, -1, width)
        ctx.save_for_backward(query_HLD, key_KLD, value_KLD, output_HLD)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output_HLD

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, grad_output_HLD: Tensor) -> tuple[Tensor | None, ...]:
        query_HLD, key_KLD, value_KLD, output_HLD = ctx.saved_tensors
        num_heads, _, width = query_HLD.shape
        grad_query_HLD = torch.empty_like(query_HLD)
        grad_key_KLD, grad_value_KLD = torch.zeros_like(key_KLD), torch.zeros_like(value_KLD)
        # Shares add up to 1: what raises them all alike changes nothing.
        common_HL1 = (grad_output_HLD * output_HLD).sum(-1, keepdim=True)
        for block in ctx.blocks:
            key_KSD = block.gather(key_KLD)
            query_KQD = _fold(query_HLD[:, block.queries], key_KLD) * ctx.scaling
            grad_output_KQD = _fold(grad_output_HLD[:, block.queries], key_KLD)
            shares_KQS = _shares(block, query_KQD, key_KSD)
            block.scatter(grad_value_KLD, shares_KQS.mT @ grad_output_KQD)
            grad_scores_KQS = grad_output_KQD @ block.gather(value_KLD).mT
            grad_scores_KQS.sub_(_fold(common_HL1[:, block.queries], key_KLD)).mul_(shares_KQS)
            grad_query_KQD = (grad_scores_KQS @ key_KSD).mul_(ctx.scaling)
            grad_query_HLD[:, block.queries] = grad_query_KQD.view(num_heads, -1, width)
            block.scatter(grad_key_KLD, grad_scores_KQS.mT @ query_KQD)
        return grad_query_HLD, grad_key_KLD, grad_value_KLD, None, None


@lru_cache(maxsize=8)
def _cut_blocks(spans: tuple[tuple[int, ...], ...], window: int | None) -> tuple[_Block, ...]:
    """Cut the queries of a row; its layers, in forward and backward, share what comes out."""
    blocks = []
    for common_start, common_end, prompt_start, prompt_end, start, end in spans:
        places = (slice(common_start, common_end), slice(prompt_start, prompt_end))
        prefixes = tuple(place for place in places if place.start < place.stop)
        num_before = common_end - common_start + prompt_end - prompt_start
        for first in range(start, end, BLOCK_QUERIES):
            last = min(first + BLOCK_QUERIES, end)
            num_keys = num_before + last - start
            blocks.append(
                _Block(
                    queries=slice(first, last),
                    prefixes=prefixes,
                    own=slice(start, last),
                    is_hidden_QS=_hide(last - first, num_keys, window),
                )
            )
    return tuple(blocks)


def _hide(num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """Tell what the queries must not see; the keys are consecutive, the last is the last query's.

    Returns:
        Bool [Q, S], without the leading keys that every query sees.
    """
    reaches_all = window is None or window >= num_keys
    first_masked = num_keys - num_queries if reaches_all else 0
    distance_QS = (
        torch.arange(num_keys - num_queries, num_keys)[:, None]
        - torch.arange(first_masked, num_keys)[None]
    )
    is_hidden_QS = distance_QS < 0
    if window is not None:
        is_hidden_QS |= distance_QS >= window
    return is_hidden_QS


def _fold(values_HQD: Tensor, like_KLD: Tensor) -> Tensor:
    """Put the queries that share a head of keys into one row of queries: [K, G * Q, D]."""
    return values_HQD.reshape(len(like_KLD), -1, values_HQD.shape[-1])


def _shares(block: _Block, query_KQD: Tensor, key_KSD: Tensor) -> Tensor:
    """Give what each query takes of each key: [K, G * Q, S]."""
    scores_KQS = query_KQD @ key_KSD.mT
    num_queries, num_masked = block.is_hidden_QS.shape
    by_head = scores_KQS.view(len(key_KSD), -1, num_queries, key_KSD.shape[1])
    by_head[..., -num_masked:].masked_fill_(block.is_hidden_QS, -torch.inf)
    return scores_KQS.softmax(-1)
