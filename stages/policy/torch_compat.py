"""Private parts of torch that the policy relies on.

Tested with torch 2.13. tests/stages/policy/test_torch_compat.py names each of them and fails when
an upgrade moves one.
"""

import torch
from torch import Tensor, nn

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute input @ weight.T + bias in float32 by oneDNN.

    In float32, torch.nn.functional.linear uses MKL where torch is built with it, and no public
    function selects oneDNN. torch's own compiler calls this operator
    (torch/_inductor/mkldnn_ir.py).
    """
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


def skip_what_fails_to_compile() -> None:
    """Make torch.compile run what its backend fails at uncompiled, with a warning.

    There is no public setting for this.
    """
    torch._dynamo.config.suppress_errors = True


def set_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    """Replace the class of a module by a subclass, for its forward pass.

    A new module would lose the hooks, the ties and the names under which others already hold the
    old one. torch does the same in nn.utils.parametrize.
    """
    assert issubclass(new_class, type(module))
    module.__class__ = new_class
