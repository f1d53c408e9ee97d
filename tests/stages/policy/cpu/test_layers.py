"""Layers are replaced only where they compute the same values."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from stages.policy.batches import lay_out
from stages.policy.cpu import layers
from stages.policy.cpu.layers import replace_layers
from stages.policy.groups import Group
from stages.policy.logps import completion_token_logps

CPU = torch.device("cpu")
OpenTinyModel = Callable[[str], PreTrainedModel]


def replaced(model: PreTrainedModel) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {"LlamaRMSNorm"}),
        ("qwen3", {"Qwen3RMSNorm"}),
        ("gemma", set()),  # Its norm multiplies by 1 + weight.
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
    replace_layers(model)
    assert replaced(model) == wanted


def test_frozen_weights_get_no_gradient(tiny_model: OpenTinyModel) -> None:
    model = deepcopy(tiny_model("llama-untied"))
    model.requires_grad_(False)
    up_projection = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    replace_layers(model)
    ids = np.arange(3, 8, dtype=np.int32)
    batch = lay_out([Group(prompt_ids=ids, completions=(ids,))], device=CPU, rows="packed")
    completion_token_logps(model, batch).sum().backward()
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {
        "model.layers.0.mlp.up_proj.weight"
    }
    assert up_projection.grad.count_nonzero() > 0


def test_products_equal_torchs_own_with_and_without_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compared in float64, also for a transposed weight, as the backward pass uses it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 48), (64, 48), (48, 64), (64,)]
    input, weight, other, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    wanted = functional.linear(input.double(), weight.double(), bias.double())
    for is_used in (True, False):
        monkeypatch.setattr(layers, "_USES_ONEDNN", is_used)
        found = layers.multiply(input, weight, bias)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        found = layers.multiply(input, other.T, bias)
        wanted_of_other = functional.linear(input.double(), other.T.double(), bias.double())
        torch.testing.assert_close(found.double(), wanted_of_other, rtol=1e-5, atol=1e-5)


def test_mkl_is_preferred_on_intel_processors_only() -> None:
    assert layers.prefers_mkl("vendor_id\t: GenuineIntel") is torch.backends.mkl.is_available()
    assert not layers.prefers_mkl("vendor_id\t: AuthenticAMD")


@pytest.mark.parametrize("is_used", [True, False], ids=["oneDNN", "MKL"])
def test_a_model_may_change_a_layers_output_in_place(
    monkeypatch: pytest.MonkeyPatch, is_used: bool
) -> None:
    """As Gemma 3n scales one; gradients are those of torch's own layer."""
    monkeypatch.setattr(layers, "_USES_ONEDNN", is_used)
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 64)
    ours = deepcopy(plain)
    ours.__class__ = layers.InPlaceLinear
    for module in (plain, ours):
        output = module(torch.ones(2, 5, 48, requires_grad=True).square())
        output *= 3.0
        output.sin().sum().backward()
    for found, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
