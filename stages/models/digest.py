"""Content digests of a model's weights, config and tokenizer, and the files that they cover."""

import json
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi

from schemas.errors import ConfigError
from schemas.ids import digest
from stages.models.sources import Source, explained_hub_errors, find_source
from stages.store.caches import digest_file

CONFIG = "config.json"
QUANTISATION_CONFIG = "hf_quant_config.json"
"""vLLM reads the quantisation of weights and cache from it if config.json does not state it."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHECKSUMS = "SHA256SUMS"
"""In a merged model's folder: sha256 of each weight file when it was written."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
)
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
SMALL_PATTERNS = (
    CONFIG,
    QUANTISATION_CONFIG,
    "generation_config.json",
    _WEIGHTS_INDEX,
    *TOKENIZER_PATTERNS,
)
"""Every file of a model but its weights."""

_PROVENANCE_KEYS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "name_or_path",
        "transformers_version",
        # save_pretrained notes here where a tokenizer was read from.
        "is_local",
        "local_files_only",
    }
)
"""Config keys that only name the model's origin; every other key may change what it computes."""

_ADAPTER_PROVENANCE_KEYS = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
)
"""Adapter config keys that do not change what the adapter computes on a given base."""

_COMPANION_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
_COMPANION_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Digests(NamedTuple):
    """Content of a model or an adapter, as 64 hex digits a part."""

    weights: str
    config: str
    tokenizer: str | None
    """None if there is no tokenizer."""


def digest_model(source: Source) -> Digests:
    """Digest a model's files, using the hub's own sha256 for weights not downloaded yet.

    Raises:
        ConfigError: the folder has no safetensors weights or no config, or holds files that some
            loader would read in place of the weights or on top of them.
    """
    _refuse_adapter(source)
    return Digests(
        weights=_digest_files(source, list_weight_files(source)),
        config=digest_config(source.folder),
        tokenizer=digest_tokenizer(source.folder),
    )


def digest_adapter(source: Source) -> Digests:
    """Digest an adapter's files, and its tokenizer if it was saved with a whole one.

    Raises:
        ConfigError: there are no safetensors weights.
    """
    config = read_json(source.folder / ADAPTER_CONFIG)
    return Digests(
        weights=_digest_files(source, [ADAPTER_WEIGHTS]),
        config=digest({k: v for k, v in config.items() if k not in _ADAPTER_PROVENANCE_KEYS}),
        tokenizer=_digest_whole_tokenizer(source.folder),
    )


def digest_config(folder: Path) -> str:
    """Digest a model's config without its provenance keys.

    Raises:
        ConfigError: there is no config.json.
    """
    path, quantisation = folder / CONFIG, folder / QUANTISATION_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {folder} is not a model's folder.")
    content: Any = _without_provenance(read_json(path))
    if quantisation.is_file():
        content = [content, read_json(quantisation)]
    return digest(content)


def digest_tokenizer(folder: Path) -> str | None:
    """Digest the tokenizer files of a folder; None if it has none."""
    paths = list_tokenizer_files(folder)
    if not paths:
        return None
    files: dict[str, Any] = {str(path): digest_file(folder / path) for path in paths}
    if TOKENIZER_CONFIG in files:
        files[TOKENIZER_CONFIG] = _without_provenance(read_json(folder / TOKENIZER_CONFIG))
    # AutoTokenizer chooses the class by these keys if tokenizer_config.json names none.
    config = folder / CONFIG
    model = read_json(config) if config.is_file() else {}
    return digest([files, model.get("model_type"), model.get("tokenizer_class")])


def list_weight_files(source: Source) -> list[str]:
    """List the weight files that a loader reads: the shards of the index, or the single file.

    Raises:
        ConfigError: loaders differ in which of the folder's files they read.
    """
    folder, index = source.folder, source.folder / _WEIGHTS_INDEX
    if not index.is_file():
        others = sorted({path.name for path in folder.glob("*.safetensors")} - {_WEIGHTS})
        if others and (folder / _WEIGHTS).is_file():
            raise ConfigError(
                f"{source.spec}: beside {_WEIGHTS}, {folder} holds {', '.join(others)} and no "
                f"{_WEIGHTS_INDEX}; vLLM would load all of them. Move the others away."
            )
        return [_WEIGHTS]
    names = sorted(set(read_json(index)["weight_map"].values()))
    if _WEIGHTS not in names and (folder / _WEIGHTS).is_file():
        raise ConfigError(
            f"{source.spec}: {folder} holds both {_WEIGHTS} and {_WEIGHTS_INDEX}, and loaders "
            "differ in which they read. Remove one."
        )
    return names


def list_tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a folder's tokenizer, as paths below the folder."""
    found = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder) for path in found)


def list_companions(folder: Path) -> list[Path]:
    """List a model's files besides its weights: config, tokenizer, template, licence."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.endswith(".index.json")
        and (file.suffix in _COMPANION_SUFFIXES or file.name.startswith(_COMPANION_STEMS))
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; Infinity and NaN become strings, because canonical JSON has neither.

    Raises:
        ConfigError: the file is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes(), parse_constant=str)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    return content


def _refuse_adapter(source: Source) -> None:
    """Refuse a folder with an adapter: transformers would apply it, vLLM would ignore it.

    A snapshot in the hub's cache may hold an adapter that another program downloaded.
    """
    config = source.folder / ADAPTER_CONFIG
    if config.is_file():
        base = read_json(config).get("base_model_name_or_path") or "its base"
        raise ConfigError(
            f"{source.spec} is an adapter ({source.folder} holds {ADAPTER_CONFIG}). Set "
            f"stages.score.model to the model that it belongs to ({base}) and stages.score.adapter "
            "to the adapter's folder. An adapter inside its model's folder must be moved out of it."
        )


def _digest_files(source: Source, names: Collection[str]) -> str:
    """Digest the sorted sha256s of weight files, so that renaming them changes nothing."""
    absent = [name for name in names if not (source.folder / name).is_file()]
    if absent and not source.commit:
        listing = os.listdir(source.folder)
        raise ConfigError(_describe_missing_weights(source.spec, absent, listing))
    known = _read_hub_digests(source, absent) if absent else {}
    present = [source.folder / name for name in names if name not in known]
    with ThreadPoolExecutor(max_workers=4) as pool:  # Hashing releases the GIL.
        digests = [*known.values(), *pool.map(_digest_weight_file, present)]
    return digest(sorted(digests))


def _digest_weight_file(path: Path) -> str:
    """Return a file's sha256; the hub's cache already names large files by it: blobs/<sha256>."""
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    return digest_file(path)


def _read_hub_digests(source: Source, names: Collection[str]) -> dict[str, str]:
    """Ask the hub for the sha256 of files that are not downloaded."""
    with explained_hub_errors(f"{source.spec}@{source.commit}"):
        info = HfApi().model_info(source.spec, revision=source.commit, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or ()}
    absent = [name for name in names if name not in files]
    if absent:
        raise ConfigError(_describe_missing_weights(source.spec, absent, files))
    # Small weights, such as test models', may be plain git files, whose hub id is a git hash.
    in_git = [name for name in names if files[name].lfs is None]
    if in_git:
        find_source(f"{source.spec}@{source.commit}", in_git)
    return {
        name: lfs.sha256 if (lfs := files[name].lfs) else digest_file(source.folder / name)
        for name in names
    }


def _describe_missing_weights(spec: str, absent: Collection[str], listing: Collection[str]) -> str:
    pickles = sorted(name for name in listing if name.endswith((".bin", ".pt", ".pth")))
    message = f"{spec} has no {', '.join(absent)}."
    if pickles:
        message += (
            f" It holds {', '.join(pickles)}, which is not read: a pickle can run any code. "
            "Convert it once: load it with transformers and call save_pretrained on a new folder."
        )
    return message + " Wanted: safetensors weights, as transformers' save_pretrained writes them."


def _digest_whole_tokenizer(folder: Path) -> str | None:
    """Digest a folder's tokenizer; None if it has no vocabulary, as with a template alone."""
    files = [path.name for path in list_tokenizer_files(folder)]
    if all(
        name.endswith((".jinja", "_config.json", "_map.json", "_tokens.json")) for name in files
    ):
        return None
    return digest_tokenizer(folder)


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_provenance(child)
            for key, child in value.items()
            if key not in _PROVENANCE_KEYS
        }
    return value
