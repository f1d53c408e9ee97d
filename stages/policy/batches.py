"""How do groups become tensors? Which of them are computed together, and in which rows?

The last token of a completion is predicted, and predicts nothing: no row holds it.

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

RowLayout = Literal["packed", "shared", "separate"]
"""What stands in a row: any number of groups, without padding; one group, prompt and completions;
one completion behind its prompt. Which of them a model can do is found out by `choose_rows`."""

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

    None where no row has more than one completion: then each token sees all tokens before it. None
    also where groups are packed.
    """
    spans_C6: Tensor | None
    """int64, packed groups only: where in the row what each completion sees starts and ends: what
    its prompt has in common with another's, the rest of its prompt, and the completion. A prompt's
    first completion stands right behind it; its span begins with the prompt, and the prompt counts
    as empty."""
    predicting_N: Tensor
    """int64; the place, in the flattened [R * L], whose output predicts the completion token."""
    target_ids_N: Tensor
    """int64; the completion tokens."""
    completion_lengths_C: Tensor
    """int64; they add up to N."""


def plan_microbatches(
    num_tokens: IntArray, *, max_tokens: int, is_packed: bool = False
) -> list[IntArray]:
    """Cut groups into micro-batches.

    Args:
        num_tokens: int [groups], the tokens that are read of each.
        max_tokens: the most that a micro-batch holds, padding included. A group that is longer
            stands alone.
        is_packed: whether groups stand one behind the other. Otherwise those of similar length
            are put together, since all rows are as long as the longest.
    Returns:
        Group numbers, int32, by micro-batch; the longest groups come first: if memory runs out, it
        does so at the start. Each group stands in exactly one micro-batch.
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
    """Make as few micro-batches as first fit does, and the largest of them smaller where it can be.

    A micro-batch costs something whatever it holds, and a small one costs more a token.
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
    """Give each group, in this order, to the share that has the fewest tokens so far."""
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
    """Make the tensors for one micro-batch.

    Args:
        groups: at least one.
        device: where the tensors are wanted.
        rows: what stands in a row. A packed batch has one row.
        num_common: packed groups only: how many leading prompt tokens each has in common with the
            group that has the most. They stand in the row once. Absent: none.
    """
    parts = [one for group in groups for one in group.split()] if rows == "separate" else groups
    assert rows == "packed" or not any(num_common)
    common = num_common if any(num_common) else [0] * len(parts)
    owner = int(np.argmax(common))
    left_out = [0 if at == owner else number for at, number in enumerate(common)]
    lengths = [part.num_read - skipped for part, skipped in zip(parts, left_out, strict=True)]
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
        # Where nothing of the prompt is its own, the common part predicts.
        prompt_last = (prompt_end if num_prompt_tokens > skipped else common_end) - 1
        input_ids[start:prompt_end] = part.prompt_ids[skipped:]
        position_ids[start:prompt_end] = np.arange(skipped, num_prompt_tokens)
        segment_ids[start:prompt_end] = PROMPT_SEGMENT
        first = prompt_end
        for segment, completion_ids in enumerate(part.completions, start=1):
            length = len(completion_ids) - 1
            here = slice(first, first + length)
            input_ids[here] = completion_ids[:-1]
            position_ids[here] = num_prompt_tokens + np.arange(length)
            segment_ids[here] = segment
            predicting.append(np.array([prompt_last]))
            predicting.append(np.arange(first, first + length))
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
        spans_C6=to_device(np.array(spans)) if rows == "packed" else None,
        predicting_N=to_device(np.concatenate(predicting)),
        target_ids_N=to_device(np.concatenate(completions)),
        completion_lengths_C=to_device(np.array([len(ids) for ids in completions])),
    )
