"""Session fixtures: tiny models, random pairs and their scores."""

from pathlib import Path

import pytest
import torch

from stages.store.shards import StageOutput
from tests.stages.train.made_data import Row, random_rows, score_rows, write_inputs
from tests.tiny_models import make_tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: on tiny models two wait for each other, more so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def encoded() -> list[Row]:
    """22 pairs, 5 of them held out."""
    return random_rows(0, 22, num_eval=5)


@pytest.fixture(scope="session")
def scored(encoded: list[Row], reference: Path) -> list[Row]:
    return score_rows(encoded, reference)


@pytest.fixture(scope="session")
def inputs(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StageOutput]:
    """The same pairs as outputs of encode and score."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), encoded, scored, reference=reference)
