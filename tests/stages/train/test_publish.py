"""Uploads to a local fake hub through the real client, with the environment's token."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.models.fabricated_hub import COMMIT, Hub

REPO = "someone/trained"
TOKEN = "hf_fabricated"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(kind="models", repo=REPO, files={}, lfs=(), token=TOKEN)
    with hub.serve():
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> dict[str, bytes]:
    """Write an exported model's files below `model/`."""
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)), "README.md": b"# Made\n"}
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    return files


def publish(hub: Hub, folder: Path, *, token: str) -> str:
    """Run a training's hub calls in another process, and return its output."""
    code = f"""
from schemas.errors import StageFailed
from stages.store.filesystems import Folder
from stages.train.publish import prepare_repository, publish_model
try:
    prepare_repository({REPO!r})
    print(publish_model(Folder({str(folder / "model")!r}), {REPO!r}, fingerprint="0123abcd"))
except StageFailed as error:
    print(error)
"""
    return hub.run(code, folder / "hf", HF_TOKEN=token, HF_HUB_DISABLE_XET="1")


def test_a_model_is_uploaded_to_a_private_repository(
    hub: Hub, tmp_path: Path, model: dict[str, bytes]
) -> None:
    assert publish(hub, tmp_path, token=TOKEN).strip() == f"{hub.endpoint}/{REPO}/commit/{COMMIT}"
    assert hub.is_private is True
    assert hub.files == model
    assert hub.commits == ["Trained offline, 0123abcd"]


def test_uploading_again_finds_the_repository_there(
    hub: Hub, tmp_path: Path, model: dict[str, bytes]
) -> None:
    """As after a run that was killed after the upload, or in a second training."""
    hub.is_private = False
    assert COMMIT in publish(hub, tmp_path, token=TOKEN)
    assert hub.is_private is False
    assert hub.files == model


@pytest.mark.parametrize("is_private", [None, False])
def test_a_refusal_is_told_before_training_without_the_token(
    is_private: bool | None, hub: Hub, tmp_path: Path, model: dict[str, bytes]
) -> None:
    """The repository cannot be created, or is read-only for this user."""
    hub.is_private = is_private
    said = publish(hub, tmp_path, token="hf_of_somebody_else")
    assert f"{REPO} is not writable, so nothing has been trained yet" in said
    assert "HF_TOKEN" in said
    assert "hf_of_somebody_else" not in said
    assert hub.files == {}
