"""How do pairs become the tensors of a step, and the model's output what a loss sees?

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
from stages.policy.logps import TokenLogps
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
    """Pairs that are computed at once."""

    pair_ids: Sequence[str]
    places: Sequence[int]
    """Where the pairs stand in the whole batch."""
    batch: Batch
    completion_lengths: Sequence[int]
    """Of chosen and rejected in turn, as in the batch, but known without asking the device."""
    ref_chosen_token_logps_BT: Tensor | None
    ref_rejected_token_logps_BT: Tensor | None
    chosen_loss_mask_BT: Tensor
    rejected_loss_mask_BT: Tensor
    weights_B: Tensor
    """float32; 0 for a filler."""
    margins_B: Tensor
    """float32: by how much the data prefers the chosen side; NaN where it does not say."""
    is_filler: bool

    def pair_logps(self, tokens: TokenLogps) -> PairLogps:
        """Split what the model gave for each completion token into sides and pairs."""
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
    """Of the whole batch, over all workers."""
    num_tokens: int
    """Of the whole batch; prompts, and what they have in common, counted as often as they are
    computed, padding and fillers left out."""
    num_padded_tokens: int
    """The same with padding and fillers."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How pairs are put together, which changes only rounding."""

    max_tokens: int
    rows: RowLayout

    @property
    def shares_prompt(self) -> bool:
        """Whether a pair's prompt is computed once."""
        return self.rows != "separate"

    @property
    def is_packed(self) -> bool:
        """Whether there is no padding."""
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
        places: those of the pairs in the batch; absent if it is all.
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
    """Give this worker's share of every batch of an epoch, from a batch number on."""
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
    """How much of each prompt others of its micro-batch may have in common with it."""
    num_tokens: int
    num_padded_tokens: int
    """Both as in StepBatch."""
    largest: PairNumbers
    """The pairs of the micro-batch in which most is computed, whoever computes it."""
    num_in_largest: int
    """Its tokens, padding included."""


def _plan_batch(
    index: PairIndex, pairs_B: PairNumbers, *, layout: Layout, world: World
) -> _BatchPlan:
    """Deal a batch out to the workers, and count what they will compute.

    Of a micro-batch's budget, room for what prompts have in common is kept free.
    """
    num_tokens_B = index.num_tokens(pairs_B, share_prompt=layout.shares_prompt)
    num_common_B = np.zeros(len(pairs_B), np.int32)
    if layout.is_packed:
        num_common_B = index.num_common_tokens_P[pairs_B]
    plans = share_batch(
        num_tokens_B - num_common_B,
        num_workers=world.size,
        max_tokens=max(1, layout.max_tokens - int(num_common_B.max())),
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
    """What the batches of an epoch hold, known from the lengths of the pairs alone."""

    most: int
    """Tokens of the largest batch, over all workers."""
    total: int
    """Of the epoch, as in StepBatch."""
    padded: int
    """The same with padding and fillers."""
    largest: PairNumbers
    """The pairs of the micro-batch in which most is computed."""

    @property
    def padding_share(self) -> float:
        return 1 - self.total / self.padded


def plan_epoch(
    index: PairIndex, order: EpochOrder, *, batch_size: int, layout: Layout, world: World
) -> EpochTokens:
    """Count what `read_batches` will give, before anything is read."""
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
    """Make a batch of these pairs' lengths in which every token is 0; no pair is read for it."""
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
    """Compute each item in a thread while the one before is being used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
