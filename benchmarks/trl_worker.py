"""One measurement of TRL's DPOTrainer on the same token ids in the same order."""

import os
import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # Read when the libraries are imported.

import torch
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.measurement import Measurement, Row, Setting, now, peak_memory_bytes, run_worker
from benchmarks.work import measure_matmul_peak
from pipeline import open_run
from stages.train.policy import make_adapter_config

_ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class IdsTrainer(DPOTrainer):
    """DPOTrainer over given token ids, in the given order."""

    num_tokens_computed = 0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_tokens_computed += inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self.num_tokens_computed += inputs["input_ids"].numel()
        return super().compute_ref_log_probs(model, inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute the first pair as a warm-up, then all, and record the duration."""
        first = self._prepare_inputs(self.data_collator([dataset[0]]))
        self.compute_ref_log_probs(self.model, first)
        self.num_tokens_computed = 0
        self.startup_memory_bytes = peak_memory_bytes()
        self.precompute_began_at, start, cpu_start = time.time(), now(), time.process_time()
        with_logps = super()._precompute_ref_logps(dataset, name, batch_size)
        self.precompute_seconds = now() - start
        self.precompute_cpu_seconds = time.process_time() - cpu_start
        return with_logps


class StepClock(TrainerCallback):
    """Records the end of each step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.startup_memory_bytes = peak_memory_bytes()
        self.began_at, self.times = time.time(), [now()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(now())


def measure(setting: Setting, row: Row) -> Measurement:
    torch.set_num_threads(setting.num_threads)
    cache = Path(setting.scratch, f"trl-{row.micro_batch_size}" if row.work == "score" else "trl-1")
    if row.work == "score":
        shutil.rmtree(cache, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = read_pairs(setting, cache)
        if row.num_pairs is not None:
            pairs = pairs.select(range(row.num_pairs))
        trainer = open_trainer(setting, row, dataset=pairs, folder=folder)
        if row.work == "score":
            return describe_precompute(trainer)
        return measure_training(trainer, setting.dtype)


def read_pairs(setting: Setting, cache: Path) -> Dataset:
    """Read encode's rows; TRL then cannot add tokens, such as a chat template's last newline."""
    encode = open_run(setting.store, setting.run).outputs["encode"]
    return Dataset.from_parquet(encode.paths(), columns=list(_ID_COLUMNS), cache_dir=str(cache))


def open_trainer(setting: Setting, row: Row, *, dataset: Dataset, folder: str) -> IdsTrainer:
    """Set up DPOTrainer, which computes precomputed reference values here."""
    assert row.micro_batch_size is not None
    precomputes = row.work == "score" or row.reference == "precomputed"
    config = DPOConfig(
        output_dir=folder,
        max_steps=setting.num_steps,
        per_device_train_batch_size=row.micro_batch_size,
        gradient_accumulation_steps=setting.global_batch_size // row.micro_batch_size,
        gradient_checkpointing=row.gradient_checkpointing,
        precompute_ref_log_probs=precomputes,
        precompute_ref_batch_size=row.micro_batch_size,
        beta=setting.beta,
        max_length=None,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=setting.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    return IdsTrainer(
        model=AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32),
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(setting.model),
        peft_config=make_adapter_config(setting.lora) if setting.lora else None,
    )


def describe_precompute(trainer: IdsTrainer) -> Measurement:
    pairs = trainer.train_dataset
    columns = (pairs[f"ref_{side}_logps"] for side in ("chosen", "rejected"))
    lengths = {name: [len(ids) for ids in pairs[name]] for name in _ID_COLUMNS}
    return Measurement(
        began_at=trainer.precompute_began_at,
        seconds=trainer.precompute_seconds,
        cpu_seconds=trainer.precompute_cpu_seconds,
        num_tokens_computed=trainer.num_tokens_computed,
        num_tokens_submitted=sum(lengths["prompt_ids"]) + sum(map(sum, lengths.values())),
        startup_memory_bytes=trainer.startup_memory_bytes,
        peak_memory_bytes=peak_memory_bytes(),
        logps=[list(pair) for pair in zip(*columns, strict=True)],
    )


def measure_training(trainer: IdsTrainer, dtype: str) -> Measurement:
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.num_tokens_computed = 0
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Measurement(
        began_at=clock.began_at,
        seconds=clock.times[-1] - clock.times[0],
        num_tokens_computed=trainer.num_tokens_computed,
        startup_memory_bytes=clock.startup_memory_bytes,
        peak_memory_bytes=peak_memory_bytes(),
        step_seconds=[end - start for start, end in pairwise(clock.times)],
        peak_flops_per_second=measure_matmul_peak(dtype),
        losses=[entry["loss"] for entry in steps],
        logps=[[entry["logps/chosen"], entry["logps/rejected"]] for entry in steps],
    )


if __name__ == "__main__":
    run_worker(measure)
