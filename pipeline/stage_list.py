"""The pipeline's stages, in order. A stage is imported when it is used."""

import importlib
from typing import Any

from stages.stage import Stage

STAGE_NAMES = ("validate", "dedupe", "encode", "score", "train", "evaluate")


def load_stage(name: str) -> Stage[Any]:
    """Import a stage and return its record."""
    stage: Stage[Any] = importlib.import_module(f"stages.{name}").STAGE
    assert stage.name == name
    return stage


def load_stages() -> list[Stage[Any]]:
    return [load_stage(name) for name in STAGE_NAMES]
