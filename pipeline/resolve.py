"""How a recipe's moving names and `auto`s are fixed before anything is hashed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config import Recipe
from schemas.config import dump_config
from stages.base import Pin, Stage
from stages.dedupe.contamination import pin_benchmarks
from stages.encode import pin_template
from stages.models import pin_adapter, pin_model, pin_tokenizer
from stages.score import pin_reference
from stages.scoring.imported import pin_table
from stages.validate.inputs import find_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedStage:
    """A stage's settings with nothing left that could mean something else tomorrow."""

    stage: Stage[Any]
    config: Any
    """Its config with every `auto` and every inherited name filled in."""
    pins: Mapping[str, Pin]
    """Its moving names by config field, fixed to content."""

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed: the config with moving names replaced by their content."""
        pinned = {name: pin.identity() for name, pin in self.pins.items()}
        return {**dump_config(self.config), **pinned}


def resolve_stages(
    recipe: Recipe, stages: list[Stage[Any]], *, has_gpus: bool
) -> dict[str, ResolvedStage]:
    """Fix every moving name of a recipe.

    Args:
        recipe: as loaded.
        stages: the pipeline's stages, in order.
        has_gpus: whether the stages will find GPUs; decides `dtype: auto`.
    Raises:
        ConfigError: something named does not exist or cannot be used.
    """
    configs = _fill_in(recipe.stages, has_gpus=has_gpus)
    memo: dict[tuple[str, str], Pin] = {}
    resolved: dict[str, ResolvedStage] = {}
    for stage in stages:
        config = configs[stage.name]
        pins = {}
        for name, kind in stage.pins.items():
            value = getattr(config, name)
            if value is None:
                continue
            key = (kind, repr(value))
            if key not in memo:
                memo[key] = _PIN_BY_KIND[kind](value)
            pins[name] = memo[key]
        if stage.name == "train" and config.model is None:
            pins["model"] = pin_reference(resolved["score"].pins)
        resolved[stage.name] = ResolvedStage(stage=stage, config=config, pins=pins)
    return resolved


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


_PIN_BY_KIND: dict[str, Callable[[Any], Pin]] = {
    "files": find_inputs,
    "model": pin_model,
    "adapter": pin_adapter,
    "table": pin_table,
    "tokenizer": pin_tokenizer,
    "template": pin_template,
    "benchmarks": pin_benchmarks,
}
