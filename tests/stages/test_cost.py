"""Tests of the cost model: sizes and operations against torch's counter and by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from stages.cost import Lengths, forward_flops, score_flops, size_model, train_flops
from tests.tiny_models import make_tiny_model

LENGTHS = Lengths(prompt=100, chosen=30, rejected=50, prompts_per_pair=0.5, source="here")


@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen3", "mistral"])
def test_the_size_and_the_operations_are_those_that_torch_counts(tmp_path: Path, name: str) -> None:
    """torch counts attention over the full square, so t is the whole sequence here."""
    folder = make_tiny_model(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    size = size_model(json.loads((folder / "config.json").read_text()))
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    body = sum(number for n, number in matrices.items() if "embed" not in n and "lm_head" not in n)
    assert (size.body, size.head) == (body, model.lm_head.weight.numel())
    num_tokens = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros((1, num_tokens), dtype=torch.long))
    attention = 4 * size.depth_width * num_tokens
    expected = num_tokens * (2 * size.body + 2 * size.head + attention)
    assert counter.get_total_flops() == expected


def test_operations_by_hand() -> None:
    """Ten pairs of five prompts, a model of N = 1000, a head of 500, L D = 7.

    Tokens: 5 * 100 + 10 * 80 = 1300, of them 800 predicted; t is half of 100 + 80 / 2.
    Training computes each pair's prompt: 10 * 180 = 1800 tokens.
    """
    config = {
        "hidden_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 20,
        "vocab_size": 50,
    }
    assert size_model(config).body == 4 * 10 * 10 + 3 * 10 * 20 == 1000
    size = dataclasses.replace(size_model(config), depth_width=7)
    assert size.head == 500
    attention = 4 * 7 * 70
    scored = 1300 * (2 * 1000 + attention) + 800 * 2 * 500
    assert score_flops(size, LENGTHS, 10) == scored
    forward = 1800 * (2 * 1000 + attention) + 800 * 2 * 500
    assert forward_flops(size, LENGTHS, num_prompts=10, num_pairs=10) == forward
    assert train_flops(size, LENGTHS, 10, is_adapter=False, recomputes=False) == 3 * forward
    assert train_flops(size, LENGTHS, 10, is_adapter=True, recomputes=False) == 2 * forward
    assert train_flops(size, LENGTHS, 10, is_adapter=False, recomputes=True) == 4 * forward


def test_a_model_with_another_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="no 'hidden_size'"):
        size_model({"model_type": "gpt2", "n_embd": 10})
