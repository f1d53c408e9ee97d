"""How far is what a worker's engine gives from a plain computation, and from itself?

Before its first commit a worker scores some sequences again, in plain float32 and one at a time,
and the completions of some prompts with and without sharing them. What it found is recorded beside
the shards, and summed up in the manifest.
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
"""Folder below the stage's directory."""
NUM_RECOMPUTED = 32
"""Sequences that each worker recomputes before its first commit."""
NUM_COMPARED_PROMPTS = 4
"""Prompts whose completions each worker scores with and without sharing them, before its first."""
LONG_PROMPT_TOKENS = 128
"""As long as the largest block of an engine's cache."""
FLOAT32_TOLERANCE_NATS = 1e-3
"""How far a token may be off in float32. Two correct engines differ by less than 1e-4."""
LOW_PRECISION_TOLERANCE_NATS = 1.0
LOW_PRECISION_MEDIAN_NATS = 0.05
"""How far tokens may differ in lower precision where only the order of additions does: the largest
difference, and the median: three times and nearly twice what 24 HH pairs showed with transformers
in bfloat16."""


class Recomputation(msgspec.Struct, frozen=True, kw_only=True):
    """How far the scores of one worker's sample lie from a plain float32 computation, in nats."""

    num_sequences: int
    num_tokens: int
    token_median: float
    token_p99: float
    token_max: float
    sequence_median: float
    """Of the differences of sums over a completion."""
    sequence_max: float


class SharingCheck(msgspec.Struct, frozen=True, kw_only=True):
    """How far scores depend on a prompt's being computed once for all of its completions."""

    num_failed: int
    """Sequences that could be scored only without it."""
    differences: Recomputation
    """Of the others."""
    is_trusted: bool
    """Whether prompts were shared from then on."""


class WorkerCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tried before its first commit."""

    recomputed: Recomputation
    sharing: SharingCheck | None = None
    """None where values were imported."""


def choose_sample(groups: Sequence[SequenceGroup]) -> dict[str, Group]:
    """Choose what is recomputed: the shortest sequences, which cost least, and the longest.

    The longest is there for what breaks with length, such as scaled positions.

    Returns:
        At most NUM_RECOMPUTED groups of one completion, by sequence_id.
    """
    singles = [alone for sequences in groups for alone in sequences.split()]
    ordered = sorted(singles, key=lambda alone: (alone[1].num_tokens, alone[0]))
    return dict([*ordered[: NUM_RECOMPUTED - 1], *ordered[-1:]])


def choose_siblings(groups: Sequence[SequenceGroup]) -> list[Group]:
    """Choose what is scored with and without sharing prompts: what is short, and shares much.

    Half of them have prompts of whole blocks: where an engine takes too much from its cache, it
    does so there first.
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
    """Compare the scores of groups without and with sharing prompts."""
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
    """Compare scores with recomputed ones; sequences that could not be scored are left out."""
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
    # Unless it is there: another run, which is first to finish, may have recorded its sha256.
    folder.create_file(f"{CHECKS}/part-{index:05d}.json", msgspec.json.encode(check))


def list_checks(folder: Folder) -> list[FileRecord]:
    return [describe_stored_file(folder, f"{CHECKS}/{name}") for name in folder.list_files(CHECKS)]


def summarize_checks(folder: Folder, checks: Sequence[FileRecord]) -> dict[str, Any]:
    """Join the workers' checks: counts are added up, of each difference the largest stays."""
    return join_recomputations([check.recomputed for check in read_checks(folder, checks)])


def summarize_sharing(folder: Folder, checks: Sequence[FileRecord]) -> dict[str, Any]:
    """Join what the workers found about sharing prompts; warn where one does without."""
    found = [check.sharing for check in read_checks(folder, checks) if check.sharing is not None]
    num_without = sum(not sharing.is_trusted for sharing in found)
    differences = join_recomputations([sharing.differences for sharing in found])
    num_failed = sum(sharing.num_failed for sharing in found)
    if num_without:
        logger.warning(
            "score: %d of %d workers computed every prompt once for each completion: where it was "
            "shared, %d sequences of a sample failed, and tokens of the others differed by up to "
            "%.3g nats; the installed engine's prefix cache is not to be relied on",
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
