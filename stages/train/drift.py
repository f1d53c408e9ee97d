"""Is the stored reference what this process would compute? Asked before the first step."""

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import ConfigError
from stages.train.log import Drift
from stages.train.losses import SideLogps
from stages.train.microbatch import MicroBatch
from stages.train.policy import Policy

NUM_DRIFT_PAIRS = 32
"""64 sequences."""

MAX_TOKEN_DIFFERENCE = 1e-3
"""Nats; float32 engines of one model stay within 4e-5 of each other."""
MAX_MEDIAN_DIFFERENCE = 0.05
MAX_MEAN_DIFFERENCE = 0.02
"""Nats a token, where one side rounds to bfloat16: beyond that, it is not rounding."""


@torch.no_grad()
def measure_drift(
    policy: Policy,
    microbatches: list[MicroBatch],
    *,
    beta: float,
    is_reference: bool,
    is_float32: bool,
) -> Drift:
    """Compare the policy as it stands with the stored reference, over the tokens that count."""
    differences = []
    margins = []
    for microbatch in microbatches:
        logps = policy.pair_logps(microbatch)
        differences += [_token_differences(side) for side in (logps.chosen, logps.rejected)]
        margins.append((logps.chosen.log_ratio_B - logps.rejected.log_ratio_B).double())
    signed = np.concatenate(differences)
    median, p90, p99, largest = np.quantile(np.abs(signed), [0.5, 0.9, 0.99, 1.0]).tolist()
    return Drift(
        is_reference=is_reference,
        is_float32=is_float32,
        num_sequences=2 * sum(len(margin) for margin in margins),
        num_tokens=len(signed),
        median=median,
        p90=p90,
        p99=p99,
        max=largest,
        mean=float(signed.mean()),
        engine_noise=beta * torch.cat(margins).std(correction=0).item(),
    )


def _token_differences(side: SideLogps) -> NDArray[np.float64]:
    return side.token_log_ratios_BT[side.loss_mask_BT > 0].double().cpu().numpy()


def check_drift(drift: Drift) -> None:
    """Refuse to train against a reference that is not the start's, though it should be.

    Raises:
        ConfigError: the start has the reference's digest, but gives other log-probabilities.
    """
    if not drift.is_reference:
        return
    if drift.is_float32:
        is_close = drift.max <= MAX_TOKEN_DIFFERENCE
        wanted = f"every token within {MAX_TOKEN_DIFFERENCE} nats, both being float32"
    else:
        is_close = drift.median <= MAX_MEDIAN_DIFFERENCE and abs(drift.mean) <= MAX_MEAN_DIFFERENCE
        wanted = (
            f"a median of |policy - reference| up to {MAX_MEDIAN_DIFFERENCE} and a mean of "
            f"policy - reference within {MAX_MEAN_DIFFERENCE} nats a token"
        )
    if not is_close:  # NaN is not close, either.
        raise ConfigError(
            "The policy starts from the very model that the reference was scored with, but gives "
            f"other log-probabilities: over {drift.num_sequences} sequences |policy - reference| "
            f"has median {drift.median:.3g}, 99th percentile {drift.p99:.3g} and maximum "
            f"{drift.max:.3g}, and policy - reference has mean {drift.mean:.3g} nats a token. "
            f"Wanted: {wanted}. Something computes another function than the model: an engine "
            "setting, a package version, damaged scores. Run score again with `--again score`, if "
            "that does not help with `stages.score.backend=transformers`, and compare."
        )
