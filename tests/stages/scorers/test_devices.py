"""The device for a model is the one that has room for its weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.scorers.devices import choose_device, count_weights
from tests.tiny_models import make_tiny_model


def test_weights_are_counted(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3")
    assert count_weights(str(folder)) == AutoModelForCausalLM.from_pretrained(
        folder
    ).num_parameters(exclude_embeddings=False)


@pytest.mark.parametrize(("num_weight_bytes", "device"), [(79, "cuda"), (81, "cpu")])
def test_a_model_that_the_gpu_cannot_hold_runs_on_the_cpu(
    num_weight_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 bytes are free; with a quarter on top, 79 need 98.75 and 81 need 101.25."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    assert choose_device(num_weight_bytes).type == device
