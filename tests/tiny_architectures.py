"""Tiny random models of many more architectures than tests need for anything but their numbers."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.tiny_models import (
    CONFIGS,
    GROUPED,
    HIDDEN_SIZE,
    MAX_POSITIONS,
    SIZES,
    SLIDING_WINDOW,
    TOKEN_IDS,
    VOCAB_SIZE,
    make_tiny_tokenizer,
)

SHORT_POSITIONS = 96
"""Positions up to which the models with a rope that depends on length count as short."""

UNGROUPED = {**GROUPED, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2}
LOCAL_EXPERTS = {**EXPERTS, "num_local_experts": 4}
SMALL_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 48}
WINDOWS = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
WIDE = {**GROUPED, "head_dim": 32}
GPT = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": HIDDEN_SIZE,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": MAX_POSITIONS,
    "initializer_range": 0.1,
    **TOKEN_IDS,
}
GPT_NEO = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_layers": 2,
    "num_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.1,
    **TOKEN_IDS,
}
LAYERS = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
BLOOM = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "n_layer": 2,
    "n_head": 2,
    "initializer_range": 0.1,
    **TOKEN_IDS,
}
DECODER = {
    "vocab_size": VOCAB_SIZE,
    "ffn_dim": 96,
    "max_position_embeddings": MAX_POSITIONS,
    "init_std": 0.1,
    **TOKEN_IDS,
}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + at for at in range(16)],
    "original_max_position_embeddings": SHORT_POSITIONS,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    **CONFIGS,
    "apertus": lambda: hf.ApertusConfig(**GROUPED),
    "arcee": lambda: hf.ArceeConfig(**GROUPED),
    "bamba": lambda: hf.BambaConfig(
        **GROUPED, **MAMBA2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16
    ),
    "biogpt": lambda: hf.BioGptConfig(**SIZES, intermediate_size=96),
    "biogpt-layerdrop": lambda: hf.BioGptConfig(
        **SIZES, intermediate_size=96, layerdrop=0.9, hidden_dropout_prob=0.5
    ),
    "bloom": lambda: hf.BloomConfig(**BLOOM),
    "codegen": lambda: hf.CodeGenConfig(**{**GPT, "n_head": 4}, rotary_dim=8),
    "cohere2": lambda: hf.Cohere2Config(**GROUPED, **WINDOWS, logit_scale=0.25),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **UNGROUPED,
        **EXPERTS,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        qk_nope_head_dim=16,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "deepseek-v3.2": lambda: hf.DeepseekV32Config(
        **UNGROUPED,
        **EXPERTS,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        qk_nope_head_dim=16,
        n_shared_experts=1,
        first_k_dense_replace=1,
        index_topk=16,
        index_n_heads=2,
        index_head_dim=32,
    ),
    "diffllama": lambda: hf.DiffLlamaConfig(**UNGROUPED),
    "doge": lambda: hf.DogeConfig(**GROUPED),
    "ernie4.5": lambda: hf.Ernie4_5Config(**GROUPED),
    "exaone4": lambda: hf.Exaone4Config(**GROUPED, **WINDOWS),
    "falcon-alibi": lambda: hf.FalconConfig(
        **LAYERS,
        **TOKEN_IDS,
        num_attention_heads=2,
        alibi=True,
        new_decoder_architecture=False,
        initializer_range=0.1,
    ),
    "falcon-h1": lambda: hf.FalconH1Config(
        **WIDE, **MAMBA2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16
    ),
    "gemma3-dynamic": lambda: hf.Gemma3TextConfig(
        **{**WIDE, "max_position_embeddings": SHORT_POSITIONS},
        **WINDOWS,
        query_pre_attn_scalar=32,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "gemma3n": lambda: hf.Gemma3nTextConfig(
        **WIDE,
        **WINDOWS,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4": lambda: hf.Gemma4TextConfig(
        **WIDE,
        **WINDOWS,
        global_head_dim=32,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    ),
    "glm4": lambda: hf.Glm4Config(**WIDE),
    "gpt-bigcode": lambda: hf.GPTBigCodeConfig(**GPT),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        **GPT_NEO, window_size=SLIDING_WINDOW, attention_types=[[["global", "local"], 1]]
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **WIDE,
        **WINDOWS,
        **LOCAL_EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=16),
    "granite-moe": lambda: hf.GraniteMoeConfig(**GROUPED, **LOCAL_EXPERTS, logits_scaling=4.0),
    "helium": lambda: hf.HeliumConfig(**WIDE),
    "hunyuan": lambda: hf.HunYuanDenseV1Config(**WIDE),
    "lfm2": lambda: hf.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], conv_L_cache=3, block_ff_dim=96
    ),
    "llama-dynamic": lambda: hf.LlamaConfig(
        **{**GROUPED, "max_position_embeddings": SHORT_POSITIONS},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "llama-yarn": lambda: hf.LlamaConfig(
        **GROUPED,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **WIDE,
        intermediate_size_mlp=96,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=16,
        no_rope_layers=[1, 0],
        interleave_moe_layer_step=1,
    ),
    "minimax": lambda: hf.MiniMaxConfig(
        **GROUPED,
        **LOCAL_EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        block_size=16,
    ),
    "modernbert-decoder": lambda: hf.ModernBertDecoderConfig(
        **SIZES, intermediate_size=96, local_attention=8
    ),
    "mpt": lambda: hf.MptConfig(
        vocab_size=VOCAB_SIZE,
        d_model=HIDDEN_SIZE,
        n_layers=2,
        n_heads=2,
        max_seq_len=MAX_POSITIONS,
        initializer_range=0.1,
    ),
    "nemotron": lambda: hf.NemotronConfig(**GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "olmo3": lambda: hf.Olmo3Config(**GROUPED, **WINDOWS),
    "olmoe": lambda: hf.OlmoeConfig(**GROUPED, **EXPERTS, num_experts=4),
    "opt": lambda: hf.OPTConfig(
        **{**DECODER, "pad_token_id": 1},
        hidden_size=HIDDEN_SIZE,
        word_embed_proj_dim=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    "phi3-longrope": lambda: hf.Phi3Config(
        **GROUPED, original_max_position_embeddings=SHORT_POSITIONS, rope_parameters=LONGROPE
    ),
    "phimoe": lambda: hf.PhimoeConfig(**GROUPED, **LOCAL_EXPERTS),
    "phimoe-longrope": lambda: hf.PhimoeConfig(
        **GROUPED,
        **LOCAL_EXPERTS,
        original_max_position_embeddings=SHORT_POSITIONS,
        rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**WIDE, **SMALL_EXPERTS),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **WIDE,
        **SMALL_EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=48,
    ),
    "recurrent-gemma": lambda: hf.RecurrentGemmaConfig(
        **WIDE,
        lru_width=HIDDEN_SIZE,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
    ),
    "rwkv": lambda: hf.RwkvConfig(
        **LAYERS, **TOKEN_IDS, attention_hidden_size=HIDDEN_SIZE, context_length=MAX_POSITIONS
    ),
    "seed-oss": lambda: hf.SeedOssConfig(**WIDE),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "stablelm": lambda: hf.StableLmConfig(**GROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**GROUPED),
    "xglm": lambda: hf.XGLMConfig(**DECODER, d_model=HIDDEN_SIZE, num_layers=2, attention_heads=2),
}

REFUSED = ("llama4", "modernbert-decoder")
"""Architectures that the loader of stages/policy refuses."""


def few_fast_ones(quick: Collection[str]) -> list[Any]:
    """List all architectures that are not refused, as parameters of a test; others are slow."""
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow)
        for name in sorted(ARCHITECTURES.keys() - {*REFUSED})
    ]


def make_tiny_architecture(folder: Path, name: str) -> Path:
    """Write a random float32 model of ARCHITECTURES and its tokenizer as a Hugging Face folder.

    Parameters that start at one value, such as norms, biases and attention sinks, get random ones,
    so that leaving them out changes the output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if (parameter == parameter.flatten()[0]).all():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder
