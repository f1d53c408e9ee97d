"""Encoded and scored rows are joined by pair_id and checked against each other."""

from pathlib import Path

import numpy as np
import pytest

from schemas.errors import DataError
from stages.train.order import keep_order
from stages.train.pairs import PairReader, find_prefix, index_pairs
from tests.stages.train.made_data import Row, write_inputs


def made_scores(encoded: list[Row]) -> list[Row]:
    """Make scores that identify their pair's position n and token t: n + t/64, or the negative."""
    return [
        {
            **row,
            "ref_chosen_token_logps": [n + t / 64 for t in range(row["num_chosen_tokens"])],
            "ref_rejected_token_logps": [-n - t / 64 for t in range(row["num_rejected_tokens"])],
            "ref_chosen_logp": 0.0,
            "ref_rejected_logp": 0.0,
        }
        for n, row in enumerate(encoded)
    ]


def test_every_pair_is_read_with_its_own_scores(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    scores = made_scores(encoded)[::-1]  # In another order than encode's.
    index = index_pairs(write_inputs(tmp_path, encoded, scores, reference=reference))["train"]
    reader = PairReader(index=index, order=keep_order(index.num_pairs_S.tolist()))
    positions = {row["pair_id"]: n for n, row in enumerate(encoded)}
    pairs = reader.read(np.arange(len(index)))
    assert {pair.pair_id for pair in pairs} == {
        row["pair_id"] for row in encoded if row["split"] == "train"
    }
    for number, pair in enumerate(pairs):
        position = positions[pair.pair_id]
        row = encoded[position]
        assert pair.group.prompt_ids.tolist() == row["prompt_ids"]
        assert [ids.tolist() for ids in pair.group.completions] == [
            row["chosen_ids"],
            row["rejected_ids"],
        ]
        assert pair.ref_chosen_token_logps_C is not None
        assert pair.ref_rejected_token_logps_R is not None
        assert pair.ref_chosen_token_logps_C[0] == position
        assert (
            pair.ref_rejected_token_logps_R[-1] == -position - (row["num_rejected_tokens"] - 1) / 64
        )
        mask = row["chosen_loss_mask"] or [True] * row["num_chosen_tokens"]
        assert pair.chosen_loss_mask_C.tolist() == mask
        assert pair.rejected_loss_mask_R.all()
        assert len(pair.rejected_loss_mask_R) == row["num_rejected_tokens"]
        assert pair.weight == row["weight"]
        assert index.num_tokens(np.array([number]), share_prompt=True).tolist() == [
            row["num_prompt_tokens"] + row["num_chosen_tokens"] + row["num_rejected_tokens"] - 2
        ]


def test_the_prefix_of_at_least_half_of_the_prompts_is_found() -> None:
    prompts = [np.array(ids, np.int32) for ids in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 5], [6, 2, 3])]
    assert find_prefix(prompts).tolist() == [1, 2, 3]
    assert find_prefix(prompts[2:]).tolist() == [1, 2, 5]  # Each is half of them.
    assert find_prefix([*prompts[1:], np.array([7], np.int32)]).tolist() == [1, 2]
    assert find_prefix([]).tolist() == []


def test_the_index_knows_how_much_of_the_prefix_each_prompt_shares(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    """Two of three prompts start with 7, 8, 9; the others share only the 7."""
    begins = ([7, 8, 9], [7, 8, 9], [7, 1])
    changed = [
        {
            **row,
            "prompt_ids": [*begins[n % 3], *row["prompt_ids"]],
            "num_prompt_tokens": row["num_prompt_tokens"] + len(begins[n % 3]),
        }
        for n, row in enumerate(encoded)
    ]
    inputs = write_inputs(tmp_path, changed, made_scores(changed), reference=reference)
    for split, index in index_pairs(inputs).items():
        rows = [row for row in changed if row["split"] == split]
        reader = PairReader(index=index, order=keep_order(index.num_pairs_S.tolist()))
        pairs = reader.read(np.arange(len(index)))
        found = dict(zip([p.pair_id for p in pairs], index.num_common_tokens_P, strict=True))
        assert len(found) == len(rows)
        for row in rows:
            is_whole = row["prompt_ids"][:3] == [7, 8, 9]
            assert found[row["pair_id"]] >= 3 if is_whole else found[row["pair_id"]] == 1


def test_pairs_that_score_rejected_are_left_out(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    scores = made_scores(encoded)[:-3]
    indexes = index_pairs(write_inputs(tmp_path, encoded, scores, reference=reference))
    assert {split: len(index) for split, index in indexes.items()} == {"train": 14, "eval": 5}


def test_a_pair_that_encode_does_not_have_is_refused(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    without = [*encoded[:7], *encoded[8:]]
    inputs = write_inputs(
        tmp_path, without, made_scores(encoded), reference=reference, num_shards=1
    )
    with pytest.raises(DataError, match=f"{encoded[7]['pair_id']}, encode does not"):
        index_pairs(inputs)


def test_scores_of_other_sequences_are_refused(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    scores = made_scores(encoded)
    scores[4]["rejected_sequence_id"] = "0" * 32
    inputs = write_inputs(tmp_path, encoded, scores, reference=reference)
    with pytest.raises(DataError, match=f"rejected_sequence_id of pair {scores[4]['pair_id']}"):
        index_pairs(inputs)


@pytest.mark.parametrize("column", ["ref_chosen_token_logps", "ref_rejected_token_logps"])
def test_a_missing_token_is_noticed(
    encoded: list[Row], reference: Path, tmp_path: Path, column: str
) -> None:
    scores = made_scores(encoded)
    scores[9][column] = scores[9][column][1:]
    index = index_pairs(write_inputs(tmp_path, encoded, scores, reference=reference))["train"]
    reader = PairReader(index=index, order=keep_order(index.num_pairs_S.tolist()))
    with pytest.raises(DataError, match=f"{column} of pair {scores[9]['pair_id']}"):
        reader.read(np.arange(len(index)))


def test_shards_are_dropped_after_their_window(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    inputs = write_inputs(
        tmp_path, encoded, made_scores(encoded), reference=reference, num_shards=4
    )
    index = index_pairs(inputs)["train"]
    order = keep_order(index.num_pairs_S.tolist())
    reader = PairReader(index=index, order=order)
    most = 0
    for start in range(0, len(index), 2):
        reader.read(order.pairs_P[start : start + 2])
        most = max(most, len(reader._held))
        reader.forget_before(start + 2)
    assert most <= 2
    assert not reader._held
