"""Cut groups into micro-batches and lay them out in rows of tokens.

No row holds the last token of a completion, which is predicted but predicts nothing, except a row
that is computed alone: the model's positions may depend on its whole length.

Shape suffixes: R rows, L tokens of the longest row, C completions, N completion tokens of all C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stages.policy.groups import Group, IntArray

RowLayout = Literal["packed", "shared", "separate", "alone"]
"""Contents of a row.

packed: any number of groups, without padding. shared: one prompt with all of its completions.
separate: one prompt with one completion. alone: the same with its last token, and a forward pass of
its own, as in plain transformers. `choose_rows` tests which of them a model computes correctly.
"""

Spans = tuple[tuple[int, ...], ...]
"""The rows of `Batch.spans_C6`."""

PADDING_SEGMENT = -1
"""Segment id of padding."""
PROMPT_SEGMENT = 0
"""Segment id of prompt tokens."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input of the model, and the positions at which it predicts completion tokens.

    The N completion tokens are in order of groups, then of completions.
    """

    input_ids_RL: Tensor
    """int64; 0 on padding."""
    position_ids_RL: Tensor
    """int64; the positions of each completion continue those of its prompt."""
    segment_ids_RL: Tensor | None
    """int64; PROMPT_SEGMENT, 1, 2, … for the completions of the row, or PADDING_SEGMENT.

    None where no row has more than one completion, so that each token sees all tokens before it,
    and where groups are packed.
    """
    spans_C6: Tensor | None
    """int64, in main memory, packed groups only: start and end, in the row, of the three spans that
    a completion sees: prompt tokens shared with another group, the rest of its prompt, and the
    completion. The first completion follows its prompt directly, so its own span starts with the
    prompt, and its prompt span is empty."""
    row_lengths: tuple[int, ...] | None
    """Rows computed alone only: tokens of each row, padding excluded."""
    predicting_N: Tensor
    """int64; index into the flattened [R * L] of the output that predicts the completion token."""
    target_ids_N: Tensor
    """int64; the completion tokens."""
    completion_lengths_C: Tensor
    """int64; tokens of each completion, N in total."""


def plan_microbatches(
    num_tokens: IntArray, *, max_tokens: int, is_packed: bool = False
) -> list[IntArray]:
    """Cut groups into micro-batches.

    Args:
        num_tokens: int [groups], tokens that the model reads of each group.
        max_tokens: most tokens in a micro-batch, padding included. A longer group gets a
            micro-batch of its own.
        is_packed: whether groups share one row without padding. Otherwise groups of similar length
            are put together, since all rows are padded to the longest.
    Returns:
        Group numbers, int32, by micro-batch, each group exactly once. The longest groups come
        first, so that running out of memory shows at the start.
    """
    order = np.argsort(-num_tokens, kind="stable").astype(np.int32)
    if is_packed:
        return _fill_bins(order, num_tokens, max_tokens=max_tokens)
    microbatches = []
    start = 0
    while start < len(order):
        num_rows = max(1, max_tokens // int(num_tokens[order[start]]))
        microbatches.append(order[start : start + num_rows])
        start += num_rows
    return microbatches


def _fill_bins(order: IntArray, num_tokens: IntArray, *, max_tokens: int) -> list[IntArray]:
    """Make as few micro-batches as first fit does, of even size where that fits the budget.

    Each micro-batch has a fixed cost, and a small one costs more a token.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for number in order.tolist():
        wanted = int(num_tokens[number])
        has_room = (at for at, load in enumerate(loads) if load + wanted <= max_tokens)
        place = next(has_room, len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(number)
        loads[place] += wanted
    even = deal_evenly(order, num_tokens, num_shares=len(bins))
    even_loads = [int(num_tokens[share].sum()) for share in even]
    is_within = all(
        len(share) == 1 or load <= max_tokens for share, load in zip(even, even_loads, strict=True)
    )
    if is_within and even and max(even_loads) <= max(loads):
        return even
    return [np.array(numbers, np.int32) for numbers in bins]


def deal_evenly(order: IntArray, num_tokens: IntArray, *, num_shares: int) -> list[IntArray]:
    """Deal groups, in this order, each to the share with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for number in order.tolist():
        place = loads.index(min(loads))
        shares[place].append(number)
        loads[place] += int(num_tokens[number])
    return [np.array(numbers, np.int32) for numbers in shares]


def lay_out(
    groups: Sequence[Group],
    *,
    device: torch.device,
    rows: RowLayout = "shared",
    num_common: Sequence[int] = (),
) -> Batch:
    """Make the tensors of one micro-batch.

    Args:
        groups: at least one group.
        device: device of the tensors.
        rows: layout of the rows. A packed batch has one row.
        num_common: packed groups only: how many leading prompt tokens each group shares with the
            group for which this number is largest. The row holds them once. Empty means none.
    """
    is_split = rows in ("separate", "alone")
    parts = [one for group in groups for one in group.split()] if is_split else groups
    num_unread = 0 if rows == "alone" else 1
    assert rows == "packed" or not any(num_common)
    common = num_common if any(num_common) else [0] * len(parts)
    owner = int(np.argmax(common))
    left_out = [0 if at == owner else number for at, number in enumerate(common)]
    lengths = [
        part.num_tokens - num_unread * len(part.completions) - skipped
        for part, skipped in zip(parts, left_out, strict=True)
    ]
    num_rows, num_columns = (1, sum(lengths)) if rows == "packed" else (len(parts), max(lengths))
    widths = lengths if rows == "packed" else [num_columns] * len(parts)
    starts = list(accumulate(widths, initial=0))[:-1]
    size = num_rows * num_columns
    input_ids = np.zeros(size, np.int64)
    position_ids = np.zeros(size, np.int64)
    segment_ids = np.full(size, PADDING_SEGMENT, np.int64)
    predicting: list[np.ndarray] = []
    spans: list[tuple[int, int, int, int, int, int]] = []
    common_ids, common_start = parts[owner].prompt_ids, starts[owner]
    for part, start, skipped in zip(parts, starts, left_out, strict=True):
        assert np.array_equal(part.prompt_ids[:skipped], common_ids[:skipped])
        num_prompt_tokens = len(part.prompt_ids)
        prompt_end = start + num_prompt_tokens - skipped
        common_end = common_start + skipped
        # A prompt that is shared entirely predicts from its last shared token.
        prompt_last = (prompt_end if num_prompt_tokens > skipped else common_end) - 1
        input_ids[start:prompt_end] = part.prompt_ids[skipped:]
        position_ids[start:prompt_end] = np.arange(skipped, num_prompt_tokens)
        segment_ids[start:prompt_end] = PROMPT_SEGMENT
        first = prompt_end
        for segment, completion_ids in enumerate(part.completions, start=1):
            length = len(completion_ids) - num_unread
            here = slice(first, first + length)
            input_ids[here] = completion_ids[:length]
            position_ids[here] = num_prompt_tokens + np.arange(length)
            segment_ids[here] = segment
            predicting.append(np.array([prompt_last]))
            predicting.append(np.arange(first, first + len(completion_ids) - 1))
            own = (start, start, start) if segment == 1 else (start, prompt_end, first)
            spans.append((common_start, common_end, *own, first + length))
            first += length
    completions = list(chain.from_iterable(part.completions for part in parts))

    def to_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(device, non_blocking=True)

    def to_rows(values: np.ndarray) -> Tensor:
        return to_device(values.reshape(num_rows, num_columns))

    needs_segments = rows == "shared" and len(completions) > len(parts)
    return Batch(
        input_ids_RL=to_rows(input_ids),
        position_ids_RL=to_rows(position_ids),
        segment_ids_RL=to_rows(segment_ids) if needs_segments else None,
        spans_C6=torch.from_numpy(np.array(spans, np.int64)) if rows == "packed" else None,
        row_lengths=tuple(lengths) if rows == "alone" else None,
        predicting_N=to_device(np.concatenate(predicting)),
        target_ids_N=to_device(np.concatenate(completions)),
        completion_lengths_C=to_device(np.array([len(ids) for ids in completions])),
    )
