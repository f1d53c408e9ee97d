"""Compiled layers compute what they computed before, are compiled once, and may fail."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from stages.policy import decoder_layers
from stages.policy.batches import lay_out
from stages.policy.decoder_layers import checkpoint_layers, compile_layers
from stages.policy.logps import completion_token_logps
from tests.stages.policy.plain_forward import random_groups

CPU = torch.device("cpu")
OpenTinyModel = Callable[[str], PreTrainedModel]


def compute(model: PreTrainedModel, seed: int) -> list[Tensor]:
    """Compute log-probs and gradients of a packed row; its length depends on the seed."""
    batch = lay_out(random_groups(seed, num_groups=2 + seed, longest=20), device=CPU, rows="packed")
    logps_N = completion_token_logps(model, batch)
    logps_N.sum().backward()
    gradients = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return [logps_N.detach(), *gradients]


def compare(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    for seed in range(3):
        for one, other in zip(compute(found, seed), compute(wanted, seed), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def open_pair(tiny_model: OpenTinyModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.compiler.reset()
    return deepcopy(tiny_model("llama")), deepcopy(tiny_model("llama"))


class CountingBackend:
    """A compiler that runs the graphs it is given, and counts them."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_are_compiled_once_for_rows_of_all_lengths(
    tiny_model: OpenTinyModel, monkeypatch: pytest.MonkeyPatch, recomputes: bool
) -> None:
    """Attention cuts a layer in two graphs, which all layers share."""
    backend = CountingBackend()
    monkeypatch.setattr(decoder_layers, "COMPILER", backend)
    compiled, plain = open_pair(tiny_model)
    compile_layers(compiled)
    if recomputes:
        checkpoint_layers(compiled)
    compute(compiled, 0)
    num_first = backend.num_graphs
    assert 0 < num_first <= 2 * compiled.config.num_hidden_layers
    compare(compiled, plain)
    assert backend.num_graphs == num_first


def test_what_the_compiler_fails_at_runs_without(
    tiny_model: OpenTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(decoder_layers, "COMPILER", fail)
    compiled, plain = open_pair(tiny_model)
    compile_layers(compiled)
    compare(compiled, plain)


@pytest.mark.slow
def test_torchs_own_compiler_gives_the_same(tiny_model: OpenTinyModel) -> None:
    compiled, plain = open_pair(tiny_model)
    compile_layers(compiled)
    compare(compiled, plain)
