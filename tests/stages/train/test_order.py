"""Every pair comes once per epoch, in an order that does not depend on the workers."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.policy.groups import IntArray
from stages.train.order import (
    MicroBatchPlan,
    count_padded_tokens,
    keep_order,
    order_epoch,
    share_batch,
)

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)


@given(sizes=SIZES, epoch=st.integers(0, 3), window_bytes=st.integers(1, 500))
def test_every_pair_comes_once_an_epoch(sizes: list[int], epoch: int, window_bytes: int) -> None:
    num_bytes = [10 * size for size in sizes]
    order = order_epoch(sizes, num_bytes, seed=0, epoch=epoch, window_bytes=window_bytes)
    assert sorted(order.pairs_P.tolist()) == list(range(sum(sizes)))
    batches = [order.batch(number, 4) for number in range(-(-sum(sizes) // 4))]
    assert np.concatenate(batches).tolist() == order.pairs_P.tolist()


@given(sizes=SIZES, window_bytes=st.integers(1, 500))
def test_no_pair_of_a_shard_comes_after_its_window(sizes: list[int], window_bytes: int) -> None:
    num_bytes = [10 * size for size in sizes]
    order = order_epoch(sizes, num_bytes, seed=3, epoch=0, window_bytes=window_bytes)
    shards = np.repeat(np.arange(len(sizes)), sizes)
    held: dict[int, int] = {}
    for position, pair in enumerate(order.pairs_P.tolist()):
        assert position < order.window_end_S[shards[pair]]
        held.setdefault(int(order.window_end_S[shards[pair]]), position)
    for end, begin in held.items():
        window = {int(shards[pair]) for pair in order.pairs_P[begin:end]}
        assert len(window) == 1 or sum(num_bytes[shard] for shard in window) <= window_bytes


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        made = order_epoch([40, 60], [400, 600], seed=seed, epoch=epoch, window_bytes=1 << 20)
        return made.pairs_P.tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    # One window: pairs of both shards are mixed from the start.
    assert 0 < sum(pair < 40 for pair in order(0, 0)[:20]) < 20


def test_evaluation_keeps_the_order() -> None:
    order = keep_order([3, 0, 2])
    assert order.pairs_P.tolist() == [0, 1, 2, 3, 4]
    assert order.window_end_S.tolist() == [3, 3, 5]


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=24),
    num_workers=st.integers(1, 5),
    max_tokens=st.integers(1, 600),
    is_packed=st.booleans(),
)
def test_a_batch_is_shared_out_whole(
    lengths: list[int], num_workers: int, max_tokens: int, is_packed: bool
) -> None:
    num_tokens = np.array(lengths, np.int32)
    shares = share_batch(
        num_tokens, num_workers=num_workers, max_tokens=max_tokens, is_packed=is_packed
    )
    assert len(shares) == num_workers
    assert len({len(share) for share in shares}) == 1, "sharded workers would wait for each other"
    counted = [plan.places.tolist() for plan in chain(*shares) if not plan.is_filler]
    assert sorted(chain(*counted)) == list(range(len(lengths)))
    for places in counted:
        computed = sum(num_tokens[places]) if is_packed else len(places) * max(num_tokens[places])
        assert len(places) == 1 or computed <= max_tokens


def test_workers_get_equal_shares_of_tokens() -> None:
    """Longest first, each to the worker with the fewest tokens: 9, 6, 5 and 8, 7, 5."""
    num_tokens = np.array([5, 9, 7, 8, 6, 5], np.int32)
    shares = share_batch(num_tokens, num_workers=2, max_tokens=1, is_packed=False)
    loads = [sum(int(num_tokens[plan.places[0]]) for plan in share) for share in shares]
    assert loads == [20, 20]


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_worker_without_pairs_gets_fillers(is_packed: bool) -> None:
    num_tokens = np.array([30, 20, 10], np.int32)
    shares = share_batch(num_tokens, num_workers=4, max_tokens=100, is_packed=is_packed)
    assert [share[0].is_filler for share in shares] == [False, False, False, True]
    assert shares[3][0].places.tolist() == [2], "the shortest pair costs least"
    assert count_all(shares, num_tokens, is_packed=is_packed) == 70


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 60), (60, 30 * 2 + 10), (90, 90)])
def test_padding_is_counted(max_tokens: int, expected: int) -> None:
    num_tokens = np.array([20, 30, 10], np.int32)
    shares = share_batch(num_tokens, num_workers=1, max_tokens=max_tokens, is_packed=False)
    assert count_all(shares, num_tokens, is_packed=False) == expected


@pytest.mark.parametrize("max_tokens", [1, 40, 60])
def test_packed_pairs_have_no_padding(max_tokens: int) -> None:
    num_tokens = np.array([20, 30, 10], np.int32)
    shares = share_batch(num_tokens, num_workers=1, max_tokens=max_tokens, is_packed=True)
    assert count_all(shares, num_tokens, is_packed=True) == 60


def count_all(
    shares: Sequence[Sequence[MicroBatchPlan]], num_tokens: IntArray, *, is_packed: bool
) -> int:
    """Count the tokens that all workers compute."""
    places = [plan.places for share in shares for plan in share]
    return sum(count_padded_tokens(num_tokens[one], is_packed=is_packed) for one in places)
