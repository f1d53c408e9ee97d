"""Encoded pairs for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas.ids import sequence_id
from schemas.manifest import Counts
from schemas.rows import ENCODED, REJECTED
from stages.store.shards import StageOutput
from tests.stages_running import open_output, stage_dir

MAX_LENGTH = 128

Row = dict[str, Any]


def encoded_row(
    name: str, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], **more: Any
) -> Row:
    """Make a complete row of the encoded table whose pair_id begins with the name."""
    return {
        "pair_id": name.ljust(32, "0"),
        "prompt_id": "0" * 32,
        "prompt_ids": list(prompt),
        "chosen_ids": list(chosen),
        "rejected_ids": list(rejected),
        "chosen_loss_mask": None,
        "rejected_loss_mask": None,
        "num_prompt_tokens": len(prompt),
        "num_chosen_tokens": len(chosen),
        "num_rejected_tokens": len(rejected),
        "chosen_sequence_id": sequence_id(list(prompt), list(chosen)),
        "rejected_sequence_id": sequence_id(list(prompt), list(rejected)),
        "truncated": 0,
        "weight": 1.0,
        "margin": None,
        "source": "made",
        "split": "train",
        **more,
    }


def random_rows(seed: int, num_rows: int, **more: Any) -> list[Row]:
    """Pairs of random tokens and lengths, each with its own prompt."""
    rng = np.random.default_rng(seed)

    def some_ids(longest: int) -> list[int]:
        ids: list[int] = rng.integers(3, 320, size=rng.integers(1, longest + 1)).tolist()
        return ids

    return [
        encoded_row(f"{seed}-{row}-", some_ids(60), some_ids(60), some_ids(60), **more)
        for row in range(num_rows)
    ]


def write_encoded(folder: Path, shards: Sequence[Sequence[Row]]) -> StageOutput:
    """Write rows in these shards, as encode does."""
    out = stage_dir(folder, "encode")
    records = []
    for index, rows in enumerate(shards):
        with out.write_shard(index, {"data": ENCODED, "rejected": REJECTED}) as shard:
            shard.write_rows("data", rows)
            records.append(shard.commit(Counts(num_in=len(rows), num_out=len(rows))))
    return open_output(out, "encode", records, config={"max_length": MAX_LENGTH})
