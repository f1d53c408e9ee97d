"""Oracle: transformers alone, one sequence at a time, with all of its logits."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.policy.groups import Group, IntArray
from tests.tiny_models import VOCAB_SIZE


def open_plain_model(folder: Path) -> PreTrainedModel:
    """Load with eager attention, because SDPA ignores soft caps on attention scores.

    Except Falcon: its eager attention adds alibi to scores whose mask already holds it.
    """
    is_falcon = "FalconForCausalLM" in (folder / "config.json").read_text()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa" if is_falcon else "eager"
    )
    return model.eval()


def plain_logps(folder: Path, groups: Sequence[Group]) -> list[list[NDArray[np.float32]]]:
    """Log-probabilities of completion tokens in float32, by group and completion."""
    model = open_plain_model(folder)
    with torch.no_grad():
        return [
            # A copy has seen no other sequence, which dynamic rope would remember.
            [
                sequence_logps(deepcopy(model), group.prompt_ids, ids).numpy()
                for ids in group.completions
            ]
            for group in groups
        ]


def sequence_logps(
    model: PreTrainedModel, prompt_ids: IntArray, completion_ids: IntArray, **inputs: bool
) -> Tensor:
    """Log-probabilities of the completion's tokens, with a graph where gradients are enabled."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, completion_ids])).long()
    logps = model(input_ids=ids[None], **inputs).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt_ids), len(ids))
    return logps[places - 1, ids[places]]


@torch.no_grad()
def plain_greedy(folder: Path, prompt_ids: IntArray, *, num_new: int, stop: int) -> list[int]:
    """Decode greedily with a full forward pass for every token."""
    model = open_plain_model(folder)
    ids = prompt_ids.tolist()
    while len(ids) < len(prompt_ids) + num_new:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == stop:
            break
    return ids[len(prompt_ids) :]


def largest_difference(
    found: Sequence[Sequence[NDArray[np.float32]]], wanted: Sequence[Sequence[NDArray[np.float32]]]
) -> float:
    """Largest difference of a token, in nats; asserts equal shapes."""
    assert [[len(a) for a in arrays] for arrays in found] == [
        [len(a) for a in arrays] for arrays in wanted
    ]
    pairs = [(a, b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f, w, strict=True)]
    assert all(a.dtype == np.float32 for a, _ in pairs)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def random_ids(rng: np.random.Generator, length: int) -> IntArray:
    return rng.integers(VOCAB_SIZE, size=length, dtype=np.int32)


def group_of(prompt_ids: IntArray, *completions: IntArray) -> Group:
    return Group(prompt_ids=prompt_ids, completions=completions)
