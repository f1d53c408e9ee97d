"""Canaries of the private parts of torch that stages/policy/torch_compat.py uses."""

import torch
from torch import nn
from torch.nn import functional

from stages.policy.torch_compat import HAS_ONEDNN_LINEAR, onednn_linear, set_class


def test_torch_ops_mkldnn_linear_pointwise_exists_wherever_onednn_does() -> None:
    """If torch renames it, products silently take the slower way."""
    assert HAS_ONEDNN_LINEAR is torch.backends.mkldnn.is_available()


def test_torch_ops_mkldnn_linear_pointwise_computes_a_linear_layer() -> None:
    if not HAS_ONEDNN_LINEAR:
        return
    generator = torch.Generator().manual_seed(0)
    input, weight, bias = (
        torch.randn(shape, generator=generator) for shape in [(2, 5, 48), (64, 48), (64,)]
    )
    for one in (None, bias):
        wanted = functional.linear(input, weight, one)
        torch.testing.assert_close(onednn_linear(input, weight, one), wanted, rtol=1e-5, atol=1e-5)


def test_the_class_of_a_module_can_be_replaced() -> None:
    """Its hooks and parameters stay, and its forward pass is the new class's."""

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    module, input = nn.Linear(3, 2), torch.ones(1, 3)
    weight, wanted = module.weight, 2 * module(input)
    called = []
    module.register_forward_hook(lambda *_: called.append(True))
    set_class(module, Doubled)
    assert module(input).equal(wanted)
    assert module.weight is weight
    assert called == [True]
