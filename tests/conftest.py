"""What many tests share: one tiny model, one Ray cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer and chat template, as a Hugging Face folder."""
    from tests.tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests that need one; code under test finds it running."""
    import ray

    from pipeline.cluster import _connect

    _connect(None)
    yield
    ray.shutdown()
