"""Attention over packed rows on a CPU, in blocks of queries that stay in the processor's cache.

Shape suffixes: L tokens of the row, H heads of queries, K of keys and values, G = H / K, D width of
a head, Q queries and S keys of a block.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from stages.policy.batches import Spans

BLOCK_QUERIES = 96
"""Queries of each head whose scores exist at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Consecutive queries of one completion, and the keys that at least one of them sees."""

    queries: slice
    prefixes: tuple[slice, ...]
    """Keys of the prompt, in order: the part shared with another prompt, and the rest. Every query
    comes after all of them."""
    own: slice
    """Keys next to the queries, up to and including the last query's."""
    is_hidden_QS: Tensor
    """Bool: which of the last keys a query must not see. It sees all keys before those."""

    def gather(self, values_KLD: Tensor) -> Tensor:
        """Collect the values of the block's keys: [K, S, D]."""
        own = values_KLD[:, self.own]
        if not self.prefixes:
            return own
        return torch.cat([*(values_KLD[:, prefix] for prefix in self.prefixes), own], dim=1)

    def scatter(self, sums_KLD: Tensor, values_KSD: Tensor) -> None:
        """Add values to the sums of the block's keys, the inverse of gather."""
        first = 0
        for keys in (*self.prefixes, self.own):
            last = first + keys.stop - keys.start
            sums_KLD[:, keys] += values_KSD[:, first:last]
            first = last


def attend_in_blocks(
    query_HLD: Tensor,
    key_KLD: Tensor,
    value_KLD: Tensor,
    *,
    spans: Spans,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute the attention of a packed row in float32.

    Args:
        spans: the rows of `Batch.spans_C6`.
        scaling: factor of the scores.
        window: positions that a query sees, its own included; None means all.
    Returns:
        float32 [H, L, D].
    """
    output_HLD: Tensor = _PackedAttention.apply(
        query_HLD, key_KLD, value_KLD, _cut_blocks(spans, window), scaling
    )
    return output_HLD


class _PackedAttention(torch.autograd.Function):
    """softmax(scaling * Q K^T) V in float32 by blocks; backward computes the softmax again."""

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
        # Gradient of softmax: the shares P of a query add up to 1, so dS = P * (dP - sum(P * dP)),
        # and sum(P * dP) = sum(dO * O) over D.
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
def _cut_blocks(spans: Spans, window: int | None) -> tuple[_Block, ...]:
    """Cut the queries of a row into blocks, cached for all layers, forward and backward."""
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
    """Mask the keys that queries must not see; positions are consecutive and end together.

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
    """Join the query heads that share a key head: [H, Q, D] to [K, G * Q, D]."""
    return values_HQD.reshape(len(like_KLD), -1, values_HQD.shape[-1])


def _shares(block: _Block, query_KQD: Tensor, key_KSD: Tensor) -> Tensor:
    """Attention weights of a block: [K, G * Q, S]."""
    scores_KQS = query_KQD @ key_KSD.mT
    num_queries, num_masked = block.is_hidden_QS.shape
    by_head = scores_KQS.view(len(key_KSD), -1, num_queries, key_KSD.shape[1])
    by_head[..., -num_masked:].masked_fill_(block.is_hidden_QS, -torch.inf)
    return scores_KQS.softmax(-1)
