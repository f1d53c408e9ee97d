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


def test_merge_keys_take_over_a_block_and_own_keys_come_first(tmp_path: Path) -> None:
    text = """
store: ./store
stages: {validate: {inputs: [a.jsonl]}}
execution:
  validate: &workers {num_workers: 3, num_cpus_per_worker: 1}
  dedupe: &more {<<: *workers, num_workers: 5}
  encode: {<<: *more}
  score: *workers
"""
    execution = load_recipe(write(tmp_path, text)).execution
    assert [execution[name].num_workers for name in ("validate", "dedupe", "encode")] == [3, 5, 5]
    assert execution["encode"].num_cpus_per_worker == 1
    assert execution["score"].num_workers == 3


def test_set_changes_no_other_block_that_shares_an_alias(tmp_path: Path) -> None:
    text = f"{MINIMAL}execution:\n  validate: &workers {{num_workers: 3}}\n  dedupe: *workers\n"
    recipe = load_recipe(write(tmp_path, text), overrides=["execution.validate.num_workers=7"])
    assert recipe.execution["validate"].num_workers == 7
    assert recipe.execution["dedupe"].num_workers == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.replace("a.jsonl", "größe.jsonl"), encoding=encoding)
    assert load_recipe(str(path)).stages["validate"].inputs[0].path == "größe.jsonl"


def test_a_recipe_of_other_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(MINIMAL.replace("a.jsonl", "größe.jsonl").encode("latin-1"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not YAML"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.train.loss={beta: 1, beta: 2}"], "'beta' is written twice"),
        (["stages.train.loss.beta=1", "stages.train.loss.beta=2"], "loss.beta already"),
        (["stages.train.loss.beta=1", "stages.train.loss={kind: ipo}"], "loss.beta already"),
    ],
)
def test_set_refuses_duplicate_keys(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, MINIMAL), overrides=overrides)


def test_set_refines_a_block_that_an_earlier_set_wrote(tmp_path: Path) -> None:
    overrides = ["stages.train.loss={kind: ipo}", "stages.train.loss.beta=0.3"]
    loss = load_recipe(write(tmp_path, MINIMAL), overrides=overrides).stages["train"].loss
    assert (loss.kind, loss.beta) == ("ipo", 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{MINIMAL}1: x\nzzz: y", "1: no such key"),
        ("store: ./s\nstages: {1: {}, tran: {}}", r"stages\.1: no such stage"),
    ],
)
def test_keys_that_are_no_words_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))
