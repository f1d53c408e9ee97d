"""Log-probabilities of target tokens from hidden states, without holding all logits at once.

The output layer multiplies N hidden states with the V rows of its weights. Its logits are the
largest tensor of a step, so they exist for one chunk of positions at a time, and their gradient
overwrites them. Of the layer's gradient, the sum over chunks is kept in float32, so that the number
of chunks changes only rounding, in bfloat16 too.

Shape suffixes: D width of the model, V vocabulary, N positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from stages.policy.cpu.layers import InPlaceLinear, add_product, add_to_gradient, multiply
from stages.policy.model import logits_of_hidden, scale_logits, vocabulary_size

MAX_LOGITS = {"cpu": 2**25, "cuda": 2**29}
"""Most logits that exist at a time, by type of device: 128 MiB in float32, 1 GiB in bfloat16."""

REDUCED_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Most logits that are reduced at a time. 4 MiB in float32 stay in a CPU's cache; 256 MiB keep a
GPU busy for longer than it takes to start a kernel."""


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """Values of the N completion tokens of a batch."""

    logps_N: Tensor
    """float32, nats, differentiable: log p(token)."""
    log_collision_N: Tensor | None
    """float32, nats, without gradient: log of the sum of p squared over the vocabulary."""


def target_logps(
    model: PreTrainedModel,
    hidden_ND: Tensor,
    target_ids_N: Tensor,
    *,
    max_logits: int,
    with_log_collision: bool = False,
) -> TokenLogps:
    """Compute log p(target | hidden state).

    With more than one chunk, the backward pass computes each chunk's logits again.

    Args:
        model: a causal language model from load_model.
        hidden_ND: last hidden states of the base model at any N positions.
        target_ids_N: int64, the tokens whose log-probability is wanted.
        max_logits: positions times vocabulary in a chunk; a chunk has at least one position.
        with_log_collision: also compute the log of the collision probability at each position, by
            which WPO (Zhou et al. 2024, arXiv:2406.11827) weights pairs.
    """
    num_positions = max(1, max_logits // vocabulary_size(model))
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return _target_logps_of_any(
            model, hidden_ND, target_ids_N, num_positions, with_log_collision
        )
    device_type = hidden_ND.device.type
    is_rounded = is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_rounded else layer.weight.dtype
    chunks = _Chunks(
        config=model.config,
        num_positions=num_positions,
        with_log_collision=with_log_collision,
        adds_in_place=isinstance(layer, InPlaceLinear) and not is_rounded,
    )
    with torch.autocast(device_type, enabled=False) if is_rounded else nullcontext():
        logps_N, log_collision_N = _OutputLayer.apply(
            hidden_ND.to(dtype), layer.weight, layer.bias, target_ids_N, chunks
        )
    return TokenLogps(
        logps_N=logps_N, log_collision_N=log_collision_N if with_log_collision else None
    )


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """Settings of an output layer's computation."""

    config: PreTrainedConfig
    """Of the model: how it scales logits."""
    num_positions: int
    """Most positions in a chunk."""
    with_log_collision: bool
    adds_in_place: bool
    """Whether gradients are added to `.grad` instead of being returned to autograd."""


class _OutputLayer(torch.autograd.Function):
    """log_softmax(scale_logits(hidden W^T + b))[target] in float32, chunk by chunk.

    Backward overwrites the logits, so it can run only once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_ids_N: Tensor,
        chunks: _Chunks,
    ) -> tuple[Tensor, Tensor]:
        rounded = _round(weight_VD, bias_V, hidden_ND.dtype)
        keeps_logits = len(hidden_ND) <= chunks.num_positions and any(ctx.needs_input_grad)
        logps, log_normalizers, log_collisions, kept = [], [], [], None

        def compute(hidden: Tensor, target_ids: Tensor) -> Tensor | None:
            """Compute a chunk; its logits are freed before the next one's exist."""
            raw = multiply(hidden, *rounded)
            logits = scale_logits(chunks.config, raw)
            logp, normalizer = log_softmax_at(logits, target_ids)
            logps.append(logp)
            log_normalizers.append(normalizer)
            if chunks.with_log_collision:
                log_collisions.append(log_collision(logits))
            return raw if keeps_logits else None

        for chunk in _split(chunks.num_positions, hidden_ND, target_ids_N):
            kept = compute(*chunk)
        ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, target_ids_N, torch.cat(log_normalizers), kept
        )
        ctx.chunks = chunks
        log_collision_N = torch.cat(log_collisions or [hidden_ND.new_empty(0)])
        ctx.mark_non_differentiable(log_collision_N)
        return torch.cat(logps), log_collision_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_ids_N, log_normalizer_N, kept = ctx.saved_tensors
        chunks: _Chunks = ctx.chunks
        rounded = _round(weight_VD, bias_V, hidden_ND.dtype)
        gradient = _Gradient(weight_VD, bias_V, ctx.needs_input_grad, chunks.adds_in_place)
        grads_hidden = []

        def add(hidden: Tensor, *columns: Tensor) -> None:
            """Add a chunk's gradient; its logits are freed before the next one's exist."""
            raw = multiply(hidden, *rounded) if kept is None else kept
            grad_raw = _differentiate(chunks.config, raw, *columns)
            gradient.add(grad_raw, hidden)
            if ctx.needs_input_grad[0]:
                grads_hidden.append(multiply(grad_raw, rounded[0].T, None))

        for chunk in _split(
            chunks.num_positions, hidden_ND, target_ids_N, log_normalizer_N, grad_logps_N
        ):
            add(*chunk)
        grad_hidden_ND = torch.cat(grads_hidden) if grads_hidden else None
        return grad_hidden_ND, gradient.weight_VD, gradient.bias_V, None, None


class _Gradient:
    """The output layer's gradient, added up over chunks in float32."""

    def __init__(
        self,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        needs_input_grad: Sequence[bool],
        adds_in_place: bool,
    ) -> None:
        self._weight_VD = weight_VD if needs_input_grad[1] else None
        self._bias_V = bias_V if needs_input_grad[2] else None
        self._adds_in_place = adds_in_place
        self.weight_VD: Tensor | None = None
        """float32; None where it is not wanted or was added in place."""
        self.bias_V: Tensor | None = None

    def add(self, grad_logits_NV: Tensor, hidden_ND: Tensor) -> None:
        if self._weight_VD is not None:
            if self._adds_in_place:
                add_product(self._weight_VD, grad_logits_NV.T, hidden_ND)
            else:
                product_VD = _multiply_to_float32(grad_logits_NV.T, hidden_ND)
                self.weight_VD = _add(self.weight_VD, product_VD)
        if self._bias_V is not None:
            sum_V = grad_logits_NV.sum(0, dtype=torch.float32)
            if self._adds_in_place:
                add_to_gradient(self._bias_V, sum_V)
            else:
                self.bias_V = _add(self.bias_V, sum_V)


def _add(total: Tensor | None, values: Tensor) -> Tensor:
    return values if total is None else total.add_(values)


def _multiply_to_float32(left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right without rounding the sums to the dtype of the factors."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _round(
    weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)


def _split(num_positions: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors into chunks of positions, their first dimension."""
    return zip(*(tensor.split(num_positions) for tensor in tensors), strict=True)


def log_softmax_at(logits_NV: Tensor, target_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log_softmax(logits)[target], and logsumexp(logits): float32 [N] each."""
    log_normalizer_N = torch.cat([part.float().logsumexp(-1) for part in _parts(logits_NV)])
    target_logits_N = logits_NV.gather(-1, target_ids_N[:, None]).squeeze(-1).float()
    return target_logits_N - log_normalizer_N, log_normalizer_N


def log_collision(logits_NV: Tensor) -> Tensor:
    """Compute log sum_v p_v^2 = logsumexp(2 logits) - 2 logsumexp(logits): float32 [N], nats."""
    return torch.cat(
        [
            (2 * part.float()).logsumexp(-1) - 2 * part.float().logsumexp(-1)
            for part in _parts(logits_NV)
        ]
    )


def _parts(logits_NV: Tensor) -> tuple[Tensor, ...]:
    return logits_NV.split(_num_reduced(logits_NV))


def _num_reduced(logits_NV: Tensor) -> int:
    """Number of positions that are reduced at a time."""
    most = REDUCED_LOGITS.get(logits_NV.device.type, REDUCED_LOGITS["cuda"])
    return max(1, most // logits_NV.shape[1])


def overwrite_with_gradient(
    logits_NV: Tensor, target_ids_N: Tensor, log_normalizer_N: Tensor, grad_logps_N: Tensor
) -> None:
    """Replace logits by grad * (onehot(target) - softmax(logits)), computed in float32."""
    columns = (target_ids_N[:, None], log_normalizer_N[:, None], grad_logps_N[:, None])
    parts = _split(_num_reduced(logits_NV), logits_NV, *columns)
    for logits, target_ids, normalizer, grad in parts:
        grad_logits = logits.float().sub_(normalizer).exp_().mul_(-grad)
        logits.copy_(grad_logits.scatter_add_(-1, target_ids, grad))


def _differentiate(
    config: PreTrainedConfig,
    raw_NV: Tensor,
    target_ids_N: Tensor,
    log_normalizer_N: Tensor,
    grad_logps_N: Tensor,
) -> Tensor:
    """Compute the gradient by logits before they were scaled, in the memory of the scaled ones."""
    with torch.enable_grad():
        raw_NV = raw_NV.detach().requires_grad_()
        logits_NV = scale_logits(config, raw_NV)
    grad_NV = logits_NV.detach()
    if logits_NV is not raw_NV:
        # The scaling may keep its result to differentiate itself.
        grad_NV = grad_NV.clone()
    overwrite_with_gradient(grad_NV, target_ids_N, log_normalizer_N, grad_logps_N)
    if logits_NV is raw_NV:
        return grad_NV
    [grad_raw_NV] = torch.autograd.grad(logits_NV, raw_NV, grad_NV)
    return grad_raw_NV


def _target_logps_of_any(
    model: PreTrainedModel,
    hidden_ND: Tensor,
    target_ids_N: Tensor,
    num_positions: int,
    with_log_collision: bool,
) -> TokenLogps:
    """Compute the same through an output layer that is not linear, such as one with an adapter."""

    def compute(hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of_hidden(model, hidden)
        # First, because the backward pass of _TargetLogps overwrites the logits.
        collision = log_collision(logits.detach()) if with_log_collision else logits.new_empty(0)
        logps: Tensor = _TargetLogps.apply(logits, target_ids)
        return logps, collision

    chunks = list(_split(num_positions, hidden_ND, target_ids_N))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        outputs = [compute(*chunk) for chunk in chunks]
    else:
        outputs = [
            checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    logps, log_collisions = zip(*outputs, strict=True)
    return TokenLogps(
        logps_N=torch.cat(logps),
        log_collision_N=torch.cat(log_collisions) if with_log_collision else None,
    )


class _TargetLogps(torch.autograd.Function):
    """log_softmax(logits)[target] in float32; backward overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_ids_N: Tensor) -> Tensor:
        logps_N, log_normalizer_N = log_softmax_at(logits_NV, target_ids_N)
        ctx.save_for_backward(logits_NV, target_ids_N, log_normalizer_N)
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, target_ids_N, log_normalizer_N = ctx.saved_tensors
        overwrite_with_gradient(logits_NV, target_ids_N, log_normalizer_N, grad_logps_N)
        return logits_NV, None
