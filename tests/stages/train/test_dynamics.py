"""Every pair's values are recorded at its step, whatever the workers, the parts and the crashes."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from schemas.rows import DYNAMICS, EVAL_DYNAMICS
from stages.store.shards import StageOutput
from stages.train import dynamics
from stages.train.config import TrainJob
from stages.train.dynamics import gradient_norms
from stages.train.losses import LOSSES, PairLogps, PairLoss
from stages.train.losses.coupled import CoupledLoss
from stages.train.trainer import train
from tests.stages.train.losses.made_logps import random_logps
from tests.stages.train.made_data import Row, load_plain, make_job, plain_logps
from tests.stages.train.test_train import ALONE, CONFIG, read_metrics, straight

__all__ = ["straight"]  # A fixture.

Visits = list[dict[str, Any]]


def read_visits(job: TrainJob, name: str = "dynamics") -> Visits:
    rows: Visits = pq.read_table(f"{job.out.folder.path}/{name}.parquet").to_pylist()
    return rows


def test_each_pair_is_recorded_once_an_epoch_with_its_step(
    straight: TrainJob, encoded: list[Row]
) -> None:
    folder = straight.out.folder.path
    for schema in (DYNAMICS, EVAL_DYNAMICS):
        assert pq.read_schema(f"{folder}/{schema.name}.parquet").equals(schema.arrow)
    visits = read_visits(straight)
    assert [row["step"] for row in visits] == [
        step for step in range(1, 11) for _ in range(4 if step % 5 else 1)
    ]
    for epoch in (1, 2):
        seen = [row["pair_id"] for row in visits if row["epoch"] == epoch]
        assert sorted(seen) == sorted(r["pair_id"] for r in encoded if r["split"] == "train")
    held_out = read_visits(straight, "eval_dynamics")
    wanted = [row["pair_id"] for row in encoded if row["split"] == "eval"]
    assert [(row["step"], row["pair_id"]) for row in held_out] == [
        (step, pair_id) for step in (0, 4, 8, 10) for pair_id in wanted
    ]


def test_rows_average_to_the_metrics(straight: TrainJob) -> None:
    for name, metrics in (("dynamics", "metrics"), ("eval_dynamics", "eval_metrics")):
        by_step = defaultdict(list)
        for row in read_visits(straight, name):
            by_step[row["step"]].append(row)
        for step in read_metrics(straight, metrics):
            rows = by_step[int(step["step"])]
            for column, metric in (
                ("loss", "loss"),
                ("margin", "rewards/margins"),
                ("policy_chosen_logp", "logps/chosen"),
                ("policy_rejected_logp", "logps/rejected"),
            ):
                mean = np.mean([row[column] for row in rows])
                assert mean == pytest.approx(step[metric], abs=1e-5), (name, column)


def test_values_are_those_of_a_plain_forward(straight: TrainJob, encoded: list[Row]) -> None:
    """The exported model is the policy of the last evaluation."""
    model = load_plain(Path(straight.out.folder.path) / "model")
    of_pair = {row["pair_id"]: row for row in encoded}
    last = [row for row in read_visits(straight, "eval_dynamics") if row["step"] == 10]
    assert len(last) == 5
    with torch.no_grad():
        for row in last:
            pair = of_pair[row["pair_id"]]
            for side in ("chosen", "rejected"):
                logps = plain_logps(model, pair, side)
                mask = torch.tensor(pair[f"{side}_loss_mask"] or [True] * len(logps))
                assert row[f"policy_{side}_logp"] == pytest.approx(
                    logps[mask].sum().item(), abs=1e-4
                )


def test_the_gradient_is_shared_by_weight_and_margin(
    straight: TrainJob, encoded: list[Row]
) -> None:
    """DPO's gradient by a pair's log-probs is ±weight · β · sigmoid(-margin)."""
    weights = {row["pair_id"]: row["weight"] for row in encoded}
    by_step = defaultdict(list)
    for row in read_visits(straight):
        by_step[row["step"]].append(row)
    for rows in by_step.values():
        pulls = [weights[row["pair_id"]] / (1 + math.exp(row["margin"])) for row in rows]
        shares = [pull / sum(pulls) for pull in pulls]
        assert [row["gradient_share"] for row in rows] == pytest.approx(shares, rel=1e-4)


def shift(logps: PairLogps, by_chosen: float, by_rejected: float) -> PairLogps:
    """Add to each pair's summed log-probs, spread evenly over the scored tokens."""

    def spread(side: Any, amount: float) -> Any:
        per_token_BT = amount * side.loss_mask_BT / side.num_tokens_B[:, None]
        return replace(side, policy_token_logps_BT=side.policy_token_logps_BT + per_token_BT)

    return replace(
        logps,
        chosen=spread(logps.chosen, by_chosen),
        rejected=spread(logps.rejected, by_rejected),
    )


@pytest.mark.parametrize(
    "loss_class", [loss for loss in LOSSES if not issubclass(loss, CoupledLoss)]
)
def test_gradient_norms_are_finite_differences(loss_class: Callable[[], PairLoss]) -> None:
    loss, logps = loss_class(), random_logps(3)
    for side in (logps.chosen, logps.rejected):
        side.policy_token_logps_BT.requires_grad_().retain_grad()
    loss(logps).sum().backward()
    epsilon = 1e-5
    with torch.no_grad():
        by_side = [
            (loss(shift(logps, *up)) - loss(shift(logps, *down))) / (2 * epsilon)
            for up, down in (((epsilon, 0), (-epsilon, 0)), ((0, epsilon), (0, -epsilon)))
        ]
    wanted = (by_side[0] ** 2 + by_side[1] ** 2).sqrt()
    torch.testing.assert_close(gradient_norms(logps), wanted, rtol=1e-5, atol=1e-8)


def test_parts_hold_a_bounded_number_of_rows(
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: TrainJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part ends with the step that brings at least 6 rows; the steps of an epoch have 4, 4, 4, 4
    and 1."""
    monkeypatch.setattr(dynamics, "ROWS_PER_PART", 6)
    job = make_job(tmp_path, inputs, reference, CONFIG)
    train(job, ALONE)
    parts = sorted(Path(job.out.folder.path, "checkpoints", "dynamics").iterdir())
    assert [pq.read_metadata(part).num_rows for part in parts] == [8, 8, 9, 8, 1]
    assert read_visits(job) == read_visits(straight)
    table = pq.ParquetFile(f"{job.out.folder.path}/dynamics.parquet")
    groups = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    assert groups == [6, 6, 6, 6, 6, 4]
