"""Can completions share one computation of their prompt in this model, with the same numbers?"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from stages.policy.batches import lay_out
from stages.policy.groups import Group, IntArray
from stages.policy.logps import completion_token_logps
from stages.policy.model import vocabulary_size

logger = logging.getLogger(__name__)

TOLERANCE = 2e-4
"""Nats a token; rounding in float32 came to 2e-5 in a model of 30 layers."""

PROBE_COMPLETION_TOKENS = 13


@torch.no_grad()
def shares_prompt_exactly(model: PreTrainedModel, *, max_length: int) -> bool:
    """Find out whether shared and separate rows give the same log-probabilities.

    They do where each token sees only what the attention mask and its position tell it. They
    don't in recurrent layers, nor where attention reaches less far than a sequence is long. Found
    by trying both on random tokens, so that no list of architectures has to be kept.

    The weights are float32 for the time of the trial, since the rounding of bfloat16 would hide
    all but gross differences. Where that does not fit into memory, the answer is no.

    Args:
        model: from load_model, not yet wrapped or sharded.
        max_length: tokens of the longest prompt with completion that will follow, at least 2. A
            window that is no shorter does no harm.
    """
    probe = random_group(vocabulary_size(model), max_length=max_length)
    try:
        with float32_weights(model):
            difference = largest_difference(model, probe)
    except (TypeError, ValueError, RuntimeError) as error:
        logger.warning("%s is run without sharing prompts: %s", type(model).__name__, error)
        return False
    return difference <= TOLERANCE


def largest_difference(model: PreTrainedModel, group: Group) -> float:
    """Compare shared and separate rows: the largest difference of a token, in nats."""
    shared_N, separate_N = (
        completion_token_logps(model, lay_out([group], device=model.device, share_prompt=share))
        for share in (True, False)
    )
    return (shared_N - separate_N).abs().max().item()


def random_group(num_token_ids: int, *, max_length: int) -> Group:
    """Make a prompt with two completions that reach max_length and a third of one token."""
    rng = np.random.default_rng(0)

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
