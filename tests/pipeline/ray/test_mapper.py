"""Tests of the mappers: nothing is lost, lost processes are replaced, failures end a stage."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.ray.mapper import InProcessMapper, RayMapper
from pipeline.ray.session import NodeCheck
from schemas.errors import ConfigError, StageFailed
from schemas.manifest import Counts, ShardRecord
from schemas.rows import TIMINGS
from stages.stage import Resources, ShardMapper, ShardWorker
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, open_stage_dir

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Task:
    index: int

    @property
    def description(self) -> str:
        return f"task {self.index}"


@dataclass(frozen=True, kw_only=True)
class MakeWorker:
    """A worker that fails or dies on given tasks; every attempt leaves a file."""

    out: StageDir
    marks: Path
    failing: frozenset[int] = frozenset()
    dying_once: frozenset[int] = frozenset()
    dying_always: frozenset[int] = frozenset()
    cannot_start: bool = False
    num_together: int = 1
    """Processes that must have begun a task before one of them ends."""

    def __call__(self) -> ShardWorker[Task]:
        if self.cannot_start:
            raise ConfigError("no such model")
        return self._process

    def _process(self, task: Task) -> ShardRecord:
        attempts = len(list(self.marks.glob(f"{task.index}-*")))
        (self.marks / f"{task.index}-{os.getpid()}-{attempts}").touch()
        deadline = time.monotonic() + 60
        while len(self.pids()) < self.num_together and time.monotonic() < deadline:
            time.sleep(0.01)
        if task.index in self.failing:
            raise ValueError("this one is bad")
        if task.index in self.dying_always or (task.index in self.dying_once and not attempts):
            os.kill(os.getpid(), signal.SIGKILL)
        with self.out.write_shard(task.index, {"data": TIMINGS}) as shard:
            return shard.commit(Counts(num_in=task.index))

    def attempts(self, index: int) -> int:
        return len(list(self.marks.glob(f"{index}-*")))

    def pids(self) -> set[str]:
        return {path.name.split("-")[1] for path in self.marks.iterdir()}


def ray_mapper(tmp_path: Path) -> RayMapper:
    return RayMapper(NodeCheck(Folder(str(tmp_path / "store"))))


@pytest.fixture(params=["in process", "ray"])
def mapper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ShardMapper]:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
        yield ray_mapper(tmp_path)
    else:
        yield InProcessMapper()


def make(tmp_path: Path, **behaviour: object) -> MakeWorker:
    marks = tmp_path / "marks"
    marks.mkdir()
    out = open_stage_dir(Folder(str(tmp_path / "store")), "validate", "0123456789ab", 1)
    return MakeWorker(out=out, marks=marks, **behaviour)  # type: ignore[arg-type]


def run(mapper: ShardMapper, worker: MakeWorker, num_tasks: int, num_workers: int = 1) -> set[int]:
    done: list[ShardRecord] = []
    resources = Resources(num_workers=num_workers, num_cpus=0.5)
    try:
        mapper.map(worker, [Task(index) for index in range(num_tasks)], resources, done.append)
    finally:
        mapper.release()
        indices = [record.index for record in done]
        assert len(indices) == len(set(indices))
        assert set(indices) == set(worker.out.committed())
    return set(indices)


def test_every_task_is_done_once(mapper: ShardMapper, tmp_path: Path) -> None:
    worker = make(tmp_path)
    assert run(mapper, worker, 7, num_workers=2) == set(range(7))
    assert all(worker.attempts(index) == 1 for index in range(7))


def test_work_is_spread_over_workers(ray_cluster: None, tmp_path: Path) -> None:
    worker = make(tmp_path, num_together=2)
    run(ray_mapper(tmp_path), worker, 12, num_workers=2)
    assert len(worker.pids()) == 2


def test_a_failing_shard_fails_the_stage_after_the_others_and_is_not_retried(
    mapper: ShardMapper, tmp_path: Path
) -> None:
    worker = make(tmp_path, failing=frozenset({3}))
    with pytest.raises(StageFailed, match=r"1 of 6 shards failed(.|\n)*task 3: .*this one is bad"):
        run(mapper, worker, 6)
    assert set(worker.out.committed()) == {0, 1, 2, 4, 5}
    assert worker.attempts(3) == 1


def test_a_stage_in_which_nothing_works_is_stopped_early(
    mapper: ShardMapper, tmp_path: Path
) -> None:
    worker = make(tmp_path, failing=frozenset(range(50)))
    with pytest.raises(StageFailed, match="Stopped early"):
        run(mapper, worker, 50)
    assert len(list(worker.marks.iterdir())) == 2


def test_ten_equal_failures_in_a_row_stop_a_stage(mapper: ShardMapper, tmp_path: Path) -> None:
    worker = make(tmp_path, failing=frozenset(range(5, 50)))
    with pytest.raises(StageFailed, match="Stopped early"):
        run(mapper, worker, 50)
    assert len(list(worker.marks.iterdir())) == 5 + 10


def test_a_worker_that_cannot_start_stops_the_stage_with_its_cause(
    mapper: ShardMapper, tmp_path: Path
) -> None:
    worker = make(tmp_path, cannot_start=True)
    with pytest.raises(StageFailed, match="no such model"):
        run(mapper, worker, 5)


def test_processes_wait_for_the_next_pass_until_they_are_released(
    ray_cluster: None, tmp_path: Path
) -> None:
    """The same process takes the shards of another pass with equal resources."""
    mapper, resources = ray_mapper(tmp_path), Resources(num_workers=1, num_cpus=0.5)
    workers = []
    for name, amount in (("one", resources), ("two", resources), ("three", None)):
        (tmp_path / name).mkdir()
        workers.append(make(tmp_path / name))
        if amount is None:
            mapper.release()
        mapper.map(workers[-1], [Task(0), Task(1)], resources, lambda record: None)
    mapper.release()
    one, two, three = (worker.pids() for worker in workers)
    assert len(one) == 1
    assert one == two != three
    assert [set(worker.out.committed()) for worker in workers] == [{0, 1}] * 3


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_its_shard_redone(ray_cluster: None, tmp_path: Path) -> None:
    worker = make(tmp_path, dying_once=frozenset({1, 4}))
    assert run(ray_mapper(tmp_path), worker, 6) == set(range(6))
    assert worker.attempts(1) == worker.attempts(4) == 2


@pytest.mark.slow
def test_a_shard_that_kills_every_process_is_given_up_after_four(
    ray_cluster: None, tmp_path: Path
) -> None:
    worker = make(tmp_path, dying_always=frozenset({1}))
    with pytest.raises(StageFailed, match=r"task 1: .*lost"):
        run(ray_mapper(tmp_path), worker, 4)
    assert set(worker.out.committed()) == {0, 2, 3}
    assert worker.attempts(1) == 4
