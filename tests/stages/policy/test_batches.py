"""Micro-batches keep within their budget, and rows have the documented layout."""

import numpy as np
import pytest
import torch

from stages.policy.batches import lay_out, plan_microbatches
from stages.policy.groups import Group

CPU = torch.device("cpu")


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("max_tokens", [1, 50, 128, 1000, 10**6])
def test_microbatches_hold_every_row_once_within_the_budget(max_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=200, dtype=np.int32)
    microbatches = plan_microbatches(lengths, max_tokens=max_tokens)
    assert sorted(np.concatenate(microbatches)) == list(range(200))
    for rows in microbatches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= max_tokens


def test_microbatches_are_full_and_sorted_by_length() -> None:
    """Longest first; 3 + 3 fill 6, and so do 2, 2 and 1 padded to 2; ties keep their order."""
    microbatches = plan_microbatches(ids(2, 3, 7, 2, 3, 1), max_tokens=6)
    assert [rows.tolist() for rows in microbatches] == [[2], [1, 4], [0, 3, 5]]


@pytest.mark.parametrize("max_tokens", [1, 50, 300, 1000, 10**6])
def test_packed_microbatches_hold_every_group_once_within_the_budget(max_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=200, dtype=np.int32)
    microbatches = plan_microbatches(lengths, max_tokens=max_tokens, is_packed=True)
    assert sorted(np.concatenate(microbatches)) == list(range(200))
    for groups in microbatches:
        assert len(groups) == 1 or lengths[groups].sum() <= max_tokens
    if max_tokens == 1000:
        assert len(microbatches) == -(-lengths.sum() // 1000), "the fewest possible"


def test_packed_microbatches_fill_the_room_that_is_left() -> None:
    """7 gets a micro-batch of its own; 5 and 1 fill 6, and so do 3 and 3."""
    microbatches = plan_microbatches(ids(3, 5, 7, 3, 1), max_tokens=6, is_packed=True)
    assert [groups.tolist() for groups in microbatches] == [[2], [1, 4], [0, 3]]


def test_packed_microbatches_are_equally_large_where_that_takes_no_more_of_them() -> None:
    """First fit would put 4, 2 and 2 together and leave the last 2 alone.

    In the second case, first fit gives loads of 9 and 9, which is better than what dealing gives:
    5 + 3 = 8 and 4 + 3 + 3 = 10.
    """
    microbatches = plan_microbatches(ids(4, 2, 2, 2), max_tokens=8, is_packed=True)
    assert [groups.tolist() for groups in microbatches] == [[0, 3], [1, 2]]
    microbatches = plan_microbatches(ids(5, 4, 3, 3, 3), max_tokens=10, is_packed=True)
    assert [groups.tolist() for groups in microbatches] == [[0, 1], [2, 3, 4]]


def test_no_rows_make_no_microbatches() -> None:
    assert plan_microbatches(ids(), max_tokens=6) == []


def test_shared_rows() -> None:
    """The row holds the prompt once; its last token, at index 1, predicts both first tokens.

    No row holds the last token of a completion, because it predicts nothing.
    """
    groups = [
        Group(prompt_ids=ids(10, 11), completions=(ids(20, 21), ids(30, 31, 32))),
        Group(prompt_ids=ids(12), completions=(ids(40),)),
    ]
    batch = lay_out(groups, device=CPU)
    assert batch.input_ids_RL.tolist() == [[10, 11, 20, 30, 31], [12, 0, 0, 0, 0]]
    assert batch.position_ids_RL.tolist() == [[0, 1, 2, 2, 3], [0, 0, 0, 0, 0]]
    assert batch.segment_ids_RL is not None
    assert batch.segment_ids_RL.tolist() == [[0, 0, 1, 2, 2], [0, -1, -1, -1, -1]]
    assert batch.predicting_N.tolist() == [1, 2, 1, 3, 4, 5]
    assert batch.target_ids_N.tolist() == [20, 21, 30, 31, 32, 40]
    assert batch.completion_lengths_C.tolist() == [2, 3, 1]


def test_packed_groups_follow_each_other_in_one_row() -> None:
    """The span of a first completion starts with its prompt; the second refers back to indices 0-2.

    A completion of one token takes up no index.
    """
    groups = [
        Group(prompt_ids=ids(10, 11), completions=(ids(20, 21), ids(30, 31, 32))),
        Group(prompt_ids=ids(12), completions=(ids(40), ids(50))),
    ]
    batch = lay_out(groups, device=CPU, rows="packed")
    assert batch.input_ids_RL.tolist() == [[10, 11, 20, 30, 31, 12]]
    assert batch.position_ids_RL.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert batch.segment_ids_RL is None
    assert batch.spans_C6 is not None
    assert batch.spans_C6.tolist() == [
        [0, 0, 0, 0, 0, 3],
        [0, 0, 0, 2, 3, 5],
        [0, 0, 5, 5, 5, 6],
        [0, 0, 5, 6, 6, 6],
    ]
    assert batch.predicting_N.tolist() == [1, 2, 1, 3, 4, 5, 5]
    assert batch.target_ids_N.tolist() == [20, 21, 30, 31, 32, 40, 50]
    assert batch.completion_lengths_C.tolist() == [2, 3, 1, 1]


def test_a_packed_row_holds_shared_prompt_tokens_once() -> None:
    """The second group holds the shared tokens, which are the whole prompt of the first group."""
    groups = [
        Group(prompt_ids=ids(10, 11), completions=(ids(20, 21), ids(30))),
        Group(prompt_ids=ids(10, 11, 12), completions=(ids(40, 41), ids(50, 51))),
        Group(prompt_ids=ids(10, 13), completions=(ids(60, 61),)),
    ]
    batch = lay_out(groups, device=CPU, rows="packed", num_common=[2, 3, 1])
    assert batch.input_ids_RL.tolist() == [[20, 10, 11, 12, 40, 50, 13, 60]]
    assert batch.position_ids_RL.tolist() == [[2, 0, 1, 2, 3, 3, 1, 2]]
    assert batch.spans_C6 is not None
    assert batch.spans_C6.tolist() == [
        [1, 3, 0, 0, 0, 1],
        [1, 3, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 5],
        [1, 1, 1, 4, 5, 6],
        [1, 2, 6, 6, 6, 8],
    ]
    assert batch.predicting_N.tolist() == [2, 0, 2, 3, 4, 3, 5, 6, 7]


def test_prompts_that_differ_in_their_shared_tokens_are_refused() -> None:
    groups = [
        Group(prompt_ids=ids(10, 11), completions=(ids(20),)),
        Group(prompt_ids=ids(10, 12), completions=(ids(20),)),
    ]
    with pytest.raises(AssertionError):
        lay_out(groups, device=CPU, rows="packed", num_common=[2, 2])


def test_rows_computed_alone_are_whole() -> None:
    """They hold the last token of a completion, too; the second is padded by one."""
    group = Group(prompt_ids=ids(10, 11), completions=(ids(20, 21), ids(30)))
    batch = lay_out([group], device=CPU, rows="alone")
    assert batch.input_ids_RL.tolist() == [[10, 11, 20, 21], [10, 11, 30, 0]]
    assert batch.row_lengths == (4, 3)
    assert batch.segment_ids_RL is None
    assert batch.spans_C6 is None
    assert batch.predicting_N.tolist() == [1, 2, 5]
    assert batch.target_ids_N.tolist() == [20, 21, 30]


def test_separate_rows_repeat_the_prompt_and_need_no_mask() -> None:
    group = Group(prompt_ids=ids(10, 11), completions=(ids(20, 21), ids(30)))
    batch = lay_out([group], device=CPU, rows="separate")
    assert batch.input_ids_RL.tolist() == [[10, 11, 20], [10, 11, 0]]
    assert batch.segment_ids_RL is None
    assert batch.predicting_N.tolist() == [1, 2, 4]
    assert batch.target_ids_N.tolist() == [20, 21, 30]
    assert batch.completion_lengths_C.tolist() == [2, 1]


def test_a_group_counts_its_prompt_once() -> None:
    group = Group(prompt_ids=ids(1, 2, 3), completions=(ids(4), ids(5, 6)))
    assert group.num_tokens == 6
    assert [single.num_tokens for single in group.split()] == [4, 5]
    assert group.num_read == 4
    assert [single.num_read for single in group.split()] == [3, 4]
