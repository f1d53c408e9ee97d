"""The output layer gives exact values, whatever its chunks, dtype and kind."""

import weakref
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stages.policy import output_layer
from stages.policy.output_layer import MAX_LOGITS, TokenLogps, target_logps
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

OpenTinyModel = Callable[[str], PreTrainedModel]

NUM_POSITIONS = 256
MAX_KERNELS = 250
"""Kernels of an output layer's forward and backward pass at 8,192 positions and 152k tokens."""


def random_positions(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(NUM_POSITIONS, HIDDEN_SIZE, generator=generator).to(dtype)
    target_ids_N = torch.randint(VOCAB_SIZE, (NUM_POSITIONS,), generator=generator)
    return hidden_ND, target_ids_N


def plain_logps(logits_NV: Tensor, target_ids_N: Tensor) -> Tensor:
    return logits_NV.log_softmax(-1)[torch.arange(len(target_ids_N)), target_ids_N]


def test_bfloat16_logits_are_normalized_in_float32(tiny_model: OpenTinyModel) -> None:
    """Forward and backward equal log_softmax of the same logits after widening."""
    model = deepcopy(tiny_model("llama")).bfloat16()
    hidden_ND, target_ids_N = random_positions(torch.bfloat16)
    found, wanted = (hidden_ND.clone().requires_grad_() for _ in range(2))
    found_N = target_logps(model, found, target_ids_N, max_logits=2**25).logps_N
    wanted_N = plain_logps(model.lm_head(wanted).float(), target_ids_N)
    torch.testing.assert_close(found_N, wanted_N, rtol=0, atol=2e-6)
    found_N.sum().backward()
    wanted_N.sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("num_chunks", [1, 8, 64, 256])
def test_under_autocast_the_number_of_chunks_changes_only_rounding(
    tiny_model: OpenTinyModel, num_chunks: int
) -> None:
    """A sum kept in bfloat16 would lose more with every chunk: 1.4 % in 256 chunks.

    bfloat16 keeps 8 bits, so each factor is off by at most 2^-9, 0.2 %; a sum over positions of
    random signs is off by no more than that, relative to its norm.
    """
    model = deepcopy(tiny_model("llama-untied"))
    hidden_ND, target_ids_N = random_positions()
    weight = model.lm_head.weight
    plain_logps(hidden_ND.double() @ weight.double().T, target_ids_N).square().sum().backward()
    wanted = weight.grad
    weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        logps_N = target_logps(
            model, hidden_ND, target_ids_N, max_logits=NUM_POSITIONS // num_chunks * VOCAB_SIZE
        ).logps_N
    logps_N.square().sum().backward()
    assert wanted is not None
    assert weight.grad is not None
    assert ((weight.grad - wanted).norm() / wanted.norm()).item() < 0.005


@pytest.mark.parametrize(("num_positions", "times"), [(10**6, 1), (10, 2)])
def test_logits_are_computed_again_only_when_they_did_not_fit(
    tiny_model: OpenTinyModel,
    monkeypatch: pytest.MonkeyPatch,
    num_positions: int,
    times: int,
) -> None:
    made = []

    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.shape[0] == VOCAB_SIZE:
            made.append(len(input))
        return nn.functional.linear(input, weight, bias)

    monkeypatch.setattr(output_layer, "multiply", multiply)
    hidden_ND, target_ids_N = random_positions()
    max_logits = num_positions * VOCAB_SIZE
    tokens = target_logps(
        tiny_model("llama"), hidden_ND.requires_grad_(), target_ids_N, max_logits=max_logits
    )
    tokens.logps_N.sum().backward()
    assert sum(made) == times * NUM_POSITIONS


@pytest.mark.parametrize("max_logits", [2**25, 50 * VOCAB_SIZE])
def test_an_output_layer_with_an_adapter_is_computed_through_it(
    tiny_model: OpenTinyModel, max_logits: int
) -> None:
    model = deepcopy(tiny_model("llama-untied"))
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(model, config)
    hidden_ND, target_ids_N = random_positions()

    def run(compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        hidden = hidden_ND.clone().requires_grad_()
        logps_N = compute(hidden)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        assert len(trained) == 2
        return (logps_N, *torch.autograd.grad(logps_N.square().sum(), [hidden, *trained]))

    def of_product(hidden: Tensor) -> TokenLogps:
        return target_logps(
            model, hidden, target_ids_N, max_logits=max_logits, with_log_collision=True
        )

    found = run(lambda hidden: of_product(hidden).logps_N)
    wanted = run(lambda hidden: plain_logps(model.lm_head(hidden), target_ids_N))
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-4)
    collision_N = of_product(hidden_ND).log_collision_N
    shares_NV = model.lm_head(hidden_ND).softmax(-1)
    assert collision_N is not None
    torch.testing.assert_close(collision_N, shares_NV.square().sum(-1).log(), rtol=0, atol=1e-5)


def test_a_frozen_output_layer_gets_no_gradient(tiny_model: OpenTinyModel) -> None:
    model = deepcopy(tiny_model("llama-untied"))
    model.lm_head.weight.requires_grad_(False)
    hidden_ND, target_ids_N = random_positions()
    tokens = target_logps(
        model, hidden_ND.requires_grad_(), target_ids_N, max_logits=9 * VOCAB_SIZE
    )
    tokens.logps_N.sum().backward()
    assert model.lm_head.weight.grad is None
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.count_nonzero() > 0


class LivingLogits(TorchDispatchMode):
    """Record the most positions with logits in memory at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most_positions = 0
        self._tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            is_wide = isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCAB_SIZE,)
            if is_wide and len(tensor) != HIDDEN_SIZE:  # The transposed weights.
                self._tensors.append(weakref.ref(tensor))
        living = [tensor for ref in self._tensors if (tensor := ref()) is not None]
        sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in living}
        self.most_positions = max(self.most_positions, sum(sizes.values()) // (4 * VOCAB_SIZE))
        return result


def test_the_logits_of_one_chunk_are_in_memory_at_a_time(tiny_model: OpenTinyModel) -> None:
    """Forward and backward."""
    model = deepcopy(tiny_model("llama-untied"))
    model.lm_head.weight.requires_grad_(False)
    hidden_ND, target_ids_N = random_positions()
    with LivingLogits() as watch:
        tokens = target_logps(
            model, hidden_ND.requires_grad_(), target_ids_N, max_logits=32 * VOCAB_SIZE
        )
        tokens.logps_N.sum().backward()
    assert watch.most_positions == 32


class CountKernels(TorchDispatchMode):
    """Count operators that a device would run a kernel for: those that make no view."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.num_kernels += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_gpu_runs_few_kernels_for_a_large_vocabulary() -> None:
    """Counted on the meta device, in bfloat16, with a GPU's number of logits at a time."""
    config = LlamaConfig(
        vocab_size=152_064,
        hidden_size=896,
        num_hidden_layers=1,
        num_attention_heads=14,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
        hidden_ND = torch.empty(8192, 896, dtype=torch.bfloat16, requires_grad=True)
        target_ids_N = torch.empty(8192, dtype=torch.int64)
    with CountKernels() as counted:
        tokens = target_logps(model, hidden_ND, target_ids_N, max_logits=MAX_LOGITS["cuda"])
        tokens.logps_N.sum().backward()
    assert np.prod(model.lm_head.weight.grad.shape) == 152_064 * 896
    assert 0 < counted.num_kernels < MAX_KERNELS
