"""Fixes a recipe's moving names and `auto`s before anything is hashed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Recipe
from schemas.config import dump_config
from stages.stage import Pin, Stage


@dataclass(frozen=True, kw_only=True)
class ResolvedStage:
    """A stage's settings with nothing left that could mean something else tomorrow."""

    stage: Stage[Any]
    config: Any
    """Its config with every `auto` and every inherited name filled in."""
    pins: Mapping[str, Pin]
    """Its moving names by config field, fixed to content."""
    inputs: tuple[str, ...]
    """The stages that it reads."""

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed: the config with moving names replaced by their content."""
        pinned = {name: pin.identity() for name, pin in self.pins.items()}
        return {**dump_config(self.config), **pinned}


class Resolver:
    """Completes configs and fixes moving names, each once. It is the RecipeView of the stages."""

    def __init__(self, recipe: Recipe, *, has_gpus: bool) -> None:
        self._recipe = recipe
        self._stages = {stage.name: stage for stage in recipe.stage_list}
        self._has_gpus = has_gpus
        self._configs: dict[str, Any] = {}
        self._pins: dict[tuple[Callable[[Any], Pin], str], Pin] = {}

    @property
    def has_gpus(self) -> bool:
        return self._has_gpus

    def config(self, stage: str) -> Any:
        if stage not in self._configs:
            given = self._recipe.stages[stage]
            self._configs[stage] = self._stages[stage].complete(given, self)
        return self._configs[stage]

    def pin(self, stage: str, name: str) -> Pin | None:
        # The pinned fields of a config class are known by name alone.
        value = getattr(self.config(stage), name)
        if value is None:
            return self._stages[stage].inherit_pins(self.config(stage), self).get(name)
        fix = self._stages[stage].pins[name]
        key = (fix, repr(value))
        if key not in self._pins:
            self._pins[key] = fix(value)
        return self._pins[key]

    def pins(self, stage: str) -> dict[str, Pin]:
        """Fix all moving names of a stage."""
        record = self._stages[stage]
        found = {name: self.pin(stage, name) for name in record.pins}
        inherited = record.inherit_pins(self.config(stage), self)
        return {**inherited, **{name: pin for name, pin in found.items() if pin is not None}}


def resolve_stages(recipe: Recipe, resolver: Resolver) -> dict[str, ResolvedStage]:
    """Fix every moving name of a recipe, and leave out the stages that it does not need.

    Raises:
        ConfigError: something named does not exist or cannot be used.
    """
    configs = {stage.name: resolver.config(stage.name) for stage in recipe.stage_list}
    inputs = _find_inputs(recipe.stage_list, configs)
    return {
        stage.name: ResolvedStage(
            stage=stage,
            config=configs[stage.name],
            pins=resolver.pins(stage.name),
            inputs=inputs[stage.name],
        )
        for stage in recipe.stage_list
        if stage.name in inputs
    }


def _find_inputs(
    stages: Sequence[Stage[Any]], configs: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Find what each stage reads, for the stages that the last one depends on."""
    needs = {stage.name: stage.needs(configs[stage.name]) for stage in stages}
    needed = {stages[-1].name}
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(needs[stage.name])
    return {
        stage.name: needs[stage.name]
        + tuple(name for name in stage.reads_if_there if name in needed)
        for stage in stages
        if stage.name in needed
    }
