"""How a test spreads shards over two fresh processes; light, because each of them imports it."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from schemas.manifest import ShardRecord
from stages.stage import MakeWorker, Resources


class TwoProcesses:
    """Maps shards as a cluster would: whatever is sent to a worker must pickle."""

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
        """Nothing is kept."""


def produce_shard(make_worker: MakeWorker[Any], task: Any) -> ShardRecord:
    return make_worker()(task)
