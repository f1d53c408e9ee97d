"""Tiny models, random pairs and their scores, made once."""

from pathlib import Path

import pytest
import torch

from stages.store.shards import StageOutput
from tests.stages.train.made_data import Row, random_rows, score_rows, write_inputs
from tests.tiny_models import make_tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two threads that wait for each other are slower on tiny models, and more so beside others."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def encoded() -> list[Row]:
    """22 pairs, of which 5 are held out."""
    return random_rows(0, 22, num_eval=5)


@pytest.fixture(scope="session")
def scored(encoded: list[Row], reference: Path) -> list[Row]:
    return score_rows(encoded, reference)


@pytest.fixture(scope="session")
def inputs(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StageOutput]:
    """Those pairs as encode and score leave them."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), encoded, scored, reference=reference)
