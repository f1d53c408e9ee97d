"""Choose the row layout of a model by comparing log-probabilities on random tokens."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.policy.batches import RowLayout, lay_out
from stages.policy.cpu.attention import pack_rows, unpack_rows
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
    """Choose the densest layout that gives the log-probabilities of sequences computed alone.

    On a CPU, packed rows come with an attention of their own, which then stays in the model.

    Completions can share a row if each token sees only what the attention mask and its position
    allow. Recurrent layers break that, and so does a dense mask with an attention window shorter
    than the sequence. Rows of one batch can be of different lengths if positions do not depend on
    the longest; with dynamic rope and longrope they do. A trial on random tokens decides, so no
    list of architectures is needed.

    The trial runs with float32 weights, because bfloat16 rounding would hide all but gross
    differences. Where these do not fit into memory, every sequence is computed alone.

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
    layouts: tuple[RowLayout, ...] = ("shared", "separate")
    try:
        with float32_weights(model):
            # Before attention is replaced: some architectures decide by its name what they compute.
            alone_N = _compute(model, probe, rows="alone")
            if pack_rows(model):
                if _agrees(model, probe, alone_N, rows="packed", num_common=num_common):
                    return "packed"
                unpack_rows(model)
            for rows in layouts:
                if _agrees(model, probe, alone_N, rows=rows):
                    return rows
    except torch.OutOfMemoryError as error:
        logger.warning("%s: no memory to try layouts of rows (%s)", type(model).__name__, error)
    logger.warning("%s computes every sequence in a batch of its own", type(model).__name__)
    return "alone"


def _agrees(
    model: PreTrainedModel,
    groups: Sequence[Group],
    alone_N: Tensor,
    *,
    rows: RowLayout,
    num_common: int = 0,
) -> bool:
    """Whether a layout gives the values of sequences computed alone."""
    try:
        found_N = _compute(model, groups, rows=rows, num_common=num_common)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        logger.warning("%s runs without %s rows: %s", type(model).__name__, rows, error)
        return False
    return (found_N - alone_N).abs().max().item() <= TOLERANCE


def _compute(
    model: PreTrainedModel, groups: Sequence[Group], *, rows: RowLayout, num_common: int = 0
) -> Tensor:
    """Compute the completion tokens of groups in one batch.

    Packed rows hold the first `num_common` prompt tokens, which all prompts share, only once.
    """
    common = [num_common] * len(groups) if rows == "packed" else []
    batch = lay_out(groups, device=model.device, rows=rows, num_common=common)
    return completion_token_logps(model, batch)


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
