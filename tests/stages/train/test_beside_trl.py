"""Training follows the trajectory of TRL's DPOTrainer on the same token ids and order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.train import TrainConfig
from stages.train.losses import SigmoidLoss
from stages.train.order import order_epoch
from stages.train.trainer import train
from tests.stages.train.made_data import Row, make_job, score_rows, write_inputs
from tests.stages.train.test_train import ALONE, read_metrics
from tests.tiny_models import TRAINING_TEXT

BATCH_SIZE = 4
NUM_STEPS = 20
BETA = 0.1
CONFIG = TrainConfig(
    loss=SigmoidLoss(beta=BETA),
    dtype="float32",
    learning_rate=5e-4,
    lr_schedule="constant",
    weight_decay=0.1,
    max_grad_norm=1.0,
    num_epochs=2,
    global_batch_size=BATCH_SIZE,
)
"""40 pairs: 10 steps per epoch."""


@pytest.fixture(scope="module")
def rows(reference: Path) -> list[Row]:
    """Make questions with a helpful and a dismissive answer, of many lengths."""
    from schemas.ids import digest, sequence_id

    tokenizer = AutoTokenizer.from_pretrained(reference)
    texts = TRAINING_TEXT[1:]
    rows = []
    for number in range(NUM_STEPS * BATCH_SIZE // CONFIG.num_epochs):
        question, answer = texts[number % 3].split("? ")
        words = (answer + " " + question).split()
        sides = {
            "chosen": " ".join(words[: 3 + number % 11]),
            "rejected": " ".join(texts[3].split()[: 1 + number % 13]) + f" No. {number}",
        }
        prompt = f"<|im_start|>user\n{question}? ({number})<|im_end|>\n<|im_start|>assistant\n"
        ids = {side: tokenizer.encode(text + "<|im_end|>") for side, text in sides.items()}
        prompt_ids = tokenizer.encode(prompt)
        rows.append(
            {
                "pair_id": digest([number])[:32],
                "prompt_id": digest([prompt])[:32],
                "prompt_ids": prompt_ids,
                "chosen_ids": ids["chosen"],
                "rejected_ids": ids["rejected"],
                "chosen_loss_mask": None,
                "rejected_loss_mask": None,
                "num_prompt_tokens": len(prompt_ids),
                "num_chosen_tokens": len(ids["chosen"]),
                "num_rejected_tokens": len(ids["rejected"]),
                "chosen_sequence_id": sequence_id(prompt_ids, ids["chosen"]),
                "rejected_sequence_id": sequence_id(prompt_ids, ids["rejected"]),
                "truncated": 0,
                "weight": 1.0,
                "margin": None,
                "source": "made",
                "split": "train",
            }
        )
    return rows


def train_with_trl(rows: list[Row], reference: Path, folder: Path) -> list[dict[str, Any]]:
    """Train with the reference in memory, and return TRL's log entry of each step."""
    from datasets import Dataset
    from torch.utils.data import Sampler, SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class IdsTrainer(DPOTrainer):
        """A DPOTrainer over given token ids, in the given order."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Sampler[int]:
            return SequentialSampler(self.train_dataset)

    in_order = []
    for epoch in range(CONFIG.num_epochs):
        order = order_epoch([len(rows)], [0], seed=CONFIG.seed, epoch=epoch, window_bytes=1)
        in_order += [rows[number] for number in order.pairs_P]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer = IdsTrainer(
        model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=BATCH_SIZE // 2,
            gradient_checkpointing=False,
            beta=BETA,
            max_length=None,
            learning_rate=CONFIG.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=CONFIG.weight_decay,
            max_grad_norm=CONFIG.max_grad_norm,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{key: row[key] for key in columns} for row in in_order]),
        processing_class=AutoTokenizer.from_pretrained(reference),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_twenty_steps_are_those_of_trl(
    rows: list[Row],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss, rewards, log-probs and gradient norms agree; TRL logs them unrounded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanted = train_with_trl(rows, reference, tmp_path / "trl")
    inputs = write_inputs(
        tmp_path, rows, score_rows(rows, reference), reference=reference, num_shards=1
    )
    job = make_job(tmp_path, inputs, reference, CONFIG)
    train(job, ALONE)
    found = read_metrics(job)
    assert len(found) == len(wanted) == NUM_STEPS
    assert found[-1]["loss"] < 0.6 < found[0]["loss"], "something must have been learned"
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
        for name in ("logps/chosen", "logps/rejected"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
