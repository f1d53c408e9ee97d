"""The tutorial's recipe with a tiny model, finished, for the examples and the documented code."""

from pathlib import Path

import pytest
import yaml

from pipeline.runs import Run
from tests.end_to_end.conftest import run_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The recipe of the tutorial with a tiny model and a store of its own."""
    folder = tmp_path_factory.mktemp("feedback")
    content = yaml.safe_load((ROOT / "examples" / "feedback.yaml").read_text())
    content["store"] = str(folder / "store")
    [data] = content["stages"]["validate"]["inputs"]
    data["path"] = str(ROOT / data["path"])
    content["stages"]["score"] = {"model": str(tiny_model), "backend": "transformers"}
    content["stages"]["evaluate"] = {"num_generations": 2, "max_new_tokens": 8}
    path = folder / "feedback.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="package")
def finished(recipe: Path) -> Run:
    return run_recipe(recipe)
