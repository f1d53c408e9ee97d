"""Which model does a name mean, fixed to the content of its files, and where do they lie here?

A name is a Hugging Face id with an optional `@revision`, a local folder, or `sample:NAME`. The
driver pins it before anything is hashed; each worker fetches the pin and refuses other content.
A model with an adapter is fetched as one folder, in which the adapter is merged: whoever opens it
(either scorer, training, evaluation) needs to know nothing of adapters. Nothing here imports torch.
"""

import contextlib
import fcntl
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
from stages.store.caches import digest_file, user_cache

SAMPLES = {"smollm2-135m-instruct": "stages.models.sample"}
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
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGE = "float32/1"
"""How adapters are merged: base and adapter are widened to float32, added, and stored so. Rounding
is left to whoever opens the folder, once, to the dtype that it computes in. It is part of what
identifies an adapter; the number goes up when merging would give other weights."""
CHECKSUMS = "SHA256SUMS"
"""In a merged model's folder: what its weights were when they were written."""
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

_ADAPTER_PROVENANCE_KEYS = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
)
"""Keys of an adapter's config that do not change what it computes on a given base."""

_COMPANION_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
_COMPANION_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""What a model's folder holds beside weights: config, tokenizer, template, licence."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class AdapterPin(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter's name fixed to the content of its files."""

    spec: str
    """As in ModelPin."""
    weights: str
    """64 hex digits, as in ModelPin."""
    config: str
    """64 hex digits over adapter_config.json, except what names its base."""
    tokenizer: str | None
    """64 hex digits over the tokenizer that it was saved with; None where it has none."""
    commit: str | None
    """As in ModelPin."""

    def identity(self) -> dict[str, str]:
        """Give what is hashed."""
        return {"weights": self.weights, "config": self.config, "merge": MERGE}

    @property
    def label(self) -> str:
        """Name the adapter for a reader, without local paths."""
        return _label(self.spec, self.commit)


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
    adapter: AdapterPin | None = None
    """What is merged into the model before anybody opens it."""

    def identity(self) -> dict[str, Any]:
        """Give what is hashed: all that decides a log-probability, once the tokens are given.

        So neither the tokenizer (encode's own pin) nor generation_config.json is part of it.
        """
        identity: dict[str, Any] = {"weights": self.weights, "config": self.config}
        if self.adapter is not None:
            identity["adapter"] = self.adapter.identity()
        return identity

    @property
    def label(self) -> str:
        """Name the model for a reader: without local paths, with its commit and its adapter."""
        name = _label(self.spec, self.commit)
        return name if self.adapter is None else f"{name} with {self.adapter.label} merged"


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


def pin_adapter(spec: str) -> AdapterPin:
    """Fix an adapter's name to content. From the hub only small files are read, never weights.

    Args:
        spec: a local folder as peft's save_pretrained writes it, or a Hugging Face id with an
            optional `@revision`.
    Raises:
        ConfigError: there is no such adapter, or it is of a kind that is not merged here.
    """
    where = _locate(spec, [_ADAPTER_CONFIG, *_TOKENIZER_PATTERNS])
    config = where.folder / _ADAPTER_CONFIG
    if not config.is_file():
        raise ConfigError(
            f"{spec} is not an adapter: {where.folder} has no {_ADAPTER_CONFIG}. Wanted: a folder "
            "as peft's save_pretrained writes it. A whole model goes into stages.score.model."
        )
    kind = _read_json(config).get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"{spec} is an adapter of kind {kind}; LoRA is what is merged into its base here. "
            "Merge it with peft, save the result, and set stages.score.model to that."
        )
    return AdapterPin(
        spec=where.spec,
        weights=_digest_files(where, [ADAPTER_WEIGHTS]),
        config=_digest_adapter_config(where.folder),
        tokenizer=_digest_whole_tokenizer(where.folder),
        commit=where.commit,
    )


def join_adapter(model: ModelPin, adapter: AdapterPin) -> ModelPin:
    """Pin a model with an adapter merged into it.

    Raises:
        ConfigError: the weights of the model are quantised.
    """
    where = _locate(_revised(model), [_CONFIG, _QUANTISATION_CONFIG])
    if (where.folder / _QUANTISATION_CONFIG).is_file() or "quantization_config" in _read_json(
        where.folder / _CONFIG
    ):
        raise ConfigError(
            f"{model.spec} is quantised: an adapter cannot be merged into it without rounding "
            "again. Name the release that it was made from, which the adapter fits as well."
        )
    return msgspec.structs.replace(model, adapter=adapter)


def fetch_model(pin: ModelPin) -> str:
    """Make sure that a pinned model's files lie on this machine, and say where.

    Downloads a hub model, converts a sample, merges an adapter, and checks every file against the
    pin.

    Raises:
        ConfigError: the model is not here and cannot be fetched, is another than the pinned, or
            does not fit its adapter.
    """
    if pin.adapter is not None:
        return _fetch_merged(pin, pin.adapter)
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


def _fetch_merged(pin: ModelPin, adapter: AdapterPin) -> str:
    """Give the folder of a model with its adapter merged; it is made once a machine.

    It lies in the user's cache under all that decides its content, and appears as a whole.
    """
    content = [pin.identity(), pin.tokenizer, adapter.tokenizer]
    folder = user_cache() / "merged" / digest(content)[:32]
    folder.parent.mkdir(exist_ok=True)
    # Workers of one machine ask at once, and each merge may need all of its memory.
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            base = fetch_model(msgspec.structs.replace(pin, adapter=None))
            _make("stages.models.merge_adapter", base, _fetch_adapter(adapter), str(folder))
    _refuse_damage(folder)
    return str(folder)


def _fetch_adapter(pin: AdapterPin) -> str:
    where = _locate(_revised(pin), [_ADAPTER_CONFIG, ADAPTER_WEIGHTS, *_TOKENIZER_PATTERNS])
    found = {
        "weights": _digest_files(where, [ADAPTER_WEIGHTS]),
        "config": _digest_adapter_config(where.folder),
        "tokenizer": _digest_whole_tokenizer(where.folder),
    }
    pinned = {"weights": pin.weights, "config": pin.config, "tokenizer": pin.tokenizer}
    _refuse_other(where.folder, pinned, found)
    return str(where.folder)


def _refuse_damage(folder: Path) -> None:
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        sha256, name = line.split(maxsplit=1)
        if not (folder / name).is_file() or digest_file(folder / name) != sha256:
            raise ConfigError(
                f"{folder / name} is not what was written there. Delete {folder} and run again: "
                "the adapter is merged anew."
            )


def list_companions(folder: Path) -> list[Path]:
    """List what belongs to a model beside its weights: config, tokenizer, template, licence."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.endswith(".index.json")
        and (file.suffix in _COMPANION_SUFFIXES or file.name.startswith(_COMPANION_STEMS))
    )


def list_tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a folder's tokenizer, by path below the folder."""
    found = {path for pattern in _TOKENIZER_PATTERNS for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder) for path in found)


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


def _label(spec: str, commit: str | None) -> str:
    return f"{spec}@{commit}" if commit else Path(spec).name


def _revised(pin: ModelPin | TokenizerPin | AdapterPin) -> str:
    return f"{pin.spec}@{pin.commit}" if pin.commit else pin.spec


def _sample_names() -> str:
    return ", ".join(f"sample:{name}" for name in SAMPLES)


def _make_sample(name: str) -> Path:
    if name not in SAMPLES:
        raise ConfigError(f"There is no sample model {name!r}. There are: {_sample_names()}.")
    folder = user_cache() / "models" / name
    if not folder.is_dir():
        _make(SAMPLES[name], str(folder))
    return folder


def _make(module: str, *arguments: str) -> None:
    """Let a module make a folder, in a process of its own: it needs torch, the driver does not.

    Raises:
        ConfigError: it cannot be made from what was given.
        PipelineError: it failed otherwise.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 2:
        raise ConfigError(done.stderr.strip())
    if done.returncode != 0:
        command = " ".join(["python -m", module, *arguments])
        raise PipelineError(f"{command} failed:\n{done.stderr.strip()}")


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
    return _digest_files(where, _weight_names(where.spec, where.folder))


def _digest_files(where: _Location, names: Collection[str]) -> str:
    """Digest weight files; of those on the hub that are not here, the hub knows the sha256."""
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
    config = where.folder / _ADAPTER_CONFIG
    if config.is_file():
        base = _read_json(config).get("base_model_name_or_path") or "its base"
        raise ConfigError(
            f"{where.spec} is an adapter ({where.folder} holds {_ADAPTER_CONFIG}). Set "
            f"stages.score.model to the model that it belongs to ({base}) and stages.score.adapter "
            "to the adapter's folder. An adapter inside its model's folder must be moved out of it."
        )


def _digest_adapter_config(folder: Path) -> str:
    config = _read_json(folder / _ADAPTER_CONFIG)
    return digest({k: v for k, v in config.items() if k not in _ADAPTER_PROVENANCE_KEYS})


def _digest_whole_tokenizer(folder: Path) -> str | None:
    """Digest the tokenizer of a folder; None where there is no vocabulary, as with a template."""
    files = [path.name for path in list_tokenizer_files(folder)]
    if all(
        name.endswith((".jinja", "_config.json", "_map.json", "_tokens.json")) for name in files
    ):
        return None
    return _digest_tokenizer(folder)


def _digest_config(folder: Path) -> str:
    path, quantisation = folder / _CONFIG, folder / _QUANTISATION_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {folder} is not a model's folder.")
    content: Any = _without_provenance(_read_json(path))
    if quantisation.is_file():
        content = [content, _read_json(quantisation)]
    return digest(content)


def _digest_tokenizer(folder: Path) -> str | None:
    paths = list_tokenizer_files(folder)
    if not paths:
        return None
    files: dict[str, Any] = {str(path): digest_file(folder / path) for path in paths}
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
