"""Is what an epoch will compute known before it begins?"""

from pathlib import Path

import pytest
import torch

from stages.policy.batches import RowLayout
from stages.train.microbatch import Layout, plan_epoch, read_batches
from stages.train.order import order_epoch
from stages.train.pairs import index_pairs
from stages.train.world import World
from tests.stages.train.made_data import Row, write_inputs

WORLD = World(device=torch.device("cpu"))


@pytest.mark.parametrize("rows", ["packed", "shared", "separate"])
def test_an_epoch_is_planned_as_it_is_read(
    rows: RowLayout, tmp_path: Path, encoded: list[Row], scored: list[Row], reference: Path
) -> None:
    """17 pairs in batches of 4, the last of one pair; counted in the tensors themselves."""
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
