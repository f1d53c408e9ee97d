"""Compare a worker's engine with plain transformers, and with itself.

Before its first commit a worker recomputes some sequences with plain transformers in float32, one
at a time (stages/scorers/plain.py), and compares the values that it stores, and those of short
sequences in one batch with the longest. It also scores the completions of some prompts with and
without sharing the prompt. The differences are recorded beside the shards and summarized in the
manifest.
"""

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from schemas.errors import DataError
from schemas.manifest import FileRecord
from stages.policy.groups import Group
from stages.scorers.pairs import Fault, SequenceGroup, SequenceLogps, find_fault
from stages.scorers.protocol import Backend, Dtype, FloatArray, Scorer
from stages.store.filesystems import Folder
from stages.store.shards import describe_stored_file

if TYPE_CHECKING:
    from stages.scorers.plain import PlainModel

logger = logging.getLogger(__name__)

CHECKS = "checks"
"""Folder of the check files, below the stage's directory."""
NUM_RECOMPUTED = 32
"""Sequences that each worker recomputes in float32 before its first commit."""
NUM_NEIGHBOURS = 3
"""Shortest sequences that each worker scores in one batch with the longest."""
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

ADVICE: Mapping[Backend, str] = {
    "vllm": "It computes this model differently from transformers: set stages.score.backend to "
    "transformers, or use another version of vllm.",
    "transformers": "This program's own forward pass (stages/policy) computes this model wrongly: "
    "set stages.score.backend to vllm, or use a model of another architecture, and report it.",
}
"""How to go on when an engine computes other values than plain transformers."""


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


@dataclass(frozen=True, kw_only=True)
class PlainSample:
    """Sequences of a shard with the values that plain transformers gives them."""

    groups: Mapping[str, Group]
    """By sequence_id, one completion each, from short to long."""
    logps: Mapping[str, FloatArray]
    """By sequence_id: float32, nats, one value a completion token."""

    def list_groups(self, *, besides: Container[str]) -> list[SequenceGroup]:
        """List the sequences that are not among others."""
        return [
            SequenceGroup(group=group, sequence_ids=(name,))
            for name, group in self.groups.items()
            if name not in besides
        ]


@dataclass(frozen=True, kw_only=True)
class StartedCheck:
    """What a worker's check has found before the shard is scored."""

    sample: PlainSample
    beside_longest: SequenceLogps
    """The engine's values of short sequences that it computed in one batch with the longest."""
    sharing: SharingCheck


class WorkerCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a worker's checks before its first commit."""

    recomputed: Recomputation
    beside_longest: Recomputation | None = None
    """Differences of short sequences, and the longest, when scored in one batch; None where values
    were imported."""
    sharing: SharingCheck | None = None
    """None where values were imported: no engine was opened."""


def choose_sample(
    groups: Sequence[SequenceGroup], *, max_tokens: int, longest: int
) -> dict[str, Group]:
    """Choose the sequences to recompute: the shortest, which cost least, and the longest.

    The longest shows faults that depend on length, such as scaled positions.

    Args:
        groups: what a shard holds.
        max_tokens: most tokens of all chosen sequences together; the longest may have half of them.
            Above 0, at least the shortest sequence is chosen.
        longest: most tokens of a sequence.
    Returns:
        At most NUM_RECOMPUTED groups of one completion, by sequence_id, from short to long.
    """
    singles = [alone for sequences in groups for alone in sequences.split()]
    ordered = sorted(singles, key=lambda alone: (alone[1].num_tokens, alone[0]))
    limit = min(longest, max_tokens // 2)
    chosen = [alone for alone in ordered if alone[1].num_tokens <= limit][-1:]
    num_left = max_tokens - sum(group.num_tokens for _, group in chosen)
    shortest = []
    for name, group in ordered[: NUM_RECOMPUTED - 1]:
        num_left -= group.num_tokens
        if num_left >= 0:
            shortest.append((name, group))
    return dict([*shortest, *chosen] or (ordered[:1] if max_tokens else []))


def recompute_sample(plain: "PlainModel", groups: Sequence[SequenceGroup]) -> PlainSample:
    """Compute a sample of a shard's sequences with plain transformers, each alone."""
    from stages.scorers.plain import MAX_TOKENS, PlainSequence  # Loads torch.

    max_tokens = plain.count_affordable_tokens()
    sample = choose_sample(groups, max_tokens=max_tokens, longest=MAX_TOKENS)
    if not sample:
        return PlainSample(groups={}, logps={})
    lengths = [group.num_tokens for group in sample.values()]
    logger.info(
        "comparing %d sequences of %d to %d tokens with plain transformers in float32",
        *(len(lengths), min(lengths), max(lengths)),
    )
    sequences = {
        name: PlainSequence(prompt_ids=group.prompt_ids, completion_ids=group.completions[0])
        for name, group in sample.items()
    }
    return PlainSample(groups=sample, logps=plain.compute(sequences))


def score_together(scorer: Scorer, groups: Mapping[str, Group]) -> SequenceLogps:
    """Score sequences, given as groups of one completion, in one batch."""
    if not groups:
        return {}
    scored = scorer.score(list(groups.values()), in_one_batch=True)
    return {
        name: find_fault(values, len(group.completions[0])) or values
        for (name, group), (values,) in zip(groups.items(), scored, strict=True)
    }


def choose_neighbours(sample: Mapping[str, Group]) -> dict[str, Group]:
    """Choose the sequences of a sample to score in one batch: the longest and a few short ones.

    Positions that depend on the longest row of a batch show in the short ones.
    """
    ordered = list(sample.items())
    return dict([*ordered[:NUM_NEIGHBOURS], *ordered[-1:]])


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


def judge_sample(
    expected: Mapping[str, FloatArray],
    logps: SequenceLogps,
    *,
    what: str,
    engine: Backend,
    dtype: Dtype,
) -> None:
    """Refuse float32 values that are further off than rounding explains; warn in lower precision.

    Args:
        expected: values of plain transformers in float32, by sequence_id.
        logps: values of the engine.
        what: the model, for the message.
        engine: the engine.
        dtype: the engine's dtype.
    Raises:
        DataError: dtype is float32 and a token is off by more than FLOAT32_TOLERANCE_NATS.
    """
    is_float32 = dtype == "float32"
    tolerance = FLOAT32_TOLERANCE_NATS if is_float32 else LOW_PRECISION_TOLERANCE_NATS
    errors = find_errors(expected, logps, tolerance=tolerance)
    median = compare_sample(expected, logps).token_median
    if not errors and (is_float32 or median <= LOW_PRECISION_MEDIAN_NATS):
        return
    if not is_float32:
        logger.warning(
            "%s in %s: tokens of %s are off from plain transformers in float32 by %.3g nats in the "
            "median, and those of %d of %d sequences by more than %g: more than rounding mostly "
            "explains. Score a few pairs with dtype: float32, which stops where values are wrong.",
            engine,
            dtype,
            what,
            median,
            len(errors),
            len(expected),
            tolerance,
        )
        return
    worst, error = next(iter(errors.items()))
    raise DataError(
        f"{engine} is off by up to {error:.3g} nats a token from plain transformers in "
        f"{len(errors)} of {len(expected)} sequences of {what}, the most in sequence {worst} "
        f"(an answer of {len(expected[worst])} tokens); rounding explains less than "
        f"{FLOAT32_TOLERANCE_NATS:g}. {ADVICE[engine]}"
    )


def find_errors(
    expected: Mapping[str, FloatArray], logps: SequenceLogps, *, tolerance: float
) -> dict[str, float]:
    """Find the sequences with a token that is further off than a tolerance.

    Returns:
        By sequence_id: the largest difference of its tokens, in nats, the largest first. NaN is
        further off than any tolerance; sequences with a fault are left out.
    """
    largest = {
        name: float(np.abs(values - expected[name]).max())
        for name in expected
        if not isinstance(values := logps[name], Fault)
    }
    wrong = {name: error for name, error in largest.items() if not error <= tolerance}
    return dict(sorted(wrong.items(), key=lambda item: -item[1]))


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
