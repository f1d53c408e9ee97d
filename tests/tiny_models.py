"""Tiny random models for tests, each a Hugging Face folder with a tokenizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
HIDDEN_SIZE = 64
MAX_POSITIONS = 2048
SLIDING_WINDOW = 8
"""Positions that a sliding-window layer of a tiny model attends to, its own included."""

END_OF_TEXT, START_OF_MESSAGE, END_OF_MESSAGE = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
)

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TRAINING_TEXT = (
    "user assistant system\n",
    "What is the capital of France? The capital of France is Paris.\n",
    "How do I boil an egg? Put the egg in boiling water and wait for eight minutes.\n",
    "Why is the sky blue? Air scatters blue light more than red light.\n",
    "Please answer the question directly and politely. I would rather not say.\n",
)

TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.1,
    **TOKEN_IDS,
}
GROUPED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 1}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN_SIZE,
        n_layer=2,
        n_head=2,
        n_positions=MAX_POSITIONS,
        initializer_range=0.1,
        **TOKEN_IDS,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=96),
    "phi": lambda: PhiConfig(**SIZES, intermediate_size=96, partial_rotary_factor=0.5),
    "phi3": lambda: Phi3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma2": lambda: Gemma2Config(
        **GROUPED,
        head_dim=32,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        sliding_window=SLIDING_WINDOW,
    ),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=SLIDING_WINDOW),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "cohere": lambda: CohereConfig(**GROUPED, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**GROUPED, logits_scaling=4.0),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        state_size=8,
        num_hidden_layers=2,
        initializer_range=0.1,
        **TOKEN_IDS,
    ),
}


def make_tiny_model(folder: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """Write a random float32 model of 2 layers and its tokenizer as a Hugging Face folder.

    The tokenizer is a byte-level BPE with a ChatML template, so it can encode every text. The same
    architecture and seed give the same weights.

    Args:
        folder: created when missing.
        architecture: a key of CONFIGS.
        seed: of the weights.
    Returns:
        The folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32)
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def shard_weights(folder: Path) -> Path:
    """Split a tiny model's weights over several files, as large models are released."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of VOCAB_SIZE tokens on TRAINING_TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_MESSAGE,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_MESSAGE],
        model_max_length=MAX_POSITIONS,
        chat_template=CHATML,
    )
