"""Oracle: one sequence at a time through the model's own forward pass, with all of its logits."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.policy.groups import Group
from tests.tiny_models import VOCAB_SIZE


def plain_token_logps(model: PreTrainedModel, groups: Sequence[Group]) -> list[Tensor]:
    """Log-probabilities of the completion tokens, one tensor [T] a completion."""
    logps = []
    for group in groups:
        for completion_ids in group.completions:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion_ids])).long()
            token_logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            places = torch.arange(len(group.prompt_ids), len(ids))
            logps.append(token_logps[places - 1, ids[places]])
    return logps


def random_groups(seed: int, *, num_groups: int, longest: int = 24) -> list[Group]:
    """Random groups of 1 to 4 completions, with many prompts and completions of one token."""
    rng = np.random.default_rng(seed)

    def random_ids() -> np.ndarray:
        length = 1 if rng.random() < 0.25 else rng.integers(1, longest + 1)
        return rng.integers(VOCAB_SIZE, size=length, dtype=np.int32)

    return [
        Group(
            prompt_ids=random_ids(),
            completions=tuple(random_ids() for _ in range(rng.integers(1, 5))),
        )
        for _ in range(num_groups)
    ]


def curved_loss(completion_logps: Tensor) -> Tensor:
    """Loss with a gradient of either sign and varying size for every completion."""
    signs = torch.ones_like(completion_logps)
    signs[1::2] = -1
    return torch.nn.functional.softplus(0.1 * signs * completion_logps).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copy the gradient of every parameter, then clear it."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


def largest_gradient_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest error of a parameter's gradient, relative to the norm of all gradients."""
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    return max((found[name] - wanted[name]).norm().item() for name in wanted) / norm.item()
