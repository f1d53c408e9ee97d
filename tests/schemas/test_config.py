"""Config classes: defaults, numbers that YAML reads as text, and messages that name the key."""

import dataclasses
import pickle
from typing import Annotated, Literal

import pytest
from pydantic import Field

from schemas.config import config_class, dump_config, parse_config
from schemas.errors import ConfigError


@config_class
class Inner:
    beta: float = 0.1
    """Strength."""
    kinds: list[str] = dataclasses.field(default_factory=list)
    """Labels."""


@config_class
class Circle:
    kind: Literal["circle"] = "circle"
    """The shape."""
    radius: float = 1.0
    """In metres."""


@config_class
class Square:
    kind: Literal["square"] = "square"
    """The shape."""
    side: float = 1.0
    """In metres."""


@config_class
class Drawing:
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    """A circle or a square."""


@config_class
class Outer:
    rate: float = 1e-6
    """Step size."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    """A block."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError("rate must be above 0")


def test_scientific_notation_that_yaml_reads_as_text_is_a_number() -> None:
    assert parse_config(Outer, {"rate": "1e-6"}, path="").rate == 0.000001


def test_unknown_key_is_refused_with_its_dotted_path_and_the_likely_key() -> None:
    with pytest.raises(ConfigError, match=r"^stages\.x\.inner\.betta: .*'beta'.*Known keys: beta"):
        parse_config(Outer, {"inner": {"betta": 1}}, path="stages.x")


def test_in_a_union_the_path_is_what_the_user_wrote() -> None:
    with pytest.raises(
        ConfigError, match=r"^d\.shape\.radius: no such key\. Known keys: kind, side"
    ):
        parse_config(Drawing, {"shape": {"kind": "square", "radius": 2}}, path="d")
    with pytest.raises(ConfigError, match=r"^d\.shape\.side: .*number"):
        parse_config(Drawing, {"shape": {"kind": "square", "side": "x"}}, path="d")


def test_wrong_value_is_refused_with_what_was_found() -> None:
    with pytest.raises(ConfigError, match=r"stages\.x\.inner\.beta: .*number.*'much'"):
        parse_config(Outer, {"inner": {"beta": "much"}}, path="stages.x")


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Outer, {"ratte": 1, "inner": {"beta": []}}, path="s")
    assert "s.ratte" in str(caught.value)
    assert "s.inner.beta" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_a_number_must_be_finite(value: object) -> None:
    with pytest.raises(ConfigError, match="finite"):
        parse_config(Outer, {"rate": value}, path="s")


def test_a_failed_check_of_the_class_itself_is_reported() -> None:
    with pytest.raises(ConfigError, match="rate must be above 0"):
        parse_config(Outer, {"rate": -1}, path="stages.x")


def test_records_are_frozen_and_pickle() -> None:
    config = parse_config(Outer, {}, path="")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 2.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_dump_gives_defaults_too() -> None:
    assert dump_config(Outer()) == {"rate": 1e-6, "inner": {"beta": 0.1, "kinds": []}}
