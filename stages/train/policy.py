"""What is trained? The model, or an adapter inside it, and the optimizer that sees to either."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from stages.models import ModelPin, fetch_model
from stages.policy.batches import RowLayout
from stages.policy.lean import make_lean
from stages.policy.logps import completion_tokens
from stages.policy.model import load_model
from stages.policy.sharing import choose_rows
from stages.train.config import TrainConfig
from stages.train.losses import PairLogps
from stages.train.microbatch import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The one model of the process. Its reference is a column of numbers."""

    model: PreTrainedModel
    """float32; with an adapter, its linear layers hold the adapter's."""
    adapter: PeftModel | None
    """The same layers, seen as base and adapter."""
    dtype: torch.dtype
    """Of matrix products: float32, or bfloat16 by autocast."""
    rows: RowLayout
    """What can stand in a row of this model, with the same numbers."""
    max_logits: int

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By name; shared ones once."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def pair_logps(self, microbatch: MicroBatch, *, with_log_collision: bool = False) -> PairLogps:
        """Compute the log-probability of every completion token, differentiably.

        Args:
            with_log_collision: also fill `policy_log_collision_BT`.
        """
        with torch.autocast(
            self.model.device.type, self.dtype, enabled=self.dtype != torch.float32
        ):
            tokens = completion_tokens(
                self.model,
                microbatch.batch,
                max_logits=self.max_logits,
                with_log_collision=with_log_collision,
            )
        return microbatch.pair_logps(tokens)

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Switch on what only training does: the adapter's dropout, gradient checkpointing."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()


def open_policy(
    config: TrainConfig,
    start: ModelPin,
    *,
    device: torch.device,
    max_length: int,
    max_logits: int,
    gradient_checkpointing: bool,
) -> Policy:
    """Load the start and put the adapter into it.

    Args:
        max_length: tokens of the longest prompt with one completion.
    """
    model = load_model(fetch_model(start), dtype=torch.float32, device=device)
    rows = choose_rows(model, max_length=max_length)
    adapter = _add_adapter(model, config)
    make_lean(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(
        model=model,
        adapter=adapter,
        dtype=getattr(torch, config.dtype),
        rows=rows,
        max_logits=max_logits,
    )


def _add_adapter(model: PreTrainedModel, config: TrainConfig) -> PeftModel | None:
    if config.lora is None:
        return None
    targets = config.lora.target_modules
    torch.manual_seed(config.seed)
    adapter = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        ),
    )
    assert isinstance(adapter, PeftModel)
    adapter.eval()
    return adapter


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.AdamW:
    """Give AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), decaying matrices only."""
    parameters = list(policy.trained_parameters.values())
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for parameter in parameters if parameter.ndim >= 2],
                "weight_decay": config.weight_decay,
            },
            {
                "params": [parameter for parameter in parameters if parameter.ndim < 2],
                "weight_decay": 0.0,
            },
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
