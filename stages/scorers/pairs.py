"""Collect the sequences of encoded pairs for scoring, and join their values to the pairs."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.rows import TOKEN_LOGPS
from stages.policy.groups import Group, IntArray
from stages.scorers.protocol import FloatArray, Scorer

ROUNDING_NATS = 1e-4
"""Accepted excess of a log-probability over 0, in nats: the rounding of logits near 1000."""

SIDES = ("chosen", "rejected")

ENCODED_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "chosen_loss_mask",
    "rejected_loss_mask",
    "num_chosen_tokens",
    "num_rejected_tokens",
    "chosen_sequence_id",
    "rejected_sequence_id",
)
"""Columns of encode's rows that scoring reads."""


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """A prompt and its distinct completions, with the sequence_id of each."""

    group: Group
    sequence_ids: tuple[str, ...]

    def split(self) -> Iterable[tuple[str, Group]]:
        """Split into one group a sequence, each with its sequence_id."""
        return zip(self.sequence_ids, self.group.split(), strict=True)

    def without(self, sequence_ids: Container[str]) -> "SequenceGroup | None":
        """Drop some sequences; None means that none is left."""
        kept = {
            name: completion_ids
            for name, completion_ids in zip(self.sequence_ids, self.group.completions, strict=True)
            if name not in sequence_ids
        }
        if not kept:
            return None
        group = Group(prompt_ids=self.group.prompt_ids, completions=tuple(kept.values()))
        return SequenceGroup(group=group, sequence_ids=tuple(kept))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Reason why the values of a sequence are unusable."""

    kind: Literal["LENGTH", "NONFINITE", "POSITIVE", "MISSING"]
    """Last part of the code with which the pair is rejected."""
    detail: str


SequenceLogps = Mapping[str, FloatArray | Fault]
"""By sequence_id: float32, nats, one value a completion token; or the fault of the values."""


@dataclass(frozen=True, kw_only=True)
class SideLogps:
    """Values of one side of B pairs without faults."""

    token_logps: pa.ListArray
    """list<float32> [B], nats, one value a completion token."""
    logps: NDArray[np.float64]
    """[B], nats: sums of the token values under the loss mask."""
    num_tokens: NDArray[np.int64]
    """[B]: number of tokens under the loss mask."""


def list_groups(encoded: pa.Table) -> list[SequenceGroup]:
    """Collect the distinct sequences of encoded rows by prompt ids, in the order of the rows.

    Rows with the same prompt may have different prompt ids, because truncation depends on the pair.
    """
    prompts: dict[bytes, IntArray] = {}
    completions: dict[bytes, dict[str, IntArray]] = {}
    columns = [list_values(encoded, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    names = [encoded[f"{side}_sequence_id"].to_pylist() for side in SIDES]
    for prompt_ids, chosen_ids, rejected_ids, chosen, rejected in zip(
        *columns, *names, strict=True
    ):
        key = prompt_ids.tobytes()
        prompts.setdefault(key, prompt_ids)
        siblings = completions.setdefault(key, {})
        siblings.setdefault(chosen, chosen_ids)
        siblings.setdefault(rejected, rejected_ids)
    return [
        SequenceGroup(
            group=Group(prompt_ids=prompt_ids, completions=tuple(completions[key].values())),
            sequence_ids=tuple(completions[key]),
        )
        for key, prompt_ids in prompts.items()
    ]


def count_tokens(encoded: pa.Table) -> dict[str, int]:
    """Number of completion tokens by sequence_id."""
    found: dict[str, int] = {}
    for side in SIDES:
        names = encoded[f"{side}_sequence_id"].to_pylist()
        found.update(zip(names, encoded[f"num_{side}_tokens"].to_pylist(), strict=True))
    return found


def score_sequences(scorer: Scorer, groups: Sequence[SequenceGroup]) -> SequenceLogps:
    """Score every sequence; one with a fault is scored once more, alone, before it is reported."""
    logps: dict[str, FloatArray | Fault] = {}
    scored = scorer.score([sequences.group for sequences in groups]) if groups else []
    for sequences, arrays in zip(groups, scored, strict=True):
        for (name, alone), values in zip(sequences.split(), arrays, strict=True):
            num_tokens = len(alone.completions[0])
            if find_fault(values, num_tokens):
                [(values,)] = scorer.score([alone])
            logps[name] = find_fault(values, num_tokens) or values
    return logps


def find_fault(token_logps: FloatArray, num_tokens: int) -> Fault | None:
    """Find why values cannot be log-probabilities of `num_tokens` tokens; None if they can."""
    if len(token_logps) != num_tokens:
        detail = f"{len(token_logps)} values for {num_tokens} tokens"
        return Fault(kind="LENGTH", detail=detail)
    if not np.isfinite(token_logps).all():
        [first, *_] = np.flatnonzero(~np.isfinite(token_logps))
        return Fault(kind="NONFINITE", detail=f"token {first}: {token_logps[first]}")
    if (highest := token_logps.max()) > ROUNDING_NATS:
        detail = f"token {token_logps.argmax()}: {highest:g} nats"
        return Fault(kind="POSITIVE", detail=detail)
    return None


def reject_faults(
    encoded: pa.Table, logps: SequenceLogps, *, whose: str
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Separate the encoded rows with a fault on either side from those without.

    Args:
        encoded: rows of encode.
        logps: values of all their sequences.
        whose: REF or POLICY, the first part of the codes.
    Returns:
        The rows without faults, and a rejected row for each of the others.
    """
    sides = [encoded[f"{side}_sequence_id"].to_pylist() for side in SIDES]
    is_kept, rejected = [], []
    for pair_id, *names in zip(encoded["pair_id"].to_pylist(), *sides, strict=True):
        values = {f"{side}_ids": logps[name] for side, name in zip(SIDES, names, strict=True)}
        faults = {field: fault for field, fault in values.items() if isinstance(fault, Fault)}
        is_kept.append(not faults)
        if faults:
            field, first = next(iter(faults.items()))
            codes = [f"{whose}_{fault.kind}" for fault in faults.values()]
            rejected.append(
                {
                    "code": codes[0],
                    "codes": codes,
                    "field": field,
                    "detail": first.detail,
                    "pair_id": pair_id,
                }
            )
    return encoded.filter(pa.array(is_kept, pa.bool_())), rejected


def join_side(encoded: pa.Table, side: str, logps: SequenceLogps) -> SideLogps:
    """Look up the values of one side of encoded rows without faults."""
    values = [logps[name] for name in encoded[f"{side}_sequence_id"].to_pylist()]
    token_logps = [array for array in values if not isinstance(array, Fault)]
    assert len(token_logps) == encoded.num_rows, "rows with faults must be taken out before"
    masks = list_masks(encoded, side)
    sums = [
        array.sum(dtype=np.float64) if mask is None else array[mask].sum(dtype=np.float64)
        for array, mask in zip(token_logps, masks, strict=True)
    ]
    counts = [
        len(array) if mask is None else int(mask.sum())
        for array, mask in zip(token_logps, masks, strict=True)
    ]
    offsets = np.cumsum([0, *(len(array) for array in token_logps)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, np.float32), *token_logps])
    return SideLogps(
        token_logps=pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=TOKEN_LOGPS),
        logps=np.array(sums, dtype=np.float64),
        num_tokens=np.array(counts, dtype=np.int64),
    )


def list_values(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """Read a list column as one array a row, without a Python object a value; null is empty."""
    column = table[name].combine_chunks()
    values = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]


def list_masks(encoded: pa.Table, side: str) -> list[NDArray[np.bool_] | None]:
    """Read the loss masks of a side; None means that every token counts."""
    name = f"{side}_loss_mask"
    return [
        mask if is_given else None
        for mask, is_given in zip(
            list_values(encoded, name), encoded[name].is_valid().to_pylist(), strict=True
        )
    ]
