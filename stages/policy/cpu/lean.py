"""Which layers of a model on a CPU are computed otherwise than torch would, and to what end?

Products in float32 go to the faster of two libraries. And in training, autograd makes a new tensor
of every weight's gradient in every micro-batch, and adds it to the one before; of token embeddings
that is a tensor as large as the vocabulary for a few hundred tokens. Here the products go where the
sums are, and what one multiplication gives back is not kept.

Shape suffixes: N tokens, D width of the model, W width of an inner layer, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
"""The second is a name that torch's own compiler calls, and no promise."""


def prefers_mkl(processor: str) -> bool:
    """Whether MKL is the faster one on a processor, which is described as in /proc/cpuinfo."""
    return torch.backends.mkl.is_available() and "GenuineIntel" in processor


def _describe_processor() -> str:
    """Give what the system says of the first core; nothing where it does not say it there."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ""
    with cpuinfo.open() as stream:  # Of many cores it takes long to write it all.
        return "".join(takewhile(str.strip, stream))


_USES_ONEDNN = _HAS_ONEDNN and not prefers_mkl(_describe_processor())


def make_lean(model: PreTrainedModel) -> None:
    """Change how the layers of a model on a CPU compute, and of what they compute only last digits.

    Linear layers multiply by the faster library. They and token embeddings add to their gradients
    in place: these are then found in `.grad` alone, and nothing that waits for autograd to hand
    them out sees them, such as DistributedDataParallel's hooks or torch.autograd.grad. RMS norms
    and gated activations keep their inputs alone; whether a layer is one of these is found out by
    trying.

    Args:
        model: not sharded; an adapter is in it already.
    """
    if model.device.type != "cpu":
        return
    make_products_lean(model)
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.requires_grad:
            module.__class__ = LeanEmbedding
        elif type(module).__name__.endswith("RMSNorm"):
            _replace_forward(module, _rms_norm)
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= dict(
            module.named_children()
        ).keys():
            _replace_forward(module, _gated_mlp)


def make_products_lean(model: PreTrainedModel) -> None:
    """Change linear layers alone, which is what scoring gains from; nothing on a GPU."""
    if model.device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = LeanLinear


def _replace_forward(module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Let a module compute by another function, if that gives the same on random numbers."""
    plain = module.forward
    generator = torch.Generator().manual_seed(0)
    weight = next(module.parameters())
    input = torch.randn(4, weight.shape[-1], generator=generator, dtype=weight.dtype)
    try:
        with torch.no_grad():
            wanted, found = plain(input), forward(module, input)
    except (AttributeError, RuntimeError):
        return  # Not built as its name says.
    if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
        module.forward = partial(_choose_forward, module, forward, plain)


def _choose_forward(
    module: nn.Module,
    lean: Callable[[nn.Module, Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    input: Tensor,
) -> Tensor:
    """Be lean where gradients will be wanted, in float32."""
    is_plain = not torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type)
    return plain(input) if is_plain else lean(module, input)


def _rms_norm(module: Any, input: Tensor) -> Tensor:
    output: Tensor = _RmsNorm.apply(input, module.weight, module.variance_epsilon)
    return output


def _gated_mlp(module: Any, input: Tensor) -> Tensor:
    gate, up = module.gate_proj(input), module.up_proj(input)
    down = module.down_proj
    output: Tensor
    if type(down) is LeanLinear and down.bias is None:
        output = _GatedDown.apply(gate, up, module.act_fn, down.weight)
    else:
        output = down(_GatedProduct.apply(gate, up, module.act_fn))
    return output


class LeanLinear(nn.Linear):
    """nn.Linear, but for the way in which its gradient comes about."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        if not torch.is_grad_enabled():
            return multiply(input, self.weight, self.bias)
        output: Tensor = _Linear.apply(input, self.weight, self.bias)
        return output


class LeanEmbedding(nn.Embedding):
    """nn.Embedding, but for the way in which its gradient comes about."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        output: Tensor = _Embedding.apply(input, self.weight, self.padding_idx)
        return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if weight.requires_grad else None)
        ctx.weight, ctx.bias = weight, bias
        return multiply(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        (input,) = ctx.saved_tensors
        grad_NW = grad_output.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            add_product(ctx.weight, grad_NW.T, input.flatten(0, -2))
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            _gradient(ctx.bias).add_(grad_NW.sum(0))
        needs_input = ctx.needs_input_grad[0]
        return multiply(grad_output, ctx.weight.T, None) if needs_input else None, None, None


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon), of which x and the root are kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = input.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(input, weight, scale)
        return (input * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        input, weight, scale = ctx.saved_tensors
        normed = input * scale
        grad_weight = (grad_output * normed).flatten(0, -2).sum(0)
        grad_normed = grad_output * weight
        common = (grad_normed * normed).mean(-1, keepdim=True)
        return grad_normed.sub_(normed.mul_(common)).mul_(scale), grad_weight, None


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up, of which act(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        activated, back = _activate(gate, ctx.act)
        return back(grad_output * up), grad_output * activated, None


class _GatedDown(torch.autograd.Function):
    """act(gate) * up times the weight of the layer below, of which only gate and up are kept."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.weight = act, weight
        return multiply(act(gate).mul_(up), weight, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        activated, back = _activate(gate, ctx.act)
        if ctx.needs_input_grad[3]:
            product = (activated * up).flatten(0, -2)
            add_product(ctx.weight, grad_output.flatten(0, -2).T, product)
        grad_product = multiply(grad_output, ctx.weight.T, None)
        return back(grad_product * up), grad_product.mul_(activated), None, None


def _activate(
    gate: Tensor, act: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Give act(gate), and what turns its gradient into that of the gate."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        activated = act(gate)
    return activated.detach(), lambda grad: torch.autograd.grad(activated, gate, grad)[0]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(input)
        ctx.weight, ctx.padding_id = weight, padding_id
        return functional.embedding(input, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        ids_N = ctx.saved_tensors[0].flatten()
        grad_ND = grad_output.flatten(0, -2)
        if ctx.padding_id is not None:
            grad_ND = grad_ND.masked_fill((ids_N == ctx.padding_id)[:, None], 0.0)
        _gradient(ctx.weight).index_add_(0, ids_N, grad_ND)
        return None, None, None


def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Give input @ weight.T + bias, by the faster of the two libraries that torch has for it.

    In float32 torch's own linear asks MKL, which is faster than oneDNN on Intel's processors and
    slower on others.
    """
    if _USES_ONEDNN and input.dtype == weight.dtype == torch.float32:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return output
    return functional.linear(input, weight, bias)


def add_product(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices to a weight's gradient, without a tensor in between."""
    if weight.grad is None:
        weight.grad = left @ right
    else:
        weight.grad.addmm_(left, right)


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
