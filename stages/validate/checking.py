"""What becomes of each row of a shard: pairs that are kept, or one row of rejected?"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.ids import pair_id, prompt_id
from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED
from stages.base import ShardWorker
from stages.shards import StageDir
from stages.validate.findings import Finding, RowFault, make_printable
from stages.validate.formats import Draft
from stages.validate.inputs import InputFile, stem_of
from stages.validate.messages import Message
from stages.validate.planning import ValidateTask
from stages.validate.reading import RawRow, read_rows
from stages.validate.rules import check_pair

_BATCH_ROWS = 1000
_BATCH_BYTES = 16 << 20


def build_pair(
    draft: Draft,
    *,
    file: InputFile,
    row: RawRow,
    warnings: Sequence[Finding],
    split: str,
) -> dict[str, Any]:
    """Give the row of a valid pair, with the columns of schemas.rows.PAIR."""
    return {
        "pair_id": pair_id(draft.prompt, draft.chosen, draft.rejected, draft.tools),
        "prompt_id": prompt_id(draft.prompt, draft.tools),
        "prompt": draft.prompt,
        "chosen": draft.chosen,
        "rejected": draft.rejected,
        "tools": draft.tools,
        "score_chosen": draft.score_chosen,
        "score_rejected": draft.score_rejected,
        "margin": draft.margin,
        "weight": draft.weight * file.weight,
        "source": file.source or draft.source or stem_of(row.file or file.name),
        "source_file": row.file or file.name,
        "source_row": row.number,
        "source_id": draft.source_id,
        "split": split,
        "warnings": list(dict.fromkeys(warning.code for warning in warnings)),
        "extra": draft.extra,
    }


def build_rejection(row: RawRow, findings: Sequence[Finding], file: InputFile) -> dict[str, Any]:
    """Give the row of a rejected one, with the columns of schemas.rows.REJECTED."""
    first = findings[0]
    raw, sha256 = row.excerpt()
    return {
        "code": first.code,
        "codes": list(dict.fromkeys(finding.code for finding in findings)),
        "field": None if first.field is None else make_printable(first.field),
        "detail": make_printable(first.detail),
        "source_file": row.file or file.name,
        "source_row": row.number,
        "pair_id": None,
        "kept_pair_id": None,
        "similarity": None,
        "raw": raw,
        "raw_sha256": sha256,
    }


def choose_split(prompt: Sequence[Message], *, eval_fraction: float, seed: int) -> str:
    """Decide by a prompt's text alone whether its pairs train or are held out.

    System messages, white space and Unicode composition make no difference, so that variants of one
    prompt do not straddle. A larger fraction holds out a superset of what a smaller one does.

    Returns:
        train or eval.
    """
    hasher = hashlib.sha256(str(seed).encode())
    for message in prompt:
        if message["role"] != "system":
            text = " ".join(unicodedata.normalize("NFC", message["content"] or "").split())
            hasher.update(f"\0{message['role']}\0{text}".encode())
    position = int.from_bytes(hasher.digest()[:8], "big") / 2**64
    return "eval" if position < eval_fraction else "train"


@dataclass(frozen=True, kw_only=True)
class CheckRows:
    """Makes the worker that validates one shard."""

    out: StageDir
    eval_fraction: float
    split_seed: int

    def __call__(self) -> ShardWorker[ValidateTask]:
        return self._check_shard

    def _check_shard(self, task: ValidateTask) -> ShardRecord:
        tally = _Tally()
        task.split.file.check_size()
        with self.out.write_shard(task.index, {"data": PAIR, "rejected": REJECTED}) as shard:
            for batch in _batches(read_rows(task.split)):
                rows: dict[str, list[dict[str, Any]]] = {"data": [], "rejected": []}
                for raw in batch:
                    role, row = self._judge(raw, task)
                    rows[role].append(row)
                tally.add(pairs=rows["data"], rejections=rows["rejected"])
                for role in rows:
                    shard.write_rows(role, rows[role])
            return shard.commit(tally.counts())

    def _judge(self, raw: RawRow, task: ValidateTask) -> tuple[str, dict[str, Any]]:
        """Turn a raw row into a row of data or of rejected, and say which."""
        file = task.split.file
        if isinstance(raw.content, Finding):
            return "rejected", build_rejection(raw, [raw.content], file)
        try:
            [draft] = task.reader.read(raw.content)
        except RowFault as fault:
            return "rejected", build_rejection(raw, [fault.finding], file)
        rejections, warnings = check_pair(draft)
        if rejections:
            return "rejected", build_rejection(raw, rejections, file)
        split = choose_split(draft.prompt, eval_fraction=self.eval_fraction, seed=self.split_seed)
        pair = build_pair(draft, file=file, row=raw, warnings=warnings, split=split)
        return "data", pair


class _Tally:
    """Counts what became of the rows of a shard."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.num_eval = 0
        self.reasons: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    def add(
        self, pairs: Sequence[Mapping[str, Any]], rejections: Sequence[Mapping[str, Any]]
    ) -> None:
        self.num_pairs += len(pairs)
        self.num_eval += sum(pair["split"] == "eval" for pair in pairs)
        self.warnings.update(code for pair in pairs for code in pair["warnings"])
        self.reasons.update(rejection["code"] for rejection in rejections)

    def counts(self) -> Counts:
        return Counts(
            num_in=self.num_pairs + self.reasons.total(),
            num_out=self.num_pairs,
            reasons=dict(sorted(self.reasons.items())),
            warnings=dict(sorted(self.warnings.items())),
            more={"num_eval": self.num_eval},
        )


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Gather rows up to a number and a size, so that memory stays bounded."""
    batch: list[RawRow] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += len(row.raw or b"")
        if len(batch) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
