"""Make a Llama with random weights, to benchmark training at other model sizes.

python -m benchmarks.random_llama 1b /tmp/llama-1b

Pass the folder to `benchmarks.beside_trl --model`. It has the sample model's tokenizer, so
the tokens are the same; the rest of the vocabulary is unused.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model

SAMPLE = "sample:smollm2-135m-instruct"

SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
"""The shapes of Qwen2.5-0.5B (without its biases), Llama-3.2-1B and Llama-3.1-8B, from their
config.json."""


def main(
    shape: Annotated[Literal["0.5b", "1b", "8b"], typer.Argument(help="Shape of the model.")],
    folder: Annotated[Path, typer.Argument(help="Output folder; weights are bfloat16.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a Llama with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_model(pin_model(SAMPLE)))
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
