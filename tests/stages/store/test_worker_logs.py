"""Each shard's log holds its own log records and how it failed, and nothing of other shards."""

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from schemas.errors import StageFailed
from schemas.manifest import Counts, ShardRecord
from stages.stage import Execution, StageContext
from stages.store.filesystems import Folder
from stages.store.worker_logs import LOGS, written_log
from tests.stages_running import make_context, stage_dir

logger = logging.getLogger("a.library")


@dataclass(frozen=True)
class Task:
    index: int

    @property
    def description(self) -> str:
        return f"shard {self.index}"


def make_worker():  # type: ignore[no-untyped-def]
    logger.info("loading")

    def work(task: Task) -> ShardRecord:
        logger.info("working on %s", task.description)
        logger.debug("too small to keep")
        if task.index == 1:
            raise ValueError("the third row is odd")
        return ShardRecord(index=task.index, files={}, counts=Counts(), seconds=0, writer="here")

    return work


def run_pass(context: StageContext, label: str = "") -> None:
    with pytest.raises(StageFailed, match="the third row is odd"):
        context.map_shards(make_worker, [Task(index) for index in range(3)], label=label)


def read_logs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / LOGS).iterdir()}


def test_each_shard_and_each_start_has_a_log(tmp_path: Path) -> None:
    out = stage_dir(tmp_path, "encode")
    context = make_context(out, {}, execution=Execution(keep_logs=True))
    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)
    run_pass(context)
    start = f"start-{socket.gethostname()}-{os.getpid()}.log"
    logs = read_logs(Path(out.folder.path))
    assert sorted(logs) == ["part-00000.log", "part-00001.log", "part-00002.log", start]
    assert logs[start].endswith(" INFO a.library: loading\n")
    assert logs["part-00000.log"].endswith(" INFO a.library: working on shard 0\n")
    assert "Traceback" in logs["part-00001.log"]
    assert logs["part-00001.log"].endswith("ValueError: the third row is odd\n")
    run_pass(context)
    again = read_logs(Path(out.folder.path))
    assert again["part-00001.log"].startswith(logs["part-00001.log"])
    assert again["part-00001.log"].count("Traceback") == 2
    assert (logging.getLogger().level, logging.getLogger().handlers) == (level, handlers)


def test_passes_have_logs_of_their_own(tmp_path: Path) -> None:
    out = stage_dir(tmp_path, "dedupe")
    run_pass(make_context(out, {}, execution=Execution(keep_logs=True)), label="near duplicates")
    assert "near-duplicates-part-00002.log" in read_logs(Path(out.folder.path))


def test_there_are_no_logs_by_default(tmp_path: Path) -> None:
    out = stage_dir(tmp_path, "encode")
    run_pass(make_context(out, {}))
    assert not Path(out.folder.path, LOGS).exists()


def test_lines_are_written_at_once_also_those_of_silent_loggers(
    tmp_path: Path,
) -> None:
    silent = logging.getLogger("an.engine")
    silent.propagate = False
    try:
        with written_log(Folder(str(tmp_path)), "part-00000.log"):
            silent.warning("the last words")
            assert "the last words" in (tmp_path / "part-00000.log").read_text()
    finally:
        silent.propagate = True


def test_an_object_store_gets_the_log_when_the_block_ends(tmp_path: Path) -> None:
    folder = Folder("memory://shard-logs")
    for number in range(2):
        with written_log(folder, "part-00000.log"):
            logger.info("attempt %d", number)
    lines = folder.read_bytes("part-00000.log").decode().splitlines()
    assert [line[-9:] for line in lines] == ["attempt 0", "attempt 1"]
