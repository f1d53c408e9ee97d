"""Encoded and scored pairs of random tokens, as the train stage reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.ids import digest, sequence_id
from schemas.manifest import Counts
from schemas.rows import ENCODED, REJECTED, SCORE
from stages.encode.config import pin_template
from stages.models.resolve import pin_model, pin_tokenizer
from stages.policy.model import load_model
from stages.stage import Pin
from stages.store.shards import StageOutput
from stages.train import TrainConfig, TrainExecution
from stages.train.config import TrainJob
from tests.stages_running import open_output, stage_dir
from tests.tiny_models import VOCAB_SIZE

Row = dict[str, Any]


def plain_logps(model: PreTrainedModel, row: Row, side: str) -> Tensor:
    """Compute the oracle: log-probs of a side's tokens, by a plain forward of it alone."""
    ids = torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]])
    all_logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    places = torch.arange(len(row["prompt_ids"]), len(ids))
    return all_logps[places - 1, ids[places]]


def random_rows(seed: int, num_pairs: int, *, num_eval: int = 0, longest: int = 24) -> list[Row]:
    """Make rows of encode's table; the first `num_eval` are held out, some have a loss mask."""
    rng = np.random.default_rng(seed)

    def random_ids() -> list[int]:
        return rng.integers(3, VOCAB_SIZE, size=rng.integers(1, longest + 1)).tolist()

    rows = []
    for number in range(num_pairs):
        prompt_ids, chosen_ids, rejected_ids = random_ids(), random_ids(), random_ids()
        mask = [True, *(rng.random(len(chosen_ids) - 1) < 0.7).tolist()]
        rows.append(
            {
                "pair_id": digest([seed, number])[:32],
                "prompt_id": digest([seed, number, "prompt"])[:32],
                "prompt_ids": prompt_ids,
                "chosen_ids": chosen_ids,
                "rejected_ids": rejected_ids,
                "chosen_loss_mask": mask if number % 4 == 0 else None,
                "rejected_loss_mask": None,
                "num_prompt_tokens": len(prompt_ids),
                "num_chosen_tokens": len(chosen_ids),
                "num_rejected_tokens": len(rejected_ids),
                "chosen_sequence_id": sequence_id(prompt_ids, chosen_ids),
                "rejected_sequence_id": sequence_id(prompt_ids, rejected_ids),
                "truncated": 0,
                "weight": 1.0 if number % 3 else 0.5,
                "margin": None,
                "source": "made",
                "split": "eval" if number < num_eval else "train",
            }
        )
    return rows


@torch.no_grad()
def score_rows(rows: Sequence[Row], reference: Path) -> list[Row]:
    """Compute rows of score's table, by the oracle in float32."""
    model = load_plain(reference)
    scored = []
    for row in rows:
        chosen, rejected = (plain_logps(model, row, side) for side in ("chosen", "rejected"))
        scored.append(
            {
                **{key: row[key] for key in SCORE.arrow.names if key in row},
                "ref_chosen_token_logps": chosen.tolist(),
                "ref_rejected_token_logps": rejected.tolist(),
                "ref_chosen_logp": chosen.sum().item(),
                "ref_rejected_logp": rejected.sum().item(),
            }
        )
    return scored


def load_plain(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def write_inputs(
    folder: Path,
    encoded: Sequence[Row],
    scored: Sequence[Row],
    *,
    reference: Path,
    num_shards: int = 2,
) -> dict[str, StageOutput]:
    """Write encode's and score's rows to a store, split into shards by position."""
    model = pin_model(str(reference)).identity()
    shard_of = {row["pair_id"]: n * num_shards // len(encoded) for n, row in enumerate(encoded)}
    outputs = {}
    for stage, schema, rows in (("encode", ENCODED, encoded), ("score", SCORE, scored)):
        out = stage_dir(folder, stage)
        records = []
        for index in range(num_shards):
            with out.write_shard(index, {"data": schema, "rejected": REJECTED}) as shard:
                shard.write_rows(
                    "data", [row for row in rows if shard_of.get(row["pair_id"], 0) == index]
                )
                records.append(shard.commit(Counts()))
        config = {"model": model, "adapter": None, "dtype": "float32"} if stage == "score" else {}
        outputs[stage] = open_output(out, stage, records, config=config)
    return outputs


def pin_start(start: Path) -> dict[str, Pin]:
    """Pin what a run's engine would: the start, its tokenizer and its chat template."""
    return {
        "model": pin_model(str(start)),
        "tokenizer": pin_tokenizer(str(start)),
        "template": pin_template("auto"),
    }


def make_job(
    folder: Path,
    inputs: Mapping[str, StageOutput],
    start: Path,
    config: TrainConfig,
    template: str | None = None,
    tokenizer: Path | None = None,
    **execution: Any,
) -> TrainJob:
    """Make a job in a folder; the tokenizer is the start's unless given."""
    return TrainJob(
        config=config,
        execution=TrainExecution(**{"max_tokens_per_microbatch": 200, **execution}),
        start=pin_model(str(start)),
        tokenizer=pin_tokenizer(str(tokenizer or start)),
        template=template,
        inputs=inputs,
        out=stage_dir(folder, "train"),
        num_threads=1,
    )
