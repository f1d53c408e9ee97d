"""Count how often TRL computes the reference again when its trainer is used on texts.

Arguments: a model's folder, a scratch folder, and the output file.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # Read when the libraries are imported.

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

NUM_PAIRS = 4


class CountingTrainer(DPOTrainer):
    """DPOTrainer that counts the pairs whose reference it computes."""

    num_computed = 0

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self.num_computed += len(inputs["input_ids"]) // 2
        return super().compute_ref_log_probs(model, inputs)


def count_computed(model: str, pairs: str, cache: str, **settings: Any) -> int:
    """Open a trainer over pairs in a JSON file; computed values go to the cache folder."""
    config = DPOConfig(
        precompute_ref_log_probs=True,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        **{"output_dir": f"{cache}/out", "learning_rate": 1e-6, "beta": 0.1, **settings},
    )
    trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_json(pairs, cache_dir=cache),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return trainer.num_computed


def main() -> None:
    model, scratch, answer = sys.argv[1:]

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows = [
        {
            "prompt": message("user", f"What is {n} and {n}?"),
            "chosen": message("assistant", f"{2 * n}."),
            "rejected": message("assistant", "Who knows."),
        }
        for n in range(NUM_PAIRS)
    ]
    pairs = Path(scratch, "sweep_pairs.jsonl")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = str(Path(scratch, "sweep"))
    changes: dict[str, dict[str, Any]] = {
        "first run": {},
        "nothing": {},
        "learning rate": {"learning_rate": 5e-7},
        "beta": {"beta": 0.3},
        "loss": {"loss_type": ["ipo"]},
        "output folder": {"output_dir": f"{cache}/other"},
    }
    computed = {
        what: count_computed(model, str(pairs), cache, **settings)
        for what, settings in changes.items()
    }
    Path(answer).write_text(json.dumps({"computed": computed, "num_pairs": NUM_PAIRS}))


if __name__ == "__main__":
    main()
