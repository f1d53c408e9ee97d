"""The drift gate: differences that stop a training, and those that are only recorded."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from schemas.errors import ConfigError
from stages.models.resolve import pin_model
from stages.policy.groups import Group
from stages.train import TrainConfig, TrainExecution
from stages.train.log import Drift
from stages.train.microbatch import lay_out_pairs
from stages.train.pairs import Pair
from stages.train.policy import Policy, open_policy
from stages.train.trainer import check_drift, measure_drift
from tests.stages.train.made_data import Row


@pytest.fixture(scope="module")
def policy(reference: Path) -> Policy:
    return open_policy(
        TrainConfig(dtype="float32"),
        TrainExecution(),
        pin_model(str(reference)),
        device=torch.device("cpu"),
        max_length=48,
    )


def measure(
    policy: Policy,
    encoded: list[Row],
    scored: list[Row],
    *,
    shift: float = 0.0,
    is_reference: bool = True,
    is_float32: bool = True,
) -> Drift:
    """Measure against scores whose chosen tokens are all shifted by `shift` nats."""
    pairs = [
        Pair(
            pair_id=row["pair_id"],
            group=Group(
                prompt_ids=np.array(row["prompt_ids"], np.int32),
                completions=(
                    np.array(row["chosen_ids"], np.int32),
                    np.array(row["rejected_ids"], np.int32),
                ),
            ),
            ref_chosen_token_logps_C=np.array(score["ref_chosen_token_logps"], np.float32) + shift,
            ref_rejected_token_logps_R=np.array(score["ref_rejected_token_logps"], np.float32),
            chosen_loss_mask_C=np.ones(row["num_chosen_tokens"], np.bool_),
            rejected_loss_mask_R=np.ones(row["num_rejected_tokens"], np.bool_),
            weight=1.0,
        )
        for row, score in zip(encoded, scored, strict=True)
    ]
    microbatch = lay_out_pairs(pairs, device=torch.device("cpu"), rows="packed")
    return measure_drift(
        policy, [microbatch], beta=0.1, is_reference=is_reference, is_float32=is_float32
    )


def test_the_reference_itself_does_not_drift(
    policy: Policy, encoded: list[Row], scored: list[Row]
) -> None:
    drift = measure(policy, encoded, scored)
    assert drift.num_sequences == 44
    assert drift.num_tokens == sum(
        row["num_chosen_tokens"] + row["num_rejected_tokens"] for row in encoded
    )
    assert drift.max < 1e-4
    assert drift.engine_noise < 1e-5
    check_drift(drift, usual_median=None)


def test_a_shift_is_measured(policy: Policy, encoded: list[Row], scored: list[Row]) -> None:
    """Every chosen token of the reference is 0.25 higher, so policy - reference is -0.25 there.

    A pair's margin is lower by 0.25 times its number of chosen tokens, and the standard deviation
    of that is the engine noise.
    """
    drift = measure(policy, encoded, scored, shift=0.25)
    num_chosen = np.array([row["num_chosen_tokens"] for row in encoded])
    assert drift.max == pytest.approx(0.25, abs=1e-4)
    assert drift.mean == pytest.approx(-0.25 * num_chosen.sum() / drift.num_tokens, abs=1e-4)
    assert drift.engine_noise == pytest.approx(0.1 * 0.25 * num_chosen.std(), rel=1e-3)


@pytest.mark.parametrize(
    ("shift", "is_float32", "is_refused"),
    [(5e-4, True, False), (2e-3, True, True), (0.01, False, False), (0.1, False, True)],
)
def test_limits(
    policy: Policy,
    encoded: list[Row],
    scored: list[Row],
    shift: float,
    is_float32: bool,
    is_refused: bool,
) -> None:
    drift = measure(policy, encoded, scored, shift=shift, is_float32=is_float32)
    if is_refused:
        with pytest.raises(ConfigError, match="--again score"):
            check_drift(drift, usual_median=None)
    else:
        check_drift(drift, usual_median=None)


def test_a_start_that_is_not_the_reference_is_not_stopped(
    policy: Policy, encoded: list[Row], scored: list[Row]
) -> None:
    drift = measure(policy, encoded, scored, shift=3.0, is_reference=False)
    assert drift.max > 2
    check_drift(drift, usual_median=None)


def test_uncomputed_scores_are_refused(
    policy: Policy, encoded: list[Row], scored: list[Row]
) -> None:
    with pytest.raises(ConfigError):
        check_drift(measure(policy, encoded, scored, shift=float("nan")), usual_median=None)


@pytest.mark.parametrize(
    ("usual_median", "is_unusual"), [(1e-3, True), (0.1, False), (None, False)]
)
def test_an_unusual_median_is_warned_of_in_bfloat16(
    policy: Policy,
    encoded: list[Row],
    scored: list[Row],
    caplog: pytest.LogCaptureFixture,
    usual_median: float | None,
    is_unusual: bool,
) -> None:
    """All chosen tokens are off by 0.02, so the median is about that and the mean is half of it."""
    drift = measure(policy, encoded, scored, shift=0.02, is_float32=False)
    check_drift(msgspec.structs.replace(drift, median=0.02), usual_median=usual_median)
    assert ("may not compute the same" in caplog.text) == is_unusual
