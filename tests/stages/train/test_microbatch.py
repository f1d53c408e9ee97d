"""The plan of an epoch equals what is computed in it."""

from pathlib import Path

import pytest
import torch

from stages.policy.batches import RowLayout
from stages.train.microbatch import Layout, lay_out_blank, plan_epoch, read_batches
from stages.train.order import keep_order, order_epoch
from stages.train.pairs import index_pairs
from stages.train.world import World
from tests.stages.train.made_data import Row, write_inputs

WORLD = World(device=torch.device("cpu"))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_common_prefix_is_planned_once_per_micro_batch(
    num_workers: int, tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    """Every prompt starts with the same 40 tokens; the budget is 120."""
    begin = list(range(1, 41))
    changed = [
        {
            **row,
            "prompt_ids": begin + row["prompt_ids"],
            "num_prompt_tokens": row["num_prompt_tokens"] + len(begin),
        }
        for row in encoded
    ]
    index = index_pairs(write_inputs(tmp_path, changed, scored, reference=reference))["train"]
    order = keep_order(index.num_pairs_S.tolist())
    layout = Layout(max_tokens=120, rows="packed")
    workers = [
        World(device=torch.device("cpu"), rank=rank, size=num_workers)
        for rank in range(num_workers)
    ]
    read = [
        list(read_batches(index, order, batch_size=8, layout=layout, world=world))
        for world in workers
    ]
    planned = plan_epoch(index, order, batch_size=8, layout=layout, world=workers[0])
    microbatches = [one for batches in read for batch in batches for one in batch.microbatches]
    in_tensors = [one.batch.input_ids_RL.numel() for one in microbatches]
    assert planned.padded == sum(in_tensors)
    assert planned.padded == sum(batch.num_padded_tokens for batch in read[0])
    real = [one for one in microbatches if not one.is_filler]
    assert planned.total == sum(one.batch.input_ids_RL.numel() for one in real)
    blank = lay_out_blank(index, planned.largest, layout=layout, device=WORLD.device)
    assert blank.input_ids_RL.numel() == max(in_tensors)
    assert any(len(one.pair_ids) > 1 for one in real)
    for one in real:
        ids = one.batch.input_ids_RL[0].tolist()
        num_begins = sum(ids[at : at + len(begin)] == begin for at in range(len(ids)))
        assert num_begins == 1
        assert len(ids) <= layout.max_tokens or len(one.pair_ids) == 1


def test_pairs_whose_sequences_are_computed_alone_get_a_microbatch_each(
    tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    """Two workers, which gather weights together, then do as many forward passes as each other."""
    index = index_pairs(write_inputs(tmp_path, encoded, scored, reference=reference))["train"]
    order = keep_order(index.num_pairs_S.tolist())
    for rank in range(2):
        batches = read_batches(
            index,
            order,
            batch_size=5,
            layout=Layout(max_tokens=10**6, rows="alone"),
            world=World(device=torch.device("cpu"), rank=rank, size=2),
        )
        rows = [[one.batch.row_lengths for one in batch.microbatches] for batch in batches]
        assert [len(one) for one in rows] == [3, 3, 3, 1]
        assert all(lengths is not None and len(lengths) == 2 for one in rows for lengths in one)


@pytest.mark.parametrize("rows", ["packed", "shared", "separate"])
def test_an_epoch_is_planned_as_it_is_read(
    rows: RowLayout, tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    """17 pairs in batches of 4, the last of one pair; tokens are counted in the tensors."""
    index = index_pairs(write_inputs(tmp_path, encoded, scored, reference=reference))["train"]
    order = order_epoch(
        index.num_pairs_S.tolist(),
        index.num_bytes_S.tolist(),
        seed=3,
        epoch=0,
        window_bytes=1 << 20,
    )
    layout = Layout(max_tokens=120, rows=rows)
    planned = plan_epoch(index, order, batch_size=4, layout=layout, world=WORLD)
    batches = list(read_batches(index, order, batch_size=4, layout=layout, world=WORLD))
    tokens, padded = [], []
    for batch in batches:
        ids = [microbatch.batch.input_ids_RL for microbatch in batch.microbatches]
        padded.append(sum(tensor.numel() for tensor in ids))
        tokens.append(batch.num_tokens)
    assert len(batches) == 5
    assert (planned.most, planned.total, planned.padded) == (max(tokens), sum(tokens), sum(padded))
    times_prompt = 2 if rows == "separate" else 1
    assert planned.total == sum(
        times_prompt * len(row["prompt_ids"])
        + len(row["chosen_ids"])
        + len(row["rejected_ids"])
        - 2
        for row in encoded
        if row["split"] == "train"
    )
    assert (planned.padding_share == 0) == (rows == "packed")
    largest = max(
        (microbatch for batch in batches for microbatch in batch.microbatches),
        key=lambda microbatch: microbatch.batch.input_ids_RL.numel(),
    )
    assert len(largest.pair_ids) > 1
    blank = lay_out_blank(index, planned.largest, layout=layout, device=WORLD.device)
    assert not blank.input_ids_RL.any()
    for name in ("input_ids_RL", "position_ids_RL", "predicting_N", "target_ids_N"):
        assert getattr(blank, name).shape == getattr(largest.batch, name).shape, name
    spans, blank_spans = largest.batch.spans_C6, blank.spans_C6
    assert (spans is None) == (blank_spans is None) == (rows != "packed")
    assert spans is None or blank_spans is None or torch.equal(spans, blank_spans)
