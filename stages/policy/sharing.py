"""Which completions can stand in one row of this model, with the same numbers?"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from stages.policy.attention import packs_rows
from stages.policy.batches import RowLayout, lay_out
from stages.policy.groups import Group, IntArray
from stages.policy.logps import completion_token_logps
from stages.policy.model import vocabulary_size

logger = logging.getLogger(__name__)

TOLERANCE = 2e-4
"""Nats a token; rounding in float32 came to 2e-5 in a model of 30 layers."""

PROBE_COMPLETION_TOKENS = 13
PROBE_COMMON_TOKENS = 5
"""Tokens that both groups begin with."""
SHORT_PROBE_TOKENS = 21
"""Of a second group, which a token of the first would be seen from if rows were not kept apart."""


@torch.no_grad()
def choose_rows(model: PreTrainedModel, *, max_length: int) -> RowLayout:
    """Find out what may stand in a row so that log-probabilities are those of separate rows.

    Completions share a row where each token sees only what the attention mask and its position tell
    it. That is not so in recurrent layers, nor with a dense mask where attention reaches less far
    than a sequence is long. Found by trying on random tokens, so that no list of architectures has
    to be kept.

    The weights are float32 for the time of the trial, since the rounding of bfloat16 would hide
    all but gross differences. Where that does not fit into memory, rows are separate.

    Args:
        model: from load_model, not yet wrapped or sharded.
        max_length: tokens of the longest prompt with completion that will follow, at least 2. A
            window that is no shorter does no harm.
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
            logger.warning("%s is run without %s rows: %s", type(model).__name__, rows, error)
            continue
        if difference <= TOLERANCE:
            return rows
    return "separate"


def largest_difference(
    model: PreTrainedModel, groups: Sequence[Group], *, rows: RowLayout, num_common: int = 0
) -> float:
    """Compare a layout with separate rows: the largest difference of a token, in nats.

    Where rows are packed, they hold once what all prompts begin with, their first `num_common`.
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
    """Make a prompt with two completions that reach max_length and a third of one token."""
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
    """Widen all weights and buffers to float32 and narrow them again, which loses nothing."""
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, _ in dtypes:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)
