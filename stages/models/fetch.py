"""Bring pinned models and tokenizers onto this machine, and refuse files that differ from the pin.

A model with an adapter is fetched as one folder in which the adapter is merged, so both scorers,
training and evaluation need no knowledge of adapters.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from schemas.errors import ConfigError
from schemas.ids import digest
from stages.models.digest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKSUMS,
    CONFIG,
    QUANTISATION_CONFIG,
    SMALL_PATTERNS,
    TOKENIZER_PATTERNS,
    digest_adapter,
    digest_config,
    digest_model,
    digest_tokenizer,
    list_weight_files,
    read_json,
)
from stages.models.resolve import AdapterPin, ModelPin, TokenizerPin
from stages.models.sources import find_source, run_module
from stages.store.caches import digest_file, user_cache
from stages.store.filesystems import Folder
from stages.store.locks import hold_lock

logger = logging.getLogger(__name__)


def fetch_model(pin: ModelPin) -> str:
    """Return the local folder of a pinned model, made present and checked against the pin.

    Downloads a hub model, converts a sample, merges an adapter.

    Raises:
        ConfigError: the model cannot be fetched, differs from the pin, or does not fit its adapter.
    """
    if pin.adapter is not None:
        return _fetch_merged(pin, pin.adapter)
    source = find_source(pin.revised_spec, SMALL_PATTERNS)
    if source.commit:
        source = find_source(pin.revised_spec, [*SMALL_PATTERNS, *list_weight_files(source)])
    _refuse_other_content(source.folder, pin, digest_model(source)._asdict())
    return str(source.folder)


def fetch_tokenizer(pin: TokenizerPin) -> str:
    """Return the local folder of a pinned tokenizer, made present and checked against the pin.

    Raises:
        ConfigError: the tokenizer cannot be fetched, or differs from the pin.
    """
    source = find_source(pin.revised_spec, [CONFIG, *TOKENIZER_PATTERNS])
    found = {"tokenizer": digest_tokenizer(source.folder)}
    _refuse_other_content(source.folder, pin, found)
    return str(source.folder)


def read_config(pin: ModelPin) -> dict[str, Any]:
    """Read a pinned model's config.json; no weights are downloaded.

    Raises:
        ConfigError: the config cannot be fetched, or differs from the pin.
    """
    source = find_source(pin.revised_spec, [CONFIG, QUANTISATION_CONFIG])
    _refuse_other_content(source.folder, pin, {"config": digest_config(source.folder)})
    return read_json(source.folder / CONFIG)


def read_vocab_size(pin: ModelPin) -> int | None:
    """Read the number of token ids that a pinned model has embeddings for.

    Returns:
        None where its config.json does not say it.
    """
    config = read_config(pin)
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _fetch_merged(pin: ModelPin, adapter: AdapterPin) -> str:
    """Return the folder of a model with its adapter merged; each machine merges once.

    The folder lies in the user's cache, is named by a digest of both pins, and appears whole.
    """
    content = [pin.identity(), pin.tokenizer, adapter.tokenizer]
    folder = user_cache() / "merged" / digest(content)[:32]

    def log_wait(holder: str) -> None:
        logger.info("waiting for %s, which merges %s", holder or "a process", adapter.label)

    # All workers of a machine ask at once, and each merge may need all of its memory.
    with hold_lock(Folder(str(folder.parent)), f"{folder.name}.lock", on_wait=log_wait):
        if not folder.is_dir():
            base = fetch_model(msgspec.structs.replace(pin, adapter=None))
            run_module("stages.models.merge_adapter", base, _fetch_adapter(adapter), str(folder))
    _refuse_damage(folder)
    return str(folder)


def _fetch_adapter(pin: AdapterPin) -> str:
    patterns = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_PATTERNS]
    source = find_source(pin.revised_spec, patterns)
    _refuse_other_content(source.folder, pin, digest_adapter(source)._asdict())
    return str(source.folder)


def _refuse_damage(folder: Path) -> None:
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        sha256, name = line.split(maxsplit=1)
        if not (folder / name).is_file() or digest_file(folder / name) != sha256:
            raise ConfigError(
                f"{folder / name} is not what was written there. Delete {folder} and run again: "
                "the adapter is merged anew."
            )


def _refuse_other_content(
    folder: Path, pin: ModelPin | AdapterPin | TokenizerPin, found: Mapping[str, str | None]
) -> None:
    """Compare the digests of some parts of a folder with those of the pin."""
    pinned = msgspec.structs.asdict(pin)
    for part, digest_found in found.items():
        if digest_found != pinned[part]:
            raise ConfigError(
                f"The {part} in {folder} differs from the planned one: found {digest_found}, "
                f"wanted {pinned[part]}. Restore the former content, or plan again with the new."
            )
