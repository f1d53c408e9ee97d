"""A shard mapper for tests that runs shards in two fresh processes; each imports this module."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from schemas.manifest import ShardRecord
from stages.stage import MakeWorker, Resources


class TwoProcesses:
    """Maps shards as a cluster does: everything sent to a worker must pickle."""

    def map(
        self,
        make_worker: MakeWorker[Any],
        tasks: Sequence[Any],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            for record in pool.map(produce_shard, [make_worker] * len(tasks), tasks):
                on_done(record)

    def release(self) -> None:
        """Release nothing, as nothing is held."""


def produce_shard(make_worker: MakeWorker[Any], task: Any) -> ShardRecord:
    return make_worker()(task)
