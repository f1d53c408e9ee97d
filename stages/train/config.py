"""What can be set about training? What decides the weights, and what only spreads the work."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.config import config_class
from stages.stage import Execution
from stages.train.losses import Loss, LossOrSum, SigmoidLoss
from stages.train.schedule import LrSchedule

LESS_MEMORY = "lower execution.train.max_tokens_per_microbatch or execution.train.max_logits"
"""What to do where memory does not suffice."""


@config_class
class LoraSettings:
    """Train a low-rank adapter (Hu et al. 2021, arXiv:2106.09685) instead of all weights."""

    rank: int = Field(default=16, ge=1)
    """Rank of every added pair of matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to 0 in training; other dropout is always off."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter; all-linear: every one but the output layer."""


@config_class
class BestSettings:
    """Judge the evaluations by one metric: its best step is exported, not the last one."""

    metric: Literal["loss", "rewards/accuracies", "rewards/margins"] = "loss"
    """Of the held-out pairs; of the loss the lowest value is best, of the others the highest."""
    patience: int = Field(default=0, ge=0)
    """Evaluations in a row without a new best after which training stops; 0: it goes to its end."""


@config_class
class TrainConfig:
    """The train stage's block under `stages:`."""

    model: str | None = None
    """Where the policy starts; absent: from the reference, that is score's model."""
    loss: LossOrSum = SigmoidLoss()
    """The loss with its parameters, or a list of losses to add up (docs/reference/losses.md)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate. LoRA wants about ten times as much as full fine-tuning."""
    lr_schedule: LrSchedule = "linear"
    """How the learning rate goes on after the warm-up: constant, or down to 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises linearly to its peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only (not on biases and norms)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square, against division by 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients whose global norm is larger are scaled down to it."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs."""
    global_batch_size: int = Field(default=16, ge=1)
    """Pairs in an optimizer step, over all workers; the last step of an epoch may have fewer."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the pairs, the adapter's start and the adapter's dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; bfloat16 is autocast over float32 weights. auto: bfloat16 on a GPU."""
    lora: LoraSettings | None = None
    """Train an adapter; absent: all weights are trained."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out pairs; 0: only before and after training."""
    keep_best: BestSettings | None = None
    """Export the best of the evaluated steps, and maybe stop early; absent: export the last."""
    side_norms_every_steps: int = Field(default=0, ge=0)
    """Steps between measurements of the gradient's norm through the chosen and through the rejected
    side alone; each takes two more passes over the step's pairs. 0: never."""
    shuffle_window_bytes: int = Field(default=1 << 30, ge=1)
    """Pairs are shuffled among so many bytes of tokens and log-probs, held in memory."""

    @model_validator(mode="after")
    def _check_evaluations(self) -> Self:
        if self.keep_best and not self.eval_every_steps:
            raise ValueError("keep_best compares evaluations: set eval_every_steps, too")
        return self

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The losses that are added up, or the only one. The first one defines the rewards."""
        return self.loss if isinstance(self.loss, tuple) else (self.loss,)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with the reference, so that it has to be scored."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def needs_margin(self) -> bool:
        """Whether a loss reads by how much the data prefers the chosen side."""
        return any(loss.needs_margin for loss in self.losses)


@config_class
class TrainExecution(Execution):
    """The train stage's block under `execution:`."""

    num_workers: int | Literal["auto"] = 1
    """Processes that share each batch; another number changes only rounding."""
    num_cpus_per_worker: float | Literal["auto"] = "auto"
    """CPU cores and so threads of each; auto = a whole machine's where it holds no GPU, else 1."""
    num_gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs that each worker holds; auto = 1 where there are GPUs, else 0."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """How workers share the policy: each has all of it (ddp), or a part of every weight, gradient
    and optimizer state, and fetches a layer at a time (fsdp2)."""
    max_tokens_per_microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens, padding included, that a worker computes at once; a longer pair stands alone. auto =
    640 on a CPU, where 800 is some 4 % faster and takes more memory, 8192 on a GPU."""
    max_logits: int = Field(default=2**25, ge=1)
    """Logits (tokens times vocabulary) that exist at once; more are computed in chunks."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, smaller."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints, that is, the most that a crash can cost."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Newest checkpoints that stay while training runs, beside the best one where it is wanted."""
    keep_checkpoints: bool = False
    """Leave checkpoints, optimizer included, when training has ended, and one of the last step;
    otherwise they are deleted."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also show the metrics in TensorBoard, in Weights & Biases (wandb)."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[^/@:]+/[^/@:]+$")
    """Upload the model to this repository (owner/name, made private) when training has ended."""
