"""Worker of validate: turn each row of a shard into kept pairs or one rejected row.

A row may give several pairs. Those that pass are kept. If none passes, the row is rejected with the
codes of its first pair. So every row counts once, as kept or as rejected.
"""

import gc
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from schemas.ids import identify_pair
from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED
from stages.stage import ShardWorker
from stages.store.shards import StageDir
from stages.validate.codes import CODES
from stages.validate.findings import Finding, Level, RowFault, make_printable
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.inputs import InputFile, stem_of
from stages.validate.messages import Message
from stages.validate.overview import OVERVIEW, ShardOverview
from stages.validate.reading import RawRow, read_rows
from stages.validate.rules import RULES
from stages.validate.rules.pair_view import PairView
from stages.validate.rules.rule import Screen, Thresholds
from stages.validate.shard_layout import ValidateTask

_BATCH_ROWS = 1000
_BATCH_BYTES = 16 << 20
_COLLECT_FROM_OBJECTS = 100_000
"""More objects than a batch creates; they are freed without the collector."""
_TO_SPACE = bytes(ord(" ") if code < 128 and chr(code).isspace() else code for code in range(256))
"""Table for bytes.translate: every ASCII white space becomes a space."""

Row = dict[str, Any]


def build_pair(
    draft: PairDraft,
    *,
    file: InputFile,
    row: RawRow,
    warnings: Sequence[Finding],
    eval_fraction: float,
    split_seed: int,
) -> Row:
    """Return a valid pair as a row with the columns of schemas.rows.PAIR."""
    pair_id, prompt_id = identify_pair(draft.prompt, draft.chosen, draft.rejected, draft.tools)
    return {
        "pair_id": pair_id,
        "prompt_id": prompt_id,
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
        "split": choose_split(draft.prompt, eval_fraction=eval_fraction, seed=split_seed),
        "warnings": list(dict.fromkeys([w.code for w in warnings])) if warnings else [],
        "extra": draft.extra,
    }


def build_rejection(row: RawRow, findings: Sequence[Finding], file: InputFile) -> Row:
    """Return a rejected row with the columns of schemas.rows.REJECTED."""
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
    """Assign a prompt to a split by its text alone.

    System messages, white space and Unicode composition make no difference, so variants of one
    prompt get the same split. A larger fraction holds out a superset of the prompts that a smaller
    one holds out.

    Returns:
        train or eval.
    """
    content = [str(seed).encode()]
    for message in prompt:
        if message["role"] != "system":
            said = _collapse(message["content"] or "")
            content.append(b"\0%b\0%b" % (message["role"].encode(), said))
    digest = hashlib.sha256(b"".join(content)).digest()
    return "eval" if int.from_bytes(digest[:8], "big") / 2**64 < eval_fraction else "train"


def _collapse(text: str) -> bytes:
    """Return a text as UTF-8, composed (NFC), with single spaces between words."""
    if text.isascii():
        content = text.encode().translate(_TO_SPACE)
    else:
        text = unicodedata.normalize("NFC", text)
        # The space is the only white space that isprintable() accepts.
        content = text.encode() if text.isprintable() else " ".join(text.split()).encode()
    if b"  " in content:
        content = b" ".join(content.split())
    return content.strip(b" ")


class PairRules:
    """The rules, with the levels and thresholds of a recipe.

    Args:
        levels: levels of codes that a recipe sets.
        thresholds: the numbers that some rules compare with.
    """

    def __init__(self, levels: Mapping[str, Level], thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._levels = {code: levels.get(code, CODES[code].level) for code in CODES}
        # A screen that consecutive rules share runs once for all of them.
        self._groups: list[tuple[Screen | None, list[str]]] = []
        for code, rule in RULES.items():
            if self._levels[code] == "off":
                continue
            if rule.screen is None or not self._groups or self._groups[-1][0] is not rule.screen:
                self._groups.append((rule.screen, []))
            self._groups[-1][1].append(code)

    def check(self, pair: PairView) -> tuple[list[Finding], list[Finding]]:
        """Apply all rules to a pair.

        Returns:
            The findings that reject the pair, and the warnings, the conversion's own first.
        """
        thresholds = self._thresholds
        found = list(pair.draft.warnings)
        for screen, codes in self._groups:
            if screen is None or screen(pair, thresholds):
                for code in codes:
                    for path, detail in RULES[code].check(pair, thresholds):
                        found.append(Finding(code, path, detail))
        if not found:
            return [], []
        return self._select(found, "reject"), self._select(found, "warn")

    def _select(self, found: list[Finding], level: Level) -> list[Finding]:
        return [finding for finding in found if self._levels[finding.code] == level]


@dataclass(frozen=True, kw_only=True)
class CheckRows:
    """Makes the worker that validates shards."""

    out: StageDir
    eval_fraction: float
    split_seed: int
    levels: dict[str, Level] = field(default_factory=dict)
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __call__(self) -> ShardWorker[ValidateTask]:
        rules = PairRules(self.levels, self.thresholds)

        def check_shard(task: ValidateTask) -> ShardRecord:
            with _fewer_collections():
                return self._check_shard(task, rules)

        return check_shard

    def _check_shard(self, task: ValidateTask, rules: PairRules) -> ShardRecord:
        checker = _ShardChecker(
            task=task, rules=rules, eval_fraction=self.eval_fraction, split_seed=self.split_seed
        )
        task.split.file.check_size()
        schemas = {"data": PAIR, "rejected": REJECTED, "overview": OVERVIEW}
        with self.out.write_shard(task.index, schemas) as shard:
            for batch in _batches(read_rows(task.split)):
                pairs: list[Row] = []
                rejections: list[Row] = []
                for raw in batch:
                    kept = checker.check_row(raw)
                    if isinstance(kept, dict):
                        rejections.append(kept)
                    else:
                        pairs += kept
                shard.write_rows("data", pairs)
                shard.write_rows("rejected", rejections)
            shard.write_rows("overview", checker.overview.rows())
            return shard.commit(checker.counts())


class _ShardChecker:
    """Turns the rows of one shard into pairs or rejected rows, and counts them."""

    def __init__(
        self, *, task: ValidateTask, rules: PairRules, eval_fraction: float, split_seed: int
    ) -> None:
        self.overview = ShardOverview()
        self._task = task
        self._rules = rules
        self._eval_fraction = eval_fraction
        self._split_seed = split_seed
        self._file = task.split.file
        self._reasons: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._more = {
            "num_eval": 0,
            "num_rows_kept": 0,
            "num_pairs_dropped": 0,
            "num_pairs_repeated": 0,
        }
        self._num_pairs = 0

    def check_row(self, raw: RawRow) -> list[Row] | Row:
        """Return the pairs of a raw row, or its one rejected row."""
        if isinstance(raw.content, Finding):
            return self._reject(raw, [raw.content])
        try:
            drafts = self._task.reader.read(raw.content)
        except RowFault as fault:
            return self._reject(raw, [fault.finding])
        passed: dict[str, tuple[Row, PairView]] = {}
        dropped: list[list[Finding]] = []
        for draft in drafts:
            view = PairView(draft)
            rejections, warnings = self._rules.check(view)
            if rejections:
                dropped.append(rejections)
                continue
            pair = self._build_pair(draft, raw, warnings)
            passed.setdefault(pair["pair_id"], (pair, view))
        if not passed:
            return self._reject(raw, dropped[0])
        self._more["num_rows_kept"] += 1
        self._more["num_pairs_dropped"] += len(dropped)
        self._more["num_pairs_repeated"] += len(drafts) - len(dropped) - len(passed)
        for pair, view in passed.values():
            if dropped:
                pair["warnings"].append("PAIR_DROPPED")
            self._count(pair, view)
        return [pair for pair, _ in passed.values()]

    def counts(self) -> Counts:
        return Counts(
            num_in=self._more["num_rows_kept"] + self._reasons.total(),
            num_out=self._num_pairs,
            reasons=dict(sorted(self._reasons.items())),
            warnings=dict(sorted(self._warnings.items())),
            more=self._more,
        )

    def _build_pair(self, draft: PairDraft, raw: RawRow, warnings: Sequence[Finding]) -> Row:
        return build_pair(
            draft,
            file=self._file,
            row=raw,
            warnings=warnings,
            eval_fraction=self._eval_fraction,
            split_seed=self._split_seed,
        )

    def _count(self, pair: Row, view: PairView) -> None:
        self._num_pairs += 1
        self._more["num_eval"] += pair["split"] == "eval"
        if pair["warnings"]:
            self._warnings.update(pair["warnings"])
        self.overview.add(view, pair["source"])

    def _reject(self, raw: RawRow, findings: Sequence[Finding]) -> Row:
        rejection = build_rejection(raw, findings, self._file)
        self._reasons[rejection["code"]] += 1
        return rejection


@contextmanager
def _fewer_collections() -> Iterator[None]:
    """Run the garbage collector once in several batches, and only over new objects.

    Every row creates dozens of objects, none of them in a cycle. Collections that walked through
    all imported modules took a fifth of the time.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_FROM_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Batch rows by number and bytes, to bound memory."""
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
