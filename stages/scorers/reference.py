"""Identity of a reference: all that a log-probability depends on besides its tokens."""

from collections.abc import Iterator, Mapping
from typing import Any

from schemas.errors import ConfigError
from schemas.fingerprint import ReferenceIdentity
from schemas.ids import digest
from stages.models.fetch import read_config
from stages.models.resolve import ModelPin
from stages.scorers.protocol import Backend, Dtype

SCORERS = 2
"""Version of the values of stages/scorers and stages/policy. Raise it when they change by more than
rounding, so that no earlier value is reused."""

COMPUTING_PACKAGES: dict[Backend, tuple[str, ...]] = {
    "transformers": ("torch", "transformers"),
    "vllm": ("torch", "transformers", "vllm"),
}
"""By engine: packages whose version may change the last digits of its values."""

POSITION_KEYS = ("max_position_embeddings", "n_positions")
ROPE_KEYS = ("rope_parameters", "rope_scaling")
ORIGINAL_POSITIONS_KEY = "original_max_position_embeddings"
STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rope that rotate a position the same way in every context. Others depend on lengths:
longrope (once called su) uses its long factors in vLLM if the engine was opened for long sequences,
and in transformers, like dynamic, if a batch holds one."""


def identify_reference(
    model: ModelPin, *, engine: str, dtype: Dtype, max_length: int
) -> ReferenceIdentity:
    """Build the identity of a reference.

    Args:
        model: the reference, with the adapter that is merged into it.
        engine: vllm, transformers, or `imported:` and the digest of a table.
        dtype: dtype of weights and activations.
        max_length: max_length of encode, in tokens. It is part of the identity only if the model's
            rope depends on it.
    """
    has_static_positions = set(list_ropes(read_config(model))) <= STATIC_ROPES
    return ReferenceIdentity(
        weights=model.weights,
        config=model.config,
        dtype=dtype,
        engine=engine,
        scorers=SCORERS,
        max_length=None if has_static_positions else max_length,
        adapter=None if model.adapter is None else digest(model.adapter.identity()),
    )


def pick_versions(versions: Mapping[str, str], backend: Backend) -> dict[str, str]:
    """Pick the versions of packages that may change the last digits of an engine's values."""
    packages = COMPUTING_PACKAGES[backend]
    return {name: versions[name] for name in packages if name in versions}


def require_positions(model: ModelPin, max_length: int) -> None:
    """Refuse a model with fewer positions than encode's max_length.

    Raises:
        ConfigError: the model has fewer positions.
    """
    num_positions = count_positions(read_config(model))
    if num_positions is not None and num_positions < max_length:
        raise ConfigError(
            f"{model.spec} has {num_positions:,} positions, but stages.encode.max_length is "
            f"{max_length:,}. Lower max_length, or use a model with a longer context."
        )


def count_positions(config: Mapping[str, Any]) -> int | None:
    """Number of positions that a model's config.json allows; None means that it sets no limit."""
    text_config = config.get("text_config", config)
    limits = [text_config[key] for key in POSITION_KEYS if text_config.get(key)]
    if not limits:
        return None
    rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
    # Some kinds of scaling state the limit after scaling, some before: accept the larger one.
    return int(min(limits) * max(1.0, rope.get("factor") or 1.0))


def require_fixed_rope(model: ModelPin, *, backend: str, max_length: int) -> None:
    """Refuse vLLM for a model whose rope depends on the length of each sequence.

    vLLM decides once, when the engine is opened: longrope by max_model_len, and dynamic rope is
    always scaled for the longest context.

    Raises:
        ConfigError: vLLM would rotate short sequences differently from transformers.
    """
    config = read_config(model)
    for rope in list_rope_settings(config) if backend == "vllm" else ():
        kind = _name_kind(rope)
        advice = "Set stages.score.backend to transformers, which computes each sequence alone"
        if kind in ("longrope", "su"):
            num_short = _count_original_positions(rope, config)
            if num_short is not None and max_length < num_short:
                continue
            advice += f", or stages.encode.max_length below {num_short}" if num_short else ""
        elif kind != "dynamic" or "alpha" in rope:
            continue
        raise ConfigError(
            f"{model.label} has {kind} positions, which depend on the length of a sequence. vLLM "
            "uses the same ones for all lengths, so its values of short sequences would be those "
            f"of another model. {advice}."
        )


def _count_original_positions(rope: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """Number of positions up to which longrope uses its short factors; None if not stated."""
    for settings in (rope, config.get("text_config", config)):
        if settings.get(ORIGINAL_POSITIONS_KEY):
            return int(settings[ORIGINAL_POSITIONS_KEY])
    return None


def list_ropes(config: Mapping[str, Any]) -> Iterator[str]:
    """List the kinds of rope in a model's config.json; some models name one per kind of layer."""
    for rope in list_rope_settings(config):
        yield _name_kind(rope)


def list_rope_settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """List the settings of every rope in a model's config.json."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _list_settings(value) if key in ROPE_KEYS else list_rope_settings(value)


def _list_settings(rope: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if isinstance(rope.get("rope_type", rope.get("type")), str):
        yield rope
    for value in rope.values():
        if isinstance(value, dict):
            yield from _list_settings(value)


def _name_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type")))
