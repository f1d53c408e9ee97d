"""The policy: the model being trained, with its adapter if any, and its optimizer."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from stages.models.fetch import fetch_model
from stages.models.merge_adapter import without_tie_warnings
from stages.models.resolve import ModelPin
from stages.policy.attention import pack_rows
from stages.policy.batches import Batch, RowLayout
from stages.policy.cpu.layers import replace_layers
from stages.policy.decoder_layers import checkpoint_layers, compile_layers
from stages.policy.logps import completion_tokens
from stages.policy.model import load_model
from stages.policy.output_layer import TokenLogps
from stages.policy.quantization import float32_products
from stages.policy.sharing import choose_rows, takes_rounded_weights
from stages.train.config import LoraSettings, TrainConfig, TrainExecution
from stages.train.losses import PairLogps
from stages.train.microbatch import MicroBatch


class TokenModel(nn.Module):
    """`completion_tokens` as the forward pass of a module.

    It calls the model's layers and its output layer separately. FSDP gathers weights at a module's
    forward pass, so both need one around them, or the output layer would find its weights sharded.
    """

    def __init__(self, model: PreTrainedModel, *, max_logits: int | None) -> None:
        super().__init__()
        self.model = model
        self.max_logits = max_logits

    def forward(self, batch: Batch, with_log_collision: bool) -> tuple[Tensor, Tensor | None]:
        """Return the fields of TokenLogps as a tuple: FSDP's hooks see only bare tensors."""
        tokens = completion_tokens(
            self.model, batch, max_logits=self.max_logits, with_log_collision=with_log_collision
        )
        return tokens.logps_N, tokens.log_collision_N


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The only model in the process. The reference exists only as stored log-probs."""

    model: PreTrainedModel
    """In float32; with LoRA, its linear layers contain the adapter's, which are float32, and its
    own weights are frozen, in `dtype` or quantised."""
    adapter: PeftModel | None
    """The same layers as a PEFT model; None when all weights are trained."""
    token_model: TokenModel
    """The same model, wrapped to return log-probs."""
    trained_parameters: Mapping[str, nn.Parameter]
    """By name, tied ones once. If sharded, DTensors of which this process holds some rows."""
    dtype: torch.dtype
    """Dtype of matrix products: float32 or bfloat16."""
    rows: RowLayout
    """The row layout that this model computes correctly."""
    is_autocast: bool = True
    """Whether autocast rounds for bfloat16 products. If not, a sharded policy rounds weights as it
    gathers them."""

    @property
    def gathers_rounded(self) -> bool:
        """Whether weights are rounded as they are gathered, and never computed with in float32."""
        return self.dtype != torch.float32 and not self.is_autocast

    def pair_logps(self, microbatch: MicroBatch, *, with_log_collision: bool = False) -> PairLogps:
        """Compute the log-probability of every completion token, differentiably.

        Args:
            with_log_collision: also fill `policy_log_collision_BT`.
        """
        return microbatch.pair_logps(self.completion_tokens(microbatch.batch, with_log_collision))

    def completion_tokens(self, batch: Batch, with_log_collision: bool = False) -> TokenLogps:
        """Compute the same, as one flat sequence of completion tokens."""
        with torch.autocast(
            self.model.device.type,
            self.dtype,
            enabled=self.is_autocast and self.dtype != torch.float32,
            # Weights that are gathered anew would be found in the cache as they were.
            cache_enabled=not isinstance(self.token_model, FSDPModule),
        ):
            logps_N, log_collision_N = self.token_model(batch, with_log_collision)
        return TokenLogps(logps_N=logps_N, log_collision_N=log_collision_N)

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Enable the adapter's dropout. All other modules stay in evaluation mode, so that a step
        computes what scoring computed."""
        layers = [one for one in self.model.modules() if isinstance(one, LoraLayer)]
        self._set_dropout(layers, is_training=True)
        try:
            yield
        finally:
            self._set_dropout(layers, is_training=False)

    @staticmethod
    def _set_dropout(layers: Iterable[LoraLayer], *, is_training: bool) -> None:
        for layer in layers:
            layer.lora_dropout.train(is_training)
            # DoRA leaves out dropout by the layer's own mode. `train` would set that of the base.
            layer.training = is_training


class Abilities(NamedTuple):
    """What trials on random tokens found of a model."""

    rows: RowLayout
    """The row layout that it computes correctly."""
    needs_autocast: bool
    """Whether autocast has to round for products, because its layers can't take rounded weights."""


def try_abilities(
    model: PreTrainedModel, config: TrainConfig, execution: TrainExecution, *, max_length: int
) -> Abilities:
    """Try what a model on its device can do; packed attention then stays in it."""
    rows = choose_rows(model, max_length=max_length)
    needs_autocast = (
        config.dtype == "float32"
        # It rounds an adapter, which is float32 beside weights that are rounded already.
        or config.lora is not None
        or not execution.shards(model.device.type)
        or not takes_rounded_weights(model, getattr(torch, config.dtype))
    )
    return Abilities(rows=rows, needs_autocast=needs_autocast)


def open_policy(
    config: TrainConfig,
    execution: TrainExecution,
    start: ModelPin,
    *,
    device: torch.device,
    max_length: int,
) -> Policy:
    """Load the start and add the adapter, if any.

    Args:
        max_length: tokens of the longest prompt with one completion.
    """
    dtype = getattr(torch, config.dtype) if config.lora else torch.float32
    model = load_model(
        fetch_model(start), dtype=dtype, device=device, is_quantized=config.is_quantized
    )
    abilities = None
    if config.is_quantized:
        with float32_products(model):
            abilities = try_abilities(model, config, execution, max_length=max_length)
    return make_policy(model, config, execution, max_length=max_length, abilities=abilities)


def make_policy(
    model: PreTrainedModel,
    config: TrainConfig,
    execution: TrainExecution,
    *,
    max_length: int,
    abilities: Abilities | None = None,
) -> Policy:
    """Make a model on its device ready for training.

    Args:
        model: in float32, or a base for an adapter; it is changed in place.
        max_length: as for `open_policy`.
        abilities: from `try_abilities`, if the model's are known.
    """
    if abilities is None:
        abilities = try_abilities(model, config, execution, max_length=max_length)
    elif abilities.rows == "packed":
        pack_rows(model)
    adapter = _add_adapter(model, config)
    if execution.compile_layers:
        compile_layers(model)
    elif not execution.shards(model.device.type):
        # These add to their gradients in place; FSDP must reduce gradients itself.
        replace_layers(model)
    if execution.gradient_checkpointing:
        checkpoint_layers(model)
    return Policy(
        model=model,
        adapter=adapter,
        token_model=TokenModel(
            model, max_logits=None if execution.max_logits == "auto" else execution.max_logits
        ),
        trained_parameters=list_trained(model),
        dtype=getattr(torch, config.dtype),
        rows=abilities.rows,
        is_autocast=abilities.needs_autocast,
    )


def list_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def open_whole(policy: Policy, config: TrainConfig, start: ModelPin) -> Policy:
    """Load the start again, whole, in float32 and on the CPU, to receive the trained weights.

    Those of a policy are then computed and exported as they were trained if it is sharded, or if
    the weights below its adapter are rounded or quantised.
    """
    model = load_model(fetch_model(start), dtype=torch.float32, device=torch.device("cpu"))
    adapter = _add_adapter(model, config)
    return replace(
        policy,
        model=model,
        adapter=adapter,
        token_model=TokenModel(model, max_logits=policy.token_model.max_logits),
        trained_parameters=list_trained(model),
        is_autocast=True,
    )


def _add_adapter(model: PreTrainedModel, config: TrainConfig) -> PeftModel | None:
    if config.lora is None:
        return None
    torch.manual_seed(config.seed)
    with without_tie_warnings():
        adapter = get_peft_model(model, make_adapter_config(config.lora))
    assert isinstance(adapter, PeftModel)
    for name, parameter in adapter.named_parameters():
        if "lora_magnitude_vector" in name and not parameter.all():
            raise ConfigError(
                f"{name.partition('.lora_magnitude_vector')[0]} has rows that are all 0, by whose "
                "norms DoRA would divide. Leave it out of stages.train.lora.target_modules, or "
                "leave stages.train.lora.use_dora out."
            )
    adapter.eval()
    return adapter


def make_adapter_config(lora: LoraSettings) -> LoraConfig:
    """Convert an adapter's settings to peft's."""
    targets = lora.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with its moments allocated.

    AdamW would allocate them in the first step. Here they come first, so that long-lived memory
    does not fragment what the steps need, and running out of memory shows at once.

    Weight decay applies to matrices, embeddings included, but not to norms and biases, not even to
    biases that a layer of experts stacks into a matrix.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in policy.trained_parameters.items():
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
        (decayed if is_matrix else not_decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": not_decayed, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    for parameter in policy.trained_parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
