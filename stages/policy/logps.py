"""Log-probabilities of a batch's completion tokens.

Shape suffixes: R rows, L tokens of the longest row, D width of the model, C completions,
N completion tokens of all C.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from stages.policy.batches import PROMPT_SEGMENT, Batch
from stages.policy.output_layer import MAX_LOGITS, TokenLogps, target_logps


def completion_token_logps(
    model: PreTrainedModel, batch: Batch, *, max_logits: int | None = None
) -> Tensor:
    """Compute only the log-probabilities of `completion_tokens`: float32 [N], differentiable."""
    return completion_tokens(model, batch, max_logits=max_logits).logps_N


def completion_tokens(
    model: PreTrainedModel,
    batch: Batch,
    *,
    max_logits: int | None = None,
    with_log_collision: bool = False,
) -> TokenLogps:
    """Compute log p(completion token | prompt and the completion tokens before it).

    The output layer runs only at positions that predict a completion token.

    Args:
        model: a causal language model from load_model.
        batch: rows from lay_out.
        max_logits: as for `target_logps`; None: the device's `MAX_LOGITS`.
        with_log_collision: as for `target_logps`.
    Returns:
        One value a completion token, group by group and completion by completion.
    """
    hidden_RLD = hidden_states(model, batch)
    return target_logps(
        model,
        hidden_RLD.flatten(0, 1).index_select(0, batch.predicting_N),
        batch.target_ids_N,
        max_logits=max_logits or MAX_LOGITS.get(hidden_RLD.device.type, MAX_LOGITS["cuda"]),
        with_log_collision=with_log_collision,
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
