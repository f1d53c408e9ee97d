"""Pin the names of models, adapters and tokenizers to the content of their files.

A name is a Hugging Face id with an optional `@revision`, a local folder, or `sample:NAME`. The
driver pins it before anything is hashed; workers fetch the pin and refuse other content.
"""

from pathlib import Path
from typing import Any

import msgspec

from schemas.errors import ConfigError
from stages.models.digest import (
    ADAPTER_CONFIG,
    CONFIG,
    QUANTISATION_CONFIG,
    SMALL_PATTERNS,
    TOKENIZER_PATTERNS,
    digest_adapter,
    digest_model,
    digest_tokenizer,
    read_json,
)
from stages.models.sources import find_source

MERGE = "float32/1"
"""How adapters are merged: base and adapter are widened to float32, added, and stored in float32.
Whoever opens the folder rounds once, to the dtype that it computes in. Part of an adapter's
identity; the number goes up when merging would give other weights."""


class AdapterPin(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a LoRA adapter, fixed to the content of its files."""

    spec: str
    """As in ModelPin."""
    weights: str
    """64 hex digits, as in ModelPin."""
    config: str
    """64 hex digits over adapter_config.json without the keys that name its base."""
    tokenizer: str | None
    """64 hex digits over the tokenizer saved with the adapter; None if there is none."""
    commit: str | None
    """As in ModelPin."""

    def identity(self) -> dict[str, str]:
        """Return the part that is hashed into fingerprints."""
        return {"weights": self.weights, "config": self.config, "merge": MERGE}

    @property
    def label(self) -> str:
        """The adapter's name for readers, without local paths."""
        return _label(self.spec, self.commit)

    @property
    def revised_spec(self) -> str:
        """The name with its commit."""
        return _revise(self.spec, self.commit)


class ModelPin(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a model, fixed to the content of its files."""

    spec: str
    """As given, but a local folder as an absolute path and a hub id without its revision."""
    weights: str
    """64 hex digits over the sorted sha256s of the weight files; renaming them changes nothing."""
    config: str
    """64 hex digits over config.json without the keys that only name its origin, and over
    hf_quant_config.json if there is one."""
    tokenizer: str | None
    """64 hex digits over the tokenizer's files and chat template; None if there are none."""
    commit: str | None
    """Commit on the hub; None for a local folder or a sample."""
    adapter: AdapterPin | None = None
    """Adapter that is merged into the model when it is fetched."""

    def identity(self) -> dict[str, Any]:
        """Return the part that is hashed: everything that decides the log-probs of given tokens.

        The tokenizer (which encode pins) and generation_config.json are therefore left out.
        """
        identity: dict[str, Any] = {"weights": self.weights, "config": self.config}
        if self.adapter is not None:
            identity["adapter"] = self.adapter.identity()
        return identity

    @property
    def label(self) -> str:
        """The model's name for readers: without local paths, with its commit and its adapter."""
        name = _label(self.spec, self.commit)
        return name if self.adapter is None else f"{name} with {self.adapter.label} merged"

    @property
    def revised_spec(self) -> str:
        """The name with its commit."""
        return _revise(self.spec, self.commit)


class TokenizerPin(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a tokenizer, fixed to the content of its files."""

    spec: str
    """As in ModelPin."""
    tokenizer: str
    """64 hex digits, equal to ModelPin.tokenizer for the same files."""
    commit: str | None
    """As in ModelPin."""

    def identity(self) -> str:
        """Return the part that is hashed into fingerprints."""
        return self.tokenizer

    @property
    def revised_spec(self) -> str:
        """The name with its commit."""
        return _revise(self.spec, self.commit)


def pin_model(spec: str) -> ModelPin:
    """Pin a model. From the hub it downloads small files only, never weights.

    Args:
        spec: `sample:NAME`, a local folder, or a Hugging Face id with an optional `@revision`. A
            local folder takes precedence over a hub id of the same name.
    Raises:
        ConfigError: there is no such model, it has no safetensors weights, or its folder holds
            files that a loader would read in place of them.
    """
    source = find_source(spec, SMALL_PATTERNS)
    found = digest_model(source)
    return ModelPin(spec=source.spec, commit=source.commit, **found._asdict())


def pin_adapter(spec: str) -> AdapterPin:
    """Pin a LoRA adapter. From the hub it downloads small files only, never weights.

    Args:
        spec: a local folder as peft's save_pretrained writes it, or a Hugging Face id with an
            optional `@revision`.
    Raises:
        ConfigError: there is no such adapter, or it is of another kind than LoRA.
    """
    source = find_source(spec, [ADAPTER_CONFIG, *TOKENIZER_PATTERNS])
    config = source.folder / ADAPTER_CONFIG
    if not config.is_file():
        raise ConfigError(
            f"{spec} is not an adapter: {source.folder} has no {ADAPTER_CONFIG}. Wanted: a folder "
            "as peft's save_pretrained writes it. A whole model goes into stages.score.model."
        )
    kind = read_json(config).get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"{spec} is an adapter of kind {kind}; only LoRA adapters are merged here. "
            "Merge it with peft, save the result, and set stages.score.model to that."
        )
    found = digest_adapter(source)
    return AdapterPin(spec=source.spec, commit=source.commit, **found._asdict())


def pin_tokenizer(spec: str) -> TokenizerPin:
    """Pin a tokenizer.

    Args:
        spec: a model as in `pin_model`, or a folder that holds only a tokenizer.
    Raises:
        ConfigError: there is no such model or folder, or it has no tokenizer.
    """
    source = find_source(spec, [CONFIG, *TOKENIZER_PATTERNS])
    tokenizer = digest_tokenizer(source.folder)
    if tokenizer is None:
        raise ConfigError(
            f"{spec} has no tokenizer ({source.folder} holds none of its usual files). "
            "Name a model that has one."
        )
    return TokenizerPin(spec=source.spec, tokenizer=tokenizer, commit=source.commit)


def join_adapter(model: ModelPin, adapter: AdapterPin) -> ModelPin:
    """Pin a model with an adapter merged into it.

    Raises:
        ConfigError: the model's weights are quantised.
    """
    folder = find_source(model.revised_spec, [CONFIG, QUANTISATION_CONFIG]).folder
    if (folder / QUANTISATION_CONFIG).is_file() or "quantization_config" in read_json(
        folder / CONFIG
    ):
        raise ConfigError(
            f"{model.spec} is quantised: merging an adapter into it would round its weights a "
            "second time. Name the release that it was made from, which the adapter fits as well."
        )
    return msgspec.structs.replace(model, adapter=adapter)


def _label(spec: str, commit: str | None) -> str:
    return f"{spec}@{commit}" if commit else Path(spec).name


def _revise(spec: str, commit: str | None) -> str:
    return f"{spec}@{commit}" if commit else spec
