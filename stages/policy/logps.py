"""Log-probabilities of completion tokens, without holding all logits at once.

Shape suffixes: R rows, L tokens of the longest row, D width of the model, V vocabulary,
C completions, N completion tokens of all C.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages.policy.batches import PROMPT_SEGMENT, Batch
from stages.policy.model import logits_of_hidden, vocabulary_size

MAX_LOGITS = 2**25
"""Most logits that exist at a time: 128 MiB in float32."""

CACHED_LOGITS = 2**20
"""Most logits that are reduced at a time, so that they stay in cache: 4 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """Values of the N completion tokens of a batch."""

    logps_N: Tensor
    """float32, nats, differentiable: log p(token)."""
    log_collision_N: Tensor | None
    """float32, nats, without gradient: log of the sum of p squared over the vocabulary."""


def completion_token_logps(
    model: PreTrainedModel, batch: Batch, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Compute only the log-probabilities of `completion_tokens`: float32 [N], differentiable."""
    return completion_tokens(model, batch, max_logits=max_logits).logps_N


def completion_tokens(
    model: PreTrainedModel,
    batch: Batch,
    *,
    max_logits: int = MAX_LOGITS,
    with_log_collision: bool = False,
) -> TokenLogps:
    """Compute log p(completion token | prompt and the completion tokens before it).

    The output layer runs only at positions that predict a completion token, in chunks of at most
    max_logits logits. With more than one chunk, the backward pass computes each chunk's logits
    again instead of keeping them.

    Args:
        model: a causal language model from load_model.
        batch: rows from lay_out.
        max_logits: positions times vocabulary in a chunk; a chunk has at least one position.
        with_log_collision: also compute the log of the collision probability at each position, by
            which WPO (Zhou et al. 2024, arXiv:2406.11827) weights pairs.
    Returns:
        One value a completion token, group by group and completion by completion.
    """
    hidden_RLD = hidden_states(model, batch)
    hidden_ND = hidden_RLD.flatten(0, 1).index_select(0, batch.predicting_N)
    num_positions = max(1, max_logits // vocabulary_size(model))
    chunks = list(
        zip(hidden_ND.split(num_positions), batch.target_ids_N.split(num_positions), strict=True)
    )
    if len(chunks) == 1 or not torch.is_grad_enabled():
        outputs = [target_logps(model, *chunk, with_log_collision) for chunk in chunks]
    else:
        outputs = [
            checkpoint(
                target_logps,
                model,
                *chunk,
                with_log_collision,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for chunk in chunks
        ]
    logps, log_collisions = zip(*outputs, strict=True)
    return TokenLogps(
        logps_N=torch.cat(logps),
        log_collision_N=torch.cat(log_collisions) if with_log_collision else None,
    )


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute the last hidden states of all rows: [R, L, D], of any value on padding."""
    if batch.row_lengths is None:
        hidden_RLD: Tensor = model.base_model(
            input_ids=batch.input_ids_RL, use_cache=False, **attention_inputs(model, batch)
        ).last_hidden_state
        return hidden_RLD
    rows = []
    for input_ids_L, length in zip(batch.input_ids_RL, batch.row_lengths, strict=True):
        forget_lengths(model)
        output = model.base_model(input_ids=input_ids_L[None, :length], use_cache=False)
        rows.append(output.last_hidden_state[0])
    return pad_sequence(rows, batch_first=True)


@torch.no_grad()
def forget_lengths(model: PreTrainedModel) -> None:
    """Compute one token, after which a model's dynamic rope forgets the lengths of earlier rows.

    In transformers it keeps the frequencies of the longest row until a short one comes.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.base_model(input_ids=token, use_cache=False)


def attention_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Build the mask and positions of rows that plain causal attention would get wrong.

    Padding is on the right, so causal attention never lets a real token see it. transformers hands
    a mask of four dimensions to the attention function unchanged.
    """
    if batch.spans_C6 is not None:
        return {"attention_mask": batch.spans_C6[None, None], "position_ids": batch.position_ids_RL}
    if batch.segment_ids_RL is None:
        return {}
    return {
        "attention_mask": shared_prompt_mask(batch.segment_ids_RL, dtype=model.dtype),
        "position_ids": batch.position_ids_RL,
    }


def shared_prompt_mask(segment_ids_RL: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Mask that lets each token see its row's prompt and its own completion, up to itself.

    Returns:
        [R, 1, L, L], queries before keys, added to attention scores: 0 where visible, else the
        dtype's minimum. Padding sees the prompt, because a softmax needs at least one key.
    """
    queries_RL1 = segment_ids_RL[:, :, None]
    keys_R1L = segment_ids_RL[:, None, :]
    is_visible_RLL = ((keys_R1L == PROMPT_SEGMENT) | (keys_R1L == queries_RL1)).tril()
    mask_RLL = torch.zeros(is_visible_RLL.shape, dtype=dtype, device=segment_ids_RL.device)
    return mask_RLL.masked_fill_(~is_visible_RLL, torch.finfo(dtype).min)[:, None]


def target_logps(
    model: PreTrainedModel,
    hidden_ND: Tensor,
    target_ids_N: Tensor,
    with_log_collision: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute log p(target), and on request the log of the sum of p squared: float32 [N] each."""
    logits_NV = logits_of_hidden(model, hidden_ND)
    # First, because the backward pass of _TargetLogps overwrites the logits.
    log_collision_N = log_collision(logits_NV.detach()) if with_log_collision else None
    logps_N: Tensor = _TargetLogps.apply(logits_NV, target_ids_N)
    return logps_N, log_collision_N


def log_collision(logits_NV: Tensor) -> Tensor:
    """Compute log sum_v p_v^2 = logsumexp(2 logits) - 2 logsumexp(logits): float32 [N], nats."""
    num_positions = max(1, CACHED_LOGITS // logits_NV.shape[1])
    return torch.cat(
        [
            (2 * logits.float()).logsumexp(-1) - 2 * logits.float().logsumexp(-1)
            for logits in logits_NV.split(num_positions)
        ]
    )


class _TargetLogps(torch.autograd.Function):
    """log_softmax(logits)[target] in float32, without a second tensor of the logits' size.

    Backward overwrites the logits with their gradient, grad * (onehot(target) - softmax(logits)).
    So it can run only once, and nothing else may need the logits. Both passes work on a few
    positions at a time, which stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_ids_N: Tensor) -> Tensor:
        num_positions = max(1, CACHED_LOGITS // logits_NV.shape[1])
        log_normalizer_N = torch.cat(
            [logits.float().logsumexp(-1) for logits in logits_NV.split(num_positions)]
        )
        ctx.save_for_backward(logits_NV, target_ids_N, log_normalizer_N)
        ctx.num_positions = num_positions
        return logits_NV.gather(-1, target_ids_N[:, None]).squeeze(-1).float() - log_normalizer_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, target_ids_N, log_normalizer_N = ctx.saved_tensors
        columns_N1 = (target_ids_N[:, None], log_normalizer_N[:, None], grad_logps_N[:, None])
        parts = (tensor.split(ctx.num_positions) for tensor in (logits_NV, *columns_N1))
        for logits, target_ids, log_normalizer, grad in zip(*parts, strict=True):
            grad_logits = logits.float().sub_(log_normalizer).exp_().mul_(-grad)
            logits.copy_(grad_logits.scatter_add_(-1, target_ids, grad))
        return logits_NV, None
