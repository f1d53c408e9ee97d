"""Which model does a name mean, fixed to the content of its files, and where do they lie here?

A name is a Hugging Face id with an optional `@revision`, a local folder, or `sample:NAME`. The
driver pins it before anything is hashed; each worker fetches the pin and refuses other content.
Nothing here imports torch.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from schemas.errors import ConfigError, PipelineError
from schemas.ids import digest
from stages.digests import digest_file
from stages.folders import user_cache

SAMPLES = {"smollm2-135m-instruct": "stages.sample_model"}
"""Sample models by name, and the module that makes the folder of each."""

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_PATTERNS = (
    "tokenizer.json",
    _TOKENIZER_CONFIG,
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
_CONFIG = "config.json"
_QUANTISATION_CONFIG = "hf_quant_config.json"
"""vLLM reads how weights and cache are quantised from it, where config.json does not say."""
_ADAPTER_CONFIG = "adapter_config.json"
_SMALL_PATTERNS = (
    _CONFIG,
    _QUANTISATION_CONFIG,
    "generation_config.json",
    _WEIGHTS_INDEX,
    *_TOKENIZER_PATTERNS,
)

_PROVENANCE_KEYS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "name_or_path",
        "transformers_version",
        # What save_pretrained notes about where a tokenizer was read from.
        "is_local",
        "local_files_only",
    }
)
"""Keys of a config that say where it came from; all others may change what a model computes."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelPin(msgspec.Struct, frozen=True, kw_only=True):
    """A model's name fixed to the content of its files."""

    spec: str
    """As given; a local folder as its absolute path, a hub id without its revision."""
    weights: str
    """64 hex digits over the sorted sha256s of the weight files: renaming changes nothing."""
    config: str
    """64 hex digits over config.json, except keys that only say where it is from, and over
    hf_quant_config.json, where there is one."""
    tokenizer: str | None
    """64 hex digits over the tokenizer's files and chat template; None where there are none."""
    commit: str | None
    """The hub's commit; None for a local folder and a sample."""

    def identity(self) -> dict[str, str]:
        """Give what is hashed: all that decides a log-probability, once the tokens are given.

        So neither the tokenizer (encode's own pin) nor generation_config.json is part of it.
        """
        return {"weights": self.weights, "config": self.config}


class TokenizerPin(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenizer's name fixed to the content of its files."""

    spec: str
    """As in ModelPin."""
    tokenizer: str
    """64 hex digits, equal to ModelPin.tokenizer for the same files."""
    commit: str | None
    """As in ModelPin."""

    def identity(self) -> str:
        """Give what is hashed."""
        return self.tokenizer


def pin_model(spec: str) -> ModelPin:
    """Fix a model's name to content. From the hub only small files are read, never weights.

    Args:
        spec: `sample:NAME`, a local folder, or a Hugging Face id with an optional `@revision`. A
            folder of that name wins over the hub.

    Raises:
        ConfigError: there is no such model, it has no safetensors weights, or its folder holds
            files that a loader would read in place of them.
    """
    where = _locate(spec, _SMALL_PATTERNS)
    _refuse_adapter(where)
    return ModelPin(
        spec=where.spec,
        weights=_digest_weights(where),
        config=_digest_config(where.folder),
        tokenizer=_digest_tokenizer(where.folder),
        commit=where.commit,
    )


def fetch_model(pin: ModelPin) -> str:
    """Make sure that a pinned model's files lie on this machine, and say where.

    Downloads a hub model, converts a sample, and checks every file against the pin.

    Raises:
        ConfigError: the model is not here and cannot be fetched, or is another than the pinned.
    """
    where = _locate(_revised(pin), _SMALL_PATTERNS)
    if where.commit:
        names = _weight_names(where.spec, where.folder)
        where = _locate(_revised(pin), [*_SMALL_PATTERNS, *names])
    _refuse_adapter(where)
    found = {
        "weights": _digest_weights(where),
        "config": _digest_config(where.folder),
        "tokenizer": _digest_tokenizer(where.folder),
    }
    pinned = {"weights": pin.weights, "config": pin.config, "tokenizer": pin.tokenizer}
    _refuse_other(where.folder, pinned, found)
    return str(where.folder)


def read_config(pin: ModelPin) -> dict[str, Any]:
    """Read a pinned model's config.json; of a hub model no weights are fetched.

    Raises:
        ConfigError: it is not here and cannot be fetched, or is another than the pinned.
    """
    where = _locate(_revised(pin), [_CONFIG, _QUANTISATION_CONFIG])
    found = {"config": _digest_config(where.folder)}
    _refuse_other(where.folder, {"config": pin.config}, found)
    return _read_json(where.folder / _CONFIG)


def pin_tokenizer(spec: str) -> TokenizerPin:
    """Fix a tokenizer's name to content; `spec` is a model, or a folder with only a tokenizer.

    Raises:
        ConfigError: there is no such name, or it has no tokenizer.
    """
    where = _locate(spec, [_CONFIG, *_TOKENIZER_PATTERNS])
    tokenizer = _digest_tokenizer(where.folder)
    if tokenizer is None:
        raise ConfigError(
            f"{spec} has no tokenizer ({where.folder} holds none of its usual files). "
            "Name a model that has one."
        )
    return TokenizerPin(spec=where.spec, tokenizer=tokenizer, commit=where.commit)


def fetch_tokenizer(pin: TokenizerPin) -> str:
    """Make sure that a pinned tokenizer's files lie on this machine, and say where.

    Raises:
        ConfigError: they are not here and cannot be fetched, or are others than the pinned.
    """
    where = _locate(_revised(pin), [_CONFIG, *_TOKENIZER_PATTERNS])
    found = {"tokenizer": _digest_tokenizer(where.folder)}
    _refuse_other(where.folder, {"tokenizer": pin.tokenizer}, found)
    return str(where.folder)


# --- from a name to a folder --------------------------------------------------------------------


class _Location(msgspec.Struct, frozen=True, kw_only=True):
    spec: str
    folder: Path
    commit: str | None


def _locate(spec: str, patterns: Collection[str]) -> _Location:
    """Find the folder of a name; of a hub model only files of these patterns are made present."""
    if spec.startswith("sample:"):
        folder = _make_sample(spec.removeprefix("sample:"))
        return _Location(spec=spec, folder=folder, commit=None)
    folder = Path(spec).expanduser().absolute()
    if folder.is_dir():
        return _Location(spec=str(folder), folder=folder, commit=None)
    match = _HUB_ID.fullmatch(spec)
    if spec.startswith((".", "~", "/")) or not match:
        raise ConfigError(
            f"{spec} is not a folder on this machine. A model is a Hugging Face id (owner/name or "
            f"owner/name@revision), a local folder, or one of {_sample_names()}. On a cluster, a "
            "local folder must be visible on every node."
        )
    repo, revision = match["repo"], match["revision"] or "main"
    with explained_hub_errors(f"{spec} is no folder here, and"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    # The hub's cache names a snapshot's folder after its commit.
    return _Location(spec=repo, folder=folder, commit=folder.name)


def _revised(pin: ModelPin | TokenizerPin) -> str:
    return f"{pin.spec}@{pin.commit}" if pin.commit else pin.spec


def _sample_names() -> str:
    return ", ".join(f"sample:{name}" for name in SAMPLES)


def _make_sample(name: str) -> Path:
    if name not in SAMPLES:
        raise ConfigError(f"There is no sample model {name!r}. There are: {_sample_names()}.")
    folder = user_cache() / "models" / name
    if not folder.is_dir():
        # A process of its own: the conversion needs torch and 2 GB, the driver neither.
        done = subprocess.run(
            [sys.executable, "-m", SAMPLES[name], str(folder)],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode == 2:
            raise ConfigError(done.stderr.strip())
        if done.returncode != 0:
            raise PipelineError(f"Making sample:{name} failed:\n{done.stderr.strip()}")
    return folder


@contextlib.contextmanager
def explained_hub_errors(subject: str) -> Iterator[None]:
    """Say what could not be read from the hub, and what may help.

    Args:
        subject: how the sentence begins.
    Raises:
        ConfigError: instead of what the hub's client raises.
    """
    try:
        yield
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        raise ConfigError(
            f"{subject} could not be read from the Hugging Face hub or its local cache. "
            f"Check the name and the connection; what is gated needs HF_TOKEN. "
            f"The hub's client said: {type(error).__name__}: {error}"
        ) from error


# --- from a folder to digests -------------------------------------------------------------------


def _digest_weights(where: _Location) -> str:
    names = _weight_names(where.spec, where.folder)
    absent = [name for name in names if not (where.folder / name).is_file()]
    if absent and not where.commit:
        raise ConfigError(_describe_missing_weights(where.spec, absent, os.listdir(where.folder)))
    known = _read_hub_digests(where, absent) if absent else {}
    present = [where.folder / name for name in names if name not in known]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
        digests = [*known.values(), *pool.map(_digest_weight_file, present)]
    return digest(sorted(digests))


def _weight_names(spec: str, folder: Path) -> list[str]:
    """Name the weight files that a loader reads: the index's shards, else the one file."""
    index = folder / _WEIGHTS_INDEX
    if not index.is_file():
        others = sorted({path.name for path in folder.glob("*.safetensors")} - {_WEIGHTS})
        if others and (folder / _WEIGHTS).is_file():
            raise ConfigError(
                f"{spec}: beside {_WEIGHTS}, {folder} holds {', '.join(others)} and no "
                f"{_WEIGHTS_INDEX}; vLLM would load all of them. Move the others away."
            )
        return [_WEIGHTS]
    names = sorted(set(_read_json(index)["weight_map"].values()))
    if _WEIGHTS not in names and (folder / _WEIGHTS).is_file():
        raise ConfigError(
            f"{spec}: {folder} holds both {_WEIGHTS} and {_WEIGHTS_INDEX}, and loaders differ in "
            "which they read. Remove one."
        )
    return names


def _describe_missing_weights(spec: str, absent: Collection[str], listing: Collection[str]) -> str:
    pickles = sorted(name for name in listing if name.endswith((".bin", ".pt", ".pth")))
    message = f"{spec} has no {', '.join(absent)}."
    if pickles:
        message += (
            f" It holds {', '.join(pickles)}, which is not read: a pickle can run any code. "
            "Convert it once: load it with transformers and call save_pretrained on a new folder."
        )
    return message + " Wanted: safetensors weights, as transformers' save_pretrained writes them."


def _read_hub_digests(where: _Location, names: Collection[str]) -> dict[str, str]:
    """Ask the hub for the sha256 of files that are not here."""
    with explained_hub_errors(f"{where.spec}@{where.commit}"):
        info = HfApi().model_info(where.spec, revision=where.commit, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or ()}
    absent = [name for name in names if name not in files]
    if absent:
        raise ConfigError(_describe_missing_weights(where.spec, absent, files))
    in_git = [name for name in names if files[name].lfs is None]
    if in_git:  # Small ones, as test models have; their id on the hub is a git hash.
        _locate(f"{where.spec}@{where.commit}", in_git)
    return {
        name: lfs.sha256 if (lfs := files[name].lfs) else digest_file(where.folder / name)
        for name in names
    }


def _digest_weight_file(path: Path) -> str:
    """Give a file's sha256; the hub's cache already names it: blobs/<sha256>."""
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    return digest_file(path)


def _refuse_adapter(where: _Location) -> None:
    """Refuse a folder that transformers would load with an adapter on it, which no pin covers.

    vLLM would leave the adapter out; a snapshot in the hub's cache may hold one without our asking.
    """
    if (where.folder / _ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{where.spec} is an adapter ({where.folder} holds {_ADAPTER_CONFIG}). Merge it into "
            "its base model (peft's merge_and_unload, then save_pretrained), and name the result."
        )


def _digest_config(folder: Path) -> str:
    path, quantisation = folder / _CONFIG, folder / _QUANTISATION_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {folder} is not a model's folder.")
    content: Any = _without_provenance(_read_json(path))
    if quantisation.is_file():
        content = [content, _read_json(quantisation)]
    return digest(content)


def _digest_tokenizer(folder: Path) -> str | None:
    paths = {path for pattern in _TOKENIZER_PATTERNS for path in folder.glob(pattern)}
    if not paths:
        return None
    files: dict[str, Any] = {str(path.relative_to(folder)): digest_file(path) for path in paths}
    if _TOKENIZER_CONFIG in files:
        files[_TOKENIZER_CONFIG] = _without_provenance(_read_json(folder / _TOKENIZER_CONFIG))
    # AutoTokenizer chooses the class by these where tokenizer_config.json does not name one.
    config = folder / _CONFIG
    model = _read_json(config) if config.is_file() else {}
    return digest([files, model.get("model_type"), model.get("tokenizer_class")])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # Some configs hold Infinity, which has no canonical JSON; as a word it has.
        content: dict[str, Any] = json.loads(path.read_bytes(), parse_constant=str)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    return content


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_provenance(child)
            for key, child in value.items()
            if key not in _PROVENANCE_KEYS
        }
    return value


def _refuse_other(
    folder: Path, pinned: Mapping[str, str | None], found: Mapping[str, str | None]
) -> None:
    for what, wanted in pinned.items():
        if found[what] != wanted:
            raise ConfigError(
                f"The {what} in {folder} is not what was planned with: found {found[what]}, "
                f"wanted {wanted}. Restore the former content, or plan again with the new one."
            )
