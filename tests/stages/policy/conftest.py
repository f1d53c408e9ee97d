"""Fixtures of tiny models, loaded once per architecture."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from stages.policy.attention import pack_rows
from stages.policy.model import load_model
from tests.tiny_architectures import make_tiny_architecture


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    """Load the float32 model of an architecture, and clear the gradients of earlier tests."""

    @cache
    def open_once(architecture: str) -> PreTrainedModel:
        folder = make_tiny_architecture(tmp_path_factory.mktemp(architecture), architecture)
        model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
        pack_rows(model)
        return model

    def tiny_model(architecture: str) -> PreTrainedModel:
        model = open_once(architecture)
        model.zero_grad(set_to_none=True)
        return model

    return tiny_model
