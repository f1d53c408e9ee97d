"""Choose the row layout of a model by comparing log-probabilities on random tokens."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from stages.policy.attention import pack_rows, unpack_rows
from stages.policy.batches import RowLayout, lay_out
from stages.policy.decoder_layers import few_layers
from stages.policy.groups import Group, IntArray
from stages.policy.logps import completion_token_logps
from stages.policy.model import vocabulary_size
from stages.policy.transformers_compat import attention_name

logger = logging.getLogger(__name__)

TOLERANCE = 2e-4
"""Largest accepted difference of a token, in nats; float32 rounding in 30 layers was 2e-5."""

ROW_COSTS: Mapping[RowLayout, str] = {
    "shared": "one prompt with its completions a row, which pads rows to the longest",
    "separate": "every prompt once for each of its completions",
    "alone": "every sequence in a forward pass of its own, which is slow",
}
"""How a model is computed when its rows can't be packed, for the log."""

PROBE_COMPLETION_TOKENS = 13
PROBE_COMMON_TOKENS = 5
"""Leading tokens that the prompts of both probe groups share."""
SHORT_PROBE_TOKENS = 21
"""Length of the second probe group, whose tokens must not see those of the first."""
LEAST_PROBE_TOKENS = 64
"""Length of the first probe group where the config names no longer limit below the data's."""
TOKENS_BEYOND_LIMIT = 16
"""How far the first probe group reaches beyond a limit that the config names."""
LIMIT_WORDS = ("window", "position", "chunk", "block", "length", "context")
"""A number whose config key has one of these words may be a limit of attention or positions."""


@torch.no_grad()
def choose_rows(model: PreTrainedModel, *, max_length: int) -> RowLayout:
    """Choose the densest layout that gives the log-probabilities of sequences computed alone.

    On a CPU, packed rows come with an attention of their own, which then stays in the model.

    Completions can share a row if each token sees only what the attention mask and its position
    allow. Recurrent layers break that, and so does a dense mask with an attention window shorter
    than the sequence. Rows of one batch can be of different lengths if positions do not depend on
    the longest; with dynamic rope and longrope they do. A trial on random tokens decides, so no
    list of architectures is needed.

    The trial takes the model's first layers, at least one of each kind, and sequences just longer
    than any limit of attention or positions in the config. It runs with float32 weights, because
    bfloat16 rounding would hide all but gross differences.

    Args:
        model: from load_model, not yet wrapped or sharded.
        max_length: tokens of the longest prompt with completion that will follow, at least 2. An
            attention window of at least this length does no harm.
    """
    probe = make_probe(model, max_length=max_length)
    try:
        with few_layers(model), float32_weights(model):
            rows = _try_layouts(model, probe)
    except torch.OutOfMemoryError as error:
        logger.warning("%s: no memory to try layouts of rows (%s)", type(model).__name__, error)
        rows = "alone"
    if rows != "packed":
        logger.info("%s computes %s", type(model).__name__, ROW_COSTS[rows])
    return rows


@torch.no_grad()
def takes_rounded_weights(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a model runs with weights in a lower precision while its buffers stay float32.

    The trial takes the model's first layers. MiniMax, for one, multiplies hidden states with
    buffers.
    """
    input_ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with few_layers(model):
        weights = {name: weight.to(dtype) for name, weight in model.named_parameters()}
        try:
            functional_call(model, weights, kwargs={"input_ids": input_ids, "use_cache": False})
        except RuntimeError as error:
            logger.info("%s is computed by autocast: %s", type(model).__name__, error)
            return False
    return True


def _try_layouts(model: PreTrainedModel, probe: Sequence[Group]) -> RowLayout:
    """Return the densest layout with the values of sequences computed alone."""
    # Before attention is replaced: some architectures decide by its name what they compute.
    alone_N = _compute(model, probe, rows="alone")
    if pack_rows(model):
        if _agrees(model, probe, alone_N, rows="packed"):
            return "packed"
        unpack_rows(model)
    else:
        logger.info("rows are not packed with %s attention here", attention_name(model))
    layouts: tuple[RowLayout, ...] = ("shared", "separate")
    agreeing = (rows for rows in layouts if _agrees(model, probe, alone_N, rows=rows))
    return next(agreeing, "alone")


def make_probe(model: PreTrainedModel, *, max_length: int) -> list[Group]:
    """Make two groups of random tokens whose prompts begin with the same tokens."""
    num_token_ids = vocabulary_size(model)
    longest = choose_probe_length(model.config, max_length=max_length)
    probe = [
        random_group(num_token_ids, max_length=length, seed=seed)
        for seed, length in enumerate((longest, min(longest, SHORT_PROBE_TOKENS)))
    ]
    num_common = _count_common(probe)
    probe[1].prompt_ids[:num_common] = probe[0].prompt_ids[:num_common]
    return probe


def choose_probe_length(config: PreTrainedConfig, *, max_length: int) -> int:
    """Choose a length at which a layout shows all faults that it has up to max_length.

    Attention windows, and positions that change with the length, have their limits in the config.
    A limit of at least max_length does no harm.
    """
    limits = _list_limits(config.get_text_config().to_dict(), below=max_length)
    return min(max_length, max([LEAST_PROBE_TOKENS, *limits]) + TOKENS_BEYOND_LIMIT)


def _list_limits(values: Mapping[str, Any], *, below: int) -> Iterator[int]:
    """List the numbers of a config, and of blocks inside it, that may be limits."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _list_limits(value, below=below)
        elif any(word in str(key) for word in LIMIT_WORDS):
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and number < below:
                    yield number


def _count_common(groups: Sequence[Group]) -> int:
    """Count the leading prompt tokens that the probe's groups share."""
    return min(PROBE_COMMON_TOKENS, *(len(group.prompt_ids) for group in groups))


def _agrees(
    model: PreTrainedModel,
    groups: Sequence[Group],
    alone_N: Tensor,
    *,
    rows: RowLayout,
) -> bool:
    """Whether a layout gives the values of sequences computed alone."""
    try:
        found_N = _compute(model, groups, rows=rows)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        logger.warning("%s runs without %s rows: %s", type(model).__name__, rows, error)
        return False
    difference = (found_N - alone_N).abs().max().item()
    if not difference <= TOLERANCE:
        logger.info("%s rows are off by %.3g nats from single sequences", rows, difference)
    return difference <= TOLERANCE


def _compute(model: PreTrainedModel, groups: Sequence[Group], *, rows: RowLayout) -> Tensor:
    """Compute the completion tokens of groups in one batch.

    Packed rows hold the prompt tokens that all groups share only once.
    """
    common = [_count_common(groups)] * len(groups) if rows == "packed" else []
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
