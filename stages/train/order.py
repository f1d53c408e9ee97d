"""Order of the pairs in an epoch, and division of each batch among workers and micro-batches.

The order is a function of (seed, epoch) and of the data's shards, and batches are cut from it. Only
then is a batch divided among workers and micro-batches, so those change only rounding.

Shape suffixes: P pairs, S shards, B pairs of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.policy.batches import deal_evenly, plan_microbatches
from stages.policy.groups import IntArray

PairNumbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """Order of one pass over all pairs, which are numbered from 0, shard by shard."""

    pairs_P: PairNumbers
    """Each pair's number, once."""
    window_end_S: PairNumbers
    """By shard: the position in pairs_P after which none of its pairs follows."""

    def batch(self, number: int, batch_size: int) -> PairNumbers:
        """Return the pairs of a batch, numbered from 0; the last batch may be short."""
        return self.pairs_P[number * batch_size : (number + 1) * batch_size]


def order_epoch(
    num_pairs_S: Sequence[int],
    num_bytes_S: Sequence[int],
    *,
    seed: int,
    epoch: int,
    window_bytes: int,
) -> EpochOrder:
    """Shuffle the shards, cut them into windows, and shuffle the pairs within each window.

    Data that fits into one window is shuffled as a whole. With more data, reading stays sequential
    and memory bounded, and each shard, being a range of hashed ids, is a random sample already.

    Args:
        num_pairs_S: pairs in each shard.
        num_bytes_S: memory of each shard's pairs.
        seed: the training's seed.
        epoch: from 0.
        window_bytes: maximum size of a window; a larger shard is a window of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    starts_S = np.cumsum([0, *num_pairs_S])
    window_end_S = np.zeros(len(num_pairs_S), np.int64)
    parts = []
    end = 0
    for window in _cut_windows(rng.permutation(len(num_pairs_S)), num_bytes_S, window_bytes):
        numbers = [np.arange(starts_S[shard], starts_S[shard + 1]) for shard in window]
        parts.append(rng.permutation(np.concatenate(numbers)))
        end += len(parts[-1])
        window_end_S[window] = end
    return EpochOrder(pairs_P=np.concatenate(parts), window_end_S=window_end_S)


def keep_order(num_pairs_S: Sequence[int]) -> EpochOrder:
    """Keep the pairs in their stored order, for evaluation."""
    ends_S = np.cumsum(num_pairs_S, dtype=np.int64)
    return EpochOrder(pairs_P=np.arange(sum(num_pairs_S)), window_end_S=ends_S)


def _cut_windows(
    shards: NDArray[np.int64], num_bytes_S: Sequence[int], window_bytes: int
) -> list[list[int]]:
    windows: list[list[int]] = []
    room = 0
    for shard in shards.tolist():
        if num_bytes_S[shard] > room or not windows:
            windows.append([])
            room = window_bytes
        windows[-1].append(shard)
        room -= num_bytes_S[shard]
    return windows


@dataclass(frozen=True, kw_only=True)
class MicroBatchPlan:
    """Pairs that one worker computes together."""

    places: IntArray
    """int32: positions of the pairs in the batch."""
    is_filler: bool = False
    """Whether it only keeps this worker in step with the others, at weight 0."""


def share_batch(
    num_tokens_B: IntArray, *, num_workers: int, max_tokens: int, is_packed: bool
) -> list[list[MicroBatchPlan]]:
    """Divide a batch among workers and cut each share into micro-batches.

    Pairs are assigned from longest to shortest, each to the worker with the fewest tokens so far.
    All workers get the same number of micro-batches, because they gather sharded weights in each:
    shorter lists are filled up with the batch's shortest pair at weight 0.

    Args:
        num_tokens_B: tokens of each pair.
        num_workers: at least 1.
        max_tokens: tokens of a micro-batch, padding included; a longer pair is computed alone.
        is_packed: whether pairs are concatenated without padding.
    Returns:
        The micro-batches of each worker.
    """
    longest_first = np.argsort(-num_tokens_B, kind="stable").astype(np.int32)
    shares = deal_evenly(longest_first, num_tokens_B, num_shares=num_workers)
    plans = [
        [
            MicroBatchPlan(places=share[rows])
            for rows in plan_microbatches(
                num_tokens_B[share], max_tokens=max_tokens, is_packed=is_packed
            )
        ]
        for share in shares
    ]
    shortest = np.array([np.argmin(num_tokens_B)], np.int32)
    filler = MicroBatchPlan(places=shortest, is_filler=True)
    longest_list = max(len(plan) for plan in plans)
    return [plan + [filler] * (longest_list - len(plan)) for plan in plans]


def count_padded_tokens(num_tokens_B: IntArray, *, is_packed: bool) -> int:
    """Count the tokens computed for the pairs of a micro-batch, padding included."""
    return int(num_tokens_B.sum() if is_packed else len(num_tokens_B) * num_tokens_B.max())
