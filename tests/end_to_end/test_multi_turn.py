"""Multi-turn answers with tool calls: user and tool turns are context and are not trained on."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.end_to_end.conftest import run_recipe, tiny_recipe

NUM_PAIRS = 6


def write_conversations(path: Path, *, asked_between: str) -> None:
    """Write pairs whose answers have two model turns, with a tool result and a question between."""

    def answer(name: str, last: str) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "look", "arguments": {"for": name}}}
        return [
            {"role": "assistant", "content": f"Let me look for {name}.", "tool_calls": [call]},
            {"role": "tool", "name": "look", "content": f"{name}: {asked_between}"},
            {"role": "user", "content": asked_between},
            {"role": "assistant", "content": last},
        ]

    rows = [
        {
            "prompt": [{"role": "user", "content": f"Where is number {n}?"}],
            "chosen": answer(f"n{n}", f"Number {n} is here. Look."),
            "rejected": answer(f"n{n}", f"No idea, {n}."),
        }
        for n in range(NUM_PAIRS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scored_logp(model: PreTrainedModel, row: dict[str, Any], side: str) -> float:
    """Sum the log-probs of the tokens in encode's loss mask, by one plain forward."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    mask = torch.tensor(row[f"{side}_loss_mask"])
    return float(logps[-len(mask) :][mask].sum())


def test_only_the_models_own_turns_are_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    """Logged log-probs and lengths count the model's turns alone, however long the others are."""
    lengths, num_tokens = [], []
    for number, asked_between in enumerate(("And?", "And then, where else did you say it is?")):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_conversations(folder / "pairs.jsonl", asked_between=asked_between)
        recipe = tiny_recipe(folder, tiny_model)
        recipe["stages"]["validate"]["eval_fraction"] = 0.0
        recipe["stages"]["encode"] = {"max_length": 1024, "max_prompt_length": 512}
        recipe["stages"]["dedupe"] = {"near": None}
        recipe["stages"]["train"] = {"global_batch_size": NUM_PAIRS}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = run_recipe(folder / "recipe.yaml", last="train")

        [step] = run.scan("train", "metrics").collect().to_dicts()
        rows = run.scan("encode").collect()
        assert step["num_pairs"] == rows.height == NUM_PAIRS
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        for side in ("chosen", "rejected"):
            wanted = sum(scored_logp(model, row, side) for row in rows.to_dicts()) / NUM_PAIRS
            assert step[f"logps/{side}"] == pytest.approx(wanted, rel=1e-5)
        lengths.append((step["lengths/chosen"], step["lengths/rejected"]))
        num_tokens.append(rows.select(pl.col("num_chosen_tokens").mean()).item())
    assert lengths[0] == lengths[1], "turns of user and tool must not count"
    assert lengths[0][0] > lengths[0][1] > 0
    assert num_tokens[1] > num_tokens[0] > lengths[0][0], "they must be part of the sequence"
