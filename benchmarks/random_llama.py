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

from benchmarks.shapes import SHAPES
from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model

SAMPLE = "sample:smollm2-135m-instruct"


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
