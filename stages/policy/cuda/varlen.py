"""Attention over packed rows on a GPU, as one call of a kernel for sequences of unequal lengths.

A prompt with its first completion is one causal sequence: its queries and keys stand together in
the row. Each further completion is a sequence of its own queries, whose keys are gathered: those of
its prompt, then its own. So is a prompt that shares its beginning with another.

The kernel is torch's FlashAttention (Dao 2023, arXiv:2307.08691). It takes bfloat16 and float16;
float32 is computed sequence by sequence with SDPA, which is slow and exact.

Shape suffixes: L tokens of the row, S gathered keys, H heads of queries, K of keys and values,
D width of a head.
"""

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from schemas.errors import ConfigError
from stages.policy.batches import Spans

logger = logging.getLogger(__name__)

CHECK_TOLERANCE = 0.05
"""Largest difference that bfloat16 explains between the kernel and SDPA for values of about 1."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences of a packed row; their queries follow each other in the row."""

    key_places_S: Tensor | None
    """int64: position in the row of each key, sequence by sequence; None where that is the row."""
    query_starts: tuple[int, ...]
    """Of each sequence among the row's tokens, and the end of the last."""
    key_starts: tuple[int, ...]
    """Of each sequence among the S keys, and the end of the last."""
    query_starts_on_device: Tensor
    """int32."""
    key_starts_on_device: Tensor
    """int32."""

    @property
    def longest_queries(self) -> int:
        return max(end - start for start, end in pairwise(self.query_starts))

    @property
    def longest_keys(self) -> int:
        return max(end - start for start, end in pairwise(self.key_starts))


def attend_by_sequence(
    query_HLD: Tensor,
    key_KLD: Tensor,
    value_KLD: Tensor,
    *,
    spans: Spans,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute the attention of a packed row, under autocast in its dtype.

    Args:
        spans: the rows of `Batch.spans_C6`.
        scaling: factor of the scores.
        window: positions that a query sees, its own included; None means all.
    Returns:
        [H, L, D].
    """
    device = query_HLD.device
    sequences = list_sequences(spans, device)
    dtype = query_HLD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    query_LHD, key_SKD, value_SKD = (
        tensor.to(dtype).transpose(0, 1) for tensor in (query_HLD, key_KLD, value_KLD)
    )
    if sequences.key_places_S is not None:
        key_SKD = key_SKD.index_select(0, sequences.key_places_S)
        value_SKD = value_SKD.index_select(0, sequences.key_places_S)
    is_kernels = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    attend = attend_by_kernel if is_kernels else attend_one_by_one
    return attend(
        query_LHD, key_SKD, value_SKD, sequences, scaling=scaling, window=window
    ).transpose(0, 1)


@lru_cache(maxsize=8)
def list_sequences(spans: Spans, device: torch.device) -> Sequences:
    """List the sequences of a row, cached for all layers, forward and backward.

    A completion of one token has no queries: its only token is predicted and never read.
    """
    read = [span for span in spans if span[4] < span[5]]
    places = [
        place
        for span in read
        for start, end in (span[0:2], span[2:4], span[4:6])
        for place in range(start, end)
    ]
    query_starts = (*(start for *_, start, _ in read), read[-1][5])
    num_keys = (sum(span[at + 1] - span[at] for at in (0, 2, 4)) for span in read)
    key_starts = tuple(accumulate(num_keys, initial=0))

    def to_device(values: tuple[int, ...] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    is_row = places == list(range(len(places)))
    return Sequences(
        key_places_S=None if is_row else to_device(places, torch.int64),
        query_starts=query_starts,
        key_starts=key_starts,
        query_starts_on_device=to_device(query_starts, torch.int32),
        key_starts_on_device=to_device(key_starts, torch.int32),
    )


def attend_by_kernel(
    query_LHD: Tensor,
    key_SKD: Tensor,
    value_SKD: Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute all sequences in one call of the flash kernel: [L, H, D].

    Queries are aligned with the last keys of their sequence (`check_alignment`). A window of the
    kernel counts the positions before a query's own.
    """
    output_LHD = varlen_attn(
        query_LHD,
        key_SKD,
        value_SKD,
        sequences.query_starts_on_device,
        sequences.key_starts_on_device,
        sequences.longest_queries,
        sequences.longest_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_LHD.shape[1] != key_SKD.shape[1],
    )
    assert isinstance(output_LHD, Tensor)
    return output_LHD


def attend_one_by_one(
    query_LHD: Tensor,
    key_SKD: Tensor,
    value_SKD: Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute the same by SDPA, sequence by sequence: [L, H, D]."""
    outputs = []
    for queries, keys in zip(
        pairwise(sequences.query_starts), pairwise(sequences.key_starts), strict=True
    ):
        query_1HQD, key_1KSD, value_1KSD = (
            tensor[slice(*place)].transpose(0, 1)[None]
            for tensor, place in ((query_LHD, queries), (key_SKD, keys), (value_SKD, keys))
        )
        num_queries, num_keys = query_1HQD.shape[2], key_1KSD.shape[2]
        is_visible_QS = torch.ones(
            num_queries, num_keys, dtype=torch.bool, device=query_LHD.device
        ).tril(num_keys - num_queries)
        if window is not None:
            is_visible_QS = is_visible_QS.triu(num_keys - num_queries - window + 1)
        output_1HQD = scaled_dot_product_attention(
            query_1HQD,
            key_1KSD,
            value_1KSD,
            attn_mask=is_visible_QS,
            scale=scaling,
            enable_gqa=query_1HQD.shape[1] != key_1KSD.shape[1],
        )
        outputs.append(output_1HQD[0].transpose(0, 1))
    return torch.cat(outputs)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs on a GPU; it needs one of NVIDIA's Ampere generation or newer.

    Raises:
        ConfigError: it runs, and computes something else.
    """
    try:
        check_alignment(device)
    except RuntimeError as error:
        logger.warning(
            "rows are padded on %s, because torch's variable-length attention fails there: %s",
            device,
            error,
        )
        return False
    return True


@torch.no_grad()
def check_alignment(device: torch.device) -> None:
    """Check on a GPU that the kernel aligns the last query of a sequence with its last key.

    FlashAttention does so since version 2.1; before, it aligned the first ones.

    Raises:
        RuntimeError: the kernel does not run on this GPU.
        ConfigError: it does not, so completions would see other tokens than their prompts.
    """
    generator = torch.Generator().manual_seed(0)
    # A prompt of 37 tokens with completions of 20, 5 and 90 tokens.
    spans = ((0, 0, 0, 0, 0, 57), (0, 0, 0, 37, 57, 62), (0, 0, 0, 37, 62, 152))
    sequences = list_sequences(spans, device)
    assert sequences.key_places_S is not None
    query_LHD, key_LKD, value_LKD = (
        torch.randn(152, num_heads, 64, generator=generator).to(device, torch.bfloat16)
        for num_heads in (4, 2, 2)
    )
    key_SKD = key_LKD.index_select(0, sequences.key_places_S)
    value_SKD = value_LKD.index_select(0, sequences.key_places_S)
    for window in (None, 11):
        found, wanted = (
            attend(query_LHD, key_SKD, value_SKD, sequences, scaling=0.125, window=window)
            for attend in (attend_by_kernel, attend_one_by_one)
        )
        difference = (found.float() - wanted.float()).abs().max().item()
        if not difference <= CHECK_TOLERANCE:
            raise ConfigError(
                f"torch's variable-length attention differs on {device} from its own SDPA by "
                f"{difference:.3g}: it does not align queries with the last keys. Install the "
                "pinned torch (requirements/gpu.txt)."
            )
