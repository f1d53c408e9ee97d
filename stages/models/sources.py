"""Find a named model's folder: a local one, a hub snapshot, or the sample model's.

Nothing here imports torch: what needs it runs in a process of its own.
"""

import contextlib
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import httpx2
import msgspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from schemas.errors import ConfigError, PipelineError
from stages.store.caches import user_cache

SAMPLES = {"smollm2-135m-instruct": "stages.models.sample"}
"""Sample models by name, with the module that makes each one's folder."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", re.ASCII)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """The folder that a name leads to."""

    spec: str
    """As given, but a local folder as an absolute path and a hub id without its revision."""
    folder: Path
    commit: str | None
    """Commit on the hub; None for a local folder or a sample."""


def find_source(spec: str, patterns: Collection[str]) -> Source:
    """Find the folder of a model, adapter or tokenizer.

    Args:
        spec: `sample:NAME`, a local folder, or a Hugging Face id with an optional `@revision`. A
            local folder takes precedence over a hub id of the same name.
        patterns: names of the files to download if it is a hub id; other files may be missing.
    Raises:
        ConfigError: nothing has this name, or the hub cannot be read.
    """
    if spec.startswith("sample:"):
        folder = _make_sample(spec.removeprefix("sample:"))
        return Source(spec=spec, folder=folder, commit=None)
    folder = Path(spec).expanduser().absolute()
    if folder.is_dir():
        return Source(spec=str(folder), folder=folder, commit=None)
    match = _HUB_ID.fullmatch(spec)
    if spec.startswith((".", "~", "/")) or not match:
        raise ConfigError(
            f"{spec} is not a folder on this machine. A model is a Hugging Face id (owner/name or "
            f"owner/name@revision), a local folder, or one of {_list_sample_names()}. On a "
            "cluster, a local folder must be visible on every node."
        )
    repo, revision = match["repo"], match["revision"] or "main"
    with explained_hub_errors(f"{spec} is no folder here, and"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    # The hub's cache names a snapshot's folder after its commit:
    # https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    return Source(spec=repo, folder=folder, commit=folder.name)


@contextlib.contextmanager
def explained_hub_errors(subject: str) -> Iterator[None]:
    """Turn the hub client's errors inside the block into one that says what may help.

    Args:
        subject: beginning of the message's first sentence.
    Raises:
        ConfigError: in place of the client's error.
    """
    try:
        yield
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        raise ConfigError(
            f"{subject} could not be read from the Hugging Face hub or its local cache. "
            f"Check the name and the connection; gated models and data need HF_TOKEN. "
            f"The hub's client said: {type(error).__name__}: {error}"
        ) from error


def run_module(module: str, *arguments: str) -> None:
    """Run a module that needs torch in a process of its own, so that the driver never loads torch.

    Raises:
        ConfigError: the module exited with 2, the code for a mistake of the user.
        PipelineError: the module failed otherwise.
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


def _make_sample(name: str) -> Path:
    if name not in SAMPLES:
        raise ConfigError(f"There is no sample model {name!r}. There are: {_list_sample_names()}.")
    folder = user_cache() / "models" / name
    if not folder.is_dir():
        run_module(SAMPLES[name], str(folder))
    return folder


def _list_sample_names() -> str:
    return ", ".join(f"sample:{name}" for name in SAMPLES)
