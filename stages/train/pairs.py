"""Read the training pairs: encoded pairs joined with their reference log-probs, if scored.

Shape suffixes: P pairs of a split, S shards, C and R tokens of a chosen and a rejected completion.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import DataError
from stages.policy.groups import Group, IntArray
from stages.stage import AlignedShards, align_shards
from stages.store.shards import StageOutput
from stages.train.order import EpochOrder, PairNumbers
from stages.train.selection import Selection

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

NUM_PREFIX_PROMPTS = 256
"""Prompts of a split that are searched for a common prefix."""

_SEQUENCE_IDS = ("chosen_sequence_id", "rejected_sequence_id")
_LENGTHS = ("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_loss_mask", "rejected_loss_mask")
_FACTS = ("weight", "margin", "split")
_REF_LOGPS = ("ref_chosen_token_logps", "ref_rejected_token_logps")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference pair, ready for a batch."""

    pair_id: str
    group: Group
    """The prompt with its chosen and its rejected completion, in this order."""
    ref_chosen_token_logps_C: FloatArray | None
    """Nats; None if the pairs were not scored."""
    ref_rejected_token_logps_R: FloatArray | None
    chosen_loss_mask_C: BoolArray
    rejected_loss_mask_R: BoolArray
    weight: float
    margin: float | None = None
    """Margin of chosen over rejected in the data, in its own unit; None if it has none."""


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """Lengths of all pairs of a split, numbered shard by shard: 12 bytes per pair in memory.

    The lengths of their common prefixes are read on first use and take 4 bytes more.
    """

    inputs: Mapping[str, StageOutput]
    split: str
    shards: Sequence[AlignedShards]
    num_pairs_S: IntArray
    num_prompt_tokens_P: IntArray
    num_chosen_tokens_P: IntArray
    num_rejected_tokens_P: IntArray
    selected_S: Sequence[BoolArray] | None = None
    """By shard: which pairs of the split belong to the index; None if all do."""
    factors_S: Sequence[FloatArray] | None = None
    """By shard: factors of the weights of the selected pairs; None if all are 1."""

    def __len__(self) -> int:
        return len(self.num_prompt_tokens_P)

    @property
    def num_left_out(self) -> int:
        """Pairs of the split that were not selected."""
        return sum(int((~selected).sum()) for selected in self.selected_S or ())

    def take(self, shard: int, joined: pa.Table) -> pa.Table:
        """Take the rows of the index out of a shard's joined rows."""
        rows = joined.filter(pc.equal(joined["split"], self.split))
        return rows if self.selected_S is None else rows.filter(pa.array(self.selected_S[shard]))

    @property
    def num_bytes_S(self) -> NDArray[np.int64]:
        """Memory of each shard's tokens and log-probs."""
        num_completion_tokens_P = self.num_chosen_tokens_P + self.num_rejected_tokens_P
        num_bytes_P = 4 * (self.num_prompt_tokens_P + 2 * num_completion_tokens_P)
        ends_S = np.cumsum(self.num_pairs_S)
        return np.diff(np.cumsum([0, *num_bytes_P])[np.array([0, *ends_S])])

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest prompt with one completion; 0 without pairs."""
        longest_P = np.maximum(self.num_chosen_tokens_P, self.num_rejected_tokens_P)
        return int((self.num_prompt_tokens_P + longest_P).max(initial=0))

    @cached_property
    def num_common_tokens_P(self) -> IntArray:
        """Tokens that each prompt shares with the split's common prefix, such as a system message.

        A row that packs several pairs computes them once.
        """
        prefix: IntArray | None = None
        parts = []
        for number, shard in enumerate(self.shards):
            columns = {"encode": ["prompt_ids", "split"]}
            joined = _read_joined(self.inputs, shard, columns, is_checked=False)
            prompts = Lists(self.take(number, joined)["prompt_ids"])
            if prefix is None and len(prompts):
                num_prompts = min(len(prompts), NUM_PREFIX_PROMPTS)
                prefix = find_prefix([prompts[row] for row in range(num_prompts)])
            parts.append(prompts.count_common([] if prefix is None else prefix))
        return np.concatenate(parts)

    def num_tokens(self, pairs_B: PairNumbers, *, share_prompt: bool) -> IntArray:
        """Count each pair's tokens against a micro-batch's budget.

        A completion's last token is not read. Without a shared prompt, a pair is two rows, each as
        long as the longer one.
        """
        num_prompt_B = self.num_prompt_tokens_P[pairs_B]
        num_chosen_B = self.num_chosen_tokens_P[pairs_B] - 1
        num_rejected_B = self.num_rejected_tokens_P[pairs_B] - 1
        if share_prompt:
            return num_prompt_B + num_chosen_B + num_rejected_B
        return 2 * (num_prompt_B + np.maximum(num_chosen_B, num_rejected_B))

    def count_tokens(self, pairs_B: PairNumbers, *, share_prompt: bool) -> int:
        """Count the tokens read, without padding; prompts count as often as they are computed."""
        times_prompt = 1 if share_prompt else 2
        return int(
            times_prompt * self.num_prompt_tokens_P[pairs_B].sum()
            + self.num_chosen_tokens_P[pairs_B].sum()
            + self.num_rejected_tokens_P[pairs_B].sum()
            - 2 * len(pairs_B)
        )


def index_pairs(
    inputs: Mapping[str, StageOutput],
    *,
    needs_margin: bool = False,
    selection: Selection | None = None,
) -> dict[str, PairIndex]:
    """Read the lengths of all pairs, by split: train and eval.

    Args:
        inputs: output of encode, of score where a loss needs the reference, and of dedupe where
            the selection does.
        needs_margin: whether every pair must have a margin above 0.
        selection: chooses and weights the training pairs; None takes all as they are.
    Raises:
        DataError: encode and score hold different sequences, a margin is missing, or the selection
            cannot be computed.
    """
    shards = align_shards(inputs, list(inputs))
    lengths: dict[str, list[NDArray[np.int32]]] = {"train": [], "eval": []}
    selected_S: list[BoolArray] = []
    factors_S: list[FloatArray] = []
    columns = {name: selection.stored_columns(name) if selection else [] for name in inputs}
    columns["encode"] = list(dict.fromkeys([*_LENGTHS, "margin", "split", *columns["encode"]]))
    for shard in shards:
        # Checking would read every file whole; that happens anyway when the pairs are read.
        joined = _read_joined(inputs, shard, columns, is_checked=False)
        used = []
        for split, parts in lengths.items():
            rows = joined.filter(pc.equal(joined["split"], split))
            if selection and split == "train":
                selected_S.append(selection.choose(rows))
                rows = rows.filter(pa.array(selected_S[-1]))
                factors = selection.weigh(rows)
                factors_S += [] if factors is None else [factors]
            parts.append(np.stack([rows[name].to_numpy() for name in _LENGTHS]))
            used.append(rows)
        if needs_margin:
            _check_margins(shard, pa.concat_tables(used))
    indexes = {}
    for split, parts in lengths.items():
        num_prompt_P, num_chosen_P, num_rejected_P = np.concatenate(parts, axis=1)
        indexes[split] = PairIndex(
            inputs=inputs,
            split=split,
            shards=shards,
            num_pairs_S=np.array([part.shape[1] for part in parts], np.int32),
            num_prompt_tokens_P=num_prompt_P,
            num_chosen_tokens_P=num_chosen_P,
            num_rejected_tokens_P=num_rejected_P,
            selected_S=(selected_S or None) if split == "train" else None,
            factors_S=(factors_S or None) if split == "train" else None,
        )
    return indexes


def find_prefix(prompts: Sequence[IntArray]) -> IntArray:
    """Find the longest prefix that at least half of the prompts share."""
    prefix: list[int] = []
    agreeing = prompts
    while agreeing:
        depth = len(prefix)
        following = Counter(int(ids[depth]) for ids in agreeing if len(ids) > depth)
        [(token, count)] = following.most_common(1) or [(0, 0)]
        if not count or 2 * count < len(prompts):
            break
        prefix.append(token)
        agreeing = [ids for ids in agreeing if len(ids) > depth and ids[depth] == token]
    return np.array(prefix, np.int32)


@dataclass(kw_only=True)
class PairReader:
    """Reads the pairs of an epoch in order, keeping the current window's shards in memory."""

    index: PairIndex
    order: EpochOrder
    _held: dict[int, "_Shard"] = field(default_factory=dict)

    def read(self, pairs_B: PairNumbers) -> list[Pair]:
        """Read pairs by their numbers."""
        starts_S1 = np.cumsum([0, *self.index.num_pairs_S])
        shards_B = np.searchsorted(starts_S1, pairs_B, side="right") - 1
        rows_B = pairs_B - starts_S1[shards_B]
        return [
            self._shard(shard).pair(row)
            for shard, row in zip(shards_B.tolist(), rows_B.tolist(), strict=True)
        ]

    def forget_before(self, position: int) -> None:
        """Drop the shards that the epoch's order does not return to."""
        for shard in [s for s in self._held if self.order.window_end_S[s] <= position]:
            del self._held[shard]

    def _shard(self, number: int) -> "_Shard":
        if number not in self._held:
            self._held[number] = _Shard(self.index, number)
        return self._held[number]


class _Shard:
    """The pairs of a split in one shard, as flat arrays."""

    def __init__(self, index: PairIndex, number: int) -> None:
        shard = index.shards[number]
        columns = {"encode": [*_TOKENS, *_LENGTHS, *_FACTS], "score": _REF_LOGPS}
        rows = index.take(number, _read_joined(index.inputs, shard, columns))
        self._pair_ids: list[str] = rows["pair_id"].to_pylist()
        weights = rows["weight"].to_numpy()
        if index.factors_S is not None:
            weights = weights * index.factors_S[number]
        self._weights: list[float] = weights.tolist()
        self._margins: list[float | None] = rows["margin"].to_pylist()
        self._lists = {
            name: Lists(rows[name]) for name in (*_TOKENS, *_REF_LOGPS) if name in rows.column_names
        }
        self._check_lengths(shard, rows)

    def pair(self, row: int) -> Pair:
        prompt_ids, chosen_ids, rejected_ids = (self._lists[name][row] for name in _TOKENS[:3])
        masks = [self._lists[name][row] for name in _TOKENS[3:]]
        ref_chosen, ref_rejected = (
            self._lists[name][row] if name in self._lists else None for name in _REF_LOGPS
        )
        return Pair(
            pair_id=self._pair_ids[row],
            group=Group(prompt_ids=prompt_ids, completions=(chosen_ids, rejected_ids)),
            ref_chosen_token_logps_C=ref_chosen,
            ref_rejected_token_logps_R=ref_rejected,
            chosen_loss_mask_C=_all_ones(chosen_ids) if masks[0] is None else masks[0],
            rejected_loss_mask_R=_all_ones(rejected_ids) if masks[1] is None else masks[1],
            weight=self._weights[row],
            margin=self._margins[row],
        )

    def _check_lengths(self, shard: AlignedShards, rows: pa.Table) -> None:
        wanted = {name: f"num_{name.split('_')[0]}_tokens" for name in _TOKENS}
        wanted |= {
            name: f"num_{name.split('_')[1]}_tokens" for name in _REF_LOGPS if name in self._lists
        }
        for name, length_name in wanted.items():
            same = pc.equal(pc.list_value_length(rows[name]), rows[length_name])
            if not pc.all(same, min_count=0).as_py():  # A null mask has no length to compare.
                bad = rows.filter(pc.invert(same.fill_null(True)))["pair_id"][0].as_py()
                raise DataError(
                    f"{shard.description}: {name} of pair {bad} does not have {length_name} "
                    "values. Run `python run.py verify RECIPE`, and then the damaged stage again "
                    "with --again."
                )


class Lists:
    """A list column as one flat array; null lists are read as None."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        self._values: NDArray[Any] = lists.values.to_numpy(zero_copy_only=False)
        self._offsets: list[int] = lists.offsets.to_pylist()
        self._is_null: list[bool] = lists.is_null().to_pylist()

    def __len__(self) -> int:
        return len(self._is_null)

    def __getitem__(self, row: int) -> Any:
        if self._is_null[row]:
            return None
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def count_common(self, prefix: Sequence[int] | IntArray) -> IntArray:
        """Count how many leading values of each list match the prefix."""
        offsets = np.array(self._offsets)
        starts, lengths = offsets[:-1], np.diff(offsets)
        num_common = np.zeros(len(self), np.int32)
        agreeing = np.arange(len(self))
        for depth, value in enumerate(prefix):
            agreeing = agreeing[lengths[agreeing] > depth]
            agreeing = agreeing[self._values[starts[agreeing] + depth] == value]
            num_common[agreeing] = depth + 1
        return num_common


def _all_ones(ids: IntArray) -> BoolArray:
    return np.ones(len(ids), np.bool_)


def _read_joined(
    inputs: Mapping[str, StageOutput],
    shard: AlignedShards,
    columns: Mapping[str, Sequence[str]],
    *,
    is_checked: bool = True,
) -> pa.Table:
    """Join a shard's rows by pair_id, in the order of score or, without it, of encode.

    A pair that score rejected is missing from the result.

    Args:
        inputs: as for index_pairs.
        shard: of all of them.
        columns: to read, by stage; the ids of pairs and sequences are read, too. The names of
            several stages' columns differ.
    Raises:
        DataError: score holds a pair that encode does not, or other sequences for it.
    """

    def read(name: str, ids: Sequence[str]) -> pa.Table:
        wanted = list(dict.fromkeys([*ids, *columns.get(name, ())]))
        return inputs[name].read(shard.records[name], columns=wanted, is_checked=is_checked)

    joined = read("encode", ["pair_id", *_SEQUENCE_IDS])
    if "score" in inputs:
        joined = _join_scores(shard, joined, read("score", ["pair_id", *_SEQUENCE_IDS]))
    if columns.get("dedupe"):
        pairs = read("dedupe", ["pair_id"])
        places = pc.index_in(joined["pair_id"], value_set=pairs["pair_id"].combine_chunks())
        pairs = pairs.take(places)
        for name in columns["dedupe"]:
            joined = joined.append_column(name, pairs[name])
    return joined


def _join_scores(shard: AlignedShards, encoded: pa.Table, scored: pa.Table) -> pa.Table:
    places = pc.index_in(scored["pair_id"], value_set=encoded["pair_id"].combine_chunks())
    if places.null_count:
        bad = scored.filter(pc.is_null(places))["pair_id"][0].as_py()
        raise DataError(f"{shard.description}: score has pair {bad}, encode does not. {_ADVICE}")
    joined = encoded.take(places)
    for name in _SEQUENCE_IDS:
        differs = pc.not_equal(joined[name], scored[name])
        if pc.any(differs, min_count=0).as_py():
            bad = scored.filter(differs)["pair_id"][0].as_py()
            raise DataError(
                f"{shard.description}: {name} of pair {bad} differs between encode and score. "
                f"{_ADVICE}"
            )
    for name in scored.column_names:
        if name not in joined.column_names:
            joined = joined.append_column(name, scored[name])
    return joined


def _check_margins(shard: AlignedShards, rows: pa.Table) -> None:
    """Refuse pairs without a margin above 0."""
    is_missing = pc.invert(pc.greater(rows["margin"], 0).fill_null(False))
    num_missing = pc.sum(is_missing).as_py() or 0
    if num_missing:
        bad = rows.filter(is_missing)["pair_id"][0].as_py()
        raise DataError(
            f"{shard.description}: {num_missing} of {rows.num_rows} pairs, the first {bad}, have "
            "no margin above 0, which this loss needs. Give the data scores or a margin (a column "
            "map names them: stages.validate.inputs.map), or choose another loss."
        )


_ADVICE = "They do not match: run score again with `--again score`."
