"""Tests of recipes: strict keys, `--set`, and one clear message for each mistake."""

from pathlib import Path

import pytest

from pipeline.recipe import load_recipe
from schemas.errors import ConfigError

MINIMAL = """
store: ./store
stages:
  validate: {inputs: [a.jsonl]}
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_fill_what_a_recipe_leaves_out(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.name == "recipe"
    assert recipe.stages["encode"].max_length == 1024
    assert recipe.stages["train"].loss.beta == 0.1
    assert recipe.execution["validate"].num_workers == "auto"


def test_set_changes_a_key_with_a_value_in_yaml(tmp_path: Path) -> None:
    overrides = [
        "stages.train.loss.beta=0.2",
        "stages.train.learning_rate=1e-6",
        "stages.dedupe.source_priority=[a, b]",
        "name=other",
    ]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides=overrides, store="/elsewhere")
    assert recipe.stages["train"].loss.beta == 0.2
    assert recipe.stages["train"].learning_rate == 0.000001
    assert recipe.stages["dedupe"].source_priority == ["a", "b"]
    assert (recipe.name, recipe.store) == ("other", "/elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no blocks"),
        ("store: [", "is not YAML"),
        ("stages: {}", "names no store"),
        ("store: ./s\nstges: {}", "stges: no such key"),
        ("store: ./s\nstages: {tran: {}}", "stages.tran: no such stage"),
        ("store: ./s\nexecution: {scores: {}}", "execution.scores: no such stage"),
        ("store: ./s\nstages: {train: {lr: 1}}", r"stages\.train\.lr: no such key"),
        ("store: ./s\nstages: {train: {num_epochs: many}}", r"stages\.train\.num_epochs"),
        ("store: ./s\nstore: ./t", "'store' is written twice"),
        ("store: ./s\nstages: {train: {loss: {kind: nonsense}}}", r"stages\.train\.loss"),
        ("store: ./s\nname: a/b", "without slashes"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))
