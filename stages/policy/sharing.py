"""Choose the row layout of a model by comparing log-probabilities on random tokens."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from stages.policy.batches import RowLayout, lay_out
from stages.policy.cpu.attention import packs_rows
from stages.policy.groups import Group, IntArray
from stages.policy.logps import completion_token_logps
from stages.policy.model import vocabulary_size

logger = logging.getLogger(__name__)

TOLERANCE = 2e-4
"""Largest accepted difference of a token, in nats; float32 rounding in 30 layers was 2e-5."""

PROBE_COMPLETION_TOKENS = 13
PROBE_COMMON_TOKENS = 5
"""Leading tokens that the prompts of both probe groups share."""
SHORT_PROBE_TOKENS = 21
"""Length of the second probe group, whose tokens must not see those of the first."""


@torch.no_grad()
def choose_rows(model: PreTrainedModel, *, max_length: int) -> RowLayout:
    """Choose the densest layout that gives the log-probabilities of separate rows.

    Completions can share a row if each token sees only what the attention mask and its position
    allow. Recurrent layers break that, and so does a dense mask with an attention window shorter
    than the sequence. A trial on random tokens decides, so no list of architectures is needed.

    The trial runs with float32 weights, because bfloat16 rounding would hide all but gross
    differences. Where these do not fit into memory, rows are separate.

    Args:
        model: from load_model, not yet wrapped or sharded.
        max_length: tokens of the longest prompt with completion that will follow, at least 2. An
            attention window of at least this length does no harm.
    """
    num_token_ids = vocabulary_size(model)
    probe = [
        random_group(num_token_ids, max_length=length, seed=seed)
        for seed, length in enumerate((max_length, min(max_length, SHORT_PROBE_TOKENS)))
    ]
    num_common = min(PROBE_COMMON_TOKENS, *(len(group.prompt_ids) for group in probe))
    probe[1].prompt_ids[:num_common] = probe[0].prompt_ids[:num_common]
    layouts: list[RowLayout] = ["packed"] if packs_rows(model) else []
    for rows in (*layouts, "shared"):
        try:
            with float32_weights(model):
                difference = largest_difference(model, probe, rows=rows, num_common=num_common)
        except (TypeError, ValueError, RuntimeError) as error:
            logger.warning("%s runs without %s rows: %s", type(model).__name__, rows, error)
            continue
        if difference <= TOLERANCE:
            return rows
    return "separate"


def largest_difference(
    model: PreTrainedModel, groups: Sequence[Group], *, rows: RowLayout, num_common: int = 0
) -> float:
    """Largest difference of a token between a layout and separate rows, in nats.

    Packed rows hold the first `num_common` prompt tokens, which all prompts share, only once.
    """
    common = [num_common] * len(groups) if rows == "packed" else []
    device = model.device
    found_N, separate_N = (
        completion_token_logps(model, batch)
        for batch in (
            lay_out(groups, device=device, rows=rows, num_common=common),
            lay_out(groups, device=device, rows="separate"),
        )
    )
    return (found_N - separate_N).abs().max().item()


def random_group(num_token_ids: int, *, max_length: int, seed: int) -> Group:
    """Random prompt with two completions that reach max_length and one of a single token."""
    rng = np.random.default_rng(seed)

    def random_ids(length: int) -> IntArray:
        return rng.integers(num_token_ids, size=length, dtype=np.int32)

    length = min(PROBE_COMPLETION_TOKENS, max_length // 2)
    return Group(
        prompt_ids=random_ids(max_length - length),
        completions=(random_ids(length), random_ids(1), random_ids(length)),
    )


@contextmanager
def float32_weights(model: PreTrainedModel) -> Iterator[None]:
    """Widen weights and buffers to float32 for a block; narrowing restores the same bits."""
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, _ in dtypes:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)
