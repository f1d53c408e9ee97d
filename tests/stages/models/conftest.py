"""Fixtures: an empty user's cache, a hub with one model, and a process that talks to it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stages.models.fabricated_hub import Hub
from tests.stages.models.made_up_models import FILES, REPO, SHARDS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the user's cache by an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that holds the made-up model."""
    hub = Hub(kind="models", repo=REPO, files=dict(FILES), lfs=SHARDS)
    with hub.serve():
        yield hub


@pytest.fixture
def ask(tmp_path: Path, hub: Hub) -> Callable[..., str]:
    """Evaluate an expression in another process: the hub's client reads its settings at import."""

    def evaluate(expression: str, **environment: str) -> str:
        code = (
            "import sys, msgspec\n"
            "from schemas.errors import ConfigError\n"
            "from stages.models import fetch, resolve\n"
            "from stages.models.resolve import AdapterPin, ModelPin, TokenizerPin\n"
            "try:\n"
            f"    result = {expression}\n"
            "except ConfigError as error:\n"
            "    sys.exit(f'ConfigError: {error}')\n"
            "sys.stdout.write(msgspec.json.encode(result).decode())"
        )
        return hub.run(code, tmp_path / "hf", **environment)

    return evaluate
