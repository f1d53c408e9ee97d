"""What is a process told to measure, and what does it give back?"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import torch

from stages.train import LoraSettings

Dtype = Literal["float32", "bfloat16"]
Backend = Literal["transformers", "vllm"]
Reference = Literal["precomputed", "in memory"]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What all rows of a run have in common."""

    store: str
    run: str
    """Name of the run in the store whose stages encode and score hold the pairs."""
    model: str
    """Folder of the model: the start of the policy, and the reference."""
    scratch: str
    """Folder for TRL's caches."""
    num_pairs: int
    global_batch_size: int
    dtype: Dtype
    """Of matrix products; training in bfloat16 is autocast over float32 weights."""
    num_threads: int
    learning_rate: float
    """Constant."""
    beta: float
    lora_rank: int | None = None
    """None: all weights are trained."""

    @property
    def num_steps(self) -> int:
        return self.num_pairs // self.global_batch_size

    @property
    def lora(self) -> LoraSettings | None:
        return None if self.lora_rank is None else LoraSettings(rank=self.lora_rank)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a table: what is measured, each time in a process of its own."""

    work: Literal["score", "train"]
    program: Literal["ours", "trl"]
    backend: Backend | None = None
    """Of our scoring."""
    micro_batch_size: int | None = None
    """TRL's, in pairs; ours cuts micro-batches by tokens."""
    num_pairs: int | None = None
    """TRL's scoring: how many of the first pairs, where not all."""
    reference: Reference | None = None
    """TRL's, in training."""
    gradient_checkpointing: bool = False


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a process found."""

    began_at: float
    """Seconds since the epoch at which the measured work began; before it lies the start-up."""
    seconds: float
    """Of the measured work."""
    num_tokens_computed: int
    """Tokens that went through the model, padding included."""
    num_tokens_submitted: int = 0
    """Scoring: tokens of all sequences, each with its whole prompt."""
    cpu_seconds: float = 0.0
    """Scoring: processor time of all threads during the measured work."""
    model_flops: float = 0.0
    """Ours, training: floating-point operations of the products with weights that had to be done,
    forward and backward: without attention, padding, or what is computed again."""
    peak_flops_per_second: float = 0.0
    """Training: what the machine reached in a product of large matrices, just after the work."""
    startup_memory_bytes: int
    peak_memory_bytes: int
    """The most that was resident in this process (CPU) or allocated on the device (GPU)."""
    step_seconds: list[float] = []
    """Training: of each optimizer step."""
    step_tokens: list[int] = []
    """Ours, training: tokens computed in each optimizer step, padding left out."""
    num_weights: int = 0
    """Ours, training: numbers in the model, those that two layers share counted once."""
    losses: list[float] = []
    """Training: of each optimizer step."""
    logps: list[list[float]]
    """[chosen, rejected], nats: scoring, of each pair; training, the means of each step."""


Measure = Callable[[Setting, Row], Measurement]


def run_worker(measure: Measure) -> None:
    """Measure what the command line says: Setting and Row as JSON, and the file to answer in."""
    setting, row, answer = sys.argv[1:]
    found = measure(msgspec.json.decode(setting, type=Setting), msgspec.json.decode(row, type=Row))
    Path(answer).write_bytes(msgspec.json.encode(found))


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Read the clock once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
