"""The whole pipeline with inputs and store on S3: a flaky server, a killed run, no credentials."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cloudpickle
import pyarrow.fs as pafs
import pytest

from pipeline.commands.verify import find_faults
from pipeline.ray import mapper
from pipeline.stage_list import STAGE_NAMES
from schemas.manifest import ShardRecord
from stages.stage import MakeWorker, Resources, T
from stages.store.filesystems import Folder
from stages.train import trainer
from stages.train.config import TrainJob
from stages.train.world import World
from tests.end_to_end.conftest import list_contents, plan_recipe, run_recipe
from tests.end_to_end.test_interruption import kill_when
from tests.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore, flaky

ROOT = Path(__file__).parents[2]
SECRETS = (SECRET_KEY.encode(), ACCESS_KEY.encode())
SMALL = "stages.dedupe.rows_per_shard=6"
TIMEOUT_S = 300


@pytest.fixture
def recipe_on_s3(object_store: ObjectStore, recipe_path: Path) -> Path:
    """The tiny recipe with its pairs and its store in the bucket."""
    folder = Folder(object_store.uri(recipe_path.parent))
    folder.write_bytes("pairs.jsonl", (recipe_path.parent / "pairs.jsonl").read_bytes())
    recipe_path.write_text(recipe_path.read_text().replace(str(recipe_path.parent), folder.uri, 2))
    return recipe_path


def command(recipe: Path, *arguments: str) -> list[str]:
    return [sys.executable, "run.py", "run", str(recipe), "--set", SMALL, *arguments]


def read_all(folder: Folder) -> dict[str, bytes]:
    """Read every object below a folder."""
    selector = pafs.FileSelector(folder.path, recursive=True)
    infos = folder.filesystem.get_file_info(selector)
    return {
        info.path: folder.filesystem.open_input_stream(info.path).read()
        for info in infos
        if info.type == pafs.FileType.File
    }


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_killed_on_a_flaky_object_store_and_run_again_under_ray_all_bytes_are_the_same(
    object_store: ObjectStore, recipe_on_s3: Path, tmp_path: Path
) -> None:
    """One request in twenty fails. Neither the store nor the output contains a credential."""
    undisturbed = run_recipe(recipe_on_s3, SMALL, store=tmp_path / "undisturbed", last="score")
    object_store.behave = flaky(0, 0.05)
    out = plan_recipe(recipe_on_s3, SMALL).stage("score").out
    assert out.folder.uri.startswith("s3://")
    with open(tmp_path / "first.log", "wb") as log:
        process = subprocess.Popen(
            command(recipe_on_s3, "--local", "--verbose"), cwd=ROOT, stdout=log, stderr=log
        )
        kill_when(process, lambda: len(out.committed()) >= 1)
    assert plan_recipe(recipe_on_s3, SMALL).stage("score").state == "resume"
    done = subprocess.run(
        command(recipe_on_s3, "--verbose", "--until", "score"),
        cwd=ROOT,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert object_store.num_faults > 20
    object_store.behave = None

    plan = plan_recipe(recipe_on_s3, SMALL)
    assert find_faults(plan).faults == []
    again = run_recipe(recipe_on_s3, SMALL, last="score")
    stages = ("validate", "dedupe", "encode", "score")
    assert list_contents(again, stages) == list_contents(undisturbed, stages)
    store = read_all(plan.store)
    assert len(store) > 20
    assert not [name for name in store if "/_staging/" in name or "/_work/" in name]
    written = {**store, "stdout": done.stdout, "stderr": done.stderr}
    written["first.log"] = (tmp_path / "first.log").read_bytes()
    for name, content in written.items():
        assert not [secret for secret in SECRETS if secret in content], name


class PicklingMapper(mapper.InProcessMapper):
    """Runs every job from its pickle, as Ray would, and keeps the pickles."""

    pickles: list[bytes]

    def map(
        self,
        make_worker: MakeWorker[T],
        tasks: Sequence[T],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        self.pickles.append(cloudpickle.dumps((make_worker, tasks)))
        make_worker, tasks = pickle.loads(self.pickles[-1])
        super().map(make_worker, tasks, resources, on_done)


@pytest.mark.slow
def test_training_on_an_object_store_is_the_same_and_no_job_carries_credentials(
    recipe_on_s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, checkpoints and the exported model have the bytes they have in a local store."""
    PicklingMapper.pickles = pickles = []
    monkeypatch.setattr(mapper, "InProcessMapper", PicklingMapper)

    def keep(job: TrainJob, world: World) -> None:
        pickles.append(cloudpickle.dumps(job))
        train(job, world)

    train = trainer.train
    monkeypatch.setattr(trainer, "train", keep)
    settings = ("execution.train.checkpoint_every_steps=2", "stages.train.num_epochs=1")
    there = run_recipe(recipe_on_s3, *settings)
    num_jobs = len(pickles)
    here = run_recipe(recipe_on_s3, *settings, store=tmp_path / "here")
    assert there.manifest("train").summary["num_steps"] > 2, "a checkpoint must lie on the way"
    assert list_contents(there, STAGE_NAMES) == list_contents(here, STAGE_NAMES)
    assert "train/model/model.safetensors" in list_contents(there, ["train"])
    assert num_jobs >= len(STAGE_NAMES)
    assert not [job for job in pickles if any(secret in job for secret in SECRETS)]
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() == SECRETS[0]
