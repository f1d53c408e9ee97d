"""Fixtures for all tests: one tiny model, one Ray cluster, one S3 server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# On a busy machine, OpenMP threads that spin while they wait take the cores from each other, and a
# tiny model's step takes ten times as long. OpenMP reads this when torch is imported, here and in
# every process that the tests start. It changes no number.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.object_store import BUCKET, ObjectStore, environment_of, serve_proxy, serve_s3

BEGUN_FIRST = ("end_to_end/test_pipeline.py", "test_run.py", "stages/scorers/test_vllm_scorer.py")
"""Files that take more than a minute. A file stays in one process; begun last, one would run alone
at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    tests = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(tests).as_posix()
        return BEGUN_FIRST.index(name) if name in BEGUN_FIRST else len(BEGUN_FIRST)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer and chat template, as a Hugging Face folder."""
    from tests.tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests that need one; the code under test uses it."""
    import ray

    from pipeline.ray.session import connect

    connect(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server behind a proxy."""
    import pyarrow.fs as pafs

    folder = tmp_path_factory.mktemp("s3")
    with serve_s3(folder) as port, serve_proxy(port) as store, environment_of(store):
        endpoint = f"http://127.0.0.1:{store.port}"
        pafs.S3FileSystem(allow_bucket_creation=True, endpoint_override=endpoint).create_dir(BUCKET)
        yield store


@pytest.fixture
def object_store(_s3_server: ObjectStore) -> Iterator[ObjectStore]:
    """The S3 server; its proxy forwards every request until the test sets `behave`."""
    yield _s3_server
    _s3_server.behave = None
    _s3_server.num_faults = 0
    _s3_server.requests.clear()
