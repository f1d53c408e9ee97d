"""Records exchanged with the worker processes: what to measure, and the measurement."""

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
    """The settings shared by all rows of a run."""

    store: str
    run: str
    """Name of the run in the store whose encode and score stages hold the pairs."""
    model: str
    """Folder of the model, which is both the initial policy and the reference."""
    scratch: str
    """Folder for TRL's caches."""
    num_pairs: int
    global_batch_size: int
    dtype: Dtype
    """Dtype of matrix products; training in bfloat16 is autocast over float32 weights."""
    num_threads: int
    learning_rate: float
    """Constant over the run."""
    beta: float
    lora_rank: int | None = None
    """None means that all weights are trained."""

    @property
    def num_steps(self) -> int:
        return self.num_pairs // self.global_batch_size

    @property
    def lora(self) -> LoraSettings | None:
        return None if self.lora_rank is None else LoraSettings(rank=self.lora_rank)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a table; each measurement of it runs in its own process."""

    work: Literal["score", "train"]
    program: Literal["ours", "trl"]
    backend: Backend | None = None
    """For our scoring."""
    micro_batch_size: int | None = None
    """For TRL, in pairs; ours cuts micro-batches by tokens."""
    num_pairs: int | None = None
    """For TRL's scoring: the number of first pairs, if not all."""
    reference: Reference | None = None
    """For TRL's training."""
    gradient_checkpointing: bool = False


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one worker process."""

    began_at: float
    """Start of the measured work, in seconds since the epoch; start-up comes before it."""
    seconds: float
    """Duration of the measured work."""
    num_tokens_computed: int
    """Tokens that went through the model, padding included."""
    num_tokens_submitted: int = 0
    """Scoring: tokens of all sequences, each with its whole prompt."""
    cpu_seconds: float = 0.0
    """Scoring: processor time of all threads during the measured work."""
    model_flops: float = 0.0
    """Our training: necessary floating-point operations of products with weights, forward and
    backward, without attention, padding and recomputation."""
    peak_flops_per_second: float = 0.0
    """Training: the speed of a product of large matrices, measured right after the work."""
    startup_memory_bytes: int
    peak_memory_bytes: int
    """Peak resident memory of this process (CPU), or peak allocation on the device (GPU)."""
    step_seconds: list[float] = []
    """Training: seconds of each optimizer step."""
    step_tokens: list[int] = []
    """Our training: tokens computed in each optimizer step, without padding."""
    num_weights: int = 0
    """Our training: parameters of the model, shared ones counted once."""
    losses: list[float] = []
    """Training: the loss of each optimizer step."""
    logps: list[list[float]]
    """[chosen, rejected], nats: for scoring, of each pair; for training, the means of each step."""


Measure = Callable[[Setting, Row], Measurement]


def run_worker(measure: Measure) -> None:
    """Run a measurement as a worker: argv holds Setting and Row as JSON, and the output file."""
    setting, row, answer = sys.argv[1:]
    found = measure(msgspec.json.decode(setting, type=Setting), msgspec.json.decode(row, type=Row))
    Path(answer).write_bytes(msgspec.json.encode(found))


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Return the time after the device has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
