"""Settings that cannot work together are refused by the plan, before any stage runs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.errors import ConfigError
from tests.end_to_end.conftest import plan_recipe
from tests.stages.models.test_vocabulary import swap_two_tokens

Change = Callable[[dict[str, Any], Path, Path], None]
"""Changes a recipe's stages, given an empty folder and the model."""


def other_vocabulary(model: Path, folder: Path) -> str:
    shutil.copytree(model, folder / "other")
    swap_two_tokens(folder / "other")
    return str(folder / "other")


def start_from_another(stages: dict[str, Any], folder: Path, model: Path) -> None:
    stages["train"]["model"] = other_vocabulary(model, folder)


def encode_with_another(stages: dict[str, Any], folder: Path, model: Path) -> None:
    stages["encode"]["tokenizer"] = other_vocabulary(model, folder)


def encode_with_another_and_no_reference(stages: dict[str, Any], folder: Path, model: Path) -> None:
    encode_with_another(stages, folder, model)
    stages["train"]["loss"] = {"kind": "sft"}


def misspell_a_layer(stages: dict[str, Any], folder: Path, model: Path) -> None:
    stages["train"]["lora"] = {"target_modules": ["q_proj", "v_porj"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (start_from_another, r"^stages.train.model: .*other has another vocabulary"),
        (encode_with_another, r"^stages.score.model: .* has another vocabulary"),
        (encode_with_another_and_no_reference, r"^stages.score.model: .* has another vocabulary"),
        pytest.param(
            misspell_a_layer,
            r"^stages.train.lora.target_modules: no layer is named v_porj",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_plan_refuses(
    recipe_path: Path, tmp_path: Path, tiny_model: Path, change: Change, message: str
) -> None:
    recipe = yaml.safe_load(recipe_path.read_text())
    change(recipe["stages"], tmp_path, tiny_model)
    recipe_path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match=message):
        plan_recipe(recipe_path)
    assert not Path(recipe["store"]).exists()
    # A stage that is not to run is not checked.
    assert plan_recipe(recipe_path, last="encode").stage("train").state == "run"


def test_the_plan_refuses_to_shard_quantised_weights(recipe_path: Path) -> None:
    recipe = yaml.safe_load(recipe_path.read_text())
    recipe["stages"]["train"]["lora"] = {"quantization": "nf4"}
    recipe.setdefault("execution", {}).setdefault("train", {})["parallelism"] = "fsdp2"
    recipe_path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match=r"^stages.train.lora.quantization quantises whole"):
        plan_recipe(recipe_path)
