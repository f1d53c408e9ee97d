"""Scorer settings are derived from resources, and stop tokens are read from the folder."""

import json
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from stages.scorers.protocol import (
    ScorerSettings,
    ScoringExecution,
    plan_scorer,
    read_stop_token_ids,
)
from stages.stage import Resources


def plan(num_processes: int, num_gpus: float, num_cpus: float = 1) -> ScorerSettings:
    return plan_scorer(
        ScoringExecution(tensor_parallel_size=num_processes),
        Resources(num_workers=1, num_cpus=num_cpus, num_gpus=num_gpus),
        backend="vllm",
        dtype="float32",
        max_length=8,
    )


@pytest.mark.parametrize(("num_processes", "num_gpus"), [(1, 2), (2, 1), (4, 2), (2, 0.5)])
def test_a_replica_holds_as_many_gpus_as_processes(num_processes: int, num_gpus: float) -> None:
    with pytest.raises(ConfigError, match="num_gpus_per_worker"):
        plan(num_processes, num_gpus)


@pytest.mark.parametrize(("num_processes", "num_gpus"), [(1, 0), (2, 0), (1, 0.5), (1, 1), (2, 2)])
def test_matching_replicas_are_accepted(num_processes: int, num_gpus: float) -> None:
    assert plan(num_processes, num_gpus).execution.tensor_parallel_size == num_processes


@pytest.mark.parametrize(("num_cpus", "num_threads"), [(0.5, 1), (1, 1), (2.9, 2), (4, 4)])
def test_threads_are_the_cores_that_a_worker_holds(num_cpus: float, num_threads: int) -> None:
    assert plan(1, 0, num_cpus).num_threads == num_threads


@pytest.mark.parametrize(
    ("generation_config", "config", "wanted"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 2}, [2]),
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 2}, [2, 3, 7]),
        ({}, {"eos_token_id": None}, []),
        (None, {"eos_token_id": 0}, [0]),
    ],
)
def test_stop_tokens_come_from_both_files(
    generation_config: dict[str, object] | None,
    config: dict[str, object],
    wanted: list[int],
    tmp_path: Path,
) -> None:
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_stop_token_ids(str(tmp_path)) == wanted
