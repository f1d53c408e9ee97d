"""Load a causal language model, and compute its logits from hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import (
    disable_progress_bar,
    get_verbosity,
    set_verbosity,
    set_verbosity_error,
)

from schemas.errors import ConfigError
from stages.policy.memory import align_parameters, keep_freed_memory
from stages.policy.quantization import keep_trainable_format, quantize_nf4

LOGIT_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
LOGIT_DIVISORS = ("logits_scaling",)
LOGIT_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Config keys by which architectures scale or cap the output layer's values."""

NUM_PROBE_TOKENS = 16
"""Random tokens on which `check_logits` compares the two ways to logits."""


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    config: PreTrainedConfig | None = None,
    is_quantized: bool = False,
) -> PreTrainedModel:
    """Load a model as shipped, in evaluation mode.

    It stays in that mode, also while it trains (`checkpoint_layers`, Policy.training_mode): there
    dropout, layer drop and router noise are off, and what a model reads of its config for other
    purposes, such as a router's threshold, is unchanged. Attention is torch's SDPA, and eager where
    that would leave out a soft cap.

    Args:
        path: a Hugging Face folder with safetensors; code in it is not run.
        dtype: dtype of the weights.
        device: device of the weights.
        config: of the model's first layers, to load only them; None: of the whole model.
        is_quantized: whether to quantise linear layers to NF4 (`quantize_nf4`).
    Raises:
        ConfigError: weights are missing from the folder, or logits_of_hidden does not compute the
            model's logits.
    """
    pin_float32()
    if device.type == "cpu":
        keep_freed_memory()
    disable_progress_bar()  # It would interrupt the run's own progress lines.
    is_part = config is not None
    if config is None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    keep_weights_unscaled(config)
    # transformers would report the weights of all other layers as unexpected.
    with _silenced() if is_part else nullcontext():
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention_implementation(config),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **(quantize_nf4(dtype, device) if is_quantized else {}),
        )
    missing = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    if missing:
        raise ConfigError(
            f"{path} lacks weights that its config.json asks for, such as {missing[0]} "
            f"({len(missing)} in all). Name a folder that holds the whole model."
        )
    model = model.to(device).eval()
    if is_quantized:
        keep_trainable_format(model)
    align_parameters(model)
    check_logits(model)
    return model


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep transformers' warnings from the log for a block."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(verbosity)


def pin_float32() -> None:
    """Make float32 products float32, also where other code in this process chose TF32 or bfloat16.

    TF32 keeps 10 bits of a factor's mantissa; torch allows it for convolutions by default.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def keep_weights_unscaled(config: PreTrainedConfig) -> None:
    """Turn off RWKV's division of its weights in evaluation mode, which would be trained and saved.

    It divides weights and hidden states by the same powers of 2, for the range of float16.
    """
    if config_number(config, "rescale_every"):
        config.rescale_every = 0


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Choose eager attention for models with a soft cap on attention scores, which SDPA ignores.

    None lets transformers choose: SDPA where the architecture supports it.
    """
    return "eager" if config_number(config, "attn_logit_softcapping") else None


def logits_of_hidden(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Apply the output layer, and the scaling and soft cap that some architectures add to it.

    Args:
        hidden_ND: last hidden states of the base model at any N positions.
    Returns:
        Logits [N, V] in the dtype of the output layer.
    """
    output_layer = model.get_output_embeddings()
    return scale_logits(model.config, output_layer(hidden_ND.to(output_layer.weight.dtype)))


def scale_logits(config: PreTrainedConfig, logits_NV: Tensor) -> Tensor:
    """Apply an architecture's scaling and soft cap to what its output layer returns.

    Returns:
        Logits [N, V]; the tensor itself where the architecture has neither.
    """
    for key in LOGIT_MULTIPLIERS:
        if factor := config_number(config, key):
            logits_NV = logits_NV * factor
    for key in LOGIT_DIVISORS:
        if divisor := config_number(config, key):
            logits_NV = logits_NV / divisor
    for key in LOGIT_SOFT_CAPS:
        if soft_cap := config_number(config, key):
            logits_NV = torch.tanh(logits_NV / soft_cap) * soft_cap
    return logits_NV


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of rows of the output layer, including those that pad it to a round number."""
    size: int = model.get_output_embeddings().weight.shape[0]
    return size


def config_number(config: PreTrainedConfig, key: str) -> float | None:
    """Read a number from the text model's config; None where the architecture has no such key."""
    value = getattr(config.get_text_config(), key, None)
    return None if value is None else float(value)


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Compare logits_of_hidden with the model's own forward pass on random tokens.

    Raises:
        ConfigError: they differ, or the model has no base model that returns hidden states.
    """
    if model.base_model is model:
        raise ConfigError(
            f"{type(model).__name__} does not keep its output layer apart from the layers below. "
            "Use a model of another architecture."
        )
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary_size(model), (1, NUM_PROBE_TOKENS), generator=generator)
    input_ids = input_ids.to(model.device)
    wanted = model(input_ids=input_ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    found = logits_of_hidden(model, hidden).float()
    difference = (found - wanted).abs().max().item()
    tolerance = 4 * torch.finfo(model.dtype).eps * wanted.abs().max().item()
    if not difference <= tolerance:
        raise ConfigError(
            f"{type(model).__name__} computes its logits in a way that this program does not know "
            f"(they differ from output layer times hidden state by {difference:.3g}). "
            "Use a model of another architecture."
        )
