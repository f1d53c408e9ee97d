"""Probe of an export: plain transformers must read from its files what the policy computed.

The policy gives log-probs of a few answers of the training set before it is exported. Then the
exported files are opened as any user would, by from_pretrained alone, and must give the same. Both
compute in float32, so the difference is rounding, or a fault. An adapter that was trained on a
rounded or quantised base is put on the base in float32 for this, as the export has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError

from schemas.errors import DataError
from stages.models.merge_adapter import without_tie_warnings
from stages.policy.batches import lay_out
from stages.policy.groups import Group
from stages.scorers.plain import PlainSequence, compute_sequence, load_plain_model
from stages.train.order import keep_order
from stages.train.pairs import PairIndex, PairReader
from stages.train.policy import Policy

NUM_PROBE_PAIRS = 4
MAX_PROMPT_TOKENS = 128
MAX_COMPLETION_TOKENS = 64
"""Longer texts are cut, so that the probe of a large model takes seconds to minutes on a CPU."""

TOLERANCE = 5e-4
"""Nats a token. Two float32 engines that run one model stay within 4e-5 of each other."""

FloatArray = NDArray[np.float32]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How far other log-probs of a probe's answers are from the policy's."""

    num_sequences: int
    num_tokens: int
    median: float
    """Nats: the median over sequences of the largest difference of a token."""
    max: float
    """Nats: the largest difference of any token."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Answers of the training set, and the log-probs that the trained policy gives them."""

    sequences: Sequence[Group]
    """A prompt with one completion each."""
    logps: Sequence[FloatArray]
    """Nats, a value a completion token, for each sequence."""


def take_probe(policy: Policy, index: PairIndex) -> Probe:
    """Compute the policy's log-probs of the first training pairs in float32.

    Args:
        policy: with weights in float32. If it is sharded, every worker must call this.
    """
    return compute_probe(replace(policy, dtype=torch.float32), index)


def compute_probe(policy: Policy, index: PairIndex) -> Probe:
    """Compute the same with the policy's own dtype and weights."""
    reader = PairReader(index=index, order=keep_order(index.num_pairs_S.tolist()))
    pairs = reader.read(np.arange(min(NUM_PROBE_PAIRS, len(index))))
    sequences = [_cut(single) for pair in pairs for single in pair.group.split()]
    with torch.no_grad():
        logps = [_score(policy, sequence) for sequence in sequences]
    return Probe(sequences=sequences, logps=logps)


def _cut(single: Group) -> Group:
    [completion] = single.completions
    return Group(
        prompt_ids=single.prompt_ids[-MAX_PROMPT_TOKENS:],
        completions=(completion[:MAX_COMPLETION_TOKENS],),
    )


def _score(policy: Policy, sequence: Group) -> FloatArray:
    batch = lay_out([sequence], device=policy.model.device, rows="alone")
    logps: FloatArray = policy.completion_tokens(batch).logps_N.float().cpu().numpy()
    return logps


def check_model(path: Path, probe: Probe, *, device: torch.device) -> Agreement:
    """Compare an exported model with the policy.

    Args:
        path: the model's folder.
        probe: what the policy computed.
        device: has room for the model in float32.
    Raises:
        DataError: transformers cannot open the model, or it computes something else.
    """
    return _check(path, None, probe, device=device)


def check_adapter(path: Path, base: Path, probe: Probe, *, device: torch.device) -> Agreement:
    """Compare an exported adapter, on its base, with the policy; as check_model."""
    return _check(base, path, probe, device=device)


def _check(path: Path, adapter: Path | None, probe: Probe, *, device: torch.device) -> Agreement:
    name = "model" if adapter is None else "adapter on its base"
    try:
        found = _read_logps(path, adapter, probe.sequences, device=device)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            f"The exported {name} cannot be opened by transformers: {error}. {_ADVICE}"
        ) from error
    agreement = compare_logps(found, probe)
    # The median over sequences, because in a mixture of experts one rounding error can send a token
    # to another expert.
    if not agreement.median <= TOLERANCE:  # NaN is not close, either.
        raise DataError(
            f"The exported {name} does not compute what was trained: its log-probabilities of "
            f"{agreement.num_sequences} answers differ from the policy's by "
            f"{agreement.median:.3g} nats in the median answer's worst token and by up to "
            f"{agreement.max:.3g}, and rounding explains {TOLERANCE:g}. {_ADVICE}"
        )
    return agreement


def compare_logps(found: Sequence[FloatArray], probe: Probe) -> Agreement:
    """Compare log-probs of a probe's answers with the policy's."""
    pairs = zip(found, probe.logps, strict=True)
    largest = np.array([np.abs(mine - wanted).max() for mine, wanted in pairs])
    return Agreement(
        num_sequences=len(largest),
        num_tokens=sum(map(len, probe.logps)),
        median=float(np.median(largest)),
        max=float(largest.max()),
    )


_ADVICE = (
    "Nothing was exported; the checkpoints are kept. This is a fault of the export for this "
    "architecture: please report it with the model's config.json. Training other layers "
    "(stages.train.lora.target_modules) may avoid it."
)


def _read_logps(
    path: Path, adapter: Path | None, sequences: Sequence[Group], *, device: torch.device
) -> list[FloatArray]:
    """Compute log-probs of completions by one plain forward a sequence."""
    model = load_plain_model(str(path), device=device)
    if adapter is not None:
        with without_tie_warnings():
            model = PeftModel.from_pretrained(model, str(adapter))
        model.to(device).eval()
    return [
        compute_sequence(
            model,
            PlainSequence(prompt_ids=one.prompt_ids, completion_ids=one.completions[0]),
        )
        for one in sequences
    ]
