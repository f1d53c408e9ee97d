"""Reads a recipe file and `--set` options into checked settings for every stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.stage_list import load_stages
from schemas.config import parse_config
from schemas.errors import ConfigError
from stages.stage import Stage

_BLOCKS = ("name", "store", "stages", "execution")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, every key checked and every default filled in."""

    name: str
    """Names the runs made from it."""
    path: str
    """The file that it was read from."""
    store: str
    """Path or URI that all stages write below."""
    stages: Mapping[str, Any]
    """Identity config by stage."""
    execution: Mapping[str, Any]
    """Execution settings by stage, which spread it over machines."""
    stage_list: Sequence[Stage[Any]]
    """The stages that there are, in order."""


def load_recipe(
    path: str,
    *,
    overrides: Sequence[str] = (),
    store: str | None = None,
    stage_list: Sequence[Stage[Any]] | None = None,
) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value in YAML, as given to `--set`.
        store: a path or URI in place of the recipe's.
        stage_list: the stages that there are, in order; the pipeline's own unless given.
    Raises:
        ConfigError: the file is absent or not YAML, or a key or value is wrong; names each.
    """
    data = _read_yaml(path)
    _apply_overrides(data, overrides)
    unknown = _list_unknown(data, _BLOCKS)
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such key. A recipe has: {', '.join(_BLOCKS)}.")
    store = store or data.get("store")
    if not isinstance(store, str) or not store:
        raise ConfigError(f"{path} names no store. Add `store: ./store`, or pass --store.")
    name = data.get("name", Path(path).stem)
    if not isinstance(name, str) or not name or "/" in name:
        raise ConfigError(f"name: a word without slashes is needed (found {name!r}).")
    stages = stage_list or load_stages()
    names = [stage.name for stage in stages]
    blocks = {block: _read_block(data, block, names) for block in ("stages", "execution")}
    return Recipe(
        name=name,
        path=path,
        store=store,
        stage_list=stages,
        **_parse_blocks(
            {
                "stages": {stage.name: stage.config for stage in stages},
                "execution": {stage.name: stage.execution for stage in stages},
            },
            blocks,
        ),
    )


def _parse_blocks(
    classes: Mapping[str, Mapping[str, type]], blocks: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Parse every stage's part of every block, and report all of their mistakes together."""
    parsed: dict[str, dict[str, Any]] = {block: {} for block in classes}
    mistakes = []
    for block, class_of in classes.items():
        for stage, cls in class_of.items():
            data = blocks[block].get(stage)
            try:
                parsed[block][stage] = parse_config(cls, data or {}, path=f"{block}.{stage}")
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return parsed


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses a duplicate key; PyYAML would silently keep the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked here and not during construction, where the keys of `<<: *other` are merged in.
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise ConfigError(f"{key!r} is written twice in the block at line {line}.")
        return node


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). "
            "Pass a recipe file; pipeline/recipes/ has examples."
        ) from error
    try:
        data = _parse_yaml(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no blocks. A recipe has: {', '.join(_BLOCKS)}.")
    return data


def _parse_yaml(content: str | bytes) -> Any:
    return yaml.load(content, Loader=_StrictLoader)  # noqa: S506  (It is a SafeLoader.)


def _read_block(data: Mapping[str, Any], block: str, names: Sequence[str]) -> dict[str, Any]:
    content = data.get(block) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{block}: a block by stage name is needed (found {content!r}).")
    unknown = _list_unknown(content, names)
    if unknown:
        raise ConfigError(f"{block}.{unknown[0]}: no such stage. Stages: {', '.join(names)}.")
    return content


def _list_unknown(block: Mapping[Any, Any], known: Sequence[str]) -> list[str]:
    return [str(key) for key in block if key not in known]


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `--set` options in their order; each may refine an earlier one, and not undo it."""
    applied: list[str] = []
    for override in overrides:
        dotted = _apply_override(data, override)
        undone = [earlier for earlier in applied if f"{earlier}.".startswith(f"{dotted}.")]
        if undone:
            raise ConfigError(
                f"--set {override}: an earlier --set has set {undone[0]} already. "
                "Pass each key once, a block before the keys in it."
            )
        applied.append(dotted)


def _apply_override(data: dict[str, Any], override: str) -> str:
    """Apply one `--set` option and return its dotted key."""
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as --set stages.train.loss.beta=0.2")
    block = data
    for key in keys[:-1]:
        inner = block.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {key} is {inner!r}, not a block of keys.")
        # A copy, because `*alias` may name the same block elsewhere.
        inner = block[key] = dict(inner or {})
        block = inner
    try:
        block[keys[-1]] = _parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML.") from error
    except ConfigError as error:
        raise ConfigError(f"--set {override}: {error}") from error
    return ".".join(keys)
