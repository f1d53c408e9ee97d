"""Settings of the train stage, and the job and outcome that its driver and workers exchange."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import AfterValidator, Field, model_validator

from schemas.config import config_class
from schemas.manifest import FileRecord
from stages.models.resolve import ModelPin, TokenizerPin
from stages.stage import Execution, Stop
from stages.store.shards import StageDir, StageOutput
from stages.train.losses import Loss, LossOrSum, SigmoidLoss
from stages.train.selection import Selection, check_weight, check_where, list_stages

LESS_MEMORY = "lower execution.train.max_tokens_per_microbatch or execution.train.max_logits"
"""Advice for running out of memory."""


@config_class
class LoraSettings:
    """Train a low-rank adapter (Hu et al. 2021, arXiv:2106.09685) instead of all weights."""

    rank: int = Field(default=16, ge=1)
    """Rank of each pair of added matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the adapter's inputs set to 0 during training; all other dropout is off."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter; all-linear: all linear layers except the output."""
    use_rslora: bool = Field(default=False, exclude_if=operator.not_)
    """Scale the adapter's output by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023,
    arXiv:2312.03732)."""
    use_dora: bool = Field(default=False, exclude_if=operator.not_)
    """Also train the norm of each row of the adapted weights (DoRA, Liu et al. 2024,
    arXiv:2402.09353)."""
    quantization: Literal["nf4"] | None = Field(default=None, exclude_if=operator.not_)
    """Hold the linear layers below the adapter in 4 bits (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314), with double quantisation; the export merges the adapter into the unquantised
    weights. Absent: hold them in `dtype`."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = self.target_modules
        if isinstance(names, tuple) and (not names or "all-linear" in names):
            raise ValueError("target_modules is all-linear, or a list of at least one layer's name")
        return self


@config_class
class BestSettings:
    """Export the step with the best evaluation instead of the last step."""

    metric: Literal["loss", "rewards/accuracies", "rewards/margins"] = "loss"
    """Metric on the held-out pairs: the lowest loss is best, or the highest of the other two."""
    patience: int = Field(default=0, ge=0)
    """Stop after this many evaluations in a row without a new best; 0: never stop early."""


def _is_none(value: object) -> bool:
    """Whether to leave a key out of what is hashed: stores made before it existed stay valid."""
    return value is None


@config_class
class TrainConfig:
    """The train stage's block under `stages:`."""

    model: str | None = None
    """Model that training starts from; absent: the reference, which is score's model."""
    loss: LossOrSum = SigmoidLoss()
    """The loss with its parameters, or a list of losses to sum (docs/reference/losses.md)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate. LoRA needs about ten times as much as full fine-tuning."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 linearly or as a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises linearly to its peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, applied to matrices only (not to biases and norms)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's running mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's running mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Term that AdamW adds to its denominator to avoid dividing by 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger global norm are scaled down to this norm."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs."""
    global_batch_size: int = Field(default=16, ge=1)
    """Pairs per optimizer step, over all workers; an epoch's last step may have fewer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the pairs' order, the adapter's initial weights and the adapter's dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; trained weights and AdamW's state are float32. auto: bfloat16 on a
    GPU, else float32. With `lora`, also the dtype in which the frozen weights are held: in bfloat16
    a start that was released in float32 is rounded, as vLLM rounds it for a bfloat16 reference; the
    export merges the adapter into weights that were not."""
    lora: LoraSettings | None = None
    """Train an adapter with these settings; absent: train all weights."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out pairs; 0: only before and after training."""
    keep_best: BestSettings | None = None
    """Export the best evaluated step and optionally stop early; absent: export the last step."""
    side_norms_every_steps: int = Field(default=0, ge=0)
    """Steps between measurements of the gradient norm through the chosen side alone and through the
    rejected side alone. Each costs two more passes over the step's pairs. 0: never."""
    shuffle_window_bytes: int = Field(default=1 << 30, ge=1)
    """Bytes of tokens and log-probs held in memory, within which pairs are shuffled."""
    where: Annotated[str, AfterValidator(check_where)] | None = Field(
        default=None, exclude_if=_is_none
    )
    """Train only on pairs for which this SQL condition is true, such as `ref_margin > -20 AND
    source <> 'forum'`; null counts as false. Held-out pairs are not selected. Absent: all pairs."""
    weight: Annotated[str, AfterValidator(check_weight)] | None = Field(
        default=None, exclude_if=_is_none
    )
    """SQL expression of a factor that multiplies each training pair's own weight, such as `CASE
    source WHEN 'forum' THEN 0.5 ELSE 1 END`; absent: 1."""

    @model_validator(mode="after")
    def _check_evaluations(self) -> Self:
        if self.keep_best and not self.eval_every_steps:
            raise ValueError("keep_best compares evaluations: set eval_every_steps, too")
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if "score" in list_stages(self.where, self.weight) and not self.needs_reference:
            raise ValueError(
                "where or weight names a reference log-prob, but this loss uses no reference, so "
                "that none is computed; choose by other columns"
            )
        return self

    @property
    def selection(self) -> Selection | None:
        """What chooses and weights the training pairs; None if all count as they are."""
        if self.where is None and self.weight is None:
            return None
        return Selection(where=self.where, weight=self.weight)

    @property
    def needed_stages(self) -> tuple[str, ...]:
        """The stages whose rows are read."""
        needed = ("encode", "score") if self.needs_reference else ("encode",)
        more = [stage for stage in list_stages(self.where, self.weight) if stage not in needed]
        return (*needed, *more)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The losses to sum, or the only one. The first defines the rewards."""
        return self.loss if isinstance(self.loss, tuple) else (self.loss,)

    @property
    def rounds_base(self) -> bool:
        """Whether the weights below an adapter are rounded or quantised, unlike those exported."""
        return self.is_quantized or (self.lora is not None and self.dtype == "bfloat16")

    @property
    def is_quantized(self) -> bool:
        """Whether the weights below an adapter are quantised."""
        return self.lora is not None and self.lora.quantization is not None

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with the reference, so that pairs have to be scored."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def needs_margin(self) -> bool:
        """Whether a loss uses the data's margin between chosen and rejected."""
        return any(loss.needs_margin for loss in self.losses)

    def learning_rate_at(self, step: int, *, num_steps: int) -> float:
        """Compute the learning rate of one optimizer step.

        It rises linearly to the peak at step `warmup_steps` and is still at the peak one step
        later. From there it decays towards 0, which step num_steps + 1 would reach, so every step
        has a rate above 0.

        Args:
            step: from 1 to num_steps.
            num_steps: steps of the whole training.
        """
        peak, warmup_steps = self.learning_rate, self.warmup_steps
        if step <= warmup_steps:
            return peak * step / warmup_steps
        if self.lr_schedule == "constant":
            return peak
        done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
        if self.lr_schedule == "linear":
            return peak * (1 - done)
        return peak * (1 + math.cos(math.pi * done)) / 2


@config_class
class TrainExecution(Execution):
    """The train stage's block under `execution:`."""

    num_workers: int | Literal["auto"] = 1
    """Processes that share each batch; their number changes only rounding."""
    num_cpus_per_worker: float | Literal["auto"] = "auto"
    """CPU cores, and so threads, of each worker; auto: all cores of a machine without GPUs, else
    1."""
    num_gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs of each worker; auto: 1 where the cluster has GPUs, else 0."""
    parallelism: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How workers hold the policy: a whole copy each (ddp), or a shard of every weight, gradient
    and optimizer state, with layers gathered one at a time (fsdp2). auto: fsdp2 on GPUs, ddp on
    CPUs. In bfloat16, fsdp2 also serves one worker: it rounds each layer's weights once, and
    hidden states are bfloat16, where ddp uses autocast."""
    max_tokens_per_microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens, padding included, that a worker computes at once; a longer pair is computed alone.
    auto: 640 on a CPU (800 is about 4 % faster and takes more memory), 8192 on a GPU, halved before
    the first step until there is memory for them (ddp only)."""
    max_logits: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Logits (tokens times vocabulary) in memory at once; more are computed in chunks. auto: 2^25
    on a CPU, 2^29 on a GPU."""
    compile_layers: bool = False
    """Compile the model's layers with torch.compile: one more minute at the start, then less time
    for element-wise operations on a GPU. What cannot be compiled runs as without."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: slower, less memory."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints; a crash loses at most this many."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Newest checkpoints to keep during training, in addition to the best with keep_best."""
    keep_checkpoints: bool = False
    """Keep the checkpoints, optimizer state included, after training, with one of the last step;
    otherwise they are deleted."""
    stop_after: float | None = Field(default=None, gt=0, lt=1)
    """Stop after this fraction of the steps, with a checkpoint and the metrics of the held-out
    pairs. A run without it goes on from there to the same weights; `sweep --halving` sets it."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send metrics to TensorBoard (tensorboard) or Weights & Biases (wandb)."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[^/@:]+/[^/@:]+$")
    """Upload the trained model to this Hugging Face repository (owner/name), created as private."""

    def shards(self, device_type: str) -> bool:
        """Whether the policy is held by FSDP2, for torch's device type, such as "cpu"."""
        if self.parallelism == "auto":
            return device_type != "cpu"
        return self.parallelism == "fsdp2"

    def tokens_per_microbatch(self, device_type: str) -> int:
        """Resolve `max_tokens_per_microbatch` for torch's device type, such as "cpu"."""
        if self.max_tokens_per_microbatch == "auto":
            return 640 if device_type == "cpu" else 8192
        return self.max_tokens_per_microbatch


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A fully resolved training; small and picklable, because it travels to the workers."""

    config: TrainConfig
    execution: TrainExecution
    start: ModelPin
    tokenizer: TokenizerPin
    """The tokenizer that encoded the pairs; the export gets it."""
    template: str | None
    """Text of the chat template that encoded the pairs, if a file named it; else None."""
    inputs: Mapping[str, StageOutput]
    """Output of encode, and of score where a loss needs the reference."""
    out: StageDir
    num_threads: int
    """Threads of each worker; another number may change the order of additions."""

    @property
    def has_reference(self) -> bool:
        """Whether there are reference log-probs."""
        return "score" in self.inputs

    @property
    def scoring_median(self) -> float | None:
        """Nats: by how much the reference's tokens differ from float32 in the median, by score's
        own check; None where it compared nothing."""
        recomputed = self.inputs["score"].manifest.summary.get("recomputed", {})
        median: float | None = recomputed.get("token_median")
        return median

    @property
    def starts_from_reference(self) -> bool:
        """Whether the policy starts from exactly the model that score used.

        A quantised start is another model: scores are computed without quantisation.
        """
        if self.config.is_quantized:
            return False
        scored = self.inputs["score"].manifest.config
        adapter = {"adapter": scored["adapter"]} if scored["adapter"] else {}
        return self.start.identity() == {**scored["model"], **adapter}

    @property
    def is_float32(self) -> bool:
        """Whether policy and reference are both computed in float32."""
        dtypes = (self.config.dtype, self.inputs["score"].manifest.config["dtype"])
        return dtypes == ("float32", "float32")


CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints below the stage's directory."""
_OUTCOME = "outcome.json"
_STOP = "stop.json"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a finished training. The driver that reads it may not be the one that began it."""

    files: list[FileRecord]
    summary: dict[str, Any]


def write_outcome(job: TrainJob, outcome: Outcome) -> None:
    """Record that the training has finished."""
    folder = job.out.work("train").folder
    folder.create()
    folder.write_bytes(_OUTCOME, msgspec.json.encode(outcome))


def read_outcome(job: TrainJob) -> Outcome | None:
    """Read a finished training's outcome; None while it is unfinished."""
    folder = job.out.work("train").folder
    if not folder.exists(_OUTCOME):
        return None
    return msgspec.json.decode(folder.read_bytes(_OUTCOME), type=Outcome)


def write_stop(out: StageDir, stop: Stop) -> None:
    """Record that the training was stopped before its end."""
    folder = out.work("train").folder
    folder.create()
    folder.write_bytes(_STOP, msgspec.json.encode(stop))


def read_stop(out: StageDir) -> Stop | None:
    """Read where a training was last stopped before its end; None if it never was."""
    folder = out.work("train").folder
    if not folder.exists(_STOP):
        return None
    return msgspec.json.decode(folder.read_bytes(_STOP), type=Stop)
