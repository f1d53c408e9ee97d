"""How a recipe's moving names and `auto`s are fixed before anything is hashed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.recipe import Recipe
from schemas.config import dump_config
from stages.dedupe.contamination import pin_benchmarks
from stages.encode import pin_template
from stages.models.resolve import pin_adapter, pin_model, pin_tokenizer
from stages.score import pin_reference
from stages.score.imported import pin_table
from stages.stage import Pin, Stage
from stages.validate.inputs import find_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def resolve_stages(
    recipe: Recipe, stages: list[Stage[Any]], *, has_gpus: bool
) -> dict[str, ResolvedStage]:
    """Fix every moving name of a recipe, and leave out the stages that it does not need.

    Args:
        recipe: as loaded.
        stages: the pipeline's stages, in order.
        has_gpus: whether the stages will find GPUs; decides `dtype: auto`.
    Raises:
        ConfigError: something named does not exist or cannot be used.
    """
    configs = _fill_in(recipe.stages, has_gpus=has_gpus)
    inputs = _find_inputs(stages, configs)
    memo: dict[tuple[str, str], Pin] = {}
    resolved: dict[str, ResolvedStage] = {}
    for stage in stages:
        if stage.name not in inputs:
            continue
        config = configs[stage.name]
        pins = _pin_names(config, stage.pins, memo)
        if stage.name == "train" and config.model is None:
            # Also where nothing is scored.
            pins["model"] = pin_reference(_pin_names(configs["score"], _REFERENCE, memo))
        resolved[stage.name] = ResolvedStage(
            stage=stage, config=config, pins=pins, inputs=inputs[stage.name]
        )
    return resolved


def _pin_names(
    config: object, kinds: Mapping[str, str], memo: dict[tuple[str, str], Pin]
) -> dict[str, Pin]:
    """Fix the moving names in some fields of a config, each kind and name once."""
    pins = {}
    for name, kind in kinds.items():
        value = getattr(config, name)
        if value is None:
            continue
        key = (kind, repr(value))
        if key not in memo:
            memo[key] = _PIN_BY_KIND[kind](value)
        pins[name] = memo[key]
    return pins


def _find_inputs(
    stages: Sequence[Stage[Any]], configs: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Say what each stage reads that the last one rests on; those that nothing needs are absent."""
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


def _fill_in(configs: Mapping[str, Any], *, has_gpus: bool) -> dict[str, Any]:
    """Resolve the names that one stage takes from another, and the dtypes."""
    filled = dict(configs)
    reference = filled["score"]
    dtype = "bfloat16" if has_gpus else "float32"
    if filled["encode"].tokenizer is None:
        has_own = reference.adapter and pin_adapter(reference.adapter).tokenizer
        tokenizer = reference.adapter if has_own else reference.model
        filled["encode"] = dataclasses.replace(filled["encode"], tokenizer=tokenizer)
    for name in ("score", "train"):
        if filled[name].dtype == "auto":
            filled[name] = dataclasses.replace(filled[name], dtype=dtype)
    return filled


_REFERENCE = {"model": "model", "adapter": "adapter"}
"""Fields of score's config that name the reference, by kind."""

_PIN_BY_KIND: dict[str, Callable[[Any], Pin]] = {
    "files": find_inputs,
    "model": pin_model,
    "adapter": pin_adapter,
    "table": pin_table,
    "tokenizer": pin_tokenizer,
    "template": pin_template,
    "benchmarks": pin_benchmarks,
}
