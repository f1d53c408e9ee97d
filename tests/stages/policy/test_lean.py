"""Which layers are replaced, and only where that changes nothing?"""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.policy.lean import LeanEmbedding, LeanLinear, make_lean

OpenTinyModel = Callable[[str], PreTrainedModel]


def replaced(model: PreTrainedModel) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}),
        ("gemma", {"GemmaMLP"}),  # Its norm multiplies by 1 + weight.
        ("gpt2", set()),
    ],
)
def test_a_layer_is_replaced_where_it_computes_what_its_name_says(
    tiny_model: OpenTinyModel, architecture: str, wanted: set[str]
) -> None:
    model = deepcopy(tiny_model(architecture))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    make_lean(model)
    assert replaced(model) == wanted


def test_frozen_weights_are_left_alone(tiny_model: OpenTinyModel) -> None:
    model = deepcopy(tiny_model("llama-untied"))
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    make_lean(model)
    assert isinstance(model.lm_head, LeanLinear)
    others = [module for module in model.modules() if module is not model.lm_head]
    assert not any(isinstance(module, LeanLinear | LeanEmbedding) for module in others)
    assert any(type(module) is nn.Linear for module in others)
