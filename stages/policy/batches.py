"""How do groups become tensors? Rows of prompt and completions, padded on the right.

Shape suffixes: R rows, L tokens of the longest row, C completions, N completion tokens of all C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from stages.policy.groups import Group, IntArray

PADDING_SEGMENT = -1
PROMPT_SEGMENT = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the model reads, and where it predicts a completion token.

    The N completion tokens stand group by group, completion by completion.
    """

    input_ids_RL: Tensor
    """int64; 0 on padding."""
    position_ids_RL: Tensor
    """int64; every completion's positions continue the prompt's."""
    segment_ids_RL: Tensor | None
    """int64; PROMPT_SEGMENT, 1, 2, … for the row's completions, PADDING_SEGMENT.

    None where no row has more than one completion: then each token sees all tokens before it.
    """
    predicting_N: Tensor
    """int64; the place, in the flattened [R * L], whose output predicts the completion token."""
    target_ids_N: Tensor
    """int64; the completion tokens."""
    completion_lengths_C: Tensor
    """int64; they add up to N."""


def plan_microbatches(num_tokens: IntArray, *, max_tokens: int) -> list[IntArray]:
    """Cut rows into micro-batches of similar length.

    Args:
        num_tokens: int [R], the length of each row.
        max_tokens: the most that a micro-batch holds, padding included. A row that is longer
            stands alone.
    Returns:
        Row numbers, int32, by micro-batch, longest rows first: if memory runs out, it does so at
        the start. Each row stands in exactly one micro-batch.
    """
    order = np.argsort(-num_tokens, kind="stable").astype(np.int32)
    microbatches = []
    start = 0
    while start < len(order):
        num_rows = max(1, max_tokens // int(num_tokens[order[start]]))
        microbatches.append(order[start : start + num_rows])
        start += num_rows
    return microbatches


def lay_out(groups: Sequence[Group], *, device: torch.device, share_prompt: bool = True) -> Batch:
    """Make the tensors for one micro-batch.

    Args:
        groups: at least one.
        device: where the tensors are wanted.
        share_prompt: one row a group, which holds the prompt once, then each completion.
            Otherwise one row a completion.
    """
    rows = groups if share_prompt else [single for group in groups for single in group.split()]
    num_columns = max(row.num_tokens for row in rows)
    shape = (len(rows), num_columns)
    input_ids_RL = np.zeros(shape, np.int64)
    position_ids_RL = np.zeros(shape, np.int64)
    segment_ids_RL = np.full(shape, PADDING_SEGMENT, np.int64)
    predicting: list[np.ndarray] = []
    for row_number, row in enumerate(rows):
        num_prompt_tokens = len(row.prompt_ids)
        input_ids_RL[row_number, :num_prompt_tokens] = row.prompt_ids
        position_ids_RL[row_number, :num_prompt_tokens] = np.arange(num_prompt_tokens)
        segment_ids_RL[row_number, :num_prompt_tokens] = PROMPT_SEGMENT
        last_prompt_place = row_number * num_columns + num_prompt_tokens - 1
        start = num_prompt_tokens
        for segment, completion_ids in enumerate(row.completions, start=1):
            length = len(completion_ids)
            here = slice(start, start + length)
            input_ids_RL[row_number, here] = completion_ids
            position_ids_RL[row_number, here] = num_prompt_tokens + np.arange(length)
            segment_ids_RL[row_number, here] = segment
            first_place = row_number * num_columns + start
            predicting.append(np.array([last_prompt_place]))
            predicting.append(np.arange(first_place, first_place + length - 1))
            start += length
    completions = list(chain.from_iterable(row.completions for row in rows))
    is_shared = len(completions) > len(rows)

    def to_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(device, non_blocking=True)

    return Batch(
        input_ids_RL=to_device(input_ids_RL),
        position_ids_RL=to_device(position_ids_RL),
        segment_ids_RL=to_device(segment_ids_RL) if is_shared else None,
        predicting_N=to_device(np.concatenate(predicting)),
        target_ids_N=to_device(np.concatenate(completions)),
        completion_lengths_C=to_device(np.array([len(ids) for ids in completions])),
    )
