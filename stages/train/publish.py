"""How does a trained model get to the Hugging Face hub?

Whose repository it may be is decided by the token in the environment (HF_TOKEN, or what `hf auth
login` left): it is in no recipe, manifest or log.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from schemas.errors import StageFailed
from stages.store.filesystems import Folder
from stages.store.local_paths import readable_path


def prepare_repository(repo: str) -> None:
    """Make the repository, private, unless it exists: a missing right shows before training.

    Raises:
        StageFailed: the hub refuses, or cannot be reached.
    """
    with _named_failures(repo, "so nothing is trained yet"):
        HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().auth_check(repo, write=True)


def publish_model(folder: Folder, repo: str, *, fingerprint: str) -> str:
    """Upload an exported model as one commit, and give the commit's address.

    Raises:
        StageFailed: the hub refuses, or cannot be reached.
    """
    names = folder.list_files()
    with (
        _named_failures(repo, "the model is trained, and the next run uploads it again"),
        readable_path(folder, names) as path,
    ):
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=names,
            commit_message=f"Trained offline, {fingerprint}",
        )
    return str(commit.commit_url)


@contextmanager
def _named_failures(repo: str, state: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx2.HTTPError) as error:
        raise StageFailed(
            f"execution.train.push_to_hub: {repo} could not be written to, {state}: {error} Check "
            "that HF_TOKEN in the environment may write there, or leave push_to_hub out."
        ) from error
