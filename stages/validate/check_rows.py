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
from itertools import islice
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
from stages.validate.unpaired import (
    GatheredRow,
    UnpairedTask,
    join_answers,
    pair_again,
    pair_answers,
    read_prompts,
)

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
    row: RawRow,
    file: InputFile | None,
    warnings: Sequence[Finding],
    eval_fraction: float,
    split_seed: int,
) -> Row:
    """Return a valid pair as a row with the columns of schemas.rows.PAIR.

    Args:
        draft: the pair.
        row: the row that it came from.
        file: the row's file; None if the draft's source and weight include the file's.
    """
    pair_id, prompt_id = identify_pair(draft.prompt, draft.chosen, draft.rejected, draft.tools)
    name = row.file or (file.name if file else "")
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
        "weight": draft.weight * file.weight if file else draft.weight,
        "source": (file.source if file else None) or draft.source or stem_of(name),
        "source_file": name,
        "source_row": row.number,
        "source_id": draft.source_id,
        "split": choose_split(draft.prompt, eval_fraction=eval_fraction, seed=split_seed),
        "warnings": list(dict.fromkeys([w.code for w in warnings])) if warnings else [],
        "extra": draft.extra,
    }


def build_rejection(row: RawRow, findings: Sequence[Finding], file: InputFile | None) -> Row:
    """Return a rejected row with the columns of schemas.rows.REJECTED."""
    first = findings[0]
    raw, sha256 = row.excerpt()
    return {
        "code": first.code,
        "codes": list(dict.fromkeys(finding.code for finding in findings)),
        "field": None if first.field is None else make_printable(first.field),
        "detail": make_printable(first.detail),
        "source_file": row.file or (file.name if file else ""),
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

    def __call__(self) -> ShardWorker[ValidateTask | UnpairedTask]:
        rules = PairRules(self.levels, self.thresholds)

        def check_shard(task: ValidateTask | UnpairedTask) -> ShardRecord:
            with _fewer_collections():
                return self._check_shard(task, rules)

        return check_shard

    def _check_shard(self, task: ValidateTask | UnpairedTask, rules: PairRules) -> ShardRecord:
        checker = _ShardChecker(
            rules=rules, eval_fraction=self.eval_fraction, split_seed=self.split_seed
        )
        schemas = {"data": PAIR, "rejected": REJECTED, "overview": OVERVIEW}
        with self.out.write_shard(task.index, schemas) as shard:
            for pairs, rejections in _check(task, checker):
                shard.write_rows("data", pairs)
                shard.write_rows("rejected", rejections)
            shard.write_rows("overview", checker.overview.rows())
            return shard.commit(checker.counts())


def _check(
    task: ValidateTask | UnpairedTask, checker: "_ShardChecker"
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield the pairs and the rejected rows of a shard, in batches."""
    if isinstance(task, UnpairedTask):
        prompts = read_prompts(task)
        while batch_of_prompts := list(islice(prompts, _BATCH_ROWS)):
            found = [checker.check_prompt(rows) for rows in batch_of_prompts]
            yield [p for pairs, _ in found for p in pairs], [r for _, rs in found for r in rs]
        return
    task.split.file.check_size()
    for batch in _batches(read_rows(task.split)):
        pairs: list[Row] = []
        rejections: list[Row] = []
        for raw in batch:
            kept = checker.check_row(raw, task)
            if isinstance(kept, dict):
                rejections.append(kept)
            else:
                pairs += kept
        yield pairs, rejections


@dataclass
class _PromptPairs:
    """What became of the pairs of one prompt's unpaired rows."""

    passed: dict[str, tuple[Row, PairView, tuple[int, int]]] = field(default_factory=dict)
    """Pairs by pair_id, with the positions of their rows."""
    kept: set[int] = field(default_factory=set)
    """Positions of the rows in these pairs."""
    dropped: list[tuple[int, int]] = field(default_factory=list)
    faults: dict[int, list[Finding]] = field(default_factory=dict)
    """Findings of the first dropped pair of each row, by position."""
    num_repeated: int = 0


class _ShardChecker:
    """Turns the rows of one shard into pairs or rejected rows, and counts them."""

    def __init__(self, *, rules: PairRules, eval_fraction: float, split_seed: int) -> None:
        self.overview = ShardOverview()
        self._rules = rules
        self._eval_fraction = eval_fraction
        self._split_seed = split_seed
        self._reasons: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._more = {
            "num_eval": 0,
            "num_rows_kept": 0,
            "num_pairs_dropped": 0,
            "num_pairs_repeated": 0,
        }
        self._num_pairs = 0

    def check_row(self, raw: RawRow, task: ValidateTask) -> list[Row] | Row:
        """Return the pairs of a raw row, or its one rejected row."""
        file = task.split.file
        if isinstance(raw.content, Finding):
            return self._reject(raw, [raw.content], file)
        try:
            drafts = task.reader.read(raw.content)
        except RowFault as fault:
            return self._reject(raw, [fault.finding], file)
        passed: dict[str, tuple[Row, PairView]] = {}
        dropped: list[list[Finding]] = []
        for draft in drafts:
            view = PairView(draft)
            rejections, warnings = self._rules.check(view)
            if rejections:
                dropped.append(rejections)
                continue
            pair = self._build_pair(draft, raw, file, warnings)
            passed.setdefault(pair["pair_id"], (pair, view))
        if not passed:
            return self._reject(raw, dropped[0], file)
        self._more["num_rows_kept"] += 1
        self._more["num_pairs_dropped"] += len(dropped)
        self._more["num_pairs_repeated"] += len(drafts) - len(dropped) - len(passed)
        for pair, view in passed.values():
            if dropped:
                pair["warnings"].append("PAIR_DROPPED")
            self._count(pair, view)
        return [pair for pair, _ in passed.values()]

    def check_prompt(self, rows: Sequence[GatheredRow]) -> tuple[list[Row], list[Row]]:
        """Return the pairs of the unpaired rows of one prompt, and a rejected row for each other.

        A row is kept if one of its pairs is.
        """
        found = _PromptPairs()
        self._check_pairs(rows, pair_answers(rows), found)
        again = [places for places in pair_again(rows, found.kept) if places not in found.dropped]
        self._check_pairs(rows, again, found)
        for pair, view, places in found.passed.values():
            if found.faults.keys() & places:
                pair["warnings"].append("PAIR_DROPPED")
            self._count(pair, view)
        kept, num_pairs = found.kept, len(found.passed)
        self._more["num_rows_kept"] += len(kept)
        num_joined = max(len(kept) - num_pairs, 0)
        self._more["num_rows_joined"] = self._more.get("num_rows_joined", 0) + num_joined
        self._more["num_pairs_dropped"] += sum(1 for at in found.dropped if kept & {*at})
        self._more["num_pairs_repeated"] += found.num_repeated
        rejections = [
            self._reject(row.raw, _explain(row, found.faults.get(at)), None)
            for at, row in enumerate(rows)
            if at not in kept
        ]
        return [pair for pair, _, _ in found.passed.values()], rejections

    def _check_pairs(
        self,
        rows: Sequence[GatheredRow],
        joined: Sequence[tuple[int, int]],
        found: "_PromptPairs",
    ) -> None:
        """Check pairs of rows, given by their positions, and note what becomes of them."""
        for places in joined:
            chosen, rejected = (rows[at] for at in places)
            draft = join_answers(chosen, rejected)
            view = PairView(draft)
            findings, warnings = self._rules.check(view)
            if findings:
                found.dropped.append(places)
                found.faults = dict.fromkeys(places, findings) | found.faults
                continue
            found.kept.update(places)
            pair = self._build_pair(draft, chosen.raw, None, warnings)
            found.num_repeated += pair["pair_id"] in found.passed
            found.passed.setdefault(pair["pair_id"], (pair, view, places))

    def counts(self) -> Counts:
        return Counts(
            num_in=self._more["num_rows_kept"] + self._reasons.total(),
            num_out=self._num_pairs,
            reasons=dict(sorted(self._reasons.items())),
            warnings=dict(sorted(self._warnings.items())),
            more=self._more,
        )

    def _build_pair(
        self, draft: PairDraft, raw: RawRow, file: InputFile | None, warnings: Sequence[Finding]
    ) -> Row:
        return build_pair(
            draft,
            row=raw,
            file=file,
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

    def _reject(self, raw: RawRow, findings: Sequence[Finding], file: InputFile | None) -> Row:
        rejection = build_rejection(raw, findings, file)
        self._reasons[rejection["code"]] += 1
        return rejection


def _explain(row: GatheredRow, of_pair: list[Finding] | None) -> list[Finding]:
    """Return why no pair of an unpaired row is kept."""
    if isinstance(row.content, Finding):
        return [row.content]
    if of_pair is not None:
        return of_pair
    wanted = "bad" if row.content.is_good else "good"
    detail = f"no row of this prompt has a {wanted} answer"
    return [Finding("UNPAIRED_NO_OPPOSITE", None, detail)]


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
