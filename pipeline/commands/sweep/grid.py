"""The combinations of a sweep, from `--set` options that list several values for a key."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from schemas.errors import ConfigError

_EXAMPLE = "--set stages.train.loss.beta=0.05,0.1,0.3"


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One value for each key."""

    overrides: tuple[str, ...]
    """`dotted.key=value` of every key, as `--set` of the other commands takes them."""
    settings: Mapping[str, str]
    """Values, in YAML, of the keys that the sweep varies, by their short names."""

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def list_combinations(overrides: Sequence[str]) -> list[Combination]:
    """List every combination of the values, those of the last key changing fastest.

    Args:
        overrides: `dotted.key=value,value,…`. The values are in YAML: brackets, braces and quotes
            protect a comma inside a value.
    Raises:
        ConfigError: an option cannot be read, or no key has several values.
    """
    values_by_key: dict[str, list[str]] = {}
    for override in overrides:
        key, values = _split_values(override)
        if key in values_by_key:
            raise ConfigError(f"--set {override}: {key} is set twice. List all of its values once.")
        values_by_key[key] = values
    varied = [key for key, values in values_by_key.items() if len(values) > 1]
    if not varied:
        raise ConfigError(f"A sweep needs a key with several values, such as {_EXAMPLE}")
    names = _shorten(varied)
    combinations = []
    for combined in itertools.product(*values_by_key.values()):
        chosen = dict(zip(values_by_key, combined, strict=True))
        combinations.append(
            Combination(
                overrides=tuple(f"{key}={value}" for key, value in chosen.items()),
                settings={names[key]: chosen[key] for key in varied},
            )
        )
    return combinations


def _split_values(override: str) -> tuple[str, list[str]]:
    """Split one option into its key and the text of each of its values."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as {_EXAMPLE}")
    try:
        # What YAML takes for the items of a list are the values, whatever they hold.
        items = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {override}: the values are not YAML. Separate them by commas, and quote a "
            "value that holds a comma or a bracket."
        ) from error
    assert isinstance(items, yaml.SequenceNode)
    listed = [text[i.start_mark.index - 1 : i.end_mark.index - 1].strip() for i in items.value]
    if not listed or not all(listed) or text.rstrip().endswith(","):
        raise ConfigError(f"--set {override}: a value is missing. Write it as {_EXAMPLE}")
    return key.strip(), listed


def _shorten(keys: Sequence[str]) -> dict[str, str]:
    """Shorten dotted keys to their last word where it tells them apart."""
    words = [key.rpartition(".")[2] for key in keys]
    return {
        key: word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)
    }
