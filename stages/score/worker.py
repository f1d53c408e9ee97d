"""Worker of the score stage: join in earlier values, score the rest, check the engine."""

import dataclasses
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from schemas.errors import DataError
from schemas.manifest import ShardRecord
from schemas.rows import REJECTED, SCORE
from stages.models.fetch import fetch_model
from stages.models.resolve import ModelPin
from stages.policy.groups import Group
from stages.score.checks import (
    FLOAT32_TOLERANCE_NATS,
    SharingCheck,
    WorkerCheck,
    choose_sample,
    choose_siblings,
    compare_sample,
    compare_sharing,
    write_check,
)
from stages.score.progress import PartDone, forget_part, report_part
from stages.score.reuse import EarlierScore, ScoreReader
from stages.score.rows import commit_scores
from stages.score.summary import count_found
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import (
    ENCODED_COLUMNS,
    Fault,
    SequenceGroup,
    SequenceLogps,
    list_groups,
    score_sequences,
)
from stages.scorers.protocol import FloatArray, Scorer, ScorerSettings, ScoreStatistics
from stages.stage import AlignedShards, ShardWorker
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file

NUM_PROMPTS_AT_ONCE = 256
"""Prompts in one call of a scorer: about a minute on a CPU, and enough to keep a GPU busy. The
worker reports its progress between two calls."""


def leave_out(groups: Iterable[SequenceGroup], found: Container[str]) -> Iterator[SequenceGroup]:
    """Drop the sequences whose values are known; groups without any other are left out."""
    for sequences in groups:
        left = sequences.without(found)
        if left is not None:
            yield left


def single(sequence_id: str, group: Group) -> SequenceGroup:
    return SequenceGroup(group=group, sequence_ids=(sequence_id,))


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Picklable settings of a worker; calling it in the worker's process makes the worker."""

    encoded: Folder
    out: StageDir
    model: ModelPin
    settings: ScorerSettings
    reference: str
    """Fingerprint of the reference."""
    earlier: Sequence[EarlierScore]
    """Earlier scores to look up values in before computing any."""

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardScorer(
            job=self, reader=ScoreReader(scores=self.earlier, reference=self.reference)
        )


@dataclass(kw_only=True)
class ShardScorer:
    """Scores shards with one engine. No value depends on earlier shards.

    The model is fetched when the first sequence is needed that no earlier score holds.
    """

    job: ScoreJob
    reader: ScoreReader
    _model_path: str | None = None
    _scorer: Scorer | None = None
    _is_checked: bool = False

    def __call__(self, task: AlignedShards) -> ShardRecord:
        try:
            return self._score_shard(task)
        except Exception:
            # The engine may have lost a process or still hold requests, so the next shard opens a
            # new one, which is checked like the first.
            self._close_scorer()
            self._is_checked = False
            raise
        finally:
            forget_part(self.job.out, task.index)

    def _score_shard(self, task: AlignedShards) -> ShardRecord:
        job = self.job
        encoded = read_file(
            job.encoded, task.records["encode"].files["data"], columns=ENCODED_COLUMNS
        )
        found = self.reader.find(encoded)
        all_groups = list_groups(encoded)
        groups = list(leave_out(all_groups, found.logps))
        # Sample from all groups: few may be left to score, and the check needs enough sequences.
        sample = choose_sample(all_groups) if groups and not self._is_checked else {}
        expected = self._recompute(sample)
        sharing = self._try_sharing(choose_siblings(all_groups)) if sample else None
        num_sequences = sum(len(sequences.sequence_ids) for sequences in all_groups)
        started = time.perf_counter()

        def report(num_scored: int, statistics: ScoreStatistics) -> None:
            pairs_per_sequence = encoded.num_rows / num_sequences
            part = PartDone(
                num_pairs=encoded.num_rows,
                num_pairs_done=round((len(found.logps) + num_scored) * pairs_per_sequence),
                num_pairs_scored=round(num_scored * pairs_per_sequence),
                seconds=time.perf_counter() - started,
                statistics=statistics,
            )
            report_part(job.out, task.index, part)

        with job.out.write_shard(task.index, {"data": SCORE, "rejected": REJECTED}) as shard:
            scored, statistics = self._score(groups, report)
            if expected:
                known = [single(name, sample[name]) for name in sample if name not in scored]
                of_sample = {**scored, **self._score(known, report)[0]}
                recomputed = compare_sample(expected, of_sample)
                self._check(task.index, WorkerCheck(recomputed=recomputed, sharing=sharing))
            return commit_scores(
                shard,
                encoded,
                {**found.logps, **scored},
                more={
                    "num_sequences_scored": len(scored),
                    **count_found(found),
                    **dataclasses.asdict(statistics),
                },
            )

    def _score(
        self,
        groups: Sequence[SequenceGroup],
        report: Callable[[int, ScoreStatistics], None],
    ) -> tuple[SequenceLogps, ScoreStatistics]:
        """Score groups, reporting progress between calls; without groups no engine is started."""
        if not groups:
            return {}, ScoreStatistics()
        scorer = self._open_scorer()
        before = scorer.statistics
        logps: dict[str, FloatArray | Fault] = {}
        for start in range(0, len(groups), NUM_PROMPTS_AT_ONCE):
            if start:
                report(len(logps), scorer.statistics.since(before))
            logps.update(score_sequences(scorer, groups[start : start + NUM_PROMPTS_AT_ONCE]))
        return logps, scorer.statistics.since(before)

    def _fetch_model(self) -> str:
        if self._model_path is None:
            self._model_path = fetch_model(self.job.model)
        return self._model_path

    def _open_scorer(self) -> Scorer:
        if self._scorer is None:
            self._scorer = open_scorer(self._fetch_model(), self.job.settings)
        return self._scorer

    def _close_scorer(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None

    def _recompute(self, sample: Mapping[str, Group]) -> dict[str, FloatArray]:
        """Score sequences in float32 with stages/policy; the engine is closed first to free
        memory."""
        if not sample:
            return {}
        self._close_scorer()
        plain = dataclasses.replace(self.job.settings, backend="transformers", dtype="float32")
        scorer = open_scorer(self._fetch_model(), plain)
        scored = scorer.score(list(sample.values()))
        scorer.close()
        return {name: values for name, (values,) in zip(sample, scored, strict=True)}

    def _try_sharing(self, groups: Sequence[Group]) -> SharingCheck:
        """Score prompts with and without sharing; stop sharing if the values differ."""
        scorer = self._open_scorer()
        shared = scorer.score(groups)
        scorer.shares_prompts = False
        whole = scorer.score(groups)
        found = compare_sharing(whole, shared, groups, self.job.settings.dtype)
        scorer.shares_prompts = found.is_trusted
        return found

    def _check(self, index: int, check: WorkerCheck) -> None:
        """Record the engine's differences from plain float32; in float32, refuse large ones.

        Raises:
            DataError: in float32, a token is off by more than rounding explains.
        """
        found = check.recomputed
        if self.job.settings.dtype == "float32" and not found.token_max <= FLOAT32_TOLERANCE_NATS:
            raise DataError(
                f"{self.job.settings.backend} is off by up to {found.token_max:.3g} nats a token "
                f"from a plain float32 computation of {found.num_sequences} sequences; rounding "
                f"explains less than {FLOAT32_TOLERANCE_NATS:g}. It computes this model "
                "differently from transformers: set stages.score.backend to transformers, or use "
                f"another version of {self.job.settings.backend}."
            )
        write_check(self.job.out.folder, index, check)
        self._is_checked = True
