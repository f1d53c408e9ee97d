"""Micro-batches: pairs as tensors for the model, and the model's output as losses take it.

Shape suffixes: B pairs, T tokens of the longest completion of a side, N completion tokens in all.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.policy.batches import Batch, RowLayout, lay_out
from stages.policy.groups import Group, IntArray
from stages.policy.output_layer import TokenLogps
from stages.train.losses import PairLogps, SideLogps
from stages.train.order import (
    EpochOrder,
    MicroBatchPlan,
    PairNumbers,
    count_padded_tokens,
    share_batch,
)
from stages.train.pairs import BoolArray, FloatArray, Pair, PairIndex, PairReader
from stages.train.world import World

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Pairs that are computed together."""

    pair_ids: Sequence[str]
    places: Sequence[int]
    """Positions of the pairs in the whole batch."""
    batch: Batch
    completion_lengths: Sequence[int]
    """Of chosen and rejected alternately, as in the batch, but known without a device sync."""
    ref_chosen_token_logps_BT: Tensor | None
    ref_rejected_token_logps_BT: Tensor | None
    chosen_loss_mask_BT: Tensor
    rejected_loss_mask_BT: Tensor
    weights_B: Tensor
    """float32; 0 in a filler."""
    margins_B: Tensor
    """float32: margin of chosen over rejected in the data; NaN where it has none."""
    is_filler: bool

    def pair_logps(self, tokens: TokenLogps) -> PairLogps:
        """Split the model's values per completion token into sides and pairs."""
        logps = self._by_side(tokens.logps_N)
        log_collisions = (
            (None, None)
            if tokens.log_collision_N is None
            else self._by_side(tokens.log_collision_N)
        )
        return PairLogps(
            chosen=SideLogps(
                policy_token_logps_BT=logps[0],
                ref_token_logps_BT=self.ref_chosen_token_logps_BT,
                loss_mask_BT=self.chosen_loss_mask_BT,
                policy_log_collision_BT=log_collisions[0],
            ),
            rejected=SideLogps(
                policy_token_logps_BT=logps[1],
                ref_token_logps_BT=self.ref_rejected_token_logps_BT,
                loss_mask_BT=self.rejected_loss_mask_BT,
                policy_log_collision_BT=log_collisions[1],
            ),
            margins_B=self.margins_B,
        )

    def _by_side(self, values_N: Tensor) -> tuple[Tensor, Tensor]:
        completions = values_N.split(list(self.completion_lengths))
        return (
            pad_sequence(completions[0::2], batch_first=True),
            pad_sequence(completions[1::2], batch_first=True),
        )


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """This worker's share of a batch, and the size of the whole."""

    microbatches: Sequence[MicroBatch]
    num_pairs: int
    """Pairs of the whole batch, over all workers."""
    num_tokens: int
    """Tokens of the whole batch, without padding and fillers; prompts and their common prefixes
    count as often as they are computed."""
    num_padded_tokens: int
    """The same including padding and fillers."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How pairs are arranged in micro-batches; it changes only rounding."""

    max_tokens: int
    rows: RowLayout

    @property
    def shares_prompt(self) -> bool:
        """Whether chosen and rejected share one computation of their prompt."""
        return self.rows in ("packed", "shared")

    @property
    def num_tokens_at_once(self) -> int:
        """Most tokens of a micro-batch with several pairs; none holds several if each sequence is
        computed alone, so that all workers do the same number of forward passes."""
        return 1 if self.rows == "alone" else self.max_tokens

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed, without padding."""
        return self.rows == "packed"


def lay_out_pairs(
    pairs: Sequence[Pair],
    *,
    device: torch.device,
    rows: RowLayout,
    places: Sequence[int] | None = None,
    is_filler: bool = False,
    num_common: Sequence[int] = (),
) -> MicroBatch:
    """Make the tensors of a micro-batch.

    Args:
        places: positions of the pairs in the batch; absent if they are the whole batch.
        num_common: as for `lay_out`.
    """

    def to_device(rows: Sequence[FloatArray | BoolArray]) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
        return pad_sequence(tensors, batch_first=True).to(device, non_blocking=True)

    def to_device_if_scored(rows: Sequence[FloatArray | None]) -> Tensor | None:
        scored = [row for row in rows if row is not None]
        return to_device(scored) if scored else None

    weights = [0.0 if is_filler else pair.weight for pair in pairs]
    margins = [math.nan if pair.margin is None else pair.margin for pair in pairs]
    groups = [pair.group for pair in pairs]
    return MicroBatch(
        pair_ids=[pair.pair_id for pair in pairs],
        places=range(len(pairs)) if places is None else places,
        batch=lay_out(groups, device=device, rows=rows, num_common=num_common),
        completion_lengths=[len(ids) for group in groups for ids in group.completions],
        ref_chosen_token_logps_BT=to_device_if_scored(
            [pair.ref_chosen_token_logps_C for pair in pairs]
        ),
        ref_rejected_token_logps_BT=to_device_if_scored(
            [pair.ref_rejected_token_logps_R for pair in pairs]
        ),
        chosen_loss_mask_BT=to_device([pair.chosen_loss_mask_C for pair in pairs]),
        rejected_loss_mask_BT=to_device([pair.rejected_loss_mask_R for pair in pairs]),
        weights_B=torch.tensor(weights, dtype=torch.float32, device=device),
        margins_B=torch.tensor(margins, dtype=torch.float32, device=device),
        is_filler=is_filler,
    )


def read_batches(
    index: PairIndex,
    order: EpochOrder,
    *,
    batch_size: int,
    first: int = 0,
    layout: Layout,
    world: World,
) -> Iterator[StepBatch]:
    """Yield this worker's share of each batch of an epoch, from batch `first` on."""
    reader = PairReader(index=index, order=order)
    for number in range(first, -(-len(index) // batch_size)):
        pairs_B = order.batch(number, batch_size)
        planned = _plan_batch(index, pairs_B, layout=layout, world=world)
        position = number * batch_size + len(pairs_B)
        yield StepBatch(
            microbatches=[
                lay_out_pairs(
                    reader.read(pairs_B[plan.places]),
                    device=world.device,
                    rows=layout.rows,
                    places=plan.places.tolist(),
                    is_filler=plan.is_filler,
                    num_common=planned.num_common_B[plan.places].tolist(),
                )
                for plan in planned.workers[world.rank]
            ],
            num_pairs=len(pairs_B),
            num_tokens=planned.num_tokens,
            num_padded_tokens=planned.num_padded_tokens,
        )
        reader.forget_before(position)


@dataclass(frozen=True, kw_only=True)
class _BatchPlan:
    workers: Sequence[Sequence[MicroBatchPlan]]
    num_common_B: IntArray
    """Tokens at the start of each prompt that its micro-batch may share."""
    num_tokens: int
    num_padded_tokens: int
    """Both as in StepBatch."""
    largest: PairNumbers
    """Pairs of the micro-batch with the most tokens, of any worker."""
    num_in_largest: int
    """Its tokens, padding included."""


def _plan_batch(
    index: PairIndex, pairs_B: PairNumbers, *, layout: Layout, world: World
) -> _BatchPlan:
    """Divide a batch among the workers, and count the tokens to compute.

    Each micro-batch reserves room in its budget for the common prefix of its prompts.
    """
    num_tokens_B = index.num_tokens(pairs_B, share_prompt=layout.shares_prompt)
    num_common_B = np.zeros(len(pairs_B), np.int32)
    if layout.is_packed:
        num_common_B = index.num_common_tokens_P[pairs_B]
    plans = share_batch(
        num_tokens_B - num_common_B,
        num_workers=world.size,
        max_tokens=max(1, layout.num_tokens_at_once - int(num_common_B.max())),
        is_packed=layout.is_packed,
    )
    together = [plan.places for worker in plans for plan in worker]
    num_saved = [
        int(num_common_B[places].sum() - num_common_B[places].max()) for places in together
    ]
    num_padded = [
        count_padded_tokens(num_tokens_B[places], is_packed=layout.is_packed) - saved
        for places, saved in zip(together, num_saved, strict=True)
    ]
    num_tokens = index.count_tokens(pairs_B, share_prompt=layout.shares_prompt)
    return _BatchPlan(
        workers=plans,
        num_common_B=num_common_B,
        num_tokens=num_tokens - sum(num_saved),
        num_padded_tokens=sum(num_padded),
        largest=pairs_B[together[int(np.argmax(num_padded))]],
        num_in_largest=max(num_padded),
    )


@dataclass(frozen=True, kw_only=True)
class EpochTokens:
    """Token counts of an epoch's batches, derived from the lengths of the pairs alone."""

    most: int
    """Tokens of the largest batch, over all workers."""
    total: int
    """Tokens of the epoch, counted as in StepBatch."""
    padded: int
    """The same including padding and fillers."""
    largest: PairNumbers
    """Pairs of the micro-batch with the most tokens."""

    @property
    def padding_share(self) -> float:
        return 1 - self.total / self.padded


def plan_epoch(
    index: PairIndex, order: EpochOrder, *, batch_size: int, layout: Layout, world: World
) -> EpochTokens:
    """Count the tokens that `read_batches` will yield, without reading any pair."""
    counts = []
    largest, num_in_largest = order.pairs_P[:0], 0
    for number in range(-(-len(index) // batch_size)):
        pairs_B = order.batch(number, batch_size)
        planned = _plan_batch(index, pairs_B, layout=layout, world=world)
        counts.append((planned.num_tokens, planned.num_padded_tokens))
        if planned.num_in_largest > num_in_largest:
            largest, num_in_largest = planned.largest, planned.num_in_largest
    totals, padded = zip(*counts, strict=True)
    return EpochTokens(most=max(totals), total=sum(totals), padded=sum(padded), largest=largest)


def lay_out_blank(
    index: PairIndex, pairs_B: PairNumbers, *, layout: Layout, device: torch.device
) -> Batch:
    """Make a batch of zeros with the lengths of these pairs, without reading any pair."""
    lengths = (
        numbers[pairs_B].tolist()
        for numbers in (
            index.num_prompt_tokens_P,
            index.num_chosen_tokens_P,
            index.num_rejected_tokens_P,
        )
    )
    groups = [
        Group(
            prompt_ids=np.zeros(num_prompt, np.int32),
            completions=(np.zeros(num_chosen, np.int32), np.zeros(num_rejected, np.int32)),
        )
        for num_prompt, num_chosen, num_rejected in zip(*lengths, strict=True)
    ]
    num_common = index.num_common_tokens_P[pairs_B].tolist() if layout.is_packed else ()
    return lay_out(groups, device=device, rows=layout.rows, num_common=num_common)


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Compute each item in a thread while the previous one is in use."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
