"""Is it found out which models may share a prompt?"""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from stages.policy.sharing import shares_prompt_exactly
from tests.tiny_models import CONFIGS

OpenTinyModel = Callable[[str], PreTrainedModel]

WINDOWED = ("gemma2", "mistral")


@pytest.mark.parametrize("architecture", sorted(CONFIGS.keys() - {*WINDOWED, "mamba"}))
def test_full_attention_shares(tiny_model: OpenTinyModel, architecture: str) -> None:
    assert shares_prompt_exactly(tiny_model(architecture), max_length=64)
    assert shares_prompt_exactly(tiny_model(architecture), max_length=2)


@pytest.mark.parametrize("window", [8, 60])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_window_shares_up_to_its_length(
    tiny_model: OpenTinyModel, monkeypatch: pytest.MonkeyPatch, architecture: str, window: int
) -> None:
    """A sequence's last token predicts nothing, so that it may be one longer than the window."""
    model = tiny_model(architecture)
    monkeypatch.setattr(model.config, "sliding_window", window)
    assert shares_prompt_exactly(model, max_length=window + 1)
    assert not shares_prompt_exactly(model, max_length=window + 2)
    assert not shares_prompt_exactly(model, max_length=4 * window)


def test_recurrence_does_not_share(tiny_model: OpenTinyModel) -> None:
    assert not shares_prompt_exactly(tiny_model("mamba"), max_length=64)


def test_low_precision_is_judged_in_float32_and_left_as_it_was(tiny_model: OpenTinyModel) -> None:
    """Rounding to bfloat16 is far above the tolerance, so that only float32 can say yes."""
    model = tiny_model("llama")
    wanted = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        original = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.bfloat16()
        answer = shares_prompt_exactly(model, max_length=64)
        found = dict(model.state_dict())
        model.float().load_state_dict(original)
    assert answer
    for name, weight in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].equal(weight)
