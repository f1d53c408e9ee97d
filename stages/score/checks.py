"""Compare a worker's engine with a plain float32 computation, and with itself.

Before its first commit a worker recomputes some sequences in plain float32, one at a time, and
scores the completions of some prompts with and without sharing the prompt. The differences are
recorded beside the shards and summarized in the manifest.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from schemas.manifest import FileRecord
from stages.policy.groups import Group
from stages.scorers.pairs import Fault, SequenceGroup, SequenceLogps, find_fault
from stages.scorers.protocol import Dtype, FloatArray
from stages.store.filesystems import Folder
from stages.store.shards import describe_stored_file

logger = logging.getLogger(__name__)

CHECKS = "checks"
"""Folder of the check files, below the stage's directory."""
NUM_RECOMPUTED = 32
"""Sequences that each worker recomputes in float32 before its first commit."""
NUM_COMPARED_PROMPTS = 4
"""Prompts that each worker scores both with and without sharing before its first commit."""
LONG_PROMPT_TOKENS = 128
"""Tokens of the largest block of an engine's prefix cache."""
FLOAT32_TOLERANCE_NATS = 1e-3
"""Largest accepted difference of a token in float32. Two correct engines differ by less than
1e-4."""
LOW_PRECISION_TOLERANCE_NATS = 1.0
LOW_PRECISION_MEDIAN_NATS = 0.05
"""Largest and median accepted differences of tokens in lower precision, where only the order of
additions differs: three times and nearly twice those of 24 HH pairs with transformers in
bfloat16."""


class Recomputation(msgspec.Struct, frozen=True, kw_only=True):
    """Differences of a worker's sample from a plain float32 computation, in nats."""

    num_sequences: int
    num_tokens: int
    token_median: float
    token_p99: float
    token_max: float
    sequence_median: float
    """Median over sequences of the difference of their sums."""
    sequence_max: float


class SharingCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Differences between scores with and without sharing a prompt among its completions."""

    num_failed: int
    """Sequences that could only be scored without sharing."""
    differences: Recomputation
    """Differences of the other sequences."""
    is_trusted: bool
    """Whether the worker shared prompts afterwards."""


class WorkerCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a worker's checks before its first commit."""

    recomputed: Recomputation
    sharing: SharingCheck | None = None
    """None where values were imported: no engine was opened."""


def choose_sample(groups: Sequence[SequenceGroup]) -> dict[str, Group]:
    """Choose the sequences to recompute: the shortest, which cost least, and the longest.

    The longest shows faults that depend on length, such as scaled positions.

    Returns:
        At most NUM_RECOMPUTED groups of one completion, by sequence_id.
    """
    singles = [alone for sequences in groups for alone in sequences.split()]
    ordered = sorted(singles, key=lambda alone: (alone[1].num_tokens, alone[0]))
    return dict([*ordered[: NUM_RECOMPUTED - 1], *ordered[-1:]])


def choose_siblings(groups: Sequence[SequenceGroup]) -> list[Group]:
    """Choose the prompts to score with and without sharing: short ones with much to share.

    Half of them have prompts of whole cache blocks, where an engine that reads too much from its
    cache fails first.
    """

    def by_sharing(sequences: SequenceGroup) -> tuple[bool, int, tuple[str, ...]]:
        group = sequences.group
        shares_little = len(group.completions) == 1 or len(group.prompt_ids) < LONG_PROMPT_TOKENS
        return shares_little, group.num_tokens, sequences.sequence_ids

    def by_blocks(sequences: SequenceGroup) -> tuple[int, tuple[bool, int, tuple[str, ...]]]:
        num_tokens = len(sequences.group.prompt_ids)
        power_of_two = num_tokens & -num_tokens
        return -min(power_of_two, LONG_PROMPT_TOKENS), by_sharing(sequences)

    half = NUM_COMPARED_PROMPTS // 2
    chosen = [*sorted(groups, key=by_blocks)[:half], *sorted(groups, key=by_sharing)[:half]]
    return list({sequences.sequence_ids: sequences.group for sequences in chosen}.values())


def compare_sharing(
    whole: Sequence[tuple[FloatArray, ...]],
    shared: Sequence[tuple[FloatArray, ...]],
    groups: Sequence[Group],
    dtype: Dtype,
) -> SharingCheck:
    """Compare the scores of groups without and with shared prompts."""
    expected: dict[str, FloatArray] = {}
    found: dict[str, FloatArray | Fault] = {}
    for place, (group, alone, together) in enumerate(zip(groups, whole, shared, strict=True)):
        for number, ids in enumerate(group.completions):
            if find_fault(alone[number], len(ids)) is None:
                name = f"{place}.{number}"
                expected[name] = alone[number]
                found[name] = find_fault(together[number], len(ids)) or together[number]
    differences = compare_sample(expected, found)
    num_failed = len(expected) - differences.num_sequences
    if dtype == "float32":
        agrees = differences.token_max <= FLOAT32_TOLERANCE_NATS
    else:
        agrees = (
            differences.token_max <= LOW_PRECISION_TOLERANCE_NATS
            and differences.token_median <= LOW_PRECISION_MEDIAN_NATS
        )
    return SharingCheck(
        num_failed=num_failed, differences=differences, is_trusted=agrees and not num_failed
    )


def compare_sample(expected: Mapping[str, FloatArray], logps: SequenceLogps) -> Recomputation:
    """Compare scores with recomputed ones; sequences with a fault are left out."""
    found = {name: logps[name] for name in expected}
    differences = [
        values.astype(np.float64) - expected[name]
        for name, values in found.items()
        if not isinstance(values, Fault)
    ]
    by_token = np.abs(np.concatenate([np.zeros(1), *differences]))
    by_sequence = np.abs([0.0, *(values.sum() for values in differences)])
    return Recomputation(
        num_sequences=len(differences),
        num_tokens=len(by_token) - 1,
        token_median=float(np.median(by_token)),
        token_p99=float(np.quantile(by_token, 0.99)),
        token_max=float(by_token.max()),
        sequence_median=float(np.median(by_sequence)),
        sequence_max=float(by_sequence.max()),
    )


def write_check(folder: Folder, index: int, check: WorkerCheck) -> None:
    folder.child(CHECKS).create()
    # Never overwrite: another run that finished first may have recorded the file's sha256.
    folder.create_file(f"{CHECKS}/part-{index:05d}.json", msgspec.json.encode(check))


def list_checks(folder: Folder) -> list[FileRecord]:
    return [describe_stored_file(folder, f"{CHECKS}/{name}") for name in folder.list_files(CHECKS)]


def summarize_checks(folder: Folder, checks: Sequence[FileRecord]) -> dict[str, Any]:
    """Merge the workers' recomputations: sums of counts, maxima of differences."""
    return join_recomputations([check.recomputed for check in read_checks(folder, checks)])


def summarize_sharing(folder: Folder, checks: Sequence[FileRecord]) -> dict[str, Any]:
    """Merge the workers' sharing checks; warn if any of them stopped sharing prompts."""
    found = [check.sharing for check in read_checks(folder, checks) if check.sharing is not None]
    num_without = sum(not sharing.is_trusted for sharing in found)
    differences = join_recomputations([sharing.differences for sharing in found])
    num_failed = sum(sharing.num_failed for sharing in found)
    if num_without:
        logger.warning(
            "score: %d of %d workers computed every prompt again for each completion, because with "
            "shared prompts %d sequences of a sample failed and tokens of the others differed by "
            "up to %.3g nats; the prefix cache of the installed engine is unreliable",
            num_without,
            len(found),
            num_failed,
            differences["token_max"],
        )
    return {
        "num_workers": len(found),
        "num_workers_without": num_without,
        "num_failed": num_failed,
        **differences,
    }


def read_checks(folder: Folder, checks: Sequence[FileRecord]) -> list[WorkerCheck]:
    return [
        msgspec.json.decode(folder.read_bytes(check.name), type=WorkerCheck) for check in checks
    ]


def join_recomputations(found: Sequence[Recomputation]) -> dict[str, Any]:
    return {
        name: (sum if name.startswith("num_") else max)(getattr(each, name) for each in found)
        for name in Recomputation.__struct_fields__
        if found
    }
